"""check-report.json and check-report.md: read, gone on from, written whole."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from checking.children import DONE
from system.errors import InputError
from system.files import is_file, read_json, typed

JSON, TEXT = "check-report.json", "check-report.md"
#: What tells these files from others of their names: how they begin.
PROGRAM = "check.py of T5 with speculative decoding in MLX"
TITLE = "# Check report: T5 with speculative decoding in MLX"
_OURS = f'{{\n "program": "{PROGRAM}"'
#: Of what is in it; another is not gone on from.
FORM = 1

PROJECT = Path(__file__).resolve().parents[1]


class _Identity(msgspec.Struct):
    machine: str
    mlx: str
    code: str


class _Section(msgspec.Struct):
    status: str
    seconds: float
    result: dict[str, Any] | None


class _Report(msgspec.Struct):
    """What has to be there for it to be gone on from."""

    program: str
    form: int
    quick: bool
    seconds: float
    identity: _Identity
    sections: dict[str, _Section]


def read(folder: Path, fresh: bool) -> dict[str, Any] | None:
    """The report that a folder has; None where it has none, or none is wanted.

    Raises:
        InputError: one of the two files is somebody else's, or the report is damaged
            and is not to be replaced by a fresh one.
    """
    path, text = folder / JSON, folder / TEXT
    if is_file(text) and not _begins(text, TITLE):
        raise InputError(f"{text} is no check report: move it away, it stays as it is")
    if not is_file(path):
        _require_nothing(path)
        return None
    ours, fault = _begins(path, _OURS), None
    try:
        report = read_json(path)
        ours = ours or report.get("program") == PROGRAM
        typed(report, _Report, str(path))
    except InputError as error:
        fault = error
    if not ours:
        raise InputError(f"{path} is no check report: move it away, it stays as it is")
    if fault and not fresh:
        raise InputError(
            f"{path} is damaged ({fault}): move it away, or begin anew with --fresh"
        )
    return None if fresh else report


def _require_nothing(path: Path) -> None:
    if path.exists():
        raise InputError(f"{path} is no file: move it away, it stays as it is")


def _begins(path: Path, text: str) -> bool:
    with path.open("rb") as file:
        return file.read(len(text.encode())) == text.encode()


def write(folder: Path, report: dict[str, Any], text: str) -> None:
    """Write both; whenever this is killed, there is the old file or the new one.

    Raises:
        OSError: the folder cannot be written, the disk is full.
    """
    data = msgspec.json.format(msgspec.json.encode(report), indent=1).decode()
    for name, content in ((JSON, data + "\n"), (TEXT, text)):
        new = folder / f"{name}.new"
        try:
            with new.open("w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            new.replace(folder / name)
        except BaseException:
            with suppress(OSError):
                new.unlink()
            raise


def begin(quick: bool, identity: dict[str, str]) -> dict[str, Any]:
    """A report without sections."""
    return {
        "program": PROGRAM,
        "form": FORM,
        "quick": quick,
        "seconds": 0.0,
        "identity": identity,
        "sections": {},
    }


def difference(
    report: dict[str, Any], quick: bool, identity: dict[str, str]
) -> str | None:
    """Why a report cannot be gone on from, in words; None where it can."""
    if report["form"] != FORM:
        return "it is another version's"
    if report["quick"] != quick:
        return f"it was made with{'' if report['quick'] else 'out'} --quick"
    words = {"machine": "machine", "mlx": "MLX version", "code": "code"}
    for name in ("mlx", "machine", "code"):
        if report["identity"][name] != identity[name]:
            return f"it is of another {words[name]}"
    return None


def is_finished(name: str, record: dict[str, Any] | None) -> bool:
    """Whether a section's record is all that there will be of it."""
    if record is None or record["status"] != DONE:
        return False
    result = record["result"] or {}
    if name == "suite" and result.get("installed"):
        return bool(result.get("complete"))
    return True


def before(name: str, record: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a section goes on from: the suite from the tests that it reached."""
    result = record and record["result"]
    if name != "suite":
        return None
    return result if result and result.get("installed") else None


def code(project: Path = PROJECT) -> str:
    """What tells this project's code and bundled models from others."""
    digest = hashlib.sha256()
    paths = sorted({*project.glob("*.py"), *project.glob("*/*.py")})
    paths += sorted(project.glob("tests/*/*.py"))
    for path in paths:
        digest.update(f"{path.relative_to(project)}\n".encode())
        digest.update(path.read_bytes())
    for path in sorted(project.glob("demo/*/*")):
        digest.update(f"{path.relative_to(project)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]
