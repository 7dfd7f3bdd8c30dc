"""The folder that convert.py fills: replaced whole, and only where it wrote it itself.

A conversion is made beside its goal and takes its place by a rename. What was there is
set aside for that moment, and deleted file by file: only what ``conversion.json``
(written last, with every file's size and hash) says that convert.py left. Killed at
any point, there is the old model or the new one; :func:`recover` finds it.

Beside ``models/x``: ``.x.partial-PID`` is being filled, or deleted, by the process of
that number; ``.x.replaced`` is an earlier model for as long as two renames take.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec import Struct

from errors import InputError
from files import read_json, typed

MARK = "conversion.json"

#: Larger files are told by their size alone: hashing 23 GB of weights takes a minute.
_HASHED_BYTES = 1 << 26

#: What systems leave in any folder that somebody looks at.
_NOBODYS = (".DS_Store",)


class _File(Struct):
    size: int
    sha256: str | None


class _Mark(Struct):
    """What conversion.json holds; no files as long as the folder is being filled."""

    files: dict[str, _File]


def check_replaceable(folder: Path) -> None:
    """See to it that replacing ``folder`` deletes nothing but an earlier conversion.

    Raises:
        InputError: it is something else, or holds something else, which is named.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} exists and is no folder: it stays as it is")
    entries = sorted(path for path in folder.iterdir() if path.name not in _NOBODYS)
    if not entries:
        return
    if not (folder / MARK).is_file():
        raise InputError(
            f"{folder} exists and is no conversion that this version made: it stays as "
            f"it is; move it away, or give another --output"
        )
    known = _read_mark(folder).files
    for entry in entries:
        if entry.name == MARK:
            continue
        if entry.name not in known or not _is(entry, known[entry.name]):
            what = "has changed since" if entry.name in known else "is none of"
            raise InputError(
                f"{entry} {what} the earlier conversion: {folder} stays as it is; move "
                f"that file away, or give another --output"
            )


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of ``output`` when all went well.

    ``output`` is no link: its goal would be replaced, and the link with it.

    Raises:
        InputError: as :func:`check_replaceable` says, before and after filling.
        OSError: the disk is full, a folder is barred.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(output)
    _clear(output)
    check_replaceable(output)
    partial = _partial(output, os.getpid())
    partial.mkdir()
    try:
        _write_mark(partial, _Mark({}))
        yield partial
        files = sorted(path for path in partial.iterdir() if path.name != MARK)
        _write_mark(partial, _Mark({path.name: _describe(path) for path in files}))
        check_replaceable(output)
        if output.exists():
            output.rename(aside)
        try:
            partial.rename(output)
        except BaseException:
            if not output.exists() and aside.exists():
                aside.rename(output)
            raise
    finally:
        if output.exists() and aside.exists():
            _delete(aside, output)
        if partial.exists():
            _unlink(partial, [path.name for path in partial.iterdir()])


def recover(output: Path) -> Path | None:
    """The earlier model of a replacement that was killed between its two renames.

    Put back in its place where that can be; None where there is none.
    """
    try:
        output = output.resolve()
    except (OSError, RuntimeError, ValueError):  # links in a circle, no name at all
        return None
    aside = _aside(output)
    if output.exists() or not (aside / MARK).is_file():
        return None
    running = any(
        _is_running(path.name.rpartition("-")[2]) for path in _partials(output)
    )
    if not running:
        with suppress(OSError):  # no right to write: it is read where it is
            aside.rename(output)
            return output
    return aside


def _aside(output: Path) -> Path:
    return output.with_name(f".{output.name}.replaced")


def _partial(output: Path, pid: int) -> Path:
    return output.with_name(f".{output.name}.partial-{pid}")


def _partials(output: Path) -> list[Path]:
    """The folders that conversions into ``output``, of any process, work in."""
    prefix = f".{output.name}.partial-"
    return [
        path
        for path in output.parent.iterdir()
        if path.name.startswith(prefix) and path.name.removeprefix(prefix).isdecimal()
    ]


def _clear(output: Path) -> None:
    """Clear away, or put back, what a killed conversion into ``output`` left."""
    recover(output)
    aside = _aside(output)
    if aside.exists():  # the kill came after the renames
        check_replaceable(aside)
        _delete(aside, output)
    for stale in _partials(output):
        if not _is_running(stale.name.rpartition("-")[2]) and not stale.is_symlink():
            names = [path.name for path in stale.iterdir()]
            if not names or MARK in names or f"{MARK}.new" in names:
                _unlink(stale, names)


def _delete(aside: Path, output: Path) -> None:
    """Delete an earlier conversion that was set aside.

    Under the name of a partial one: killed meanwhile, what is left is no model.
    """
    partial = _partial(output, os.getpid())
    aside.rename(partial)
    known = _read_mark(partial).files if (partial / MARK).is_file() else ()
    _unlink(partial, [*known, *_NOBODYS])


def _unlink(folder: Path, names: list[str]) -> None:
    """Delete these files, the mark last, and the folder if nothing else is in it."""
    with suppress(OSError):
        for name in sorted(names, key=lambda name: name == MARK):
            (folder / name).unlink(missing_ok=True)
        (folder / MARK).unlink(missing_ok=True)
        folder.rmdir()


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        pass  # another user's
    return True


def _read_mark(folder: Path) -> _Mark:
    mark = typed(read_json(folder / MARK), _Mark, str(folder / MARK))
    if any(name != Path(name).name for name in mark.files):
        raise InputError(f"{folder / MARK} names what is not in its folder")
    return mark


def _write_mark(folder: Path, mark: _Mark) -> None:
    files = {
        name: {"size": file.size, "sha256": file.sha256}
        for name, file in mark.files.items()
    }
    new = folder / f"{MARK}.new"
    new.write_text(json.dumps({"files": files}, indent=2) + "\n", "utf-8")
    new.replace(folder / MARK)


def _describe(path: Path) -> _File:
    size = path.stat().st_size
    if size > _HASHED_BYTES:
        return _File(size, None)
    return _File(size, hashlib.sha256(path.read_bytes()).hexdigest())


def _is(path: Path, file: _File) -> bool:
    """Whether a folder's entry is the very file, and no link or folder of its name."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_size != file.size:
        return False
    return file.sha256 is None or _describe(path).sha256 == file.sha256
