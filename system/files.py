"""Files as strangers make them: what is opened, and how far it is believed.

A checkpoint comes from somebody else. Everything of it that is read passes here first:
a file has to be one (a pipe would wait forever, a device need not end), JSON has to be
of a sane size and depth, and its fields of the types and ranges that a schema states.
"""

import json
import mmap
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from system.errors import InputError

#: Bytes of a JSON file: parsed, it takes thirty times that. The largest known configs
#: have one megabyte, and the index of a model of 671 billion parameters nine.
JSON_BYTES = 1 << 22
INDEX_BYTES = 1 << 24
#: Objects and lists inside each other.
JSON_DEPTH = 64

#: What a repository that was cloned without git-lfs has instead of large files.
_POINTER = b"version https://git-lfs"

T = TypeVar("T")


def is_file(path: Path) -> bool:
    """Whether there is something to read at ``path``: a file, or a link to one.

    Raises:
        InputError: something that only looks like it: a pipe, a socket or a device.
    """
    try:
        kind = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if stat.S_ISREG(kind) or stat.S_ISDIR(kind):
        return stat.S_ISREG(kind)
    raise InputError(f"{path} is a pipe or a device, and no file")


def require_files(folder: Path) -> None:
    """See to it that whoever opens anything in ``folder`` by name opens a file.

    Raises:
        InputError: a pipe, a socket or a device is in it, or it cannot be listed.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}") from None
    for entry in entries:
        is_file(entry)


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading, unbuffered.

    Raises:
        FileNotFoundError: there is none.
        InputError: it is no file.
    """
    if not is_file(path):
        raise FileNotFoundError(f"{path} is missing")
    file = path.open("rb", buffering=0)
    if os.pread(file.fileno(), len(_POINTER), 0) == _POINTER:
        file.close()
        raise InputError(
            f"{path} is not the file, but git-lfs's pointer to it: fetch it (git lfs "
            f"pull)"
        )
    return file


def map_file(path: Path) -> mmap.mmap:
    """Map a file into memory, read-only.

    Raises:
        FileNotFoundError, InputError: as for :func:`open_file`.
        ValueError: it is empty.
    """
    with open_file(path) as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read_json(
    path: Path, *, optional: bool = False, limit: int | None = None
) -> dict[str, Any]:
    """A JSON object from a file; empty where an optional file is missing.

    Args:
        limit: the most bytes it may have; None for :data:`JSON_BYTES`.

    Raises:
        InputError: it is missing, no JSON, no object, or beyond the limits above.
    """
    limit = JSON_BYTES if limit is None else limit
    try:
        with open_file(path) as file:
            text = file.read(limit + 1)
        if len(text) > limit:
            raise InputError(f"{path} has over {limit / 1e6:.0f} MB: none does")
        value = json.loads(text.decode("utf-8"))
    except FileNotFoundError:
        if optional:
            return {}
        raise InputError(f"{path.parent} has no {path.name}") from None
    except RecursionError:
        value = _TOO_DEEP
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if _is_deep(value):
        raise InputError(f"{path} is nested over {JSON_DEPTH} levels deep")
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return value


#: Stands for what the parser gave up on.
_TOO_DEEP: Any = object()


def _is_deep(value: Any) -> bool:
    """Whether ``value`` is nested beyond the limit; without recursion."""
    level, depth = [value], 0
    while level and depth <= JSON_DEPTH:
        inside: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inside += each.values()
            elif isinstance(each, list):
                inside += each
        level, depth = inside, depth + 1
    return bool(level) or value is _TOO_DEEP


def typed(values: Mapping[str, Any], schema: type[T], what: str) -> T:
    """The fields that ``schema`` (a msgspec.Struct) names, of the types it says.

    Numbers are no strings, true is no number, infinity is out of any range; fields that
    the schema does not name are passed over.

    Args:
        what: the file or part that is read, for the message.

    Raises:
        InputError: a field is missing, or of another type or range; it is named.
    """
    try:
        return msgspec.convert(values, schema)
    except msgspec.ValidationError as error:
        reason, _, where = str(error).partition(" - at `")
        missing = "Object missing required field "
        if reason.startswith(missing):
            raise InputError(
                f"{what} has no {reason.removeprefix(missing).strip('`')}"
            ) from None
        field = where.rstrip("`").removeprefix("$").removeprefix(".")
        raise InputError(
            f"{what} has an odd value in {field or 'its root'}: "
            f"{reason[:1].lower()}{reason[1:]}"
        ) from None
    except UnicodeError as error:  # half of a surrogate pair, that JSON can write
        raise InputError(f"{what} has text that is no Unicode: {error}") from None
