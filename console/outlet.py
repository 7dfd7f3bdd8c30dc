"""Where a file's answers go: whole lines, in order, and a record of them to go on from.

Beside the output lies ``OUTPUT.job`` while the job is under way: a line with what the
job is, then for each line of the output the checksum of the line that it answers. The
checksum is written first, so there is never an answer without one.
"""

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from system.errors import InputError

RECORD = ".job"
_CHECKSUM = 8  # hexadecimal digits, and a line feed


def checksum(line: bytes) -> bytes:
    """Of a line of the input, with a line feed."""
    digest = hashlib.blake2b(line, digest_size=_CHECKSUM // 2)
    return digest.hexdigest().encode() + b"\n"


def require_writable(path: str, input_path: str) -> None:
    """See to it, before anything takes time, that there may be an output.

    Raises:
        InputError: it cannot be written, or is the input.
    """
    if path == "-":
        return
    place = Path(path)
    if place.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    if not place.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {place.parent}")
    if not os.access(place if place.exists() else place.parent, os.W_OK):
        raise InputError(f"cannot write {path}: there is no permission to")
    if input_path != "-" and place.exists() and place.samefile(input_path):
        raise InputError(f"{path} is the input: its answers need a file of their own")


class Outlet:
    """Takes lines; each one is out, or it is not.

    Attributes:
        known: how many answers are there already.
    """

    def __init__(self, path: str, job: dict[str, Any], resume: bool):
        """
        Args:
            path: a file's, or "-" for standard output.
            job: what the answers depend on, by the names of flags; JSON.
            resume: go on with what is there.

        Raises:
            InputError: it cannot be written, or is not of this job.
        """
        self.known = 0
        self._sums = b""
        self._path = path
        self._file = self._record = None
        self._pending: tuple[int, bytes] | None = None
        if path == "-":
            return
        try:
            self._open(Path(path), job, resume)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, job: dict[str, Any], resume: bool) -> None:
        try:
            # Not truncated before it is known to be a file, and nobody else's.
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                if resume:
                    raise InputError(f"--resume needs a file: {path} is none")
                return
            self._open_record(Path(f"{path}{RECORD}"), job, resume)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None

    def write(self, answer: str, line: bytes) -> None:
        """An answer, without a line feed, and the line that it answers.

        After Ctrl-C what was begun is finished.

        Raises:
            InputError: the disk takes no more; what is there can be gone on with.
            BrokenPipeError: nobody reads any more.
        """
        if self._record is not None:
            self._write(self._record, checksum(line))
        if self._file is None:
            print(answer, flush=True)
        else:
            self._write(self._file, answer.encode("utf-8") + b"\n")

    def require_same(self, place: int, line: bytes) -> None:
        """See to it that a line, from 0 on, is the one whose answer is there already.

        Raises:
            InputError: it is another.
        """
        start = place * (_CHECKSUM + 1)
        if self._sums[start : start + _CHECKSUM + 1] != checksum(line):
            raise InputError(
                f"{self._path} was begun with another input: line {place + 1} differs"
            )

    def done(self) -> None:
        """All is out: there is nothing to go on with."""
        if self._record is not None:
            Path(self._path + RECORD).unlink(missing_ok=True)

    def close(self) -> None:
        """Leave it to others."""
        for file in (self._file, self._record):
            if file is not None:
                os.close(file)
        self._file = self._record = None

    def _write(self, file: int, data: bytes) -> None:
        self._pending = file, data
        try:
            self._write_pending()
        except KeyboardInterrupt:
            self._write_pending()
            raise

    def _write_pending(self) -> None:
        file, data = self._pending
        while data:
            try:
                count = os.write(file, data)
            except BrokenPipeError:
                raise
            except OSError as error:
                hint = "" if self._record is None else ": --resume goes on with it"
                raise InputError(
                    f"cannot write {self._path}: {error.strerror}{hint}"
                ) from None
            data = data[count:]
            self._pending = file, data

    def _open_record(self, record: Path, job: dict[str, Any], resume: bool) -> None:
        size = os.fstat(self._file).st_size
        header = json.dumps(job, sort_keys=True).encode() + b"\n"
        unfinished = record.exists()
        if resume and not unfinished and size:
            raise InputError(
                f"{self._path} is not of a job that was interrupted: there is no "
                f"{record.name} beside it; remove it, or name another"
            )
        if unfinished and size and not resume:
            raise InputError(
                f"{self._path} is of a job that was interrupted: go on with it "
                f"(--resume), or remove it"
            )
        self._record = os.open(record, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{self._path} is being written by another job") from None
        if resume and unfinished and self._go_on(header, job):
            return
        os.ftruncate(self._file, 0)
        os.ftruncate(self._record, 0)
        self._write(self._record, header)

    def _go_on(self, header: bytes, job: dict[str, Any]) -> bool:
        """Find the last line that is whole, and go on behind it; whether there is
        anything to go on with."""
        with os.fdopen(os.dup(self._record), "rb") as file:
            begun = file.readline()
            if not begun.endswith(b"\n"):
                return False  # it was interrupted before anything was out
            if begun != header:
                raise InputError(f"{self._path} {_difference(begun, job)}")
            sums = file.read()
        whole = len(sums) // (_CHECKSUM + 1)
        lines, size = 0, 0
        for end in _line_ends(self._file):
            if lines == whole:
                break
            lines, size = lines + 1, end
        known = sums[: lines * (_CHECKSUM + 1)]
        os.ftruncate(self._file, size)
        os.ftruncate(self._record, len(header) + len(known))
        for each in (self._file, self._record):
            os.lseek(each, 0, os.SEEK_END)
        self.known, self._sums = lines, known
        return True


def _line_ends(file: int) -> Iterator[int]:
    """Where each line of a file ends."""
    os.lseek(file, 0, os.SEEK_SET)
    place = 0
    while chunk := os.read(file, 1 << 20):
        at = chunk.find(b"\n")
        while at >= 0:
            yield place + at + 1
            at = chunk.find(b"\n", at + 1)
        place += len(chunk)


def _difference(begun: bytes, job: dict[str, Any]) -> str:
    """How the job that was begun differs from this one."""
    try:
        before = json.loads(begun)
    except ValueError:
        before = None
    if not isinstance(before, dict):
        return "has a record beside it that is none: remove both, or name another"
    for name in sorted({*before, *job}):
        if before.get(name) != job.get(name):
            was = json.dumps(before.get(name), ensure_ascii=False)
            return (
                f"was begun with another {name} ({was}): go on with that, or name "
                f"another output"
            )
    return "was begun by another version of this program: name another output"
