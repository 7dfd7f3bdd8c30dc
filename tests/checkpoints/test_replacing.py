"""replacing.py: nothing of the user's is deleted, and a kill leaves a whole model."""

import json
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import convert
from checkpoints import converted
from checkpoints.converted import WEIGHTS, locate
from checkpoints.replacing import MARK, check_replaceable, recover, replacing
from system.errors import InputError


def fill(output: Path, text: str) -> None:
    """A conversion, as far as replacing.py is concerned."""
    with replacing(output) as folder:
        (folder / WEIGHTS).write_text(text)
        (folder / "config.json").write_text("{}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_file_is_in_the_mark(make):
    """What a conversion writes, and nothing else, may be deleted by the next."""
    folder = make()[2]
    marked = json.loads((folder / MARK).read_text())["files"]
    assert sorted(marked) == [name for name in names(folder) if name != MARK]
    check_replaceable(folder)


def test_an_earlier_conversion_is_replaced(tmp_path):
    out = tmp_path / "x"
    fill(out, "old")
    (out / ".DS_Store").touch()  # Finder looked at it
    fill(out, "new")
    assert (out / WEIGHTS).read_text() == "new"
    assert names(tmp_path) == ["x"]
    assert names(out) == ["config.json", MARK, WEIGHTS]


def own_file(out):
    (out / "notes.txt").write_text("mine")
    return "notes.txt"


def own_folder(out):
    (out / "thesis").mkdir()
    (out / "thesis" / "chapter1").write_text("mine")
    return "thesis"


def changed_file(out):
    (out / "config.json").write_text("[]")  # as long as it was
    return "config.json"


def larger_file(out):
    (out / WEIGHTS).write_text("fine-tuned since")
    return WEIGHTS


def link_for_a_file(out):
    kept = out.parent / "disk2"
    (out / WEIGHTS).rename(kept)
    (out / WEIGHTS).symlink_to(kept)
    return WEIGHTS


def folder_for_a_file(out):
    (out / "config.json").unlink()
    (out / "config.json").mkdir()
    return "config.json"


@pytest.mark.parametrize(
    "change",
    [
        own_file,
        own_folder,
        changed_file,
        larger_file,
        link_for_a_file,
        folder_for_a_file,
    ],
)
@pytest.mark.parametrize("late", [False, True], ids=["before", "while converting"])
def test_a_file_of_the_users_stops_it(tmp_path, change, late):
    """It is named, and stays; also one that comes while a long conversion runs."""
    out = tmp_path / "x"
    fill(out, "old")
    if not late:
        name = change(out)
    before = sorted(out.rglob("*"))
    with pytest.raises(InputError) as error, replacing(out) as folder:
        assert late
        (folder / WEIGHTS).write_text("new")
        name = change(out)
        before = sorted(out.rglob("*"))
    assert f"{out / name} " in str(error.value)
    assert sorted(out.rglob("*")) == before
    assert not [path for path in names(tmp_path) if path.startswith(".")]


@pytest.mark.parametrize("damage", ["[]", "{}", '{"files": 1}', '{"files": {"../y"'])
def test_a_mark_of_somebody_elses(tmp_path, damage):
    """conversion.json in a folder does not make it ours, nor can it name others."""
    out = tmp_path / "x"
    out.mkdir()
    (out / WEIGHTS).write_text("mine")
    (out / MARK).write_text(damage)
    with pytest.raises(InputError):
        fill(out, "new")
    assert (out / WEIGHTS).read_text() == "mine"


def test_a_mark_that_leads_out_of_the_folder(tmp_path):
    out = tmp_path / "x"
    fill(out, "old")
    (tmp_path / "y").write_text("mine")
    mark = json.loads((out / MARK).read_text())
    mark["files"]["../y"] = {"size": 4, "sha256": None}
    (out / MARK).write_text(json.dumps(mark))
    with pytest.raises(InputError, match="not in its folder"):
        fill(out, "new")
    assert (tmp_path / "y").exists()


def test_what_is_no_conversion(tmp_path):
    """A file, a folder that an earlier version made: kept. An empty one is free."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="no folder"):
        fill(tmp_path / "file", "new")
    (tmp_path / "unmarked").mkdir()
    (tmp_path / "unmarked" / WEIGHTS).write_text("by an earlier version")
    with pytest.raises(InputError, match="stays as it is"):
        fill(tmp_path / "unmarked", "new")
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty", "new")
    assert (tmp_path / "empty" / WEIGHTS).read_text() == "new"


NEIGHBOURS = (
    *(".x.replaced", ".x.partial-backup", ".x.partial-1a", ".x.partial-999999"),
    *(".x.partial-7777777", ".x.partial-12345678", ".x.partial-abcdefgh"),
)


@pytest.mark.parametrize("name", NEIGHBOURS)
@pytest.mark.parametrize(
    "kind", ["folder", "copy", "marked", "file", "file of a mark's name"]
)
def test_neighbours_whose_names_look_like_ours(tmp_path, name, kind):
    """A user's folder or file beside the output, named as ours are: it stays."""
    fill(tmp_path / "x", "old")
    mine = tmp_path / name
    if kind == "file":
        mine.write_text("mine")
    else:
        if kind == "copy":
            shutil.copytree(tmp_path / "x", mine)
        else:
            mine.mkdir()
        if kind == "marked":
            (mine / MARK).write_text('{"files": {}}')
        if kind == "file of a mark's name":
            (mine / MARK).write_text("mine")
        (mine / "precious").write_text("mine")
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    for text in ("new", "newer"):
        try:
            fill(tmp_path / "x", text)
        except InputError as error:
            assert name in str(error)
        assert (tmp_path / "x" / WEIGHTS).is_file()
    after = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    assert after == before
    assert mine.exists()


def test_a_folder_of_the_users_is_no_earlier_model(tmp_path):
    """Named as ours are, with a conversion.json of their own: nothing moves it."""
    mine = tmp_path / ".x.replaced"
    mine.mkdir()
    for text in ('{"my": "notes"}', '{"files": {}}'):
        (mine / MARK).write_text(text)
        (mine / "thesis.txt").write_text("mine")
        assert recover(tmp_path / "x") is None
        assert names(tmp_path) == [".x.replaced"]


def test_what_a_kill_left_half_made(tmp_path):
    stale = tmp_path / ".x.partial-a1b2c3d4"
    for files in ([], [f"{MARK}.new"], [MARK], [MARK, WEIGHTS, "config.json"]):
        stale.mkdir()
        for name in files:
            (stale / name).write_text('{"files": {}}' if name == MARK else "half")
        fill(tmp_path / "x", "new")
        assert names(tmp_path) == ["x"]


def test_half_made_by_somebody_who_is_at_it(tmp_path):
    """Two conversions at once: neither touches what the other fills, the last wins."""
    out = tmp_path / "x"
    with replacing(out) as first:
        (first / WEIGHTS).write_text("first")
        with replacing(out) as second:
            (second / WEIGHTS).write_text("second")
            assert (first / WEIGHTS).is_file()
        assert (out / WEIGHTS).read_text() == "second"
        assert (first / WEIGHTS).is_file()
    assert (out / WEIGHTS).read_text() == "first"
    assert names(tmp_path) == ["x"]


def test_a_failure_beside_somebody_who_is_at_it(tmp_path):
    """Killed between the renames, then a failing run beside a living one."""
    out = tmp_path / "x"
    fill(out, "old")
    out.rename(tmp_path / ".x.replaced")
    with replacing(tmp_path / "y"):
        with suppress(KeyError), replacing(out):
            raise KeyError
        assert (locate(str(out)) / WEIGHTS).read_text() == "old"


def test_a_link_stays(make, tmp_path):
    """models on another disk: what the link leads to is replaced, the link is not."""
    (tmp_path / "disk2").mkdir()
    link = tmp_path / "mlx"
    link.symlink_to(tmp_path / "disk2" / "mlx")
    for _ in range(2):  # a link that leads nowhere yet, then one to a conversion
        convert.convert(make()[1], link)
        assert link.is_symlink()
        assert (tmp_path / "disk2" / "mlx" / WEIGHTS).is_file()
    assert names(tmp_path) == ["disk2", "mlx"]
    assert names(tmp_path / "disk2") == ["mlx"]
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(InputError, match="cannot write"):
        convert.convert(make()[1], circle)


#: Kills itself at the Nth call that changes a file or folder: Python tells of each.
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from checkpoints.replacing import replacing
left = int(sys.argv[3])
def watch(event, arguments):
    global left
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
        event == "open" and arguments[1] in ("w", "wb", "x"))
    if changes and "models" in str(arguments):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
with replacing(Path(sys.argv[2])) as folder:
    (folder / "weights.npz").write_text("new")
    (folder / "config.json").write_text("{}")
"""


def test_killed_at_any_point(tmp_path):
    """There is the old or the new model, for main.py and for the next conversion."""
    project = str(Path(convert.__file__).parent)
    out = tmp_path / "models" / "x"
    seen = set()
    for point in range(100):
        shutil.rmtree(out.parent, ignore_errors=True)
        fill(out, "old")
        script = [sys.executable, "-c", KILLED, project, str(out), str(point)]
        status = subprocess.run(script).returncode
        found = locate(str(out))
        seen.add((found / WEIGHTS).read_text())
        assert json.loads((found / "config.json").read_text()) == {}
        fill(out, "newer")
        assert names(out.parent) == ["x"]
        assert (out / WEIGHTS).read_text() == "newer"
        if status == 0:
            break
    assert status == 0
    assert point > 10
    assert seen == {"old", "new"}


def test_the_earlier_model_where_nothing_can_be_renamed(tmp_path, monkeypatch):
    """Killed between the renames, in a folder that main.py may not write to."""
    out = tmp_path / "x"
    fill(out, "old")
    aside = out.rename(tmp_path / ".x.replaced")

    def barred(*_):
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", barred)
        assert locate(str(out)) == aside
    monkeypatch.setattr(converted, "MODELS", tmp_path)
    assert locate("x") == out  # by name, and put back
    assert names(tmp_path) == ["x"]


RACE = """
import os, random, signal, sys
from contextlib import suppress
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from checkpoints.converted import locate
from system.errors import InputError
from checkpoints.replacing import replacing
out, chance = Path(sys.argv[2]), random.Random(sys.argv[3])
for i in range(40):
    with replacing(out) as folder:
        (folder / "weights.npz").write_text(f"{sys.argv[3]} {i}" * 3)
        (folder / "config.json").write_text("{}")
        if chance.random() < 0.2:
            with suppress(InputError), replacing(out):
                raise InputError("this one fails")
    found = locate(str(out)) / "weights.npz"
    with suppress(FileNotFoundError):  # replaced since
        assert found.read_text()
"""


def test_conversions_at_once(tmp_path):
    """Three processes replace one model: each succeeds each time, nothing is left."""
    project = str(Path(convert.__file__).parent)
    out = tmp_path / "x"
    racing = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, project, str(out), str(seed)],
            stderr=subprocess.PIPE,
        )
        for seed in range(3)
    ]
    assert [(p.communicate()[1], p.returncode) for p in racing] == [(b"", 0)] * 3
    assert names(tmp_path) == ["x"]
    check_replaceable(out)


def test_list_shows_what_a_kill_left(make, tmp_path, monkeypatch):
    monkeypatch.setattr(converted, "MODELS", tmp_path)
    convert.convert(make()[1], tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / ".x.replaced")
    (line,) = convert.list_models(tmp_path)
    assert line.startswith("x: ")
