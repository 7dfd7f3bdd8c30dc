"""Every reader takes some dozens of hostile files; the fuzzer sees each fault."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import fuzz
import mutations
import pytest

TESTS = Path(__file__).resolve().parents[1]

#: Inputs for each reader: fewer where transformers reads them, or limits are reached.
INPUTS = {"pickle": 80, "spiece": 8, "tokenizer-config": 8}
MOST = 16
#: Readers that one process has: starting it costs as much as most of the inputs.
GROUPS = [
    ["pickle"],
    ["npz", "npz-bf16", "npz-quantized", "config", "tokenizer"],
    ["convert-config", "generation-config", "safetensors", "torch-zip"],
    ["torch-legacy", "safetensors-index", "torch-index"],
    ["spiece"],
    ["tokenizer-config"],
]

#: Readers that do what none may, by the kind of fault that it is.
FAULTY = """
import json, os, pathlib, signal, sys, mutations
import fuzz
from system.errors import InputError

def raises(source, out):
    raise KeyError("odd")

def crashes(source, out):
    os.kill(os.getpid(), signal.SIGSEGV)

def computes(source, out):
    while True:
        pass

def waits(source, out):
    os.read(os.pipe()[0], 1)

def takes_memory(source, out):
    bytearray(1 << 30)

def hides_that_memory_ends(source, out):
    try:
        bytearray(1 << 30)
    except MemoryError as error:
        raise InputError(f"the file is damaged ({error}): fetch it again")

def writes_outside(source, out):
    (source.parent / "other").write_text("x")
    raise InputError("no")

def leaves_output(source, out):
    out.mkdir()
    raise InputError("no")

def changes_input(source, out):
    (source / "file").write_text("y")

def accepts(source, out):
    pass

def reads(source, out):
    (out).mkdir()
    os.write(fuzz.Contained.said, fuzz.DONE)

def refuses(source, out):
    raise InputError("two\\nlines \\x1b[2J")

def is_ended_where_it_is_confined(source, out):
    os.write(fuzz.Contained.said, b"(")
    os.kill(os.getpid(), signal.SIGSEGV)

def make(rng, folder):
    (folder / "file").write_text("x")

def make_outside(rng, folder):
    return mutations.REFUSE

runs = [raises, crashes, computes, waits, takes_memory, hides_that_memory_ends]
runs += [writes_outside, leaves_output, changes_input, accepts, reads, refuses]
runs += [is_ended_where_it_is_confined]
keep = pathlib.Path(sys.argv[1])
(keep / "seeds" / "x").mkdir(parents=True)
os.environ["FUZZ_SEEDS"] = str(keep / "seeds")
makes = {accepts: make_outside}
readers = {
    run.__name__: fuzz.Reader("x", makes.get(run, make), run, ()) for run in runs
}
limits = fuzz.Limits(cpu=1, wall=6, memory=1 << 28)
records = fuzz.fuzz(readers, inputs=1, keep=keep, limits=limits)
print(json.dumps({name: [its[0].kind, its[0].kept] for name, its in records.items()}))
print("\\n".join(fuzz.table(records, 0)), file=sys.stderr)
"""


@pytest.fixture(scope="session")
def seeds(tmp_path_factory) -> Path:
    """The real files, made once for all readers."""
    folder = tmp_path_factory.mktemp("fuzz") / "seeds"
    mutations.make_seeds(folder)
    return folder


def run(*command: str, **options) -> subprocess.CompletedProcess:
    """Run Python in a process that has no threads yet, as a fork needs it."""
    path = os.pathsep.join((str(TESTS), str(TESTS.parent)))
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


@pytest.mark.parametrize("readers", GROUPS, ids=lambda readers: readers[0])
def test_hostile_files_end_in_a_result_or_in_one_line(readers, seeds, tmp_path):
    inputs = INPUTS.get(readers[0], MOST)
    done = run(
        *(str(TESTS / "fuzz.py"), "--reader", *readers, "--seed", "1", "--jobs", "1"),
        *("--inputs", str(inputs), "--seeds", str(seeds), "--keep", str(tmp_path)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for reader in readers:
        counts = re.search(
            rf"^{reader} +(\d+) +(\d+) +(\d+) +\d+ +(\d+)", done.stdout, re.M
        )
        all_, read, refused, faults = map(int, counts.groups())
        assert all_ == inputs
        assert faults == 0
        assert read
        assert refused


def test_no_reader_is_left_out():
    assert sorted(r for group in GROUPS for r in group) == sorted(fuzz.READERS)


def test_the_fuzzer_sees_every_kind_of_fault(tmp_path):
    done = run("-c", FAULTY, str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name: kind for name, (kind, _) in found.items()} == {
        "raises": "exception",
        "crashes": "crash",
        "computes": "hang",
        "waits": "hang",
        "takes_memory": "memory",
        "hides_that_memory_ends": "memory",
        "writes_outside": "written outside",
        "leaves_output": "written outside",
        "changes_input": "changed input",
        "accepts": "accepted",
        "reads": "ok",
        "refuses": "refused",
        "is_ended_where_it_is_confined": "refused",
    }
    for kind, kept in found.values():
        assert bool(kept) == (kind not in ("ok", "refused"))
        assert not kept or (Path(kept) / "in").is_dir()
    assert "KeyError: 'odd'" in done.stderr
    assert "--reader raises --seed 0 --first 0 --inputs 1" in done.stderr


def test_an_input_is_the_same_every_time(seeds, tmp_path, monkeypatch):
    monkeypatch.setenv("FUZZ_SEEDS", str(seeds))
    for name in ("pickle", "npz", "config", "tokenizer", "spiece"):
        made = []
        for attempt in range(2):
            folder = tmp_path / f"{name}-{attempt}"
            source = seeds / fuzz.READERS[name].folder
            shutil.copytree(source, folder)
            fuzz.READERS[name].make(Random(f"0/{name}/7"), folder)
            files = sorted(folder.iterdir())
            made.append({path.name: path.read_bytes() for path in files})
        assert made[0] == made[1]
