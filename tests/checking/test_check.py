"""check.py: its sections' processes, whatever becomes of them, and its two files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from canned import Sections, results
from conftest import HANG

import check
from checking import children, kept, program, task
from checking.kept import JSON, TEXT
from system import errors
from system.errors import InputError

PROJECT = Path(check.__file__).parent


@pytest.fixture
def sections(tmp_path, monkeypatch):
    stand_ins = Sections(tmp_path)
    monkeypatch.setattr(children, "command_of", stand_ins.command)
    monkeypatch.setattr(kept, "code", lambda: "some code")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return stand_ins


@pytest.fixture
def run(call, sections):
    """Run check.py in this process: (status, stdout, stderr)."""
    return lambda *flags: call(*flags, program=check)


def report():
    return json.loads(Path(JSON).read_text())


def statuses():
    return {name: its["status"] for name, its in report()["sections"].items()}


def names(folder=Path()):
    return sorted(path.name for path in folder.iterdir())


ALL = list(results())
DONE = dict.fromkeys(ALL, "done")


def test_a_whole_run(run, sections):
    status, out, err = run("--quick")
    assert status == 0
    assert "- exact: yes" in out and f"written: {TEXT} and {JSON}" in out
    assert "exactness: 0 s\n" in err
    tasks = sections.tasks()
    assert list(tasks) == ALL  # in this order
    assert all(each["quick"] and each["before"] is None for each in tasks.values())
    assert tasks["curve"]["seconds"] == task.SECTIONS["curve"][0]
    assert tasks["curve"]["seconds"] < tasks["suite"]["seconds"] <= task.TOTAL[0]
    assert statuses() == DONE
    assert Path(TEXT).read_text().startswith(kept.TITLE)
    assert names() == sorted([JSON, TEXT])


def test_a_section_is_ended_soon_after_its_time(run, sections, monkeypatch):
    real, limits = children.run, []

    def spy(command, told, seconds, *rest):
        limits.append(seconds - told["seconds"])
        return real(command, told, seconds, *rest)

    monkeypatch.setattr(children, "run", spy)
    run("--quick")
    assert limits == pytest.approx([task.GRACE] * len(ALL))
    # Even if each were, it would be within the 4 minutes, and the others' the 10.
    for quick, promised in ((True, 240), (False, 600)):
        assert task.TOTAL[not quick] + task.GRACE < promised


def test_only_what_programs_go_by_is_kept(run, sections):
    """That section has the user's cache, all others have one that is gone with them."""
    cache = "'cache': os.environ.get('XDG_CACHE_HOME')"
    for name in ("speed", "compiled"):
        whole = results()[name]
        sections.scripts[name] = f"print(json.dumps({{**{whole!r}, {cache}}}))"
        run("--quick", "--fresh")
        found = report()["sections"][name]["result"]["cache"]
        assert (found == os.environ.get("XDG_CACHE_HOME")) == (name == "compiled")


def test_odd_results_are_refused_in_a_line(run, sections):
    run("--quick")
    value = report()
    value["sections"]["curve"]["result"]["rows"] = 5
    Path(JSON).write_text(json.dumps(value))
    status, out, err = run("--quick")
    assert (status, out) == (2, "")
    assert "odd results: --fresh begins anew" in err
    assert report() == value


def test_a_folder_that_cannot_be_written(run, sections, monkeypatch):
    monkeypatch.setattr(program.os, "access", lambda *_: False)
    status, _, err = run("--quick")
    assert status == 2 and "cannot write into" in err
    assert not sections.tasks()


def test_the_long_one_has_more_time(run, sections):
    run()
    tasks = sections.tasks()
    assert tasks["curve"]["seconds"] == task.SECTIONS["curve"][1]
    assert not tasks["curve"]["quick"]


@pytest.mark.parametrize(
    "script, status, more",
    [
        ("os.abort()", "crashed", {"signal": "SIGABRT"}),
        ("os.kill(os.getpid(), 11)", "crashed", {"signal": "SIGSEGV"}),
        ("os.kill(os.getpid(), 9)", "crashed", {"signal": "SIGKILL"}),
        ("sys.exit(2)", "failed", {"exit": 2}),
        ("pass", "failed", {"exit": 0}),  # it says nothing
    ],
)
def test_a_section_that_dies_costs_itself(run, sections, script, status, more):
    noise = "print('first\\n\\nlast words', file=sys.stderr, flush=True)\n"
    sections.scripts["curve"] = noise + script
    assert run()[0] == 0
    assert statuses() == DONE | {"curve": status}
    record = report()["sections"]["curve"]
    assert record["stderr"] == ["first", "last words"]
    assert record.items() >= {"result": None, **more}.items()
    assert "last words" in Path(TEXT).read_text()


def test_what_it_had_found_out_is_kept(run, sections):
    """The last whole line of it."""
    half = {"wanted": 9, "all": False, "variants": []}
    sections.scripts["exactness"] = f"""\
        print(json.dumps({{"wanted": 1}}))
        print("no json")
        print(json.dumps({half!r}))
        print('{{"wanted": 9, "all": tr', end="", flush=True)
        os.abort()
        """
    run()
    assert report()["sections"]["exactness"]["result"] == half


def test_a_section_that_hangs_is_ended_with_what_it_began(
    run, sections, monkeypatch, tmp_path
):
    """And only that: the others are measured."""
    pid = tmp_path / "pid"
    sections.scripts["curve"] = f"""\
        import signal, subprocess
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)"])
        open({str(pid)!r}, "w").write(str(child.pid))
        print(json.dumps({{"rows": []}}), flush=True)
        time.sleep(999)
        """
    monkeypatch.setitem(task.SECTIONS, "curve", (1.0, 1.0))
    monkeypatch.setattr(program, "LEAST", 0.0)
    monkeypatch.setattr(program, "GRACE", 1.0)
    monkeypatch.setattr(program.report, "markdown", lambda _: kept.TITLE)
    assert run()[0] == 0
    assert statuses() == DONE | {"curve": "hung"}
    until = time.monotonic() + HANG
    while Path(f"/proc/{pid.read_text()}").exists():
        state = Path(f"/proc/{pid.read_text()}/stat").read_text().split()[2]
        if state == "Z":  # nobody's child any more
            break
        assert time.monotonic() < until
        time.sleep(0.05)


def test_what_there_is_no_time_for_is_left_out(run, sections, monkeypatch):
    monkeypatch.setattr(program, "TOTAL", (0.0, 0.0))
    run()
    assert set(statuses().values()) == {"left out"}
    assert sections.tasks() == {}


def test_a_later_call_does_the_rest(run, sections):
    whole = sections.scripts["speed"]
    sections.scripts["speed"] = "os.abort()"
    run()
    first = report()
    sections.tasks()
    sections.scripts["speed"] = whole
    status, _, err = run()
    assert status == 0
    assert list(sections.tasks()) == ["machine", "speed"]
    assert statuses() == DONE
    assert report()["sections"]["curve"] == first["sections"]["curve"]
    assert report()["seconds"] > first["seconds"]
    assert "begins anew" not in err
    status, out, err = run()
    assert list(sections.tasks()) == ["machine"]
    assert "all of it had been measured before; --fresh measures anew" in err
    assert "- exact: yes" in out


def test_a_suite_that_was_cut_off_goes_on(run, sections):
    suite = results()["suite"] | {"complete": False, "tests": 9}
    sections.scripts["suite"] = f"print(json.dumps({suite!r}))"
    run()
    sections.tasks()
    run()
    tasks = sections.tasks()
    assert list(tasks) == ["machine", "suite"]
    assert tasks["suite"]["before"] == suite
    sections.scripts["suite"] = "os.abort()"  # what was reached is not lost
    run()
    assert report()["sections"]["suite"]["result"] == suite


def test_fresh_begins_anew(run, sections):
    run()
    sections.tasks()
    assert run("--fresh")[0] == 0
    assert list(sections.tasks()) == ALL


@pytest.mark.parametrize(
    "field, why",
    [
        ("machine", "it is of another machine"),
        ("mlx", "it is of another MLX version"),
        ("code", "it is of another code"),
    ],
)
def test_elsewhere_it_begins_anew_and_says_so(run, sections, field, why):
    run()
    sections.tasks()
    value = report()
    value["identity"][field] = "other"
    Path(JSON).write_text(json.dumps(value))
    err = run()[2]
    assert f"{JSON} is not gone on with: {why}; this begins anew" in err
    assert list(sections.tasks()) == ALL
    assert report()["identity"][field] != "other"


def test_with_other_flags_too(run, sections):
    run("--quick")
    sections.tasks()
    assert "it was made with --quick; this begins anew" in run()[2]
    assert list(sections.tasks()) == ALL
    assert "it was made without --quick" in run("--quick")[2]


def damaged(text):
    """As it lies on a disk after something has gone wrong."""
    return [text[: len(text) // 2], text.replace('"quick": false', '"quick": 3')]


@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_report_is_refused_and_stays(run, sections, which):
    run()
    sections.tasks()
    broken = damaged(Path(JSON).read_text())[which]
    Path(JSON).write_text(broken)
    status, out, err = run()
    assert (status, out) == (2, "")
    assert err.startswith("check.py: ") and err.count("\n") == 1
    assert "is damaged" in err and "--fresh" in err
    assert Path(JSON).read_text() == broken
    assert sections.tasks() == {}
    assert run("--fresh")[0] == 0
    assert statuses() == DONE


@pytest.mark.parametrize("flags", [(), ("--fresh",)])
@pytest.mark.parametrize("text", ['{"mine": 1}', "no json", "", "[]"])
@pytest.mark.parametrize("name", [JSON, TEXT])
def test_somebody_elses_file_is_refused_and_stays(run, sections, flags, text, name):
    Path(name).write_text(text)
    status, out, err = run(*flags)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and "it stays as it is" in err
    assert names() == [name]
    assert Path(name).read_text() == text
    assert sections.tasks() == {}


def test_a_folder_in_its_place_is_refused(run):
    Path(JSON).mkdir()
    status, _, err = run("--fresh")
    assert status == 2 and "is no file" in err


def test_a_file_is_never_half_written(monkeypatch, tmp_path):
    old = kept.begin(True, {"machine": "a", "mlx": "b", "code": "c"})
    kept.write(tmp_path, old, kept.TITLE)

    def full(_):
        raise OSError("the disk is full")

    monkeypatch.setattr(kept.os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        kept.write(tmp_path, old | {"quick": False}, "other")
    assert kept.read(tmp_path, fresh=False) == old
    assert names(tmp_path) == sorted([JSON, TEXT])


def test_a_folder_that_cannot_be_written_is_said_at_once(run, sections, monkeypatch):
    def barred(*_):
        raise PermissionError(13, "Permission denied", JSON)

    monkeypatch.setattr(kept, "write", barred)
    monkeypatch.setattr(errors, "_drop_stdout", lambda: None)  # it is pytest's
    status, out, err = run()
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("check.py: [Errno 13]")
    assert list(sections.tasks()) == ["machine"]  # before minutes are spent


#: check.py with stand-ins, as a program of its own: Ctrl-C is nothing for this process.
PROGRAM = """\
import sys
sys.path[:0] = {path!r}
import check
from pathlib import Path
from checking import children, kept
from system.errors import run
from canned import Sections
stand_ins = Sections(Path({folder!r}))
stand_ins.scripts |= {scripts!r}
children.command_of = stand_ins.command
kept.code = lambda: "some code"
sys.argv = ["check.py", "--quick"]
sys.exit(run(check.main, "check.py"))
"""


def started(folder, scripts):
    path = [str(PROJECT), str(PROJECT / "tests"), str(Path(__file__).parent)]
    script = PROGRAM.format(path=path, folder=str(folder), scripts=scripts)
    return subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_is_gone_on_with(run, sections, tmp_path, number):
    ready = tmp_path / "ready"
    reached = results()["suite"] | {"complete": False, "tests": 9}
    hangs = f"""\
        print(json.dumps({reached!r}), flush=True)
        open({str(ready)!r}, "w").write(str(os.getpid()))
        time.sleep(999)
        """
    process = started(tmp_path, {"suite": hangs})
    until = time.monotonic() + HANG
    while not (ready.exists() and ready.read_text()):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 130
    last = err.splitlines()[-1]
    assert last == "interrupted: the same command goes on from there"
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.kill(int(ready.read_text()), 0)
    assert statuses() == DONE | {"suite": "interrupted"}
    assert "suite was interrupted" in Path(TEXT).read_text()
    sections.tasks()
    assert run("--quick")[0] == 0
    tasks = sections.tasks()
    assert list(tasks) == ["machine", "suite"]
    assert tasks["suite"]["before"] == reached
    assert statuses() == DONE
    assert not report()["interrupted"]


def test_an_interrupted_section_ends_the_run(run, sections):
    """Whoever sent it Ctrl-C meant all of it."""
    sections.scripts["curve"] = "sys.exit(130)"
    status, _, err = run()
    assert status == 130
    assert "interrupted: the same command goes on from there" in err
    assert list(sections.tasks()) == ["machine", "exactness", "curve"]


def test_interrupted_at_the_beginning_nothing_is_changed(run, sections):
    run()
    before = Path(JSON).read_text()
    sections.scripts["machine"] = "sys.exit(130)"
    assert run()[0] == 130
    assert Path(JSON).read_text() == before


def test_what_sections_leave_in_temporary_folders_is_gone(run, sections, tmp_path):
    said = tmp_path / "said"
    sections.scripts["curve"] = f"""\
        import tempfile
        made = [tempfile.mkdtemp(), os.environ["XDG_CACHE_HOME"]]
        open({str(said)!r}, "w").write(" ".join(made))
        os.kill(os.getpid(), 9)
        """
    run()
    made = said.read_text().split()
    assert len(made) == 2
    assert not any(Path(name).exists() for name in made)
    assert os.environ["XDG_CACHE_HOME"] not in made


def test_a_section_by_itself(tmp_path):
    """As check.py starts it: a real one."""
    done = subprocess.run(
        children.command_of("machine"),
        input=json.dumps({"quick": True, "seconds": 60.0, "before": None}),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["identity"] and result["cores"] == os.cpu_count()
    assert result["footprint"]["resident"] > 10_000_000


#: A section that prints as libraries do, and has a result in two steps.
NOISY = """\
import sys
sys.path.insert(0, {project!r})
from checking import child, machine

def section(task):
    print("noise", task.seconds)
    yield {{"step": 1}}
    yield {{"step": 2}}

machine.section = section
child.main("machine")
"""


def test_whatever_libraries_print_is_no_result():
    done = subprocess.run(
        [sys.executable, "-c", NOISY.format(project=str(PROJECT))],
        input=json.dumps({"quick": True, "seconds": 60.0}),
        capture_output=True,
        text=True,
    )
    assert done.stderr == "noise 60.0\n"
    steps = [json.loads(line)["step"] for line in done.stdout.splitlines()]
    assert steps == [1, 2]


def test_there_is_no_other_section(call):
    status, _, err = call("--section", "weather", program=check)
    assert (status, err) == (2, "check.py: there is no section weather\n")


def test_the_section_is_nobodys_flag(call):
    assert "--section" not in call("--help", program=check)[1]


def test_code_is_told_by_its_files(tmp_path):
    (tmp_path / "room").mkdir()
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "room" / "b.py").write_text("2")
    told = {kept.code(tmp_path)}
    (tmp_path / "room" / "b.py").write_text("3")
    told.add(kept.code(tmp_path))
    (tmp_path / "room" / "b.py").rename(tmp_path / "room" / "c.py")
    told.add(kept.code(tmp_path))
    assert len(told) == 3


def test_a_report_of_another_form_is_not_gone_on_with(tmp_path):
    identity = {"machine": "a", "mlx": "b", "code": "c"}
    report = kept.begin(True, identity)
    assert kept.difference(report, True, identity) is None
    report["form"] += 1
    assert kept.difference(report, True, identity) == "it is another version's"
    kept.write(tmp_path, report, kept.TITLE)
    assert kept.read(tmp_path, fresh=False) == report
    (tmp_path / JSON).write_text(json.dumps({**report, "sections": 3}))
    with pytest.raises(InputError, match="damaged"):
        kept.read(tmp_path, fresh=False)
