"""A seeded fuzzer of every file that the program reads.

    python tests/fuzz.py [--reader NAME ...] [--inputs N] [--minutes M] [--seed S]
                         [--first I] [--keep DIR] [--seeds DIR] [--jobs N]

People download models from strangers: each file of them, damaged or hostile, is to end
in a result or in an InputError of one line. Anything else is a fault: another
exception, a crash, more than 10 s of computing or 1 GB of memory, a file written
outside the output folder. Inputs are real files with their bytes or their meaning
changed; number i of a reader and a seed is always the same.

Each input is read in a process of its own, forked from one that has imported what it
needs and computed nothing: threads do not survive a fork.
"""

import os

# Before the libraries that read them, as in conftest.py.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


import argparse
import gc
import importlib
import json
import math
import re
import resource
import select
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from random import Random
from typing import Any, ClassVar

import msgspec
from mutations import (
    REFUSE,
    SECRET,
    TEXTS,
    make_config,
    make_generation,
    make_index,
    make_npz,
    make_pickle,
    make_safetensors,
    make_spiece,
    make_tokenizer,
    make_tokenizer_config,
    make_torch_legacy,
    make_torch_zip,
    seeds,
)

from system.errors import InputError, one_line
from text import confined, saving

ROOT = Path(__file__).resolve().parent.parent
CHAT = [{"role": "user", "content": "the cat"}]
_SECRET = "nobody's business"
#: What is said on the pipe when a conversion is complete: its folder stays.
DONE = b"c"
#: Says that there was no memory, whatever the exception was made into.
_NO_MEMORY = re.compile(r"MemoryError|[Aa]llocat|bad_alloc|damaged \(\)")


@dataclass(frozen=True)
class Reader:
    """Which files it starts from, how they are damaged, and what reads them."""

    folder: str  # of the seeds
    make: Callable[[Random, Path], Any]
    run: Callable[[Path, Path], None]  # (the input, where output may go)
    imports: tuple[str, ...] = ("convert", "pair", "checkpoints.torch_file")
    warm: Callable[[Path], None] | None = None  # what else is imported on the way


@dataclass(frozen=True)
class Limits:
    """What a reader may take: seconds of computing and in all, and bytes."""

    cpu: int = 10
    wall: int = 60
    memory: int = 1 << 30


@dataclass
class Record:
    """What came of an input: "ok", "refused", or a kind of fault."""

    reader: str
    number: int
    kind: str
    message: str = ""
    confined: bool = False  # refused only because a process of its own contained it
    seconds: float = 0.0
    megabytes: float = 0.0
    kept: str = ""

    @property
    def fault(self) -> bool:
        return self.kind not in ("ok", "refused")


# What reads them.


def _convert(source: Path, out: Path, **options: Any) -> None:
    import convert

    convert.convert(source, out, **options)
    os.write(Contained.said, DONE)


class Contained:
    """Stands for confined.Confined: this process is confined as it is.

    While a call lasts, the pipe says so: whatever ends the process then would have
    ended the other one, and been an InputError here.
    """

    said: int = -1  # the pipe
    seconds: int = 10
    # Freed with the process: of the other one nobody sees how it ends.
    programs: ClassVar[list] = []

    def __init__(self, module: str, folder: Path):
        self._folder = folder
        opener = importlib.import_module(module).open_folder
        self._program = None
        self._program = self._attempt(opener, folder)
        self.programs.append(self._program)

    def call(self, method: str, *arguments: Any) -> Any:
        method, *arguments = msgspec.json.decode(
            msgspec.json.encode([method, *arguments])
        )
        value = self._attempt(getattr(self._program, method), *arguments)
        return msgspec.json.decode(value)

    def _attempt(self, call: Any, *arguments: Any) -> Any:
        os.write(self.said, b"(")
        confined.limit_seconds(confined.SECONDS)
        try:
            value = call(*arguments)
            value = value if self._program is None else msgspec.json.encode(value)
        except InputError:
            os.write(self.said, b"?")
            raise
        except BaseException as error:
            os.write(self.said, b"!")
            raise InputError(f"{self._folder}: {type(error).__name__}") from None
        confined.limit_seconds(self.seconds)
        os.write(self.said, b")")
        return value


def run_model(folder: Path, _: Path, rules: bool = False) -> None:
    """What main.py does: load, and answer a prompt, by the ``rules`` that the files
    bring."""
    import pair
    from speculation.sampling import Sampling

    confined.Confined = sys.modules["text.tokenizer"].Confined = Contained
    loaded = pair.Pair.load(str(folder), pair.LOOKUP)
    options = {}
    if rules:
        asked = loaded.defaults(TEXTS[0])
        assert all(one_line(line).isprintable() for line in asked.lines(False))
        options["sampling"] = Sampling(**asked.options)
    for special in (False, True):
        answer = loaded.generate(
            TEXTS[0], max_tokens=5, keep_special=special, **options
        )
        json.dumps(answer.finish().text, ensure_ascii=False).encode()


def run_tokenizer(folder: Path, out: Path) -> None:
    from text.tokenizer import TextStream, Tokenizer

    sys.modules["text.tokenizer"].Confined = Contained
    tokenizer = Tokenizer(folder)
    tokenizer.gaps(min(tokenizer.size, 96))
    for each in TEXTS:
        ids = tokenizer.encode(each)
        for shown in (tokenizer.decode, tokenizer.decode_with_special):
            stream = TextStream(shown)
            pieces = [stream.push(token) for token in ids[:20]]
            ("".join(pieces) + stream.finish()).encode()
    run_model(folder, out)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def run_convert(folder: Path, out: Path) -> None:
    """Convert weights; their tokenizer is none of the matter."""

    saving.save_tokenizer = _copy_tokenizer
    _convert(folder, out)


def run_convert_config(folder: Path, out: Path) -> None:
    from checkpoints.config import Quantization

    saving.save_tokenizer = _copy_tokenizer
    _convert(folder, out, quantization=Quantization.choose(group_size=32))
    run_model(out, out)


def run_generation(folder: Path, out: Path) -> None:
    """At conversion and when the model is loaded, whichever folder it is."""
    if (folder / "weights.npz").is_file():
        return run_model(folder, out, rules=True)
    run_convert(folder, out)
    return run_model(out, out, rules=True)


def run_spiece(folder: Path, out: Path) -> None:
    """Convert with the tokenizer, and use both what was there and what came of it."""
    confined.Confined = Contained
    _convert(folder, out)
    pieces = Contained("text.spiece_tokenizer", folder)
    for each in TEXTS:
        for special in (True, False):
            pieces.call("decode", pieces.call("encode", each), special)
    run_model(out, out)


def run_slow_tokenizer(folder: Path, out: Path) -> None:
    """Convert with the tokenizer; through transformers as well, for a chat."""
    confined.Confined = Contained
    _convert(folder, out)
    slow = Contained("text.slow_tokenizer", folder)
    for each in TEXTS:
        slow.call("decode", slow.call("encode", each), True)
    run_model(out, out)
    with suppress(InputError):
        slow.call("encode_chat", CHAT)


def run_pickle(folder: Path, _: Path) -> None:
    """The pickle alone, which may raise what its docstring says; then in files."""
    from checkpoints import torch_file, torch_pickle

    with suppress(torch_pickle.RefusedError, ValueError, KeyError):
        torch_pickle.load((folder / "pickle").read_bytes(), 0)
    refused = None
    for name in ("zip", "legacy"):
        try:
            for tensor in torch_file.read_torch(folder / name).values():
                tensor.bits.tobytes()
        except InputError as error:
            refused = error
    if refused:
        raise refused


def _load_slow(folder: Path) -> None:
    importlib.import_module("text.slow_tokenizer").open_folder(folder).encode("the cat")


_SPIECE = ("convert", "pair", "text.spiece_tokenizer")
_SLOW = (
    "convert",
    "pair",
    "text.slow_tokenizer",
    "sentencepiece.sentencepiece_model_pb2",
)

READERS = {
    "pickle": Reader("pickle", make_pickle, run_pickle, ("checkpoints.torch_file",)),
    "npz": Reader("mlx-f32", make_npz, run_model),
    "npz-bf16": Reader("mlx-bf16", make_npz, run_model),
    "npz-quantized": Reader("mlx-q", make_npz, run_model),
    "config": Reader("mlx-q", make_config, run_model),
    "convert-config": Reader("hf", make_config, run_convert_config),
    "generation-config": Reader("hf", make_generation, run_generation),
    "tokenizer": Reader("mlx-f32", make_tokenizer, run_tokenizer),
    "safetensors": Reader("hf", make_safetensors, run_convert),
    "torch-zip": Reader("hf-zip", make_torch_zip, run_convert),
    "torch-legacy": Reader("hf-legacy", make_torch_legacy, run_convert),
    "safetensors-index": Reader("hf-sharded", make_index, run_convert),
    "torch-index": Reader("hf-bin-sharded", make_index, run_convert),
    "spiece": Reader("spm", make_spiece, run_spiece, _SPIECE),
    # Last: transformers makes every fork after it slower.
    "tokenizer-config": Reader(
        "spm", make_tokenizer_config, run_slow_tokenizer, _SLOW, _load_slow
    ),
}


# The processes.


def run_one(
    name: str, reader: Reader, number: int, seed: int, limits: Limits, keep: Path
) -> Record:
    """Make an input, read it in a process of its own, and judge what came of it."""
    work = keep / f"{name}-{seed}-{number}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    source = work / "in"
    shutil.copytree(seeds() / reader.folder, source)
    (work / SECRET).write_text(_SECRET)
    wish = reader.make(Random(f"{seed}/{name}/{number}"), source)
    before, resident = _snapshot(work), _status("VmRSS")
    began = time.monotonic()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(reader, work, writing, limits)
    os.close(writing)
    said = _listen(reading, limits.wall)
    os.close(reading)
    if said is None:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    record = _judge(name, number, status, said)
    record.seconds = time.monotonic() - began
    scale = 1 << 20 if sys.platform == "darwin" else 1 << 10
    record.megabytes = max(0, usage.ru_maxrss / scale - resident / (1 << 20))
    if record.kind == "ok" and wish == REFUSE:
        record.kind, record.message = "accepted", "what has to be refused was read"
    if any(_SECRET in each.read_text("latin1") for each in work.glob("out/*.json")):
        record.kind, record.message = "accepted", "what lies beside the input was read"
    if record.megabytes > 1.1 * limits.memory / (1 << 20) and not record.confined:
        record.kind = "memory"
    after = _snapshot(work)
    after.pop("log", None)
    if DONE in (said or b"").partition(b"[")[0]:
        after = {k: v for k, v in after.items() if Path(k).parts[0] != "out"}
    changed = {k for k in before.keys() | after if before.get(k) != after.get(k)}
    if record.confined and record.message.startswith("ended by"):
        # The conversion would have gone on, and cleared up.
        changed = {each for each in changed if not each.startswith(".out.partial-")}
    if changed and not record.fault:
        inside = all(Path(each).parts[0] == "in" for each in changed)
        record.kind = "changed input" if inside else "written outside"
        record.message = ", ".join(sorted(changed))[:200]
    if record.fault:
        record.kept = str(work)
    else:
        shutil.rmtree(work)
    return record


def _snapshot(work: Path) -> dict[str, tuple[int, ...]]:
    """All that is there, and enough of each to see that it changed."""
    found = {}
    for folder, folders, files in os.walk(work):
        for name in (*folders, *files):
            path = Path(folder, name)
            its = path.lstat()
            facts = (its.st_mode, its.st_size, its.st_ino, its.st_mtime_ns)
            found[str(path.relative_to(work))] = facts
    return found


def _status(what: str) -> int:
    """A figure of this process's memory in bytes, where Linux tells."""
    with suppress(OSError):
        text = Path("/proc/self/status").read_text()
        return int(re.search(rf"{what}:\s*(\d+)", text)[1]) << 10
    return 0


def _child(reader: Reader, work: Path, pipe: int, limits: Limits) -> None:
    """Read the input and say on the pipe what came of it; this does not return."""
    for stream, path in ((0, Path(os.devnull)), (1, work / "log"), (2, work / "log")):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, stream)
        os.close(opened)
    os.chdir(work)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu, 9 * limits.cpu))
    confined.limit_memory(_status("VmData") + limits.memory)
    Contained.said, Contained.seconds = pipe, limits.cpu
    try:
        reader.run(work / "in", work / "out")
        kind, message = "ok", ""
    except InputError as error:
        kind, message = "refused", str(error)
        line = one_line(message)
        if not line or not line.isprintable():
            kind, message = "not one line", ascii(line)
        elif _NO_MEMORY.search(message):
            kind = "memory"
    except MemoryError as error:
        kind, message = "memory", f"MemoryError: {error} ({_where(error)})"
    except BaseException as error:
        text = one_line(str(error)) if str(error) else ""
        kind = "memory" if _NO_MEMORY.search(text) else "exception"
        message = f"{type(error).__name__}: {text} ({_where(error)})"
    os.write(pipe, json.dumps([kind, message[:900]]).encode())
    os._exit(0)


def _where(error: BaseException) -> str:
    """The program's own line that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if ROOT in Path(frame.filename).parents[:2]:
            return f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"


def _listen(pipe: int, seconds: float) -> bytes | None:
    """All that a process says until it ends; None if it does not."""
    said, until = b"", time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if select.select([pipe], [], [], left)[0]:
            got = os.read(pipe, 1 << 16)
            if not got:
                return said
            said += got
    return None


def _judge(name: str, number: int, status: int, said: bytes | None) -> Record:
    if said is None:
        return Record(name, number, "hang", "it waits, and computes nothing")
    marks = said.partition(b"[")[0]
    # What another process did not survive was an InputError in this one.
    contained = marks.replace(DONE, b"")[-1:] in (b"(", b"!", b"?")
    if os.WIFSIGNALED(status) or b"[" not in said:
        ended = os.waitstatus_to_exitcode(status)
        if contained:
            return Record(name, number, "refused", f"ended by {ended}", True)
        if -ended in (signal.SIGXCPU, signal.SIGKILL):
            return Record(name, number, "hang", "it computes longer than it may")
        return Record(name, number, "crash", f"ended by {ended}")
    kind, message = json.loads(said[len(marks) :])
    if kind == "memory" and contained:
        kind = "refused"
    only = kind == "refused" and marks.replace(DONE, b"")[-1:] == b"!"
    return Record(name, number, kind, message, only)


# The jobs.

_run: Callable[[int], Record]


def _work(number: int) -> Record:
    return _run(number)


def _require_no_threads() -> None:
    """Whatever was computed before would have left some, which no fork has."""
    for _ in range(100):  # those of the pool before are about to end
        if len(list(Path("/proc/self/task").glob("*"))) <= 1:
            return
        time.sleep(0.01)
    raise RuntimeError("something was computed: a fork would lack its threads")


def fuzz(
    readers: Mapping[str, Reader],
    *,
    inputs: int | None = None,
    seconds: float = math.inf,
    seed: int = 0,
    first: int = 0,
    keep: Path,
    jobs: int = 1,
    limits: Limits = Limits(),
) -> dict[str, list[Record]]:
    """Give each reader so many inputs, or as many as it gets through.

    Args:
        seconds: for each reader.
        first: the number of the first input.
        keep: where the faults' inputs stay.
        jobs: how many processes read at a time.
    """
    global _run
    records: dict[str, list[Record]] = {}
    for name, reader in readers.items():
        for module in reader.imports:
            importlib.import_module(module)
        if reader.warm:
            reader.warm(seeds() / reader.folder)
        _require_no_threads()
        gc.freeze()  # a fork that collects garbage copies every page of it

        def run(number: int, name: str = name, reader: Reader = reader) -> Record:
            return run_one(name, reader, number, seed, limits, keep)

        _run = run  # the jobs are forked, and have it
        records[name] = []
        until = time.monotonic() + seconds
        with get_context("fork").Pool(jobs) as pool:
            numbers = count(first) if inputs is None else range(first, first + inputs)
            batch = (4 if inputs is None else 100) * jobs
            while time.monotonic() < until:
                some = [n for n, _ in zip(numbers, range(batch), strict=False)]
                if not some:
                    break
                records[name] += pool.imap_unordered(_work, some)
                numbers = range(some[-1] + 1, first + (inputs or sys.maxsize))
            pool.terminate()
            pool.join()  # its threads are none of the next reader's
    return records


def table(records: Mapping[str, list[Record]], seed: int) -> Iterator[str]:
    """The faults, each with how to have it again, then a line for each reader."""
    for name, its in records.items():
        for record in sorted(its, key=lambda record: record.number):
            if record.fault:
                yield f"{name} {record.number}: {record.kind}: {record.message}"
                yield (
                    f"    {record.kept}: python tests/fuzz.py --reader {name} --seed "
                    f"{seed} --first {record.number} --inputs 1"
                )
    heads = (
        "inputs",
        "ok",
        "refused",
        "confined",
        "faults",
        "slowest s",
        "MB",
        "per s",
    )
    yield f"{'reader':18}" + "".join(f"{head:>10}" for head in heads)
    for name, its in records.items():
        kinds = Counter("fault" if each.fault else each.kind for each in its)
        contained = sum(each.confined for each in its)
        counts = (kinds["ok"], kinds["refused"], contained, kinds["fault"])
        slowest = max((each.seconds for each in its), default=0)
        largest = max((each.megabytes for each in its), default=0)
        rate = len(its) / max(1e-9, sum(each.seconds for each in its))
        yield (
            f"{name:18}{len(its):10}"
            + "".join(f"{n:10}" for n in counts)
            + f"{slowest:10.2f}{largest:10.0f}{rate:10.1f}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--reader", nargs="+", choices=READERS, default=list(READERS), metavar="NAME")
    add("--inputs", type=int, help="for each reader (default: 200)")
    add("--minutes", type=float, help="for all readers together")
    add("--seed", type=int, default=0)
    add("--first", type=int, default=0, help="the number of the first input")
    add("--keep", type=Path, help="where the inputs of faults stay")
    add("--seeds", type=Path, help="the real files: made there, unless it exists")
    add("--jobs", type=int, default=os.cpu_count())
    chosen = parser.parse_args(arguments)
    keep = chosen.keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
    folder = chosen.seeds or Path(tempfile.mkdtemp(prefix="fuzz-seeds-")) / "seeds"
    try:
        if not folder.exists():
            code = (
                "import mutations, pathlib, sys; mutations.make_seeds("
                "pathlib.Path(sys.argv[1]))"
            )
            path = os.pathsep.join((str(ROOT / "tests"), str(ROOT)))
            subprocess.run(
                [sys.executable, "-c", code, str(folder)],
                check=True,
                env=os.environ | {"PYTHONPATH": path},
            )
        os.environ["FUZZ_SEEDS"] = str(folder.resolve())
        inputs = 200 if chosen.inputs is None and not chosen.minutes else chosen.inputs
        share = chosen.minutes * 60 / len(chosen.reader) if chosen.minutes else math.inf
        records = fuzz(
            {name: READERS[name] for name in READERS if name in chosen.reader},
            inputs=inputs,
            seconds=share,
            seed=chosen.seed,
            first=chosen.first,
            keep=keep.resolve(),
            jobs=chosen.jobs,
        )
    finally:
        if not chosen.seeds:
            shutil.rmtree(folder.parent)
    print("\n".join(table(records, chosen.seed)))
    faults = any(record.fault for its in records.values() for record in its)
    if faults:
        print(f"the inputs of the faults are in {keep}")
    elif not chosen.keep:
        shutil.rmtree(keep)
    return int(faults)


if __name__ == "__main__":
    sys.exit(main())
