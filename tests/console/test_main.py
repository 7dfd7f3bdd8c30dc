"""main.py as its user meets it: output, errors, exit status, Ctrl-C and pipes."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG

import convert
import main
from architectures.t5_session import T5Session
from checkpoints import converted
from checkpoints.converted import WEIGHTS
from console import choosing, prompts
from pair import Pair
from speculation.requests import Stats
from speculation.sampling import Sampling
from system.errors import InputError

#: Something that the tiny target answers at length.
PROMPT = "the cat on"


@pytest.fixture(scope="session")
def pair(make):
    """Folders of a target and of a draft that is often right."""
    return make()[2], make(noise=0.05)[2]


def command(*arguments) -> list[str]:
    script = Path(main.__file__)
    return [sys.executable, str(script), *map(str, arguments)]


def models(pair) -> tuple:
    return "--model", pair[0], "--draft-model", pair[1]


def test_text_and_statistics(call, pair):
    flags = [*models(pair), "--prompt", PROMPT, "--max-tokens", 20, "--num-draft", 3]
    status, out, err = call(*flags)
    assert status == 0
    assert out.endswith("\n")
    assert "20 tokens in" in err
    assert "alpha" in err
    plain = call("--model", pair[0], "--draft-model", "none", "--max-tokens", 20)
    again = call(*models(pair), "--regular-decode", "--max-tokens", 20)
    zero = call(*models(pair), "--num-draft", 0, "--max-tokens", 20)
    assert plain[:2] == again[:2] == zero[:2]
    assert "20 tokens in 20 target passes" in plain[2]


def test_json(call, pair):
    status, out, err = call(*models(pair), "--prompt", PROMPT, "--json")
    assert (status, err) == (0, "")
    (line,) = out.splitlines()
    value = json.loads(line)
    assert list(value) == ["prompt", "text", "tokens", "finish_reason", "stats"]
    assert value["prompt"] == PROMPT
    assert value["finish_reason"] in ("eos", "length")
    assert (value["tokens"][-1] == 1) == (value["finish_reason"] == "eos")
    stats = value["stats"]
    assert list(stats) == [
        "new_tokens",
        "rounds",
        "drafted",
        "accepted",
        "alpha",
        "tokens_per_round",
        "accept_histogram",
        "found",
        "found_accepted",
        "encode_seconds",
        "decode_seconds",
        "tokens_per_second",
        "peak_memory_bytes",
    ]
    assert stats["new_tokens"] == len(value["tokens"])
    streamed = call(*models(pair), "--prompt", PROMPT)[1]
    assert streamed == value["text"] + "\n"
    plain = call(*models(pair), "--prompt", PROMPT, "--json", "--regular-decode")[1]
    plain = json.loads(plain)
    assert plain["tokens"] == value["tokens"]
    assert plain["stats"]["alpha"] is None


class Terminal:
    """A stdout that says it is a terminal."""

    def __init__(self, stream):
        self.stream = stream

    def isatty(self):
        return True

    def __getattr__(self, name):
        return getattr(self.stream, name)


def test_color(call, pair, monkeypatch):
    """Green for the draft's tokens in a terminal, and no escape codes elsewhere."""
    arguments = (*models(pair), "--prompt", PROMPT, "--color", "--max-tokens", 40)
    arguments += ("--num-draft", 3)
    plain = call(*arguments)[1]
    assert "\x1b" not in plain
    with monkeypatch.context() as patch:
        patch.setattr(main.sys, "stdout", Terminal(sys.stdout))
        patch.delenv("NO_COLOR", raising=False)
        colored = call(*arguments)[1]
        patch.setenv("NO_COLOR", "1")
        assert call(*arguments)[1] == plain
    assert colored.replace("\x1b[32m", "").replace("\x1b[0m", "") == plain
    assert "\x1b[32m" in colored
    assert colored.rstrip("\n").rfind("\x1b[0m") >= colored.rfind("\x1b[32m")


def test_prompts_from_standard_input(call, pair, monkeypatch):
    """A prompt a line, an answer a line; an undecodable line is an error, an empty one
    is none."""
    arguments = (*models(pair), "--max-tokens", 10)
    alone = [call(*arguments, "--prompt", text)[1] for text in (PROMPT, "é cat")]
    raw = io.BytesIO(f"\r\n{PROMPT}\r\n \né cat\n".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, encoding="ascii"))
    assert call(*arguments, "--prompt", "-")[1] == "".join(alone)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n")))
    one_line(call(*arguments, "--prompt", "-"), "main.py: line 1: ", "UTF-8")


@pytest.fixture
def type_in(monkeypatch):
    """Have standard input be these bytes."""

    def put(raw: bytes) -> None:
        stream = io.TextIOWrapper(io.BytesIO(raw), encoding="ascii")
        monkeypatch.setattr(sys, "stdin", stream)

    return put


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_line_that_cannot_be_answered(call, pair, type_in, flags):
    """It is named, the others are answered as without it, and the status is 2."""
    arguments = (*models(pair), "--max-tokens", 10, "--prompt", "-", *flags)
    type_in(f"{PROMPT}\n\n\xff\nthe cat\n".encode("latin-1"))
    status, out, err = call(*arguments)
    type_in(f"{PROMPT}\nthe cat\n".encode())
    good = call(*arguments)
    assert (status, good[0]) == (2, 0)
    texts = [
        [json.loads(line)["tokens"] for line in lines.splitlines()] if flags else lines
        for lines in (out, good[1])
    ]
    assert texts[0] == texts[1]
    named = [line for line in err.splitlines() if line.startswith("main.py: ")]
    assert named == ["main.py: line 3: the prompt is not valid UTF-8 text"]


@pytest.mark.parametrize(
    "error, message",
    [
        (RuntimeError("[malloc_or_wait] Unable to allocate 9 bytes."), "no memory"),
        (MemoryError(), "no memory"),
        (InputError("the logits are not finite"), "not finite"),
    ],
)
def test_a_line_that_fails_while_it_is_answered(
    call, pair, type_in, monkeypatch, error, message
):
    start = T5Session.start

    def fail(self, prompts):
        if len(prompts[0]) > 5:
            raise error
        return start(self, prompts)

    monkeypatch.setattr(T5Session, "start", fail)
    type_in(b"the cat sat on the cat on\nthe cat\n")
    status, out, err = call(*models(pair), "--prompt", "-", "--max-tokens", 4)
    assert (status, len(out.splitlines())) == (2, 1)
    assert "main.py: line 1: " in err
    assert message in err
    result = call(*models(pair), "--prompt", "the cat sat on the cat on")
    one_line(result, message)


def test_what_concerns_every_line(call, pair, type_in):
    """It is said once, and the run is over."""
    type_in(b"the cat\nthe cat\n")
    flags = ("--prompt", "-", "--suppress-tokens", 999)
    result = call(*models(pair), *flags)
    one_line(result, "main.py: there is no token 999")
    type_in(b"the cat\nthe cat\n")
    one_line(call(*models(pair), "--prompt", "-", "--chat"), "no chat template")


def test_byte_order_marks(call, pair, type_in):
    """One that begins the input is no part of a prompt; UTF-16's is refused."""
    arguments = (*models(pair), "--max-tokens", 5, "--prompt", "-", "--json")
    type_in(b"\xef\xbb\xbfthe cat\r\n\xef\xbb\xbfon\n")
    prompts = [json.loads(line)["prompt"] for line in call(*arguments)[1].splitlines()]
    assert prompts == ["the cat", "\ufeffon"]
    type_in(b"\xef\xbb\xbf\n")
    assert call(*arguments) == (0, "", "")
    for kind in ("utf-16", "utf-16-be"):
        type_in("\ufeffthe\ncat".encode(kind))
        if kind == "utf-16":
            type_in("the\ncat".encode(kind))
        one_line(call(*arguments), "standard input is UTF-16, not UTF-8")


def test_separator(call, pair, type_in, monkeypatch):
    """What a reader needs where answers have line breaks; said once where it does."""
    flags = [*models(pair), "--prompt", "-", "--max-tokens", 2]
    monkeypatch.setattr("text.tokenizer.Tokenizer.decode", lambda *_: "a\nb")

    def outcome(*more):
        type_in(b"the\ncat\n")
        return call(*flags, *more)

    status, out, err = outcome()
    assert (status, out) == (0, "a\nb\na\nb\n")
    assert err.count("--separator") == 1
    for given, meant in (
        (r"\0", "\0"),
        (r"\n--\t", "\n--\t"),
        ("|", "|"),
        (r"\\n", r"\n"),
    ):
        status, out, err = outcome("--separator", given)
        assert (status, out) == (0, f"a\nb{meant}" * 2)
        assert "--separator" not in err
    assert "--separator" not in call(*flags[:-4], "--prompt", "the")[2]
    monkeypatch.setattr("text.tokenizer.Tokenizer.decode", lambda *_: "a b")
    assert "--separator" not in outcome()[2]
    one_line(outcome("--separator", ""), "separator is empty")
    one_line(outcome("--separator", "\udcff"), "UTF-8")
    one_line(outcome("--separator", "x", "--json"), "--separator is for texts")


@pytest.mark.parametrize("name", ["t5-small", "google/flan-t5-xl", "x/madlad400-3b"])
def test_a_t5_that_is_not_converted(call, monkeypatch, name):
    """Said at once: the hub, which may be out of reach, has nothing to add."""

    def asked(*_):
        raise AssertionError

    monkeypatch.setattr("architectures.registry.fetch_causal", asked)
    one_line(call("--model", name, "--prompt", "a"), "convert it first", name)


def test_json_lines_are_lines(call, pair, monkeypatch):
    """Some readers end a line at these: they are written as escapes."""
    monkeypatch.setattr("text.tokenizer.Tokenizer.decode", lambda *_: "a\u2028b\u2029c")
    out = call(*models(pair), "--json", "--prompt", PROMPT, "--max-tokens", 2)[1]
    assert len(out.splitlines()) == 1
    assert "a\u2028b\u2029c" in json.loads(out)["text"]


def test_full_disk(pair):
    """/dev/full takes nothing: one line, no traceback."""
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            command(*models(pair), "--json", "--max-tokens", 3),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1


def test_own_draft(call, pair, monkeypatch, tmp_path):
    """t5-small as the target is not loaded twice to draft for itself."""
    monkeypatch.setattr(converted, "MODELS", tmp_path)
    shutil.copytree(pair[0], tmp_path / "t5-small")
    assert "no draft model" in call("--model", "t5-small", "--max-tokens", 3)[2]


def test_verbose(call, pair):
    err = call(*models(pair), "--verbose")[2]
    assert "MLX" in err
    assert "rounds by draft tokens committed" in err


def test_compare(call, pair):
    """Both ways of decoding are timed, and their texts compared."""
    flags = [*models(pair), "--prompt", PROMPT, "--max-tokens", 12, "--compare"]
    status, out, err = call(*flags)
    assert status == 0
    assert out == call(*flags[:-1])[1]
    assert re.search(r"compared: \d+\.\d\d times as fast .* s\), the same text\n", err)
    assert "another text" in call(*flags, "--delta", 1, "--num-draft", 3)[2]
    for alone in (["--regular-decode"], ["--num-draft", 0], ["--draft-model", "none"]):
        one_line(call(*flags, *alone), "--compare needs a draft")


def test_samples(call, pair):
    """Several answers to a prompt, a line each, and the first of them alone."""
    flags = [*models(pair), "--prompt", PROMPT, "--max-tokens", 9, "--temperature", 1]
    flags += ["--num-draft", 5]
    status, out, err = call(*flags, "--num-samples", 5)
    lines = out.splitlines()
    assert status == 0
    assert len(lines) == 5 and len(set(lines)) > 1
    assert re.search(r"\d+ tokens in \d+ target passes", err)
    assert call(*flags)[1].splitlines() == lines[:1]
    assert call(*flags, "--num-samples", 5, "--seed", 1)[1] != out
    values = call(*flags, "--num-samples", 5, "--json")[1].splitlines()
    values = [json.loads(line) for line in values]
    assert [value["text"] for value in values] == lines
    assert [value["sample"] for value in values] == list(range(5))
    assert "another text" in call(*flags, "--compare")[2]
    assert "the same text" in call(*flags, "--compare", "--seed", 1)[2]


def test_prompts_are_sampled_apart(call, pair, monkeypatch):
    """The same prompt twice is no reason for the same answer twice."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\na\n")))
    flags = [*models(pair), "--prompt", "-", "--max-tokens", 9, "--temperature", 1]
    first, second = call(*flags)[1].splitlines()
    assert first != second


def test_rules_reach_the_loop(call, pair):
    flags = [*models(pair), "--prompt", PROMPT, "--max-tokens", 12, "--json"]
    for rule in (
        ["--repetition-penalty", 3],
        ["--no-repeat-ngram-size", 1],
        ["--suppress-tokens", *range(3, 40)],
        ["--forced-bos-token-id", 50],
    ):
        got = json.loads(call(*flags, *rule)[1])["tokens"]
        assert got != json.loads(call(*flags)[1])["tokens"], rule
    assert got[0] == 50


def test_prompts_that_were_not_typed_are_shown(call, pair, monkeypatch):
    """To a person, that is: a script's stderr has errors and figures alone."""
    assert "> " not in call(*models(pair), "--max-tokens", 2)[2]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert f"> {prompts.EXAMPLE}\n" in call(*models(pair), "--max-tokens", 2)[2]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"cat\n")))
    assert "> cat\n" in call(*models(pair), "--prompt", "-", "--max-tokens", 2)[2]
    assert "> " not in call(*models(pair), "--prompt", "cat", "--max-tokens", 2)[2]


def test_default_models(call, pair, monkeypatch, tmp_path):
    """t5-11b with t5-small once converted; a target of one's own takes t5-small."""
    monkeypatch.setattr(converted, "MODELS", tmp_path / "models")
    status, out, err = call()
    assert (status, out) == (0, "Die Kinder spielen im Garten.\n")
    assert err.startswith("using the bundled pair")
    monkeypatch.setattr(choosing, "BUNDLED", (tmp_path, tmp_path))
    status, _, err = call()
    assert status == 2
    assert "no model is converted yet" in err
    shutil.copytree(pair[0], tmp_path / "models" / "mine")
    status, _, err = call("--model", "mine", "--max-tokens", 4)
    assert status == 0
    assert "no draft model" in err
    shutil.copytree(pair[1], tmp_path / "models" / "t5-small")
    status, _, err = call("--model", "mine", "--max-tokens", 4)
    assert status == 0
    assert "drafting with t5-small" in err
    shutil.copytree(pair[0], tmp_path / "models" / "t5-11b")
    status, _, err = call("--max-tokens", 4)
    assert status == 0
    assert "t5-11b" in err.splitlines()[0]


def test_default_draft_of_another_family(call, pair, make, monkeypatch, tmp_path):
    monkeypatch.setattr(converted, "MODELS", tmp_path)
    other = shutil.copytree(pair[1], tmp_path / "t5-small")
    rename_a_token(other)
    status, _, err = call("--model", pair[0], "--max-tokens", 4)
    assert status == 0
    assert "no draft for this tokenizer" in err


def rename_a_token(folder):
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8").replace('"▁cat"', '"▁dog"')
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def other_tokenizer(pair, tmp_path):
    folder = shutil.copytree(pair[1], tmp_path / "other")
    rename_a_token(folder)
    return folder


@pytest.fixture
def damaged(pair, tmp_path):
    folder = shutil.copytree(pair[0], tmp_path / "damaged")
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: len(raw) // 2])
    return folder


def one_line(result, *words):
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--num-draft", "-1"], ["num-draft", "-1"]),
        (["--num-draft", "many"], ["--num-draft", "many"]),
        (["--delta", "1.5"], ["delta", "1.5"]),
        (["--delta", "-0.5"], ["delta", "-0.5"]),
        (["--delta", "nan"], ["delta", "nan"]),
        (["--max-tokens", "0"], ["max-tokens", "0"]),
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--temperature", "nan"], ["temperature", "nan"]),
        (["--temperature", "1", "--top-k", "-1"], ["top-k", "-1"]),
        (["--temperature", "1", "--top-p", "0"], ["top-p", "0"]),
        (["--temperature", "1", "--top-p", "nan"], ["top-p", "nan"]),
        (["--temperature", "1", "--min-p", "2"], ["min-p", "2"]),
        (["--top-p", "0.9"], ["top-p", "temperature"]),
        (["--num-samples", "0"], ["num-samples", "0"]),
        (["--num-samples", "2"], ["samples are the same"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--coupling", "loose"], ["--coupling", "loose"]),
        (
            ["--coupling", "shared", "--delta", "0.1", "--temperature", "1"],
            ["coupling", "delta", "residual"],
        ),
        (["--suppress-tokens", "3", "96"], ["no token 96", "95"]),
        (["--no-such-flag"], ["--no-such-flag", "--help"]),
        (["--prompt", ""], ["prompt is empty"]),
        (["--prompt", " \n"], ["prompt is empty"]),
        (["--prompt", "cat \udcff"], ["UTF-8"]),
        (["--model", "x" * 300], ["cannot look"]),
        (["--system", "x"], ["--system needs --chat"]),
        (["--keep-turns", "1", "--chat"], ["--keep-turns needs"]),
        (["--keep-turns", "-1", "--chat", "--interactive"], ["keep-turns is -1"]),
    ],
)
def test_bad_flags(call, pair, arguments, words):
    one_line(call(*models(pair), *arguments), *words)


def test_bad_models(call, pair, other_tokenizer, damaged, make, tmp_path):
    none = ["--draft-model", "none"]
    one_line(call("--model", "t5-nowhere"), "convert.py --model t5-nowhere")
    result = call("--model", "nowhere")
    one_line(result, "no model 'nowhere'", "hub cannot be reached")
    assert "convert" not in result[2]
    one_line(call("--model", tmp_path, *none), "holds no weights.npz")
    one_line(call("--model", make()[1], *none), "convert the checkpoint first")
    one_line(call("--model", damaged, *none), WEIGHTS, "convert the model again")
    one_line(
        call("--model", pair[0], "--draft-model", other_tokenizer),
        *("different tokenizers", "token 5 is '▁dog' in one and '▁cat' in the other"),
    )
    one_line(call("--model", pair[0], "--draft-model", "x"), "no model 'x'")


def test_prompt_beyond_the_embedding(call, make, tmp_path):
    """A tokenizer with more ids than rows: sentinels that a model never saw."""
    folder = shutil.copytree(make(vocab_size=40)[2], tmp_path / "short")
    shutil.copy(make()[2] / "tokenizer.json", folder)
    result = call("--model", folder, "--draft-model", "none", "--prompt", "w60 w60")
    one_line(result, "embedding has 40 rows")
    wide = shutil.copytree(make()[2], tmp_path / "wide")
    result = call("--model", wide, "--draft-model", folder)
    one_line(result, "40 embedding rows", "no pair")


def test_long_prompt(call, pair):
    """Longer than any training text, and than any bucket of the position bias."""
    prompt = "the cat " * 700
    status, _, err = call(*models(pair), "--prompt", prompt, "--max-tokens", 5)
    assert status == 0, err


def test_convert_command(call, make, tmp_path):
    source, out = make()[1], tmp_path / "out"
    status, printed, err = call(
        "--model", source, "--output", out, "--dtype", "bfloat16", program=convert
    )
    assert (status, printed) == (0, "")
    assert f"converted into {out}" in err
    one_line(
        call("--model", tmp_path / "x", program=convert), "neither a folder nor a model"
    )
    one_line(call(program=convert), "--model")
    packed = tmp_path / "packed"
    flags = ["--model", source, "--output", packed, "-q", "--q-group-size", 32]
    assert call(*flags, "--q-bits", 8, program=convert)[0] == 0
    noted = json.loads((packed / "config.json").read_text())["quantization"]
    assert noted == {"mode": "affine", "bits": 8, "group_size": 32}
    assert call("--model", packed, "--draft-model", out, "--max-tokens", 3)[0] == 0
    one_line(call(*flags, "--q-bits", 7, program=convert), "q-bits is 7", "2, 3, 4")
    one_line(call("--model", source, "--q-bits", 4, program=convert), "go with -q")
    assert call("--model", out, "--draft-model", "none", "--max-tokens", 3)[0] == 0


def test_many_runs_end_well(pair):
    """A process that exits under MLX's work can abort: status 134, now and then."""
    arguments = command(*models(pair), "--max-tokens", 6, "--json")
    running = [
        subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(6)
    ]
    outputs = [process.communicate(timeout=HANG) for process in running]
    assert [process.returncode for process in running] == [0] * 6, outputs
    assert len({json.loads(out)["text"] for out, _ in outputs}) == 1


def test_ctrl_c_while_streaming(pair):
    """The text so far stays, on a line of its own; status 130; no traceback."""
    process = subprocess.Popen(
        command(
            *models(pair),
            *("--max-tokens", 100_000, "--min-new-tokens", 100_000),
            *("--prompt", PROMPT),
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    first = process.stdout.read(30)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=HANG)
    assert process.returncode == 130, err
    assert first.strip()
    assert rest.endswith(b"\n")
    assert b"Traceback" not in err


def test_closed_pipe_is_quiet(pair):
    """`main.py | head -c 1` ends without a word about the pipe."""
    with subprocess.Popen(
        command(*models(pair), "--max-tokens", 2000, "--prompt", PROMPT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read().decode()
        assert process.wait(timeout=HANG) == 0
    assert "Traceback" not in err
    assert "pipe" not in err.lower()


def test_a_stderr_that_takes_nothing(pair):
    """The answer is what was asked for: it is not given up for a line beside it."""
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            command(*models(pair), "--prompt", PROMPT, "--max-tokens", 3),
            stdout=subprocess.PIPE,
            stderr=full,
            text=True,
        )
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 1


def test_help_needs_no_model(tmp_path):
    result = subprocess.run(
        command("--help"), capture_output=True, text=True, cwd=tmp_path, env=os.environ
    )
    assert result.returncode == 0
    assert "--num-draft" in result.stdout


def test_one_generation_at_a_time(pair):
    """A pair's caches are one generation's; another that begins ends it loudly."""
    both = Pair.load(str(pair[0]), str(pair[1]))
    first, second = both.generate(PROMPT), both.generate(PROMPT)
    next(iter(first))
    next(iter(second))
    with pytest.raises(RuntimeError, match="another generation"):
        first.finish()
    assert second.finish().text == both.generate(PROMPT).finish().text


def test_figures_of_samples_that_were_not_begun():
    """As after Ctrl-C in the first of several."""
    begun = Stats(new_tokens=3, rounds=2, accept_histogram=[1, 1])
    assert Stats.of_batch([begun, Stats()]).accept_histogram == [1, 1]


def test_rows_that_were_decoded_one_after_another():
    rows = [Stats(new_tokens=6, rounds=n, decode_seconds=n) for n in (2, 3)]
    for together, rounds in ((True, 3), (False, 5)):
        whole = Stats.of_batch(rows, together)
        assert (whole.new_tokens, whole.rounds, whole.decode_seconds) == (
            12,
            rounds,
            rounds,
        )


def test_samples_in_any_order(pair):
    """Whichever sample is read first, and however they are mixed."""
    both = Pair.load(str(pair[0]), str(pair[1]))
    options = {"sampling": Sampling(temperature=1.0), "max_tokens": 12, "num_draft": 5}
    texts = [one.finish().text for one in both.samples(PROMPT, 3, **options)]
    first, second, third = both.samples(PROMPT, 3, **options)
    next(iter(second))
    assert [one.finish().text for one in (third, first, second)] == [
        texts[2],
        texts[0],
        texts[1],
    ]
    assert both.generate(PROMPT, **options).finish().text == texts[0]
    first, second = both.samples(" ", 2, **options)
    with pytest.raises(InputError, match="prompt is empty"):
        first.finish()


def feed(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_line_that_never_ends(call, pair, monkeypatch):
    """Named, and not kept; what comes after it is answered."""
    monkeypatch.setattr(prompts, "MOST_CHARACTERS", 50)
    feed(monkeypatch, b"cat\n" + b"x" * 170 + b"\ncat\n" + b"y" * 51)
    status, out, err = call(
        "--model", pair[0], "--prompt", "-", "--max-tokens", 3, "--draft-model", "none"
    )
    assert status == 2
    assert len(out.splitlines()) == 2
    said = [line for line in err.splitlines() if line.startswith("main.py")]
    reason = "it has over 50 characters: shorten it"
    assert said == [f"main.py: line {number}: {reason}" for number in (2, 4)]


def test_a_line_of_just_the_most_characters(monkeypatch):
    monkeypatch.setattr(prompts, "MOST_CHARACTERS", 5)
    feed(monkeypatch, b"abcde\nabc\nabcdef\nabcde")
    monkeypatch.setattr(prompts, "open_input", lambda: None)
    faults = [line.fault is not None for line in prompts.read_prompts("-")]
    assert faults == [False, False, True, False]


def test_utf_16_without_a_mark(call, pair, monkeypatch):
    feed(monkeypatch, "cat\ncat\n".encode("utf-16-le"))
    status, out, err = call("--model", pair[0], "--prompt", "-", "--max-tokens", 3)
    assert (status, out) == (2, "")
    assert "line 1: the prompt has NUL characters in it, as UTF-16 text has" in err


def test_the_mark_of_a_file_on_the_command_line(call, pair):
    """As of a shell's $(cat FILE)."""
    options = ("--model", pair[0], "--max-tokens", 3, "--json")
    _, out, _ = call(*options, "--prompt", "\ufeffcat")
    assert json.loads(out)["prompt"] == "cat"


@pytest.mark.parametrize(
    "flags, reason",
    [
        (("--num-samples", 10**30, "--temperature", 1), "has to be from 1 to 1000"),
        (("--num-samples", 1001, "--temperature", 1), "has to be from 1 to 1000"),
        (("--model=--",), "'--' is no value of --model"),
        (("--temperature", "inf"), "it has to be a number from 0 on"),
    ],
)
def test_numbers_and_values_beyond_all_use(call, flags, reason):
    status, out, err = call(*flags)
    assert (status, out) == (2, "")
    assert reason in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ("--min-new-tokens", 2**31),
        ("--min-new-tokens", 10**30),
        ("--temperature", 0.7, "--top-p", 1e-320),
        ("--repetition-penalty", 1e-320),
        ("--repetition-penalty", 1e300),
    ],
)
def test_numbers_at_the_edge_do_what_they_say(call, pair, flags):
    status, out, _ = call("--model", pair[0], "--prompt", "cat", *flags)
    assert (status, out[-1:]) == (0, "\n")


def test_without_docstrings():
    """As python -OO has it."""
    for program in ("main.py", "convert.py", "benchmark.py"):
        done = subprocess.run(
            [sys.executable, "-OO", Path(main.__file__).with_name(program), "--help"],
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")


ODD_NUMBERS = ["", "many", "2.5", "Auto", "nan", "-1", "9" * 5000]


@pytest.mark.parametrize("number", ODD_NUMBERS, ids=lambda text: text[:9])
def test_odd_numbers_of_draft_tokens(call, pair, number):
    result = call(*models(pair), "--num-draft", number, "--prompt", PROMPT)
    one_line(result, "main.py: ")
    assert "num-draft" in result[2]


def test_auto_is_the_default(call, pair):
    """With it, a number, and lookup before the draft the text is the target's."""
    flags = ["--prompt", PROMPT, "--max-tokens", 20]
    plain = call("--model", pair[0], "--draft-model", "none", *flags)[1]
    for how in (
        [],
        ["--num-draft", "auto"],
        ["--num-draft", "auto", "--lookup"],
        ["--num-draft", 4, "--lookup"],
    ):
        status, out, err = call(*models(pair), *flags, *how)
        assert (status, out) == (0, plain)
        assert "20 tokens in" in err
    alone = ["--model", pair[0], "--draft-model", "prompt-lookup"]
    for how in ([], ["--lookup"], ["--num-draft", "auto"]):
        assert call(*alone, *flags, *how)[:2] == (0, plain)


@pytest.mark.parametrize(
    "alone",
    [["--draft-model", "none"], ["--regular-decode"], ["--num-draft", 0]],
    ids=lambda flags: flags[0],
)
def test_lookup_is_a_draft(call, pair, alone):
    flags = ["--model", pair[0], "--prompt", PROMPT, "--lookup"]
    one_line(call(*flags, *alone), "--lookup drafts")


def test_compare_with_auto_and_lookup(call, pair):
    flags = [*models(pair), "--prompt", PROMPT, "--max-tokens", 12, "--lookup"]
    status, _, err = call(*flags, "--num-draft", "auto", "--compare")
    assert status == 0
    assert re.search(r"compared: \d+\.\d\d times as fast .* s\), the same text\n", err)


def test_json_says_what_was_found(call, pair):
    prompt = "the cat sat on the cat sat on the cat"
    flags = [*models(pair), "--prompt", prompt, "--max-tokens", 60, "--json"]
    flags += ["--num-draft", 4, "--delta", 1]
    stats = json.loads(call(*flags, "--lookup")[1])["stats"]
    assert 0 <= stats["found_accepted"] <= stats["found"] <= stats["drafted"]
    assert stats["found_accepted"] <= stats["accepted"]
    assert json.loads(call(*flags)[1])["stats"]["found"] == 0
    alone = ["--model", pair[0], "--draft-model", "prompt-lookup", *flags[4:]]
    stats = json.loads(call(*alone)[1])["stats"]
    assert stats["found"] == stats["accepted"] == stats["found_accepted"] > 0
