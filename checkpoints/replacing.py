"""The folder that convert.py fills: replaced whole, and only where it wrote it itself.

A conversion is made beside its goal and takes its place by a rename. What was there is
set aside for that moment, and deleted file by file: only what ``conversion.json``
(written last, with every file's size and hash) says that convert.py left. Killed at
any point, there is the old model or the new one; :func:`recover` finds it.

Beside ``models/x``: ``.x.partial-*`` is being filled, or deleted, by a process that
holds a lock on it (one that nobody holds was left by a kill); ``.x.replaced`` is an
earlier model for as long as two renames take. Whoever renames holds a lock on
``models``, so that two conversions, or one and main.py, never see each other halfway.
Locks are the kernel's (flock): they end with their process.
"""

import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from msgspec import Struct

from checkpoints.sources import COMPANIONS
from system.errors import InputError
from system.files import read_json, typed

MARK = "conversion.json"

#: All that a conversion may consist of: what is half made is known by these names.
NAMES = {
    *(*COMPANIONS, "sentencepiece.bpe.model", "weights.npz", MARK, f"{MARK}.new"),
}

#: Larger files are told by their size alone: hashing 23 GB of weights takes a minute.
_HASHED_BYTES = 1 << 26


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
    entries = sorted(path for path in folder.iterdir() if not _is_nobodys(path))
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
        InputError: as :func:`check_replaceable` says, before and after filling; or the
            folder was filled with a name that is none of :data:`NAMES`.
        OSError: the disk is full, a folder is barred.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with _locked(output.parent):
            _clear(output)
            check_replaceable(output)
            partial = _new_partial(output)
            held.enter_context(_locked(partial))
        try:
            partial.chmod(0o777 & ~_umask())  # at first they are for their owner alone
            _write_mark(partial, _Mark({}))
            yield partial
            _complete(partial)
            with _locked(output.parent):
                _swap(partial, output)
        except BaseException:
            if not _is_complete(partial):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            _delete(partial)  # what was replaced, or what did not get there


def _complete(partial: Path) -> None:
    """Write the mark of a folder that is filled."""
    paths = (path for path in partial.iterdir() if not _is_nobodys(path))
    files = sorted(path for path in paths if path.name != MARK)
    odd = next((path.name for path in files if path.name not in NAMES), None)
    if odd:
        raise InputError(f"a conversion has no file {odd}")
    _write_mark(partial, _Mark({path.name: _describe(path) for path in files}))


def _swap(partial: Path, output: Path) -> None:
    """Exchange the two; ``partial`` may be missing afterwards. Under the lock."""
    aside = _aside(output)
    if output.exists() and aside.exists():
        _clear(output)
    check_replaceable(output)
    replaced = output.exists()
    if replaced:
        output.rename(aside)
    try:
        partial.rename(output)
    except BaseException:
        if replaced and not output.exists():
            aside.rename(output)
        raise
    if replaced:
        aside.rename(partial)


def recover(output: Path) -> Path | None:
    """The earlier model of a replacement that was killed between its two renames.

    Put back in its place where that can be, or where somebody has meanwhile put it;
    None where there is none.
    """
    try:
        output = output.resolve()
        if not output.parent.is_dir() or not (_aside(output) / MARK).is_file():
            return None
        with _locked(output.parent):
            return _recover(output)
    except (OSError, RuntimeError, ValueError):  # links in a circle, no name at all
        return None


def _recover(output: Path) -> Path | None:
    """Likewise, under the lock: nobody is between the two renames now."""
    aside = _aside(output)
    if output.exists():
        return output  # while the lock was waited for, it got there
    if not (aside / MARK).is_file():
        return None
    with suppress(InputError):
        check_replaceable(aside)  # somebody's own folder may have that name
        if not _read_mark(aside).files:
            return None
        with suppress(OSError):  # no right to write: it is read where it is
            aside.rename(output)
            return output
        return aside
    return None


def _aside(output: Path) -> Path:
    return output.with_name(f".{output.name}.replaced")


def _new_partial(output: Path) -> Path:
    import tempfile  # main.py has no use for it

    prefix = f".{output.name}.partial-"
    return Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))


def _partials(output: Path) -> list[Path]:
    """The folders that conversions into ``output``, of any process, work in."""
    name = re.compile(re.escape(f".{output.name}.partial-") + "[a-z0-9_]{8}")
    return [
        path
        for path in output.parent.iterdir()
        if name.fullmatch(path.name) and not path.is_symlink() and path.is_dir()
    ]


def _clear(output: Path) -> None:
    """Clear away, or put back, what a killed conversion into ``output`` left.

    Under the lock: what is set aside beside an ``output`` was replaced by it.
    """
    _recover(output)
    aside = _aside(output)
    if output.exists() and aside.exists():
        check_replaceable(aside)
        doomed = _new_partial(output)
        aside.rename(doomed)  # killed meanwhile, what is left is no model
        _delete(doomed)
    for path in _partials(output):
        with suppress(OSError), _locked(path, wait=False):
            _delete(path)


def _is_complete(partial: Path) -> bool:
    """Whether its mark is the last thing that was written to it."""
    with suppress(OSError, InputError):
        return bool(_read_mark(partial).files)
    return False


def _delete(folder: Path) -> None:
    """Delete a folder that consists of a conversion, whole or half gone; no other.

    Of a complete one every file is as its mark says; one that is half made has no
    names but those of a conversion.
    """
    with suppress(OSError, InputError):
        paths = list(folder.iterdir())
        if any(not stat.S_ISREG(path.lstat().st_mode) for path in paths):
            return
        ours = [path for path in paths if not _is_nobodys(path)]
        files = [path for path in ours if path.name not in (MARK, f"{MARK}.new")]
        marked = (folder / MARK).is_file()
        known = _read_mark(folder).files if marked else {}
        for path in files:
            if not marked or path.name not in (known or NAMES):
                return
            if known and not _is(path, known[path.name]):
                return
        for path in sorted(paths, key=lambda path: path.name == MARK):
            path.unlink()
        folder.rmdir()


def _is_nobodys(path: Path) -> bool:
    """Whether macOS left it: in folders that somebody looks at, on foreign disks."""
    return path.name == ".DS_Store" or path.name.startswith("._")


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock on a folder.

    Raises:
        OSError: the folder cannot be opened; or somebody holds it, and not to ``wait``.
    """
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            if not wait:
                raise
            # A file system without locks: as good as it gets.
        yield
    finally:
        os.close(opened)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


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
    import hashlib  # likewise

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
