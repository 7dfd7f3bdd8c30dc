"""Beams on the command line: texts are those of transformers' generate."""

import io
import json
import re
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from conftest import tiny_tokenizer
from test_main import PROMPT, Terminal, models, one_line
from tiny_causal import tiny_causal

import main
from console import outlet, program
from console.arguments import parse_arguments
from speculation.requests import Stats

PROMPTS = (PROMPT, "the cat sat", "a b c", "on the cat", "sat on sat on", "e t")
ENOUGH = ("--max-tokens", 12)


@pytest.fixture(scope="session")
def pair(make):
    return make()[2], make(noise=0.05)[2]


@pytest.fixture(scope="session")
def generate(make):
    """transformers' best texts of a prompt: token ids and scores."""
    oracle, _, _ = make()
    tokenizer = tiny_tokenizer()

    @lru_cache
    def best(prompt, count=1, **options):
        options = {"num_beams": 4, "max_new_tokens": 12, **options}
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad():
            found = oracle.generate(
                ids,
                num_return_sequences=count,
                output_scores=True,
                return_dict_in_generate=True,
                **options,
            )
        texts = []
        for row in found.sequences[:, 1:].tolist():
            end = row.index(1) + 1 if 1 in row else len(row)
            texts.append(row[:end])
        return texts, found.sequences_scores.tolist()

    return best


def text_of(tokens) -> str:
    return tiny_tokenizer().decode(tokens, skip_special_tokens=True)


def values(out) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


WAYS = {
    "beams": ((), {}),
    "longer": (("--length-penalty", 3), {"length_penalty": 3.0}),
    "shorter": (("--length-penalty", -2), {"length_penalty": -2.0}),
    "early": (("--early-stopping",), {"early_stopping": True}),
    "never": (("--early-stopping", "never"), {"early_stopping": "never"}),
    "rules": (
        ("--no-repeat-ngram-size", 2, "--repetition-penalty", 1.5),
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.5},
    ),
}


@pytest.mark.parametrize("drafted", [0, 3, "auto"])
@pytest.mark.parametrize("way", WAYS)
def test_texts_are_generates(call, pair, generate, way, drafted):
    """Best first, each with its number and its score, whatever is drafted."""
    flags, options = WAYS[way]
    status, out, err = call(
        *models(pair),
        *("--prompt", PROMPT, "--json", "--num-draft", drafted, *ENOUGH),
        *("--num-beams", 4, "--num-return-sequences", 4, *flags),
    )
    assert (status, err) == (0, "")
    texts, scores = generate(PROMPT, 4, **options)
    its = values(out)
    assert [one["tokens"] for one in its] == texts
    assert [one["score"] for one in its] == pytest.approx(scores, rel=1e-4)
    assert [one["sample"] for one in its] == [0, 1, 2, 3]
    ends = ["eos" if text[-1] == 1 else "length" for text in texts]
    assert [one["finish_reason"] for one in its] == ends
    lengths = [one["stats"].pop("new_tokens") for one in its]
    assert lengths == list(map(len, texts))
    assert len({one["stats"]["rounds"] for one in its}) == 1  # of one search


def test_a_line_each(call, pair, generate):
    flags = (*models(pair), "--prompt", PROMPT, "--num-beams", 4, *ENOUGH)
    texts = [text_of(tokens) for tokens in generate(PROMPT, 3)[0]]
    status, out, _ = call(*flags, "--num-return-sequences", 3)
    assert (status, out.splitlines()) == (0, texts)
    assert call(*flags)[1].splitlines() == texts[:1]
    (one,) = values(call(*flags, "--json")[1])
    assert list(one) == [
        *("prompt", "text", "tokens", "finish_reason", "score", "stats")
    ]
    greedy = call(*models(pair), "--prompt", PROMPT, *ENOUGH)
    assert call(*flags[:-4], "--num-beams", 1, *ENOUGH)[:2] == greedy[:2]


@pytest.mark.parametrize("count", [1, 3])
def test_figures_are_steps_of_one_search(call, pair, generate, count):
    """However many texts of it are printed."""
    status, _, err = call(
        *models(pair),
        *("--prompt", PROMPT, "--num-draft", 3, "--verbose", *ENOUGH),
        *("--num-beams", 4, "--num-return-sequences", count),
    )
    assert status == 0
    found = re.search(
        r"^(\d+) tokens, by (\d+) steps in (\d+) target passes \((.*) per pass\)\n"
        r"draft: (\d+) of (\d+) judged steps stood \(alpha (.*)\), (\d+) proposed\n",
        err,
        re.MULTILINE,
    )
    tokens, steps, passes, stood, judged, drafted = map(
        int, found.group(1, 2, 3, 5, 6, 8)
    )
    assert tokens == len(generate(PROMPT)[0][0])
    assert steps == stood + passes == 12  # as no search of this prompt ends before
    assert 0 < stood <= judged <= drafted
    assert float(found[4]) == pytest.approx(steps / passes, abs=0.006)
    assert float(found[7]) == pytest.approx(stood / judged, abs=0.006)
    assert "rounds by draft steps committed: [" in err
    assert "draft steps by round: 3" in err


def test_figures_of_a_search_that_was_not_begun(capsys):
    program.report_search(Stats(), False)
    assert "0 steps in 0 target passes (0.00 per pass)" in capsys.readouterr().err


def test_compare(call, pair):
    flags = ("--num-beams", 3, "--num-return-sequences", 2, "--compare", *ENOUGH)
    status, out, err = call(*models(pair), "--prompt", PROMPT, *flags)
    assert (status, len(out.splitlines())) == (0, 2)
    assert re.search(r"compared: \d+\.\d\d times as fast .* s\), the same text\n", err)
    # Rounds are those of one search: one of them takes a step or more.
    rounds = int(re.search(r"of (\d+) rounds", err)[1])
    runs = int(re.search(r"in (\d+) target passes", err)[1])
    assert rounds <= 15 * 12 and runs <= 12


def test_color(call, pair, monkeypatch):
    """Green is what a draft proposed of the best text, as far as that is known."""
    flags = (*models(pair), "--prompt", PROMPT, "--color", "--num-draft", 4, *ENOUGH)
    flags += ("--num-beams", 3, "--num-return-sequences", 2)
    plain = call(*flags)[1]
    with monkeypatch.context() as patch:
        patch.setattr(main.sys, "stdout", Terminal(sys.stdout))
        patch.delenv("NO_COLOR", raising=False)
        colored = call(*flags)[1]
    assert "\x1b[32m" in colored.splitlines()[0]
    assert colored.replace("\x1b[32m", "").replace("\x1b[0m", "") == plain


def type_in(monkeypatch, lines):
    stream = io.TextIOWrapper(io.BytesIO("".join(f"{x}\n" for x in lines).encode()))
    monkeypatch.setattr(sys, "stdin", stream)


@pytest.mark.parametrize("how", [("--prompt", "-"), ("--interactive",)], ids=str)
def test_prompts_that_come_in(call, pair, generate, monkeypatch, how):
    lines = [*PROMPTS[:2], *([":stats"] if how[0] == "--interactive" else [])]
    type_in(monkeypatch, lines)
    flags = ("--num-beams", 4, "--num-return-sequences", 2, *ENOUGH)
    status, out, err = call(*models(pair), *how, *flags)
    expected = [text_of(x) for line in PROMPTS[:2] for x in generate(line, 2)[0]]
    assert status == 0
    assert [line for line in out.splitlines() if line] == expected
    assert "steps in" in err


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--num-beams", 4, "--temperature", 1), ("num-beams", "temperature at 0")),
        (("--num-beams", 4, "--delta", 0.1), ("delta is above 0",)),
        (
            ("--num-beams", 4, "--num-samples", 2),
            ("num-samples is 2", "num-return-sequences"),
        ),
        (("--num-beams", 0), ("num-beams is 0", "from 1 to 64")),
        (("--num-beams", 65), ("num-beams is 65",)),
        (("--num-beams", "x"), ("--num-beams", "'x'")),
        (
            ("--num-beams", 2, "--num-return-sequences", 3),
            ("num-return-sequences is 3", "2 beams"),
        ),
        (("--num-beams", 2, "--num-return-sequences", 0), ("sequences is 0",)),
        (
            ("--num-beams", 2, "--early-stopping", "maybe"),
            ("'maybe' is neither true, false nor never",),
        ),
        (("--num-beams", 2, "--length-penalty", 11), ("length-penalty is 11",)),
        (("--num-beams", 2, "--length-penalty", "nan"), ("length-penalty is nan",)),
        (("--num-beams", 4, "--top-p", 0.5), ("top-p",)),
        (
            ("--num-samples", 2, "--num-return-sequences", 2, "--temperature", 1),
            ("--num-samples are drawn", "give one"),
        ),
        (
            ("--input", "x", "--num-beams", 4, "--num-return-sequences", 2),
            ("no --num-return-sequences",),
        ),
    ],
)
@pytest.mark.parametrize("more", [(), ("--task-defaults",)], ids=["", "defaults"])
def test_what_does_not_go_together(call, monkeypatch, flags, words, more):
    """Said before a model is loaded, whatever its files ask for."""

    def load(*_, **__):
        raise AssertionError

    monkeypatch.setattr(program, "choose_pair", load)
    one_line(call(*flags, *more), "main.py: ", *words)


@pytest.mark.parametrize(
    "flags",
    [
        ("--num-return-sequences", 2),
        ("--length-penalty", 2),
        ("--num-beams", 1, "--length-penalty", 2),
        ("--early-stopping",),
        ("--early-stopping", "never"),
    ],
    ids=str,
)
def test_what_needs_beams(call, pair, monkeypatch, flags):
    """Said before a model is loaded, or by one whose files bring none."""
    name = flags[-2 if flags[-1] in (2, "never") else -1].removeprefix("--")
    words = f"main.py: {name} needs num-beams above 1"
    flags = (*models(pair), "--prompt", PROMPT, *flags)
    one_line(call(*flags, "--task-defaults"), words)

    def load(*_, **__):
        raise AssertionError

    monkeypatch.setattr(program, "choose_pair", load)
    one_line(call(*flags), words)


def test_what_says_that_there_are_none(call, pair):
    """As other options it may be said, and asks for nothing."""
    flags = (*models(pair), "--prompt", PROMPT, *ENOUGH)
    nothing = ("--num-return-sequences", 1, "--length-penalty", 1)
    nothing += ("--early-stopping", "false", "--num-beams", 1)
    assert call(*flags, *nothing)[:2] == call(*flags)[:2]


def test_early_stopping_alone_is_true():
    for given, meant in (
        ([], None),
        (["--early-stopping"], True),
        (["--early-stopping", "true"], True),
        (["--early-stopping", "false"], False),
        (["--early-stopping=never", "--json"], "never"),
        (["--early-stopping", "--json"], True),
    ):
        assert repr(parse_arguments(given).early_stopping) == repr(meant)


@pytest.mark.parametrize("more", [(), ("--task-defaults",)], ids=["", "defaults"])
@pytest.mark.parametrize("how", ["--prompt", "--input", "--interactive"])
def test_decoder_only_models_have_none(call, tmp_path, monkeypatch, how, more):
    """Said before anything is answered."""
    tiny_causal("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    source = tmp_path / "in.txt"
    source.write_text(f"{PROMPT}\n")
    type_in(monkeypatch, [PROMPT])
    value = {"--prompt": ["-"], "--input": [source], "--interactive": []}[how]
    flags = ("--model", tmp_path / "model", "--draft-model", "none", how, *value)
    one_line(call(*flags, "--num-beams", 2, *more), "num-beams", "with an encoder")


def test_fewer_texts_than_are_asked_for(call, pair):
    """Where rules leave no more of them: those there are, and a line."""
    ids = [token for token in range(96) if token not in (1, 50)]
    flags = ("--max-tokens", 1, "--suppress-tokens", *ids)
    flags += ("--num-beams", 4, "--num-return-sequences", 4)
    status, out, err = call(*models(pair), "--prompt", PROMPT, "--json", *flags)
    assert status == 2
    assert sorted(one["tokens"] for one in values(out)) == [[1], [50]]
    assert "main.py: there are only 2 texts" in err


@pytest.fixture
def files(tmp_path):
    source, out = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("".join(f"{line}\n" for line in PROMPTS))
    return source, out


@pytest.mark.parametrize("size", [1, 4, "auto"])
@pytest.mark.parametrize("drafted", [0, 3])
def test_a_file(call, pair, generate, files, size, drafted):
    """Several searches at a time, each as it is alone."""
    source, out = files
    status, _, err = call(
        *(*models(pair), "--input", source, "--output", out, "--num-beams", 4),
        *("--batch-size", size, "--num-draft", drafted, *ENOUGH),
    )
    assert (status, "6 lines in" in err) == (0, True)
    expected = [text_of(generate(line)[0][0]) for line in PROMPTS]
    assert out.read_text().splitlines() == expected


def test_scores_in_a_file(call, pair, generate, files):
    """They are the answer's: what the input has under that name gives way."""
    source, _ = files
    objects = [{"prompt": line, "score": "theirs", "id": 1} for line in PROMPTS[:2]]
    objects.append({"prompt": 5, "score": "theirs"})
    source.write_text("".join(f"{json.dumps(each)}\n" for each in objects))
    flags = (*models(pair), "--input", source.rename(f"{source}.jsonl"), *ENOUGH)
    status, printed, err = call(*flags, "--num-beams", 4)
    *found, failed = values(printed)
    assert (status, err.count("field 'score' gives way")) == (2, 1)
    scores = [generate(line)[1][0] for line in PROMPTS[:2]]
    assert [one["score"] for one in found] == pytest.approx(scores, rel=1e-4)
    assert [one["id"] for one in found] == [1, 1] and "score" not in failed
    assert {one["score"] for one in values(call(*flags)[1])} == {"theirs"}


@pytest.fixture
def begun(call, pair, files, monkeypatch):
    """The flags of a job that was interrupted after two of six lines."""
    source, out = files
    write, count = outlet.Outlet.write, []

    def stopping(self, *what):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(what)
        write(self, *what)

    def begin(*more):
        count.clear()
        flags = (*models(pair), "--input", source, "--output", out, *ENOUGH, *more)
        with monkeypatch.context() as patch:
            patch.setattr(outlet.Outlet, "write", stopping)
            assert call(*flags)[0] == 130
        assert out.read_bytes().count(b"\n") == 2
        return flags

    return begin


BEAMS = ("--num-beams", 4, "--length-penalty", 2, "--early-stopping")


@pytest.mark.parametrize(
    "more, name",
    [
        (("--num-beams", 3), "num-beams (4)"),
        (("--num-beams", 1, *BEAMS[4:], "false", "--length-penalty", 1), "early-"),
        (("--length-penalty", 1), "length-penalty (2.0)"),
        (("--early-stopping", "never"), "early-stopping (true)"),
        (("--early-stopping", "false"), "early-stopping (true)"),
    ],
)
def test_going_on_with_another_search(call, begun, generate, files, more, name):
    flags = begun(*BEAMS)
    before = files[1].read_bytes()
    status, _, err = call(*flags, *more, "--resume")
    assert status == 2
    assert f"was begun with another {name}" in err
    assert files[1].read_bytes() == before
    assert call(*flags, "--resume", "--batch-size", 3)[0] == 0
    options = {"length_penalty": 2.0, "early_stopping": True}
    expected = [text_of(generate(line, **options)[0][0]) for line in PROMPTS]
    assert files[1].read_text().splitlines() == expected


def test_going_on_without_one(call, begun):
    """What earlier versions began so goes on; also where that there is none is said."""
    flags = begun()
    record = Path(f"{flags[7]}{outlet.RECORD}").read_text().splitlines()[0]
    assert not any(name in record for name in ("beams", "length-p", "early-", "return"))
    status, _, err = call(*flags, "--num-beams", 2, "--resume")
    assert (status, "another num-beams (none)" in err) == (2, True)
    nothing = ("--num-beams", 1, "--length-penalty", 1, "--early-stopping", "false")
    assert call(*flags, *nothing, "--resume")[0] == 0


def test_that_there_is_none_is_an_option(call, begun):
    """Where the model's files may ask for a search."""
    flags = begun("--task-defaults")
    status, _, err = call(*flags, "--num-beams", 1, "--resume")
    assert (status, "another num-beams (none)" in err) == (2, True)
    assert call(*flags, "--resume")[0] == 0
