"""The house: which room may use which, and that every room says what lives in it."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import main

PROJECT = Path(main.__file__).parent
ROOMS = sorted(file.parent.name for file in PROJECT.glob("*/__init__.py"))
FILES = sorted(file.stem for file in PROJECT.glob("*.py"))

#: What a file at the top may import; the rooms' own rules are in pyproject.toml, where
#: import-linter finds them.
MAY = {
    "model": {"checkpoints", "speculation", "system"},
    "decoder": {"speculation", "system"},
    "answering": {"decoder", "speculation", "system", "text"},
    "pair": {
        "answering",
        "architectures",
        "checkpoints",
        "decoder",
        "speculation",
        "system",
        "text",
    },
    "convert": {"architectures", "checkpoints", "model", "system", "text"},
    "main": {"console", "system"},
    "serve": {"serving", "system"},
    "check": {"checking", "system"},
    "benchmark": {"console", "decoder", "measuring", "speculation", "system"},
}


def imported(code: str) -> set[str]:
    """What of the project a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found & {*ROOMS, *FILES}


@pytest.mark.parametrize("name", FILES)
def test_what_stands_at_the_top(name):
    assert imported((PROJECT / f"{name}.py").read_text()) <= MAY[name]


def test_an_arrow_that_points_up_is_found():
    code = (PROJECT / "decoder.py").read_text() + "\n\ndef f():\n    import model.x\n"
    assert not imported(code) <= MAY["decoder"]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_lives_in_it(room):
    """In which order to read it, too: every module of it is named."""
    said = ast.get_docstring(ast.parse((PROJECT / room / "__init__.py").read_text()))
    for module in (PROJECT / room).glob("[!_]*.py"):
        assert f"``{module.stem}``" in said


@pytest.mark.parametrize(
    "room, line",
    [
        ("speculation", "from architectures import t5"),
        ("checkpoints", "from text import tokenizer"),
        ("architectures", "import decoder"),
        ("measuring", "import benchmark"),
    ],
)
def test_lint_finds_a_wrong_import(tmp_path, room, line):
    for name in ROOMS:
        shutil.copytree(PROJECT / name, tmp_path / name)
    for file in [*PROJECT.glob("*.py"), PROJECT / "pyproject.toml"]:
        shutil.copy(file, tmp_path)
    lint = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    with (tmp_path / room / "planted.py").open("w") as file:
        file.write(f"{line}\n")
    done = subprocess.run(lint, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{room}.planted" in done.stdout
