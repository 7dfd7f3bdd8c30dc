"""What a checkpoint's makers ask for, beside transformers' generate without options."""

import json
import shutil
import sys

import mlx.core as mx
import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from tiny_causal import tiny_causal
from transformers import AutoModelForSeq2SeqLM, GenerationConfig

import convert
from checkpoints import defaults
from checkpoints.defaults import Files
from decoder import Engine
from pair import Pair
from speculation.beams import MOST_BEAMS, MOST_PENALTY, Beams
from speculation.processors import BadWords, Prefix
from speculation.requests import MAX_TOKENS
from speculation.sampling import Sampling
from system import errors
from system.errors import InputError
from system.files import typed

PROMPT = "the cat on the cat"

# Of the length that it takes by itself, and of fields that say nothing as they are.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers")


@pytest.fixture
def asks(make, tmp_path):
    """A function that makes a checkpoint and its conversion with such fields."""

    def build(generation=None, tasks=None, **config):
        _, source, _ = make()
        folder = tmp_path / "asks"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder / "hf")
        path = folder / "hf" / "config.json"
        values = json.loads(path.read_text()) | config
        if tasks:
            values["task_specific_params"] = tasks
        path.write_text(json.dumps(values))
        path = folder / "hf" / "generation_config.json"
        if generation is None:
            path.unlink()
        else:
            values = json.loads(path.read_text()) | generation
            path.write_text(json.dumps(values))
        convert.convert(folder / "hf", folder / "mlx")
        return folder / "hf", folder / "mlx"

    return build


def texts(source, folder, prompt=PROMPT) -> tuple[list[int], list[int]]:
    """What generate writes without an option, and what this program writes."""
    reference = AutoModelForSeq2SeqLM.from_pretrained(source).eval()
    pair = Pair.load(str(folder), "prompt-lookup")
    asked = pair.defaults(prompt)
    answer = pair.generate(
        prompt,
        sampling=Sampling(**asked.options),
        beams=Beams(**asked.beams) if asked.beams else None,
        max_tokens=asked.max_tokens or 20,  # as many as transformers has by itself
    ).finish()
    with torch.no_grad():
        ids = torch.tensor([pair.tokenizer.encode(prompt)])
        return reference.generate(ids)[0, 1:].tolist(), answer.tokens


RULES = {
    "repetition": {"repetition_penalty": 2.5},
    "n-grams": {"no_repeat_ngram_size": 2},
    "the prompt's": {"encoder_no_repeat_ngram_size": 2},
    "suppressed": {"suppress_tokens": [55, 39, 80, 95_000]},
    "forced": {"forced_bos_token_id": 30},
    "most": {"max_length": 6},
    "least is nothing": {"min_length": 18, "min_new_tokens": 0},
    "least is less than nothing": {"min_length": -1},
    "forced, in a list": {"forced_bos_token_id": [30]},
    "greedy, whatever sampling says": {"top_p": 2.0, "top_k": -1, "temperature": -1.0},
    "most new": {"max_new_tokens": 7, "max_length": 90},
    "least": {"min_length": 15, "repetition_penalty": 1.9},
    "least new": {"min_new_tokens": 18, "repetition_penalty": 1.9},
    "greedy": {"temperature": 0.3, "top_p": 0.2, "top_k": 5},
    "nothing": {"num_beams": 1, "length_penalty": 2.0, "do_sample": False},
    "nothing by themselves": {"length_penalty": 99.0, "early_stopping": True},
    "beams": {"num_beams": 3},
    "beams of a length": {"num_beams": 3, "length_penalty": -1.5, "max_length": 14},
    "longer beams": {"num_beams": 4, "length_penalty": 3, "early_stopping": "never"},
    "as T5 summarizes": {
        "num_beams": 4,
        "length_penalty": 2.0,
        "early_stopping": True,
        "min_length": 9,
        "max_length": 18,
        "no_repeat_ngram_size": 3,
    },
    "together": {
        "repetition_penalty": 1.4,
        "bad_words_ids": [[7, 9], [12], [1]],
        "no_repeat_ngram_size": 3,
        "max_length": 30,
        "min_length": 12,
    },
}


@pytest.mark.parametrize("name", RULES)
def test_text_is_generates(asks, name):
    expected, got = texts(*asks(RULES[name]))
    assert got == expected


@pytest.mark.parametrize(
    "name", ["repetition", "most", "forced", "together", "as T5 summarizes"]
)
def test_old_configs_have_them_themselves(asks, name):
    """Read where there is no generation_config.json, as transformers has it."""
    expected, got = texts(*asks(None, **RULES[name]))
    assert got == expected
    _, folder = asks({}, **RULES[name])
    assert Pair.load(str(folder)).defaults(PROMPT) == defaults.Defaults(
        "generation_config.json"
    )


def test_words_that_are_banned(asks):
    """Words of the very text, so that the rule has something to do."""
    plain, _ = texts(*asks({}))
    for words in ([plain[1:3]], [plain[:1], plain[3:6]]):
        expected, got = texts(*asks({"bad_words_ids": words}))
        assert got == expected != plain


def of(folder, prompt=PROMPT, started=1, vocabulary=96, **more):
    return Files.read(folder).of(prompt, started, vocabulary, **more)


def test_sampling_is_asked_for_with_transformers_own_values(asks):
    """The defaults that generate has where a file says no more than do_sample."""
    its = GenerationConfig._get_default_generation_params()
    _, folder = asks({"do_sample": True})
    asked = of(folder)
    assert asked.options == {"temperature": 1.0, "top_k": its["top_k"]}
    assert its["temperature"] == its["top_p"] == 1.0
    fields = {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "min_p": 0.1}
    _, folder = asks({"do_sample": True, "typical_p": 0.3, **fields})
    asked = of(folder)
    del fields["top_k"]
    assert asked.options == fields
    assert asked.lacking == {"typical_p": 0.3}
    _, folder = asks({"typical_p": 0.3, **fields})
    assert of(folder) == defaults.Defaults("generation_config.json")


def test_what_is_lacking_is_named(asks):
    lacking = {
        "num_beam_groups": 4,
        "forced_eos_token_id": 1,
        "sequence_bias": [[[4], -1.0]],
        "stop_strings": ["a"],
        "guidance_scale": 1.5,
    }
    _, folder = asks(lacking)
    asked = of(folder)
    assert asked.lacking == lacking
    assert asked.options == {} and asked.max_tokens is None
    (line,) = asked.lines(applied=True)
    assert "num_beam_groups 4, forced_eos_token_id 1" in line
    assert "sequence_bias (1)" in line
    _, folder = asks(dict.fromkeys(lacking))
    assert not list(of(folder).lines(applied=False))


def test_every_field_of_transformers_is_accounted_for():
    """Rules, what is lacking, and what does not change a text or is read elsewhere."""
    known = {*defaults._RULES, *defaults._LACKING, *defaults._LACKING_SAMPLED}
    known |= {*defaults._LACKING_SEARCHED}
    known |= {"do_sample", *defaults._SAMPLED, *defaults._BEAMS}
    known |= {"max_length", "max_new_tokens", "min_length", "min_new_tokens"}
    known |= {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"}
    silent = {
        *("use_cache", "num_return_sequences", "output_scores", "output_attentions"),
        *("output_hidden_states", "output_logits", "return_dict_in_generate"),
        *("remove_invalid_values", "diversity_penalty"),
    }
    its = GenerationConfig._get_default_generation_params()
    speculation = ("assistant", "lookbehind")
    left = {name for name in its if not any(part in name for part in speculation)}
    assert left <= known | silent


def test_sums_that_are_made_anew_are_named_where_there_are_any(asks):
    """It changes what a search with rules finds, and no other text."""
    wanted = {"renormalize_logits": True, "repetition_penalty": 1.5}
    _, folder = asks(wanted)
    assert not of(folder).lacking
    assert of(folder, given={"num_beams": 4}).lacking == {"renormalize_logits": True}
    _, folder = asks({**wanted, "num_beams": 4})
    assert of(folder).lacking == {"renormalize_logits": True}
    assert not of(folder, given={"num_beams": 1}).lacking


TASKS = {
    "summarization": {
        "early_stopping": True,
        "length_penalty": 2.0,
        "max_length": 20,
        "min_length": 9,
        "no_repeat_ngram_size": 3,
        "num_beams": 4,
        "prefix": "the cat: ",
    },
    "another": {"max_length": 12, "prefix": "the cat: sat "},
    "odd": {"prefix": ["the cat: "]},
    "none": {"prefix": "  ", "max_length": 3},
    "no dictionary": 3,
}


def test_tasks_are_told_by_how_a_prompt_begins(asks):
    _, folder = asks({"repetition_penalty": 1.5, "max_length": 8}, TASKS)
    asked = of(folder, "the cat: on")
    assert asked.where == "config.json, for summarization,"
    assert asked.max_tokens == 19
    assert asked.options == {
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 8,
    }
    assert asked.beams == {
        "num_beams": 4,
        "length_penalty": 2.0,
        "early_stopping": True,
    }
    assert not asked.lacking and not asked.apart
    assert not of(folder, "the cat: sat on").beams
    assert of(folder, "the cat: sat on").max_tokens == 11
    assert of(folder, "a cat: on").max_tokens == 7
    # What counts the prompt, where there is no encoder.
    assert of(folder, "the cat: on", started=6).options["min_new_tokens"] == 3
    assert of(folder, "the cat: on", started=6).max_tokens == 14
    assert of(folder, "the cat: on", started=6).asked["max_length"] == 20
    with pytest.raises(InputError, match="no token for an answer"):
        of(folder, "the cat: on", started=20)


def test_told_once_and_applied_when_asked(call, asks):
    _, folder = asks({"repetition_penalty": 2.5, "max_length": 9, "num_beam_groups": 2})
    flags = ("--model", folder, "--draft-model", "none", "--prompt", PROMPT, "--json")
    status, out, err = call(*flags)
    assert status == 0
    asked, groups = err.splitlines()
    assert "repetition_penalty 2.5, max_length 9, which --task-defaults app" in asked
    assert "num_beam_groups 2" in groups and "cannot" in groups
    assert len(json.loads(out)["tokens"]) > 8
    status, out, err = call(*flags, "--task-defaults")
    assert status == 0
    assert "asks for: repetition_penalty 2.5, max_length 9" in err
    pair = Pair.load(str(folder))
    rules = Sampling(repetition_penalty=2.5)
    expected = pair.generate(PROMPT, sampling=rules, max_tokens=8).finish().tokens
    assert json.loads(out)["tokens"] == expected
    # A flag holds, also where it says what is so without it.
    flags = (*flags, "--task-defaults", "--repetition-penalty", 1)
    status, out, err = call(*flags, "--max-tokens", MAX_TOKENS)
    assert json.loads(out)["tokens"] == pair.generate(PROMPT).finish().tokens
    assert "num_beam_groups 2" in err and "repetition" not in err


def test_sampling_that_is_asked_for(call, asks):
    _, folder = asks({"do_sample": True, "top_p": 0.9})
    flags = ("--model", folder, "--draft-model", "none", "--prompt", PROMPT, "--json")
    status, out, _ = call(*flags, "--task-defaults", "--seed", 3)
    assert status == 0
    rules = Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=3)
    answer = Pair.load(str(folder)).generate(PROMPT, sampling=rules)
    assert json.loads(out)["tokens"] == answer.finish().tokens
    assert call(*flags, "--task-defaults", "--num-samples", 2)[0] == 0
    status, out, _ = call(*flags, "--task-defaults", "--temperature", 0)
    assert status == 0
    assert json.loads(out)["tokens"] == json.loads(call(*flags)[1])["tokens"]
    status, _, err = call(*flags, "--num-samples", 2)
    assert status == 2 and "temperature above 0" in err


SEARCH = {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True}


def test_beams_that_are_asked_for(call, asks):
    """Not applied unless that is asked for; flags take the place of each."""
    _, folder = asks({**SEARCH, "max_new_tokens": 12})
    first = ("--model", folder, "--draft-model", "none", "--prompt", PROMPT, "--json")
    pair = Pair.load(str(folder))

    def expected(**changed):
        beams = Beams(**{**SEARCH, **changed})
        return pair.generate(PROMPT, max_tokens=12, beams=beams).finish().tokens

    status, out, err = call(*first, "--max-tokens", 12)
    assert (status, err.count("\n")) == (0, 1)
    assert "num_beams 3, length_penalty 2, early_stopping True, which --task" in err
    greedy = pair.generate(PROMPT, max_tokens=12).finish().tokens
    assert json.loads(out)["tokens"] == greedy
    flags = (*first, "--task-defaults")
    for more, changed, said in (
        ([], {}, "num_beams 3, length_penalty 2, early_stopping True"),
        (["--num-beams", 2], {"num_beams": 2}, "length_penalty 2, early_stopping True"),
        (["--early-stopping", "false"], {"early_stopping": False}, "_penalty 2\n"),
        (["--length-penalty", -3], {"length_penalty": -3.0}, "3, early_stopping True"),
        (["--num-return-sequences", 1], {}, "early_stopping True"),
    ):
        status, out, err = call(*flags, *more)
        assert (status, err.count("\n"), said in err) == (0, 1, True), (more, err)
        assert json.loads(out)["tokens"] == expected(**changed), more
    status, out, err = call(*flags, "--num-beams", 1)
    assert json.loads(out)["tokens"] == greedy and "beams" not in err
    status, out, _ = call(*flags, "--num-return-sequences", 3)
    assert [json.loads(line)["sample"] for line in out.splitlines()] == [0, 1, 2]
    for more, words in (
        (["--num-return-sequences", 4], "a search with 3 beams has no more"),
        (["--num-samples", 2], "a beam search draws nothing"),
        (["--delta", 0.5], "delta is above 0"),
    ):
        status, out, err = call(*flags, *more)
        assert (status, out) == (2, "") and words in err.splitlines()[-1]


def test_beams_without_a_number_of_them(call, asks):
    """What a file says of a search is so where a flag asks for one."""
    _, folder = asks({"length_penalty": 2.0, "early_stopping": True})
    flags = ("--model", folder, "--draft-model", "none", "--prompt", PROMPT, "--json")
    flags = (*flags, "--task-defaults", "--max-tokens", 12)
    status, out, err = call(*flags)
    assert (status, err) == (0, "")
    status, out, err = call(*flags, "--num-beams", 3)
    assert (status, "length_penalty 2, early_stopping True" in err) == (0, True)
    beams = Beams(**SEARCH)
    answer = Pair.load(str(folder)).generate(PROMPT, max_tokens=12, beams=beams)
    assert json.loads(out)["tokens"] == answer.finish().tokens


def test_beams_and_sampling(call, asks):
    """What asks for the one has it without the other, which is said."""
    _, folder = asks(SEARCH)
    flags = ("--model", folder, "--draft-model", "none", "--prompt", PROMPT, "--json")
    warm = ("--temperature", 1, "--seed", 3)
    whole = "num_beams 3, length_penalty 2, early_stopping True, which this program "
    for more in ([], ["--task-defaults"]):
        status, out, err = call(*flags, *warm, *more)
        assert (status, err.count("\n")) == (0, 1)
        assert whole + "cannot do together with sampling" in err
        rules = Sampling(temperature=1.0, seed=3)
        answer = Pair.load(str(folder)).generate(PROMPT, sampling=rules)
        assert json.loads(out)["tokens"] == answer.finish().tokens
    _, folder = asks({"do_sample": True, "top_k": 7, "num_beams": 3})
    asked = of(folder)
    assert (asked.beams, asked.apart) == ({}, {"num_beams": 3})
    assert asked.options == {"temperature": 1.0, "top_k": 7}
    for given in ({"num_beams": 2}, {"temperature": 0}):
        asked = of(folder, given=given)
        assert asked.options == {}
        assert asked.beams == ({"num_beams": 3} if "temperature" in given else {})
        assert asked.apart == ({} if "temperature" in given else {"do_sample": True})
    flags = ("--model", folder, "--draft-model", "none", "--prompt", PROMPT, "--json")
    status, out, err = call(*flags, "--task-defaults", "--num-beams", 2)
    assert status == 0 and "do_sample True, which this program cannot do tog" in err
    assert "together with beams" in err
    answer = Pair.load(str(folder)).generate(PROMPT, beams=Beams(2)).finish()
    assert json.loads(out)["tokens"] == answer.tokens


def test_lines_that_are_searched_for_and_others(call, asks, tmp_path, monkeypatch):
    """As a task has it: each line of a file by its own rules, and a batch waits for
    the other kind once, not line by line."""
    admit, widths = Engine.admit, []

    def noting(self, request):
        widths.append(request.width)
        return admit(self, request)

    monkeypatch.setattr(Engine, "admit", noting)
    _, folder = asks({}, TASKS)
    lines = ["the cat: on", "on", "the cat: a cat on the cat", "sat on the cat " * 2]
    lines += ["the cat: a b", "the cat " * 5]
    source = tmp_path / "in.txt"
    source.write_text("\n".join(lines))
    flags = ("--model", folder, "--draft-model", "none", "--json", "--task-defaults")
    status, out, _ = call(*flags, "--input", source, "--batch-size", 3)
    assert status == 0
    assert widths == [1, 1, 1, 4, 4, 4]
    found = [json.loads(line) for line in out.splitlines()]
    alone = [json.loads(call(*flags, "--prompt", line)[1]) for line in lines]
    assert [one["tokens"] for one in found] == [one["tokens"] for one in alone]
    assert ["score" in one for one in found] == [":" in line for line in lines]


def test_ranges_are_those_of_a_search():
    """Which is in another room, beside this one."""
    for count in (1, MOST_BEAMS):
        for penalty in (-MOST_PENALTY, MOST_PENALTY):
            values = {"num_beams": count, "length_penalty": penalty}
            typed(values, defaults._Fields, "it")
    for name, value in (
        *(("num_beams", 0), ("num_beams", MOST_BEAMS + 1)),
        *(("length_penalty", each * (MOST_PENALTY + 0.1)) for each in (-1, 1)),
    ):
        with pytest.raises(InputError, match=name):
            typed({name: value}, defaults._Fields, "it")


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"repetition_penalty": "2"}, "repetition_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"bad_words_ids": [3]}, "bad_words_ids"),
        ({"max_length": 1}, "no token for an answer"),
        ({"max_new_tokens": 0, "max_length": 9}, "max_new_tokens of 0"),
        ({"do_sample": True, "temperature": 0}, "temperature"),
        ({"do_sample": 1}, "do_sample"),
        ({"do_sample": True, "top_k": -1}, "top_k"),
        ({"do_sample": True, "top_p": 0}, "top_p"),
        ({"suppress_tokens": "all"}, "suppress_tokens"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 65}, "num_beams"),
        ({"num_beams": "4"}, "num_beams"),
        ({"num_beams": 2, "length_penalty": 11}, "length_penalty"),
        ({"num_beams": 2, "early_stopping": "always"}, "early_stopping"),
        ({"num_beams": 2, "early_stopping": 1}, "early_stopping"),
    ],
)
def test_odd_values_are_named_and_harmless(call, asks, fields, words):
    _, folder = asks(fields)
    flags = ("--model", folder, "--draft-model", "none", "--prompt", PROMPT)
    status, out, err = call(*flags)
    assert status == 0 and out
    assert words in err.splitlines()[0]
    status, out, err = call(*flags, "--task-defaults")
    assert (status, out) == (2, "")
    assert words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "fields, flags",
    [
        ({"repetition_penalty": -1}, ("--repetition-penalty", 1)),
        ({"max_length": 1}, ("--max-tokens", MAX_TOKENS)),
        ({"max_new_tokens": "x"}, ("--max-tokens", MAX_TOKENS)),
        ({"min_length": "x", "min_new_tokens": -3}, ("--min-new-tokens", 0)),
        ({"do_sample": True, "temperature": 0, "top_k": "x"}, ("--temperature", 0)),
        ({"do_sample": True, "top_k": 7, "top_p": 0.8}, ("--temperature", 0)),
        ({"num_beams": "x", "length_penalty": "y"}, ("--num-beams", 1)),
    ],
)
def test_a_flag_takes_the_place_of_whatever_a_file_says(call, asks, fields, flags):
    _, folder = asks(fields)
    first = ("--model", folder, "--draft-model", "none", "--prompt", PROMPT)
    status, out, err = call(*first, "--task-defaults", *flags)
    assert (status, out) == (0, call(*first)[1])
    assert not any(name in err for name in fields)


def test_a_decoder_only_model(call, tmp_path):
    """Lengths count the prompt; the first token is the prompt's, and none is forced;
    what is wrong with a prompt is said once, and of it."""
    reference = tiny_causal("llama")
    reference.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    fields = {"max_length": 14, "forced_bos_token_id": 30, "repetition_penalty": 1.3}
    beams = {"num_beams": 2, "length_penalty": 2.0}  # which it is not searched with
    path.write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 0} | fields))
    reference.generation_config = GenerationConfig.from_pretrained(tmp_path)
    path.write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 0} | fields | beams))
    flags = ("--model", tmp_path, "--draft-model", "none", "--json", "--task-defaults")
    pair = Pair.load(str(tmp_path))
    said = set()
    for prompt in (PROMPT, "the cat", "the cat sat on the"):
        ids = torch.tensor([pair.tokenizer.encode(prompt)])
        with torch.no_grad():
            expected = reference.generate(ids)[0, ids.shape[1] :].tolist()
        status, out, err = call(*flags, "--prompt", prompt)
        assert (status, json.loads(out)["tokens"]) == (0, expected)
        said.add(err)
    (told,) = said
    assert "num_beams 2, length_penalty 2, which this program cannot do: " in told
    assert "for: max_length 14" in told or "repetition_penalty 1.3, max" in told
    long = "the cat sat on " * 9
    status, out, err = call(*flags, "--prompt", long)
    assert status == 2 and "max_length of 14" in err and "--max-tokens" in err
    assert call(*flags, "--prompt", long, "--max-tokens", 3)[0] == 0
    for rest in ([], ["--task-defaults"]):
        status, out, err = call(*flags[:-1], *rest, "--prompt", " ")
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("main.py: the prompt is empty")
    forced = ("--prompt", "the cat", "--forced-bos-token-id", 3)
    status, out, err = call(*flags, *forced)
    assert status == 2 and "models with an encoder" in err


def test_long_bad_words_cost_no_more_than_short_ones(make):
    """A comparison for words of like length: not one for each of their tokens."""
    words = [tuple(3 + (i + k) % 7 for i in range(k)) for k in range(2, 257)]
    rule = BadWords([*words, (5,) * 20_000], 96)
    assert len(rule._longer) < 12
    logits = mx.zeros((1, 2, 96))
    for length in (4, 60):
        tokens = [3 + (i + 60) % 7 for i in range(length)]
        prefix = Prefix(mx.array([tokens]), mx.zeros((1, 2)), mx.zeros((1, 1)))
        got = np.isinf(np.array(rule(logits, prefix)[0]))
        for place in range(2):
            before = tuple(tokens[: length - 1 + place])
            expected = {w[-1] for w in words if before[-len(w) + 1 :] == w[:-1]}
            assert set(np.flatnonzero(got[place]).tolist()) == expected


def test_converting_says_what_a_model_asks_for(asks, tmp_path, monkeypatch, capsys):
    source, _ = asks({"repetition_penalty": 2.5, "num_beams": 3, "num_beam_groups": 3})
    arguments = ["convert.py", "--model", str(source), "--output", str(tmp_path / "o")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert errors.run(convert.main, "convert.py") == 0
    asked, groups, done = capsys.readouterr().err.splitlines()
    assert "repetition_penalty 2.5, num_beams 3" in asked
    assert "num_beam_groups 3" in groups
    assert done.startswith("converted into ")


def test_bad_words_by_their_text(call, make):
    """At the start of a text and after a space; none of it is written."""
    _, _, folder = make()
    flags = ("--model", folder, "--draft-model", "prompt-lookup", "--prompt", PROMPT)
    pair = Pair.load(str(folder))
    before = json.loads(call(*flags, "--json")[1])
    words = [w for w in dict.fromkeys(before["text"].split()) if w.startswith("w")][:2]
    status, out, _ = call(*flags, "--json", "--bad-words", *words)
    assert status == 0
    after = json.loads(out)
    assert after["tokens"] != before["tokens"]
    assert not set(words) & set(after["text"].split())
    ids = tuple(tuple(pair.tokenizer.encode_word(word)) for word in words)
    assert all(len(word) == 1 for word in ids)
    rules = Sampling(bad_words_ids=ids)
    assert after["tokens"] == pair.generate(PROMPT, sampling=rules).finish().tokens
    for word, said in (
        (" ", "empty"),
        ("\udcff", "not valid UTF-8"),
        ("</s>", "no token that could be banned"),
    ):
        status, _, err = call(*flags, "--bad-words", word)
        assert status == 2 and said in err and err.count("\n") == 1
