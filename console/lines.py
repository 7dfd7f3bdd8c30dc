"""The lines of a file or a pipe, as they come in, and what is asked in them."""

import json
import math
import os
import select
import stat
from typing import Any, NamedTuple

from console.prompts import MARK, MOST_CHARACTERS, check_start, too_long
from system.errors import InputError

#: Bytes of a line: no character has more than four.
_MOST = 4 * MOST_CHARACTERS
_CHUNK = 1 << 16

#: The names of files whose lines are JSON, whatever the first one looks like.
JSON_NAMES = (".jsonl", ".ndjson")


class Line(NamedTuple):
    """What a line of the input asks.

    Attributes:
        number: of the line, from 1 on.
        prompt: a text, or a conversation; what there is of it, where it is faulty.
        fields: a JSON line's, with the prompt; None of plain text.
        fault: why it cannot be answered; None where nothing is known of that.
    """

    number: int
    prompt: Any
    fields: dict[str, Any] | None
    fault: str | None

    @property
    def blank(self) -> bool:
        """Whether nothing is asked."""
        return self.fields is None and not self.fault and not self.prompt.strip()


class LineReader:
    """Bytes up to each line feed, without waiting for what has not come yet.

    Attributes:
        size: bytes of the whole; None of a pipe.
        consumed: bytes of the lines that were taken.
        file: its descriptor.
    """

    def __init__(self, path: str):
        """``path``: a file's, or "-" for standard input.

        Raises:
            InputError: it cannot be read.
        """
        try:
            self.file = 0 if path == "-" else os.open(path, os.O_RDONLY)
            status = os.fstat(self.file)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"cannot read {path}: it is a folder")
        self._path = path
        self._regular = stat.S_ISREG(status.st_mode)
        self.size = status.st_size if self._regular else None
        self.consumed = 0
        self._buffer = bytearray()
        self._searched = 0  # bytes of it that have no line feed
        self._dropped = 0  # bytes of a line that is too long
        self._ended = False

    def take(self, wait: bool) -> tuple[bytes, bool] | None:
        """The next line without its end, and whether it was too long: then it is the
        beginning. None where it is not there yet, and nobody is to wait for it.

        Raises:
            StopIteration: there are no more.
            InputError: it cannot be read.
        """
        while True:
            end = self._buffer.find(b"\n", self._searched)
            if end >= 0 or (self._ended and (self._buffer or self._dropped)):
                return self._cut(end)
            if self._ended:
                raise StopIteration
            self._searched = len(self._buffer)
            if self._searched > _MOST:
                self._drop(self._searched)
            if not (wait or self._regular or self._ready()):
                return None
            try:
                chunk = os.read(self.file, _CHUNK)
            except BlockingIOError:  # as another program left it
                if not wait:
                    return None
                select.select([self.file], [], [])
                continue
            except OSError as error:
                raise InputError(
                    f"cannot read {self._path}: {error.strerror}"
                ) from None
            self._buffer += chunk
            self._ended = not chunk

    def _ready(self) -> bool:
        return bool(select.select([self.file], [], [], 0)[0])

    def _cut(self, end: int) -> tuple[bytes, bool]:
        stop = len(self._buffer) if end < 0 else end
        line, long = bytes(self._buffer[:stop]), bool(self._dropped) or stop > _MOST
        if self._dropped:
            line = self._beginning
        self.consumed += self._dropped + stop + (end >= 0)
        del self._buffer[: stop + 1]
        self._searched = self._dropped = 0
        return line[:80] if long else line, long

    def _drop(self, count: int) -> None:
        """Forget what came of a line that is too long, but for its beginning."""
        if not self._dropped:
            self._beginning = bytes(self._buffer[:80])
        self._dropped += count
        self._buffer.clear()
        self._searched = 0


class Asked:
    """What the lines ask, plain text or JSON: the first one that is not blank decides.

    Attributes:
        json: whether lines are JSON; None as long as nobody knows.
    """

    def __init__(self, path: str):
        self._name = "standard input" if path == "-" else path
        self.json = True if path.lower().endswith(JSON_NAMES) else None
        self._number = 0

    def of(self, line: bytes, long: bool) -> Line:
        """What the next line asks.

        Raises:
            InputError: it is the first one, and UTF-16.
        """
        self._number += 1
        text = line.removesuffix(b"\r").decode("utf-8", "surrogateescape")
        if self._number == 1:
            check_start(text, self._name)
            text = text.removeprefix(MARK)
        if self.json is None and text.strip():
            self.json = self._is_json(text)
        if long or len(text) > MOST_CHARACTERS:
            return Line(self._number, text, {} if self.json else None, too_long())
        if not self.json:
            return Line(self._number, text, None, None)
        fields, fault = _read_object(text)
        if not fault and "prompt" not in fields:
            fault = 'the object has no "prompt"'
        return Line(self._number, fields.get("prompt"), fields, fault)

    @staticmethod
    def _is_json(text: str) -> bool:
        fields, _ = _read_object(text)
        return "prompt" in fields


def _read_object(text: str) -> tuple[dict[str, Any], str | None]:
    """A JSON object's fields, or none and what is wrong with it."""
    if not text.strip():
        return {}, "the line is empty"
    if any("\udc80" <= character <= "\udcff" for character in text):
        return {}, "the line is not valid UTF-8 text"
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_no_number)
    except RecursionError:
        return {}, "the line is no JSON that anybody writes: it is nested too deep"
    except ValueError as error:
        if "set_int_max_str_digits" in str(error):
            error = ValueError("a number has thousands of digits")
        return {}, f"the line is no JSON: {error}"
    if not isinstance(value, dict):
        return {}, "the line is no JSON object"
    return value, None


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is out of range")
    return value


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number that JSON has")
