"""--parallel data: several processes answer the lines of one job, which comes to what
one would have written."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue

import pytest
from conftest import HANG
from jobs import FLAGS, models, sentences
from ranked import free_ports

import main
from answering import Generation
from console import outlet, program, shared_job
from console.lines import Line
from console.questions import Tag
from console.shared_job import Desk
from speculation.requests import Stats
from system.errors import InputError, PromptError


@pytest.fixture(scope="session")
def pair(make):
    return make()[2], make(noise=0.05)[2]


class Launched:
    """main.py in several processes, as a launcher begins them, each in a folder of its
    own: rank 0 in that of the output."""

    def __init__(self, folder, *flags, size=2):
        first = free_ports(size + 1)
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{first + n}"] for n in range(size)]))
        command = [sys.executable, main.__file__, "--parallel", "data", "--verbose"]
        self.ranks = []
        for rank in range(size):
            home = folder if rank == 0 else folder / f"home of rank {rank}"
            home.mkdir(exist_ok=True)
            process = subprocess.Popen(
                [*command, *map(str, flags)],
                cwd=home,
                env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
                stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
            )
            self.ranks.append(process)
        self.first = self.ranks[0]
        self.said: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.first.stderr:
            with self._news:
                self.said.append(line.decode().rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self.said.append("(it has ended)")
            self._news.notify_all()

    def until_ready(self):
        """All have loaded their models."""
        with self._news:
            assert self._news.wait_for(
                lambda: (
                    sum(line.endswith("is ready") for line in self.said)
                    == len(self.ranks) - 1
                    or "(it has ended)" in self.said
                ),
                timeout=HANG,
            )
        assert "(it has ended)" not in self.said, self.said

    def ask(self, data: bytes):
        self.first.stdin.write(data)

    def answered(self) -> list[int]:
        """How many lines each has answered."""
        found = re.findall(r"rank \d answered (\d+) of", "\n".join(self.said))
        return [int(count) for count in found]

    def end(self):
        """The exit statuses, and what rank 0 wrote on stdout."""
        self.first.stdin.close()
        out = self.first.stdout.read()
        statuses = [process.wait(timeout=HANG) for process in self.ranks]
        self._reader.join()
        for process in self.ranks[1:]:
            assert process.stdout.read() == b""
            assert b"Traceback" not in process.stderr.read()
            process.stderr.close()
            process.stdout.close()
        self.first.stdout.close()
        self.first.stderr.close()
        assert not any("Traceback" in line for line in self.said), self.said
        return statuses, out


@pytest.fixture
def launch(tmp_path):
    """A function that launches main.py; what is left at the end is killed."""
    launched = []

    def run(*flags, size=2):
        launched.append(Launched(tmp_path, *flags, size=size))
        return launched[-1]

    yield run
    for process in (rank for each in launched for rank in each.ranks):
        process.kill()
        process.wait()


def without_times(text: bytes) -> list[dict]:
    """The objects of lines, without what takes its time; and scores as they are
    whatever is decoded beside."""
    found = [json.loads(line) for line in text.splitlines()]
    for each in found:
        each.pop("stats", None)
        if "score" in each:
            each["score"] = pytest.approx(each["score"], rel=1e-5)
    return found


@pytest.mark.parametrize(
    "size, flags",
    [
        (2, ("--num-draft", 3, "--batch-size", 2)),
        (3, ("--temperature", 1, "--seed", 5, "--batch-size", 1)),
    ],
    ids=["greedy", "sampled"],
)
def test_what_one_would_have_written(call, launch, pair, tmp_path, size, flags):
    """With lines that are nothing, or faulty; and each has answered some."""
    lines = [line.encode() for line in sentences(50)]
    lines[3:3] = [b"", b"a\xff\xfeb", b"  ", b"the\0cat"]
    (tmp_path / "in.txt").write_bytes(b"\n".join(lines))
    flags = (*models(pair), *flags, *FLAGS)
    alone = tmp_path / "alone.txt"
    status, _, err = call(*flags, "--input", tmp_path / "in.txt", "--output", alone)
    assert status == 2
    launched = launch(*flags, "--input", "-", "--output", "out.txt", size=size)
    launched.until_ready()
    launched.ask((tmp_path / "in.txt").read_bytes())
    statuses, out = launched.end()
    assert (statuses, out) == ([2, *[0] * (size - 1)], b"")
    assert (tmp_path / "out.txt").read_bytes() == alone.read_bytes()
    assert not (tmp_path / f"out.txt{outlet.RECORD}").exists()
    for rank in range(1, size):  # it opens nothing
        assert list((tmp_path / f"home of rank {rank}").iterdir()) == []
    answered = launched.answered()
    assert len(answered) == size
    assert min(answered) > 0
    assert sum(answered) == 52  # all but blank ones
    assert "rank 0 answered" in launched.said[-size - 1]
    faults = [line for line in err.splitlines() if line.startswith("main.py:")]
    assert len(faults) == 2
    assert [line for line in launched.said if line.startswith("main.py:")] == faults


def test_json_lines(call, launch, pair, tmp_path):
    """Of a beam search, with its scores; what is answered comes as its line does, not
    later."""
    objects = [
        {"prompt": text, "id": n, "text": "theirs"}
        for n, text in enumerate(sentences(20))
    ]
    objects[4:4] = [{"prompt": None}, {"prompt": "a\ud800b"}, {"question": "é\u2028"}]
    lines = [json.dumps(each).encode() + b"\n" for each in objects]
    (tmp_path / "in.txt").write_bytes(b"".join(lines))
    flags = (*models(pair), "--num-beams", 2, *FLAGS)
    alone = tmp_path / "alone.txt"
    call(*flags, "--input", tmp_path / "in.txt", "--output", alone)
    launched = launch(*flags, "--input", "-")
    launched.until_ready()
    out = b""
    for line in lines[:4]:
        for part in (line[:5], line[5:]):
            launched.ask(part)
        out += launched.first.stdout.readline()
        assert out.endswith(b"\n")
    launched.ask(b"".join(lines[4:]))
    statuses, rest = launched.end()
    assert statuses == [2, 0]
    expected = without_times(alone.read_bytes())
    assert without_times(out + rest) == expected
    assert sum("score" in each for each in expected) == 20
    assert min(launched.answered()) > 0
    assert sum("gives way" in line for line in launched.said) == 1


@pytest.mark.parametrize("dies", [0, 1])
def test_killed_and_gone_on_with(call, launch, pair, tmp_path, dies):
    """Whoever dies, all end; and what is there is gone on with."""
    source, out, alone = (tmp_path / name for name in ("in.txt", "out.txt", "alone"))
    source.write_text("\n".join(sentences(60)) + "\n")
    flags = (*models(pair), "--batch-size", 2, *FLAGS)
    call(*flags, "--input", source, "--output", alone)
    launched = launch(*flags, "--input", "-", "--output", "out.txt")
    launched.until_ready()
    launched.ask(source.read_bytes()[:-1])  # the last one does not end
    stop = threading.Event()
    while not stop.wait(0.005):
        assert launched.first.poll() is None
        if out.read_bytes().count(b"\n") >= 10:
            launched.ranks[dies].kill()
            stop.set()
    statuses, _ = launched.end()
    assert statuses == ([-9, 2] if dies == 0 else [2, -9])
    if dies == 1:
        assert launched.said[-2:] == [
            "main.py: rank 1 (127.0.0.1) is gone, and its part of the work with it",
            "(it has ended)",
        ]
    before = out.read_bytes()
    assert alone.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert before != alone.read_bytes()
    if dies == 0:
        flags = (*flags, "--input", "in.txt", "--output", "out.txt", "--resume")
        again = launch(*flags)  # rank 1 has no such input
        assert again.end() == ([0, 0], b"")
        said = "\n".join(again.said)
    else:  # one process goes on as well
        flags = (*flags, "--input", source, "--output", out, "--resume")
        status, _, said = call(*flags)
        assert status == 0
    assert "of them before" in said
    assert out.read_bytes() == alone.read_bytes()
    assert not Path(f"{out}{outlet.RECORD}").exists()


def test_flags(call, pair, tmp_path):
    """Lines are what is shared; and one process is an ordinary job of its own."""
    status, out, err = call(*models(pair), "--parallel", "data", "--prompt", "the cat")
    assert (status, out) == (2, "")
    assert err == "main.py: --parallel data needs --input, lines to share\n"
    source = tmp_path / "in.txt"
    source.write_text("\n".join(sentences(3)))
    flags = (*models(pair), "--input", source, "--verbose", *FLAGS)
    alone = call(*flags)[1]
    for parallel in ("data", "tensor"):
        status, out, err = call(*flags, "--parallel", parallel)
        assert (status, out) == (0, alone)
        assert "rank" not in err


# Rank 0 alone, with others that are scripts.


class Scripted:
    """Ranks as rank 0 sees them, with one other."""

    rank, size = 0, 2

    def __init__(self, follow):
        self.said, self._answers = SimpleQueue(), SimpleQueue()
        thread = threading.Thread(
            target=follow, args=(self.said.get, self._answers.put), daemon=True
        )
        thread.start()

    def tell_one(self, number, message):
        assert number == 1
        self.said.put(json.loads(json.dumps(message)))

    def hear_from(self, number):
        assert number == 1
        return json.loads(json.dumps(self._answers.get()))


@pytest.fixture
def with_other(call, monkeypatch):
    """A function that runs main.py as rank 0 beside another that follows a script."""

    def run(follow, *flags):
        ranks = Scripted(follow)
        monkeypatch.setattr(program, "meet", lambda name: ranks)
        return call("--parallel", "data", *flags)

    return run


def echoing(hear, say):
    """Answers each line with what it asks."""
    say(None)
    while lines := hear():
        for number, prompt in lines:
            answer = Generation(prompt, str, tag=number)
            answer.text, answer.finish_reason = f"{number}: {prompt}", "eos"
            say(shared_job._sent(answer))


def never_ready(hear, say):
    hear()


def test_who_is_never_ready_is_not_waited_for(with_other, call, pair, tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("\n".join(sentences(40)))
    flags = (*models(pair), "--input", source, *FLAGS)
    assert with_other(never_ready, *flags)[:2] == call(*flags)[:2]


def test_an_input_that_cannot_be_read(with_other, pair, tmp_path, monkeypatch):
    """In another thread than the one that answers: the job ends as it always does."""
    source = tmp_path / "in.txt"
    source.write_text("the cat", encoding="utf-16")
    flags = (*models(pair), "--input", source, *FLAGS)
    status, out, err = with_other(never_ready, *flags)
    assert (status, out) == (2, "")
    assert err == f"main.py: {source} is UTF-16, not UTF-8: convert it (iconv -f " + (
        "UTF-16 -t UTF-8)\n"
    )


def test_a_rank_that_does_not_answer(with_other, pair, tmp_path, monkeypatch):
    """Where its loss is not noticed as that."""

    def gone(self, number):
        raise InputError("rank 1 does not answer")

    monkeypatch.setattr(Scripted, "hear_from", gone)
    source = tmp_path / "in.txt"
    source.write_text("\n".join(sentences(200)))
    flags = (*models(pair), "--input", source, "--batch-size", 1, *FLAGS)
    status, _, err = with_other(never_ready, *flags)
    assert (status, err) == (2, "main.py: rank 1 does not answer\n")


def test_what_a_line_asks_of_the_model_is_said_by_rank_0(
    with_other, call, make, tmp_path
):
    """Of lines that another answers as well."""
    tasks = {"summarization": {"prefix": "summarize: ", "no_repeat_ngram_size": 2}}
    model = tmp_path / "model"
    shutil.copytree(make()[2], model)
    config = json.loads((model / "config.json").read_text())
    config["task_specific_params"] = tasks
    (model / "config.json").write_text(json.dumps(config))
    source = tmp_path / "in.txt"
    lines = [*["the cat"] * 4, "summarize: the cat", "sat"]
    source.write_text("\n".join(lines))
    flags = ("--model", model, "--draft-model", "none", "--input", source)
    flags = (*flags, "--task-defaults", *FLAGS)
    name = "no_repeat_ngram_size"
    alone = [line for line in call(*flags)[2].splitlines() if name in line]
    assert len(alone) == 1
    for follow in (never_ready, echoing):
        err = with_other(follow, *flags)[2].splitlines()
        assert [line for line in err if name in line] == alone


def tag(number, prompt="x", fault=None):
    return Tag(Line(number, prompt, None, fault), prompt.encode(), number)


def finished(text):
    answer = Generation("", str)
    answer.text, answer.finish_reason = text, "eos"
    return answer


@pytest.mark.parametrize("seed", range(20))
def test_each_line_once_and_in_order(seed):
    """Whoever answers when; and who has nothing to do gets what there is."""
    rng = random.Random(seed)
    ranks, rows, count = rng.randint(1, 4), rng.choice([1, 2, 8]), rng.randint(0, 300)
    desk = Desk(ranks, rows)
    coming = deque(range(1, count + 1))
    held = [[] for _ in range(ranks)]
    written, ended = [], False
    while len(written) < count or not ended:
        rank = rng.randrange(ranks)
        match rng.choice(["put", "take", "bring", "write"]):
            case "put" if coming:
                number = coming.popleft()
                desk.put(tag(number, fault="odd" if rng.random() < 0.1 else None))
            case "put" if not ended:
                desk.end()
                ended = True
            case "take":
                try:
                    taken = desk.take(rank)
                except StopIteration:
                    assert ended
                    continue
                if taken:
                    held[rank].append(taken.line.number)
                else:
                    assert held[rank] or not desk._waiting
            case "bring" if held[rank]:
                number = held[rank].pop(rng.randrange(len(held[rank])))
                desk.bring(rank, number, finished(str(number)))
            case "write":
                for who, answer in desk.ready():
                    written.append(answer.tag.line.number)
                    if answer.error:
                        assert (who, str(answer.error)) == (0, "odd")
                    else:
                        assert answer.text == str(written[-1])
    assert written == list(range(1, count + 1))
    assert sum(desk.answered) + desk.faulty == count
    assert not desk.wait(0)


def test_who_is_faster_gets_more_and_nobody_the_rest():
    """Rank 1 answers three lines where rank 0 answers one: both are done at last."""
    desk = Desk(2, 4)
    for number in range(1, 401):
        desk.put(tag(number))
    desk.end()
    held = [deque(), deque()]
    for _ in range(1000):
        for rank in (0, 1):
            while True:
                try:
                    taken = desk.take(rank)
                except StopIteration:
                    break
                if taken is None:
                    break
                held[rank].append(taken.line.number)
            for _ in range((1, 3)[rank]):
                if held[rank]:
                    desk.bring(rank, held[rank].popleft(), finished(""))
        if not (held[0] and held[1]):
            break
    assert len(held[0]) + len(held[1]) <= 5
    assert 280 < desk.answered[1] < 320


@pytest.mark.parametrize("most", ["lines", "bytes"])
def test_nobody_runs_on_without_end(monkeypatch, most):
    """While the first line is not answered, only so many are read."""
    monkeypatch.setattr(shared_job, "WINDOW", 2)
    if most == "bytes":
        monkeypatch.setattr(shared_job, "_MOST_BYTES", 10)
    desk = Desk(2, 1)
    put = []

    def read():
        for number in range(1, 31):
            desk.put(tag(number))
            put.append(number)
        desk.end()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    (first,) = desk.take_some(0)[:1]
    while desk.wait(1) and len(put) < (16 if most == "lines" else 10):
        if (taken := desk.take(1)) is not None:
            desk.bring(1, taken.line.number, finished(""))
    reader.join(timeout=0.05)
    assert len(put) == (16 if most == "lines" else 10)
    assert list(desk.ready()) == []
    desk.bring(0, first.line.number, finished(""))
    written = []
    while desk.wait(1):
        written += [answer.tag.line.number for _, answer in desk.ready()]
        for rank in (0, 1):
            for held in list(desk._held[rank]):
                desk.bring(rank, held, finished(""))
        with suppress(StopIteration):
            desk.take(1)
    assert written == list(range(1, 31))
    reader.join()


def test_an_answer_arrives_as_it_was():
    answer = Generation("a\udcff", str, tag=7, searched=True)
    answer.text, answer.tokens, answer.finish_reason = "é\u2028", [5, 1], "eos"
    answer.score = -1 / 3
    answer.stats = Stats(
        2, 1, 3, 2, 1, [0, 1], 1, 1, [(3, 1), (2, 4)], 0.1, 1 / 3, 10**12
    )
    for error in (None, PromptError(""), InputError("no")):
        answer.error = error
        sent = json.loads(json.dumps(shared_job._sent(answer)))
        line, received = shared_job._received(sent)
        assert line == 7
        assert repr(received.error) in ("None", f"PromptError({str(error)!r})")
        assert (received.error is None) == (error is None)
        assert asdict(received.stats) == asdict(answer.stats)
        for name in ("prompt", "text", "tokens", "finish_reason", "score", "searched"):
            assert getattr(received, name) == getattr(answer, name)
    assert set(vars(received)) == set(vars(answer))
