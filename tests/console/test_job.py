"""--input: a file of prompts, whatever is in it and whatever happens on the way."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import pytest
from conftest import HANG
from jobs import FLAGS, models, sentences

import main
from console import job, lines, outlet, prompts
from console.arguments import parse_arguments
from console.lines import Asked, LineReader
from pair import Pair
from speculation.sampling import COUPLINGS
from system.errors import InputError


@pytest.fixture(scope="session")
def pair(make):
    return make()[2], make(noise=0.05)[2]


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.txt", tmp_path / "out.txt"


@lru_cache
def loaded(target, draft):
    return Pair.load(str(target), str(draft))


def expected(pair, texts):
    """What each prompt is answered alone."""
    return [loaded(*pair).generate(text, max_tokens=8).finish().text for text in texts]


@pytest.mark.parametrize("size", ["1", "3", "16", "auto"])
@pytest.mark.parametrize("num_draft", [0, 3])
def test_a_line_is_what_it_is_alone(call, pair, files, size, num_draft):
    source, out = files
    texts = sentences(20)
    source.write_text("\n".join(texts))  # no line feed at the end
    status, printed, err = call(
        *models(pair),
        *("--input", source, "--output", out, "--batch-size", size),
        *("--num-draft", num_draft, *FLAGS),
    )
    assert (status, printed) == (0, "")
    assert out.read_text().splitlines() == expected(pair, texts)
    assert out.read_text().endswith("\n")
    assert "20 lines in" in err
    assert not Path(f"{out}{outlet.RECORD}").exists()


def test_to_standard_output(call, pair, files):
    source, _ = files
    texts = sentences(3)
    source.write_text("".join(f"{text}\r\n" for text in texts))
    status, printed, _ = call(*models(pair), "--input", source, *FLAGS)
    assert status == 0
    assert printed.splitlines() == expected(pair, texts)


@pytest.mark.parametrize("drafted", [0, 2])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_sampled_lines_have_streams_of_their_own(call, pair, files, coupling, drafted):
    """The same text whatever the batch size, and another where the line is another."""
    source, out = files
    source.write_text("the cat sat\n" * 12)
    texts = []
    for size in (1, 4, 16):
        call(
            *models(pair),
            *("--input", source, "--output", out, "--batch-size", size),
            *("--temperature", 1, "--seed", 5, "--coupling", coupling),
            *("--num-draft", drafted, *FLAGS),
        )
        texts.append(out.read_text())
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0].splitlines())) > 6


def test_json_lines(call, pair, files):
    """Fields pass through, whatever they are; faults have an object of their own."""
    source, out = files
    objects = [
        {"id": 7, "prompt": "the cat", "tags": ["é", None, 1.5, {"a": 10**40}]},
        {"prompt": "sat on", "id": "x\u2028y", "text": "theirs"},
        {"id": None, "question": "no prompt"},
        {"prompt": None, "id": 1},
        {"prompt": 5, "id": 2},
        {"prompt": "", "id": 3},
        {"prompt": "a\ud800b", "id": "\udfff"},
        {"prompt": "the cat sat"},
    ]
    raw = [json.dumps(each).encode() for each in objects]
    raw[4:4] = [b'{"prompt": "broken', b"[1, 2]", b"", b'{"prompt": "a", "x": 1e999}']
    raw[6:6] = [b"[" * 5000, b'{"prompt": "\xff"}', b'{"prompt": "a", "x": NaN}']
    source.write_bytes(b"\n".join(raw))
    status, _, err = call(*models(pair), "--input", source, "--output", out, *FLAGS)
    assert status == 2
    found = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    assert len(found) == len(raw)
    good = {0: objects[0], 1: objects[1], len(raw) - 1: objects[-1]}
    texts = expected(pair, [each["prompt"] for each in good.values()])
    for (place, fields), text in zip(good.items(), texts, strict=True):
        assert found[place]["text"] == text
        assert {k: v for k, v in found[place].items() if k in fields} == (
            fields | ({"text": text} if "text" in fields else {})
        )
        assert found[place]["finish_reason"] in ("eos", "length")
    for place, value in enumerate(found):
        assert ("error" in value) == (place not in good)
    assert found[2]["id"] is None
    assert found[2]["question"] == "no prompt"
    assert found[-2]["id"] == "\udfff"
    assert f"{len(raw) - 3} could not be answered" in err
    assert "'text' gives way" in err
    assert "Traceback" not in err


def test_a_conversation_is_a_prompt_too(call, pair, files):
    """For models with a chat template; others say so, of that line alone."""
    source, out = files
    source.write_text(
        '{"prompt": [{"role": "user", "content": "the cat"}]}\n{"prompt": "the cat"}\n'
    )
    status, _, _ = call(*models(pair), "--input", source, "--output", out, *FLAGS)
    first, second = map(json.loads, out.read_text().splitlines())
    assert status == 2
    assert "chat template" in first["error"]
    assert [second["text"]] == expected(pair, ["the cat"])


def test_what_is_no_text(call, pair, files, monkeypatch):
    """Bytes, NULs, marks, blank and endless lines: each has its line."""
    source, out = files
    monkeypatch.setattr(prompts, "MOST_CHARACTERS", 60)
    monkeypatch.setattr(lines, "MOST_CHARACTERS", 60)
    monkeypatch.setattr(lines, "_MOST", 240)
    raw = [
        b"\xef\xbb\xbfthe cat",
        b"",
        b"  \t",
        b"a\xff\xfeb",
        b"a\0b",
        b"the " * 1000,
        b"sat on\r",
        "é漢😀".encode(),
    ]
    source.write_bytes(b"\n".join(raw) + b"\n")
    status, _, err = call(*models(pair), "--input", source, "--output", out, *FLAGS)
    assert status == 2
    found = out.read_text().split("\n")
    good = dict(
        zip([0, 6, 7], expected(pair, ["the cat", "sat on", "é漢😀"]), strict=True)
    )
    assert found == [good.get(place, "") for place in range(len(raw))] + [""]
    for number in (4, 5, 6):
        assert f"line {number}:" in err
    for number in (1, 2, 3, 7, 8):
        assert f"line {number}:" not in err
    assert "3 could not be answered" in err
    _, printed, _ = call(*models(pair), "--input", source, "--json", *FLAGS)
    objects = [json.loads(line) for line in printed.splitlines()]
    assert [o.get("text", "") for o in objects] == found[:-1]
    assert ["error" in o for o in objects] == [
        number in (4, 5, 6) for number in range(1, 9)
    ]


@pytest.mark.parametrize("content", [b"", b"\n\n \n"])
def test_nothing_is_asked(call, pair, files, content):
    source, out = files
    source.write_bytes(content)
    assert call(*models(pair), "--input", source, "--output", out)[0] == 0
    assert out.read_bytes() == b"\n" * content.count(b"\n")


def test_utf_16(call, pair, files):
    source, out = files
    source.write_text("the cat", encoding="utf-16")
    status, _, err = call(*models(pair), "--input", source, "--output", out)
    assert (status, "UTF-16" in err) == (2, True)


def test_line_breaks_of_an_answer(call, pair, files, monkeypatch):
    source, out = files
    source.write_text("the cat\n")
    monkeypatch.setattr(
        job.Pair,
        "_decode_with_special",
        lambda self, tokens: "one\r\ntwo\n" if len(tokens) > 1 else "",
    )
    flags = (*models(pair), "--input", source, "--output", out, "--keep-special")
    _, _, err = call(*flags, *FLAGS)
    assert out.read_bytes() == rb"one\r\ntwo\n" + b"\n"
    assert "line breaks" in err
    call(*flags, "--json", *FLAGS)
    assert json.loads(out.read_text())["text"] == "one\r\ntwo\n"


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--output", "x"), "--output needs --input"),
        (("--batch-size", 4), "--batch-size needs --input"),
        (("--resume",), "--resume needs --input"),
        (("--input", "-", "--resume"), "--resume needs --output"),
        (("--input", "-", "--prompt", "x"), "--prompt"),
        (("--input", "-", "--num-samples", 2, "--temperature", 1), "--num-samples"),
        (("--input", "-", "--interactive"), "--interactive"),
        (("--input", "-", "--batch-size", 0), "auto nor a number"),
        (("--input", "-", "--batch-size", "many"), "auto nor a number"),
        (("--input", "missing.txt"), "cannot read missing.txt"),
        (("--input", "."), "a folder"),
        (("--input", "-", "--output", "."), "cannot write .: Is a directory"),
        (("--input", "{source}", "--output", "made"), "no model 'no-such-model'"),
        (("--input", "-", "--output", "no/such/file"), "cannot write no/such/file"),
        (("--input", "-", "--output", "x" * 253), "File name too long"),
        (("--input", "-", "--output", ""), "--output is empty"),
        (("--input", ""), "--input is empty"),
        (("--input", "{source}", "--output", "{source}"), "is the input"),
        (("--input", "{source}.job", "--output", "{source}"), "is the input"),
    ],
)
def test_flags_that_do_not_go_together(call, files, flags, words, monkeypatch):
    """Said before a model is looked at."""
    source, _ = files
    source.write_text("the cat\n")
    Path(f"{source}.job").write_text("the cat\n")
    flags = [str(flag).replace("{source}", str(source)) for flag in flags]
    monkeypatch.chdir(source.parent)
    status, printed, err = call("--model", "no-such-model", *flags)
    assert (status, printed) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert source.read_text() == Path(f"{source}.job").read_text() == "the cat\n"
    assert len(list(source.parent.iterdir())) == 2


def start(pair, source, out, *flags, **options):
    script = Path(main.__file__)
    command = [sys.executable, script, *models(pair), "--input", source]
    command += ["--output", out, *FLAGS, *flags]
    return subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_and_gone_on_with(call, pair, files, blow):
    """At any moment: in the end the output is what it would have been."""
    source, out = files
    source.write_text("\n".join(sentences(60)) + "\n")
    call(*models(pair), "--input", source, "--output", out, *FLAGS)
    whole = out.read_bytes()
    out.unlink()
    had = 0
    for more in (1, 9, 23):
        process = start(pair, source, out, "--resume", "--batch-size", 2)
        while process.poll() is None:
            if out.exists() and out.read_bytes().count(b"\n") >= had + more:
                process.send_signal(blow)
                break
            time.sleep(0.005)
        _, err = process.communicate(timeout=HANG)
        assert process.returncode in (0, 130 if blow == signal.SIGINT else -9)
        assert "Traceback" not in err
        if blow == signal.SIGINT:
            assert out.read_bytes().endswith(b"\n")
        if process.returncode == 0:
            break
        assert whole.startswith(out.read_bytes())
        had = out.read_bytes().count(b"\n")
        with out.open("ab") as file:
            file.write(b"half a li")  # as a kill in the middle of a line leaves it
    status, _, err = call(
        *models(pair), "--input", source, "--output", out, "--resume", *FLAGS
    )
    if process.returncode:
        assert status == 0
        assert "of them before" in err
    assert out.read_bytes() == whole
    assert not Path(f"{out}{outlet.RECORD}").exists()


def test_a_disk_that_is_full(call, pair, files):
    source, out = files
    source.write_text("\n".join(sentences(40)) + "\n")
    call(*models(pair), "--input", source, "--output", out, *FLAGS)
    whole = out.read_bytes()
    out.unlink()

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        size = len(whole) // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    process = start(pair, source, out, preexec_fn=limited)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 2
    (line,) = [each for each in err.splitlines() if each.startswith("main.py:")]
    assert "cannot write" in line
    assert "--resume" in line
    assert "Traceback" not in err
    assert whole.startswith(out.read_bytes())
    status, _, _ = call(
        *models(pair), "--input", source, "--output", out, "--resume", *FLAGS
    )
    assert status == 0
    assert out.read_bytes() == whole


@pytest.fixture
def begun(call, pair, files, monkeypatch):
    """A job of 12 lines of which 5 are answered; and flags that go on with it."""
    source, out = files
    source.write_text("\n".join(sentences(12)) + "\n")
    write, count = outlet.Outlet.write, []

    def stopping(self, *what):
        if len(count) == 5:
            raise KeyboardInterrupt
        count.append(what)
        write(self, *what)

    monkeypatch.setattr(outlet.Outlet, "write", stopping)
    flags = (*models(pair), "--input", source, "--output", out, *FLAGS)
    assert call(*flags)[0] == 130
    monkeypatch.undo()
    assert out.read_bytes().count(b"\n") == 5
    return flags


@pytest.mark.parametrize(
    "more, name",
    [
        (("--num-draft", 2), "num-draft"),
        (("--delta", 0.5), "delta"),
        (("--temperature", 1), "temperature"),
        (("--json",), "json"),
        (("--max-tokens", 9), "max-tokens"),
        (("--keep-special",), "keep-special"),
        (("--regular-decode",), "draft-model"),
    ],
)
def test_going_on_with_another_job(call, begun, files, more, name):
    before = files[1].read_bytes()
    status, _, err = call(*begun, *more, "--resume")
    assert status == 2
    assert name in err
    assert files[1].read_bytes() == before
    assert call(*begun, "--resume", "--batch-size", 3)[0] == 0


def test_going_on_with_another_model(call, begun, files, make):
    other = ("--model", make(seed=9, num_decoder_layers=1)[2], "--draft-model", "none")
    status, _, err = call(*begun, *other, "--resume")
    assert (status, "another" in err) == (2, True)


def test_going_on_with_another_input(call, begun, files):
    source, out = files
    before, texts = out.read_bytes(), source.read_text().splitlines()
    for changed in (["other", *texts[1:]], [*texts[:4], "x", *texts[5:]], texts[:3]):
        source.write_text("\n".join(changed) + "\n")
        status, _, err = call(*begun, "--resume")
        assert status == 2
        assert "another input" in err
        assert out.read_bytes() == before
    # What was not answered yet may have changed.
    source.write_text("\n".join([*texts[:6], "the cat"]) + "\n")
    assert call(*begun, "--resume")[0] == 0
    assert out.read_bytes().count(b"\n") == 7


def test_an_output_that_is_not_to_be_lost(call, begun, files):
    """One that was interrupted is not begun again, nor one that is no job's gone on
    with."""
    _, out = files
    before = out.read_bytes()
    status, _, err = call(*begun)
    assert (status, "--resume" in err) == (2, True)
    assert out.read_bytes() == before
    Path(f"{out}{outlet.RECORD}").unlink()
    status, _, err = call(*begun, "--resume")
    assert (status, "interrupted" in err) == (2, True)
    assert out.read_bytes() == before
    Path(f"{out}{outlet.RECORD}").write_text("what is this\n")
    assert call(*begun, "--resume")[0] == 2
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "record", [b"", b"{}", b"[1]", b"\xff\0", b'{"a job of main.py": {"delta'], ids=str
)
def test_a_record_that_is_torn(call, begun, files, record):
    """What it says nothing of is not begun again, and nothing else is taken for one."""
    _, out = files
    before = out.read_bytes()
    Path(f"{out}{outlet.RECORD}").write_bytes(record)
    assert call(*begun, "--resume")[0] == 2
    assert out.read_bytes() == before
    out.write_bytes(b"")  # nothing is lost, unless the record is somebody else's
    status, _, err = call(*begun, "--resume")
    if outlet._MAGIC.startswith(record[: len(outlet._MAGIC)]):
        assert (status, out.read_bytes().count(b"\n")) == (0, 12)
    else:
        assert (status, "no record of a job" in err) == (2, True)
        assert Path(f"{out}{outlet.RECORD}").read_bytes() == record


@pytest.mark.parametrize("damage", ["edited", "longer", "windows"])
def test_an_output_that_was_changed_since(call, begun, files, damage):
    _, out = files
    texts = out.read_bytes().splitlines(keepends=True)
    changed = {
        "edited": [*texts[:2], b"mine\n", *texts[3:]],
        "longer": [*texts, b"mine\n"],
        "windows": [text.replace(b"\n", b"\r\n") for text in texts],
    }[damage]
    out.write_bytes(b"".join(changed))
    status, _, err = call(*begun, "--resume")
    assert (status, "name another output" in err) == (2, True)
    assert out.read_bytes() == b"".join(changed)


def test_faults_before_an_interruption_count(call, pair, files, monkeypatch):
    source, out = files
    source.write_bytes(b"the cat\na\0b\n" + b"sat on\n" * 6)
    write = outlet.Outlet.write

    def stopping(self, answer, line, failed):
        write(self, answer, line, failed)
        if failed:
            raise KeyboardInterrupt

    monkeypatch.setattr(outlet.Outlet, "write", stopping)
    flags = (*models(pair), "--input", source, "--output", out, *FLAGS)
    assert call(*flags)[0] == 130
    monkeypatch.undo()
    status, _, err = call(*flags, "--resume")
    assert status == 2
    assert "1 could not be answered" in err
    assert "1 of an earlier run" in err


def test_what_is_done_is_done(call, pair, files):
    """A script may ask again; and that is not said of what has other lines."""
    source, out = files
    source.write_text("the cat\nsat\n")
    flags = (*models(pair), "--input", source, "--output", out, *FLAGS)
    assert call(*flags)[0] == 0
    before = out.read_bytes()
    status, _, err = call(*flags, "--resume")
    assert (status, "done" in err) == (0, True)
    source.write_text("the cat\nsat\non\n")
    assert call(*flags, "--resume")[0] == 2
    assert out.read_bytes() == before
    assert sorted(source.parent.iterdir()) == [source, out]


def test_flags_that_say_the_default(call, begun, files):
    more = ("--temperature", 0, "--seed", 0, "--delta", 0, "--num-draft", "auto")
    assert call(*begun, *more, "--resume")[0] == 0


def test_whether_noise_is_shared_belongs_to_a_job(pair):
    """Where anything is drawn: a seed that is given says so."""

    def coupling(*flags):
        flags = map(str, ("--input", "x", "--num-draft", 0, *flags))
        return job.describe(parse_arguments(list(flags)), Pair.load(str(pair[0]))).get(
            "coupling"
        )

    warm = ("--temperature", 1)
    assert [
        coupling("--seed", 0),
        coupling(*warm),
        coupling(*warm, "--seed", 0),
        coupling(*warm, "--seed", 0, "--coupling", "residual"),
        coupling("--task-defaults", "--seed", 0),
    ] == [None, None, "shared", None, "shared"]


def test_two_jobs_at_once(begun, files, call, pair):
    _, out = files
    held = os.open(out, os.O_RDWR)
    outlet.fcntl.flock(held, outlet.fcntl.LOCK_EX)
    status, _, err = call(*begun, "--resume")
    os.close(held)
    assert (status, "another job" in err) == (2, True)


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_two_jobs_at_once_by_two_names(begun, files, call, pair, link):
    _, out = files
    other = out.with_name("other.txt")
    getattr(other, link)(out)
    held = os.open(other, os.O_RDWR)
    outlet.fcntl.flock(held, outlet.fcntl.LOCK_EX)
    before = out.read_bytes(), Path(f"{out}{outlet.RECORD}").read_bytes()
    assert call(*begun, "--resume")[0] == 2
    os.close(held)
    assert before == (out.read_bytes(), Path(f"{out}{outlet.RECORD}").read_bytes())
    if link == "symlink_to":  # one file has one record
        flags = [str(other) if flag == out else flag for flag in begun]
        assert "interrupted" in call(*flags)[2]
        assert call(*flags, "--resume")[0] == 0


def test_a_refused_job_leaves_the_others_record(pair, files, call):
    """While that one loads its models it is empty."""
    source, out = files
    source.write_text("the cat\n")
    first = outlet.Outlet(str(out), False)
    flags = (*models(pair), "--input", source, "--output", out, *FLAGS)
    assert "another job" in call(*flags)[2]
    assert Path(f"{out}{outlet.RECORD}").exists()
    first.close()
    assert list(source.parent.iterdir()) == [source]
    assert call(*flags)[0] == 0


@pytest.mark.parametrize("way", ["input", "record", "output"])
def test_standard_input_that_is_the_output(pair, files, way):
    _, out = files
    name = Path(f"{out}{outlet.RECORD}") if way == "record" else out
    name.write_text("the cat\n")
    command = [sys.executable, Path(main.__file__), *models(pair), "--input", "-"]
    with name.open() as stdin, name.open("a") as stdout:
        done = subprocess.run(
            list(map(str, [*command, "--output", "-" if way == "output" else out])),
            stdin=stdin,
            stdout=stdout if way == "output" else None,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, "is the input" in done.stderr) == (2, True)
    assert name.read_text() == "the cat\n"
    assert list(out.parent.iterdir()) == [name]


def test_what_is_somebodys_stays(call, pair, files):
    """Notes without a line feed, empty files, and a pipe where the record would be."""
    source, out = files
    source.write_text("the cat\n")
    flags = (*models(pair), "--input", source, "--output", out, *FLAGS)
    out.write_text("precious notes")
    assert call(*flags, "--resume")[0] == 2
    assert out.read_text() == "precious notes"
    record = Path(f"{out}{outlet.RECORD}")
    out.write_text("")
    record.mkdir()
    assert call(*flags)[0] == 2
    assert out.exists()
    record.rmdir()
    os.mkfifo(record)
    status, _, err = call(*flags)
    assert (status, "is no file" in err) == (2, True)
    assert out.exists()
    record.unlink()
    assert call("--model", "no-such-model", *flags[2:])[0] == 2
    assert not record.exists()


def test_interrupted_right_after_a_write(call, pair, files, monkeypatch):
    """What is out is not written once more."""
    source, out = files
    source.write_text("\n".join(sentences(6)) + "\n")
    flags = (*models(pair), "--input", source, "--output", out, *FLAGS)
    call(*flags)
    whole = out.read_bytes()
    pwrite = os.pwrite
    for stop in range(2, 14):
        out.unlink()
        count = []

        def stopping(file, data, place, stop=stop, count=count):
            done = pwrite(file, data, place)
            count.append(done)
            if len(count) == stop:
                raise KeyboardInterrupt
            return done

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", stopping)
            assert call(*flags)[0] == (130 if stop < 14 else 0)
        assert whole.startswith(out.read_bytes())
        assert call(*flags, "--resume")[0] == 0
        assert out.read_bytes() == whole


def test_a_job_that_waits_for_its_pipe(pair, files):
    """An output that is a pipe gets what a reader who comes later reads."""
    source, out = files
    source.write_text("the cat\nsat\n")
    os.mkfifo(out)
    process = start(pair, source, out)
    with out.open("rb") as reader:
        assert reader.read().count(b"\n") == 2
    assert process.wait(timeout=HANG) == 0
    process.stderr.close()


def test_a_pipe_that_trickles(pair, tmp_path):
    """Each line is answered when it is there: nobody waits for the next one."""
    script = Path(main.__file__)
    command = [sys.executable, script, *models(pair), "--input", "-", *FLAGS]
    with subprocess.Popen(
        list(map(str, command)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    ) as process:
        for text in ("the cat\n", "sat\n", "on\n"):
            for byte in text.encode():
                process.stdin.write(bytes([byte]))
            assert process.stdout.readline().endswith(b"\n")
        process.stdin.write(b"the")  # no line feed
        process.stdin.close()
        assert process.stdout.read().count(b"\n") == 1
        assert process.wait(timeout=HANG) == 0


def test_nobody_reads_any_more(pair, files):
    source, _ = files
    source.write_text("\n".join(sentences(60)) + "\n")
    command = [sys.executable, Path(main.__file__), *models(pair), "--input", source]
    with subprocess.Popen(
        list(map(str, [*command, "--batch-size", 1, *FLAGS])),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=HANG) == 0
    assert "Traceback" not in err
    assert "Error" not in err


def read_all(reader):
    found = []
    while True:
        try:
            found.append(reader.take(wait=True))
        except StopIteration:
            return found


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 16])
def test_lines_however_they_are_cut(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(lines, "_CHUNK", chunk)
    monkeypatch.setattr(lines, "_MOST", 90)
    rng = random.Random(chunk)
    for _ in range(30):
        whole = [b"x" * rng.choice([0, 1, 5, 90, 91, 150, 400]) for _ in range(8)]
        end = rng.choice([b"", b"\n"])
        data = b"\n".join(whole) + end
        (tmp_path / "in").write_bytes(data)
        reader = LineReader(str(tmp_path / "in"))
        expected = [(w if len(w) <= 90 else w[:80], len(w) > 90) for w in whole]
        if not whole[-1] and not end:
            expected.pop()
        assert read_all(reader) == expected
        assert reader.consumed == len(data)


def test_what_the_first_line_decides():
    asked = Asked("in.txt")
    assert asked.of(b"", False).blank
    assert asked.of(b'{"not": 1}', False).prompt == '{"not": 1}'
    assert asked.of(b'{"prompt": "x"}', False).fields is None
    asked = Asked("in.txt")
    assert asked.of(b'\xef\xbb\xbf{"prompt": "x"}', False).prompt == "x"
    assert asked.of(b"plain", False).fault
    assert Asked("in.JSONL").of(b"plain", False).fault
    with pytest.raises(InputError, match="UTF-16"):
        Asked("in.txt").of(b"\xff\xfea\0", False)


@pytest.mark.parametrize("flags", [[], ["--num-draft", "auto", "--lookup"]], ids=str)
def test_going_on_with_auto(call, pair, files, flags, monkeypatch):
    """What was begun so goes on so, and not with a number, or with lookup or without
    it otherwise."""
    source, out = files
    texts = sentences(12)
    source.write_text("\n".join(texts))
    asked = [*models(pair), "--input", source, "--output", out, *FLAGS]
    write, left = outlet.Outlet.write, [1, 2, 3]

    def stopping(self, *what):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        write(self, *what)

    with monkeypatch.context() as patch:
        patch.setattr(outlet.Outlet, "write", stopping)
        assert call(*asked, *flags)[0] == 130
    assert out.read_bytes().count(b"\n") == 3
    for other in (["--num-draft", 3, *flags[2:]], [] if flags else ["--lookup"]):
        status, _, err = call(*asked, *other, "--resume")
        assert status == 2
        assert ("num-draft" if "--num-draft" in other else "lookup") in err
    assert call(*asked, *flags, "--resume")[0] == 0
    assert out.read_text().splitlines() == expected(pair, texts)
