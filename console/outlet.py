"""Where a file's answers go: whole lines, in order, and a record of them to go on from.

Beside the output lies ``OUTPUT.job`` while the job is under way: a line with what the
job is, then for each line of the output the checksums of the line that it answers and
of itself, and whether there is an answer. They are written first, so there is never a
line of the output without them.
"""

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from system.errors import InputError

RECORD = ".job"
#: What a record begins with.
_MAGIC = b'{"a job of main.py": '
_CHECKSUM = 8  # hexadecimal digits
_ENTRY = 2 * _CHECKSUM + 2  # with a mark and a line feed


def _checksum(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=_CHECKSUM // 2).hexdigest().encode()


def _entry(line: bytes, answer: bytes, failed: bool) -> bytes:
    mark = b"!" if failed else b" "
    return _checksum(line) + _checksum(answer) + mark + b"\n"


def require_apart(path: str, input_path: str) -> None:
    """See to it that the input is neither the output nor its record.

    Raises:
        InputError: it is.
    """
    if "-" in (path, input_path):
        return
    for each in (Path(path), Path(f"{path}{RECORD}")):
        if each.exists() and each.samefile(input_path):
            raise InputError(f"{each} is the input: answers need a file of their own")


class Outlet:
    """Takes lines; each one is out, or it is not.

    It is opened before models are loaded, and begun with once it is known what the job
    is: until then nothing of it is changed.

    Attributes:
        known: how many answers are there already.
        failed: how many of those lines have none.
        unknown: how many lines there are which no record tells anything of.
    """

    def __init__(self, path: str, resume: bool):
        """
        Args:
            path: a file's, or "-" for standard output.
            resume: go on with what is there.

        Raises:
            InputError: it cannot be written, or somebody else writes it.
        """
        self.known = self.failed = self.unknown = 0
        self._path = path
        self._resume = resume
        self._file = self._record = None
        self._entries = b""
        self._end = 0  # of the lines that are known
        self._pending: tuple[int, bytes] | None = None
        if path == "-":
            return
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def read(self, job: dict[str, Any]) -> None:
        """Find out what is there already.

        Args:
            job: what the answers depend on, by the names of flags; JSON.

        Raises:
            InputError: what is there is not of this job.
        """
        text = json.dumps(job, sort_keys=True)
        self._header = _MAGIC + text.encode() + b"}\n"
        if self._record is None:
            return
        size = os.fstat(self._file).st_size
        with os.fdopen(os.dup(self._record), "rb") as file:
            begun, entries = file.readline(), file.read()
        if begun and not begun.startswith(_MAGIC[: len(begun)]):
            raise InputError(
                f"{self._path}{RECORD} is no record of a job, which it would have to "
                f"be: name another output"
            )
        whole = begun.endswith(b"\n")
        if not size:
            return
        if not self._resume:
            if whole:
                raise InputError(
                    f"{self._path} is of a job that was interrupted: go on with it "
                    f"(--resume), or remove it"
                )
            return
        if not whole:
            self.unknown = sum(1 for _ in _lines(self._file))
            return
        if begun != self._header:
            difference = _difference(begun, json.loads(text))  # no tuples
            raise InputError(f"{self._path} {difference}")
        self._find_end(entries[: len(entries) // _ENTRY * _ENTRY])

    def begin(self) -> None:
        """Go on behind what is there, or at the beginning."""
        if self._record is None:
            return
        os.ftruncate(self._file, self._end)
        os.lseek(self._file, 0, os.SEEK_END)
        os.ftruncate(self._record, 0)
        os.lseek(self._record, 0, os.SEEK_SET)
        self._write(self._record, self._header + self._entries)

    def require_same(self, place: int, line: bytes) -> None:
        """See to it that a line, from 0 on, is the one whose answer is there already.

        Raises:
            InputError: it is another.
        """
        start = place * _ENTRY
        if self._entries[start : start + _CHECKSUM] != _checksum(line):
            raise InputError(
                f"{self._path} was begun with another input: line {place + 1} differs"
            )

    def write(self, answer: str, line: bytes, failed: bool) -> None:
        """An answer, without a line feed, and the line that it answers.

        After Ctrl-C what was begun is finished.

        Args:
            failed: it says only that there is none.

        Raises:
            InputError: the disk takes no more; what is there can be gone on with.
            BrokenPipeError: nobody reads any more.
        """
        if self._file is None:
            print(answer, flush=True)
            return
        data = answer.encode("utf-8") + b"\n"
        if self._record is not None:
            self._write(self._record, _entry(line, data, failed))
        self._write(self._file, data)

    def done(self) -> None:
        """All is out: there is nothing to go on with."""
        if self._record is not None:
            Path(f"{self._path}{RECORD}").unlink(missing_ok=True)

    def close(self) -> None:
        """Leave it to others."""
        if self._record is not None and not os.fstat(self._record).st_size:
            Path(f"{self._path}{RECORD}").unlink(missing_ok=True)  # nothing was begun
        for file in (self._file, self._record):
            if file is not None:
                os.close(file)
        self._file = self._record = None

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT
        path = self._path
        try:
            self._file = os.open(path, flags, 0o666)
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                if self._resume:
                    raise InputError(f"--resume needs a file: {path} is none")
                return
            made = not os.fstat(self._file).st_size
            path = f"{path}{RECORD}"
            try:
                self._record = os.open(path, flags, 0o666)
            except OSError:
                if made:
                    Path(self._path).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{self._path} is being written by another job") from None

    def _find_end(self, entries: bytes) -> None:
        """What of the output the record knows."""
        marks = []
        for line in islice(_lines(self._file), len(entries) // _ENTRY):
            start = len(marks) * _ENTRY
            entry = entries[start : start + _ENTRY]
            if entry[_CHECKSUM : 2 * _CHECKSUM] != _checksum(line):
                raise InputError(
                    f"{self._path} was changed since: line {len(marks) + 1} is not "
                    f"what was written; name another output"
                )
            marks.append(entry[2 * _CHECKSUM : -1])
            self._end += len(line)
        self.known, self.failed = len(marks), marks.count(b"!")
        self._entries = entries[: self.known * _ENTRY]
        more = sum(1 for _ in islice(_lines(self._file), self.known, None))
        if more:
            raise InputError(
                f"{self._path} has {more:,} lines more than were written: name another "
                f"output"
            )

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


def _lines(file: int) -> Iterator[bytes]:
    """The lines of a file that have an end."""
    with os.fdopen(os.dup(file), "rb") as opened:
        opened.seek(0)
        for line in opened:
            if line.endswith(b"\n"):
                yield line


def _difference(begun: bytes, job: dict[str, Any]) -> str:
    """How the job that was begun differs from this one."""
    try:
        before = json.loads(begun[len(_MAGIC) : -2])
    except ValueError:
        before = None
    if not isinstance(before, dict):
        return "has a record beside it that is damaged: name another output"
    for name in sorted({*before, *job}):
        if before.get(name) != job.get(name):
            was = before.get(name)
            was = "none" if was is None else json.dumps(was, ensure_ascii=False)
            return (
                f"was begun with another {name} ({was}): go on with that, or name "
                f"another output"
            )
    return "was begun by another version of this program: name another output"
