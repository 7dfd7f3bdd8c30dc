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
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from system.errors import InputError

RECORD = ".job"
#: What a record begins with.
_MAGIC = b'{"a job of main.py": '
_CHECKSUM = 8  # hexadecimal digits
_ENTRY = 2 * _CHECKSUM + 2  # with a mark and a line feed


_MARKS = {False: b" ", True: b"!"}


def _checksum(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=_CHECKSUM // 2).hexdigest().encode()


def _entry(line: bytes, answer: bytes, failed: bool) -> bytes:
    mark = _MARKS[failed]
    return _checksum(line) + _checksum(answer + mark) + mark + b"\n"


class Outlet:
    """Takes lines; each one is out, or it is not.

    It is opened before models are loaded, and begun with once it is known what the job
    is: until then nothing is changed that was there.

    Attributes:
        known: how many answers are there already.
        failed: how many of those lines have none.
        unrecorded: whether there is something which no record tells anything of,
        unknown: and how many lines it has; None where the last one has no end.
    """

    def __init__(self, path: str, resume: bool):
        """
        Args:
            path: a file's, or "-" for standard output.
            resume: go on with what is there.

        Raises:
            InputError: it cannot be written, or somebody else writes it.
        """
        self.known = self.failed = 0
        self.unrecorded = False
        self.unknown: int | None = 0
        self._path = path
        # One file has one record, by whatever name it goes.
        self._record_path = Path(f"{os.path.realpath(path)}{RECORD}")
        self._resume = resume
        self._file: int | None = None
        self._record: int | None = None
        self._made: list[Path] = []  # files that were not there before
        self._entries = b""
        self._places: dict[int, int] = {}  # where the next bytes go, by file
        if path == "-":
            return
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def require_apart(self, file: int) -> None:
        """See to it that an open input is neither the output nor its record.

        Raises:
            InputError: it is.
        """
        ours = [self._file, self._record]
        if self._path == "-":
            with suppress(OSError, ValueError, AttributeError):
                ours = [sys.stdout.fileno()]
        theirs = os.fstat(file)
        if not stat.S_ISREG(theirs.st_mode):
            return
        for each in ours:
            if each is not None and os.path.samestat(os.fstat(each), theirs):
                name = "standard output" if self._path == "-" else self._path
                raise InputError(
                    f"{name} is the input, or its record would be: answers need a file "
                    f"of their own"
                )

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
                f"{self._record_path} is no record of a job, which it would have to "
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
            self.unrecorded = True
            self.unknown = sum(1 for _ in _lines(self._file))
            if os.pread(self._file, 1, size - 1) != b"\n":
                self.unknown = None
            return
        if begun != self._header:
            difference = _difference(begun, json.loads(text))  # no tuples
            raise InputError(f"{self._path} {difference}")
        self._find_end(entries[: len(entries) // _ENTRY * _ENTRY])

    def begin(self) -> None:
        """Go on behind what is there, or at the beginning."""
        self._made = []
        if self._record is None:
            return
        os.ftruncate(self._file, self._places[self._file])
        if self.known:
            size = len(self._header) + len(self._entries)
            os.ftruncate(self._record, size)
            self._places[self._record] = size
        else:
            os.ftruncate(self._record, 0)
            self._write(self._record, self._header)

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
            self._record_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave it to others; as it was, if nothing was begun."""
        for path in self._made:
            path.unlink(missing_ok=True)
        self._made = []
        for file in (self._file, self._record):
            if file is not None:
                os.close(file)
        self._file = self._record = None

    def _open(self) -> None:
        path = self._path
        try:
            if Path(path).exists() and not Path(path).is_file():
                if self._resume:
                    raise InputError(f"--resume needs a file: {path} is none")
                self._file = os.open(path, os.O_WRONLY)
                return
            made: list[Path] = []
            self._file = _open(Path(path), made)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"{path} is being written by another job") from None
            self._made = made  # nobody else's, now that it is locked
            path = self._record_path
            self._record = _open(path, self._made)
            if not stat.S_ISREG(os.fstat(self._record).st_mode):
                raise InputError(f"{path} is no file, but the job's record has to be")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None
        self._places = {self._file: 0, self._record: 0}

    def _find_end(self, entries: bytes) -> None:
        """What of the output the record knows."""
        marks = []
        for line in islice(_lines(self._file), len(entries) // _ENTRY):
            start = len(marks) * _ENTRY
            entry = entries[start : start + _ENTRY]
            mark = entry[2 * _CHECKSUM : -1]
            if entry[_CHECKSUM : 2 * _CHECKSUM] != _checksum(line + mark):
                raise InputError(
                    f"{self._path} was changed since: line {len(marks) + 1} is not "
                    f"what was written; name another output"
                )
            marks.append(mark)
            self._places[self._file] += len(line)
        self.known, self.failed = len(marks), marks.count(b"!")
        self._entries = entries[: self.known * _ENTRY]
        more = sum(1 for _ in islice(_lines(self._file), self.known, None))
        if more:
            raise InputError(
                f"{self._path} has {more:,} lines more than were written: name another "
                f"output"
            )

    def _write(self, file: int, data: bytes) -> None:
        place = self._places.get(file)
        if place is None:  # a pipe: what was begun is not finished for who stops it
            self._put(file, data, None)
            return
        try:
            self._put(file, data, place)
        except KeyboardInterrupt:
            self._put(file, data, place)
            raise
        finally:
            self._places[file] = place + len(data)

    def _put(self, file: int, data: bytes, place: int | None) -> None:
        """Write all of it, at a place where there are places."""
        done = 0
        while done < len(data):
            rest = data[done:]
            try:
                if place is None:
                    done += os.write(file, rest)
                else:
                    done += os.pwrite(file, rest, place + done)
            except BrokenPipeError:
                raise
            except OSError as error:
                hint = "" if self._record is None else ": --resume goes on with it"
                raise InputError(
                    f"cannot write {self._path}: {error.strerror}{hint}"
                ) from None


def _open(path: Path, made: list[Path]) -> int:
    """A file to read and write, which is added to ``made`` if it was not there."""
    flags = os.O_RDWR | os.O_NONBLOCK  # a pipe would wait for somebody
    try:
        file = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return os.open(path, flags)
    made.append(path)
    return file


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
