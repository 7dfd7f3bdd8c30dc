"""What a checkpoint's makers ask of whoever generates with it.

Three places may say: ``generation_config.json``; ``config.json`` where that is missing,
as files of before 2022 have it; and ``task_specific_params`` in ``config.json``, which
transformers' pipelines apply to one task: T5 1.0 has them for prompts that begin with
``summarize: `` and the like. transformers' ``generate`` is the reference for what each
field means.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from checkpoints.config import with_text
from checkpoints.converted import CONFIG, GENERATION_CONFIG
from system.errors import InputError
from system.files import is_file, read_json, typed

Count = Annotated[int, Meta(ge=0, le=1 << 24)]
Id = Annotated[int, Meta(ge=-1, lt=1 << 31)]
Share = Annotated[float, Meta(ge=0, le=1)]
Word = Annotated[list[Id], Meta(max_length=1 << 8)]


class DefaultsError(InputError):
    """What a checkpoint's files ask for is odd."""


class _Fields(Struct):
    """The fields that this program has a rule for."""

    max_length: Count | None = None
    max_new_tokens: Count | None = None
    min_length: Annotated[int, Meta(le=1 << 24)] | None = None
    min_new_tokens: Count | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Meta(ge=1e-30, le=1e30)] | None = None
    top_k: Count | None = None
    top_p: Annotated[float, Meta(ge=1e-30, le=1)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Meta(ge=1e-30, le=1e30)] | None = None
    no_repeat_ngram_size: Count | None = None
    encoder_no_repeat_ngram_size: Count | None = None
    bad_words_ids: Annotated[list[Word], Meta(max_length=1 << 16)] | None = None
    suppress_tokens: list[Id] | None = None
    forced_bos_token_id: Id | Annotated[list[Id], Meta(max_length=1)] | None = None
    num_beams: Annotated[int, Meta(ge=1, le=64)] | None = None
    length_penalty: Annotated[float, Meta(ge=-10, le=10)] | None = None
    early_stopping: bool | Literal["never"] | None = None


#: The rules of these names that :class:`sampling.Sampling` has, and what is no rule.
_RULES = {
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": (),
    "suppress_tokens": (),
    "forced_bos_token_id": -1,
}
#: How transformers samples where a file says that it is to, and no more.
_SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
#: A beam search by the names of :class:`beams.Beams`, and what is none.
_BEAMS = {"num_beams": (1,), "length_penalty": (1,), "early_stopping": (False,)}
#: Fields that change the text and that this program has no rule for; what of theirs is
#: no rule.
_LACKING: dict[str, tuple[Any, ...]] = {
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "encoder_repetition_penalty": (1,),
    "force_words_ids": ([],),
    "constraints": ([],),
    "forced_eos_token_id": (-1,),
    "forced_decoder_ids": ([],),
    "exponential_decay_length_penalty": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "guidance_scale": (1,),
    "watermarking_config": ({},),
    "token_healing": (False,),
    "stop_strings": ("", []),
    "max_time": (),
}
_LACKING_SAMPLED = {
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
#: With rules, a search's sums are others then.
_LACKING_SEARCHED = {"renormalize_logits": (False,)}


@dataclass(frozen=True)
class Defaults:
    """What is asked for, as this program can do it.

    Attributes:
        where: which file says so, and of which task.
        options: of :class:`sampling.Sampling`, by name.
        beams: of :class:`beams.Beams`, likewise.
        max_tokens: the most new tokens; None where nothing is said.
        asked: the fields that these come from, as they were found.
        lacking: fields that this program has nothing for, likewise.
        apart: fields that it does either without sampling or without beams, and that
            the other of them is before.
    """

    where: str
    options: Mapping[str, Any] = field(default_factory=dict)
    beams: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)
    lacking: Mapping[str, Any] = field(default_factory=dict)
    apart: Mapping[str, Any] = field(default_factory=dict)

    def lines(self, applied: bool) -> Iterator[str]:
        """What a person should know of it.

        Args:
            applied: whether it is, or what has to be done about that is said.
        """
        if self.asked and applied:
            yield f"as the model's {self.where} asks for: {_listed(self.asked)}"
        elif self.asked:
            yield (
                f"the model's {self.where} asks for {_listed(self.asked)}, which "
                f"--task-defaults applies"
            )
        other = "sampling" if "num_beams" in self.apart else "beams"
        beside = f" together with {other}"
        for found, what in ((self.lacking, ""), (self.apart, beside)):
            if found:
                yield (
                    f"the model's {self.where} asks for {_listed(found)}, which this "
                    f"program cannot do{what}: the text may be another than its makers'"
                )


@dataclass(frozen=True)
class Files:
    """What a checkpoint's files say, of any prompt and of tasks.

    Attributes:
        where: the file for any prompt.
        values: its fields.
        tasks: the fields of each task by its name; ``prefix`` is how prompts begin.
    """

    where: str
    values: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Files":
        """Read a checkpoint folder, Hugging Face's or converted.

        Raises:
            InputError: a file is damaged.
        """
        config = read_json(folder / CONFIG)
        where, values = GENERATION_CONFIG, {}
        if is_file(folder / GENERATION_CONFIG):
            values = read_json(folder / GENERATION_CONFIG)
        else:
            where = CONFIG
            for part in reversed(with_text(config)):
                values |= part
        tasks = config.get("task_specific_params")
        tasks = tasks if isinstance(tasks, dict) else {}
        return cls(
            where, values, {k: v for k, v in tasks.items() if isinstance(v, dict)}
        )

    def of(
        self,
        prompt: str,
        started: int,
        vocabulary: int,
        given: Mapping[str, Any] = MappingProxyType({}),
        searched: bool = True,
    ) -> Defaults:
        """What is asked for when a prompt is answered.

        Args:
            prompt: its text; the task is the one with the longest prefix that fits.
            started: how many tokens stand before the first new one, which
                ``max_length`` and ``min_length`` count: 1 for a T5, the prompt's for a
                decoder-only model.
            vocabulary: the number of ids; bans of others are none.
            given: what has been chosen, options, beams and ``max_tokens`` by name.
                Fields that it takes the place of are not looked at.
            searched: whether the model's texts may be searched for with beams.

        Raises:
            InputError: a field has an odd value; it is named.
        """
        found = [
            (len(prefix), name)
            for name, its in self.tasks.items()
            if isinstance(prefix := its.get("prefix"), str)
            and prefix.strip()
            and prompt.startswith(prefix)
        ]
        where, values = self.where, self.values
        if found:
            _, task = max(found)
            where = f"{CONFIG}, for {task},"
            values = {**values, **self.tasks[task]}
        unread = set(given)
        if "max_tokens" in given:
            unread |= {"max_length", "max_new_tokens"}
        if "min_new_tokens" in given:
            unread.add("min_length")
        if started != 1:  # generate passes over it
            unread.add("forced_bos_token_id")
        if given.get("temperature") == 0 or values.get("do_sample") in (None, False):
            unread |= {"do_sample", *_SAMPLED}
        if given.get("num_beams", 1) > 1:
            unread |= {*_SAMPLED}
        elif given.get("num_beams", values.get("num_beams")) in (None, 1):
            unread |= {*_BEAMS}  # by themselves they say nothing
        values = {k: v for k, v in values.items() if k not in unread}
        return _defaults(where, values, started, vocabulary, given, searched)


def _defaults(
    where: str,
    values: Mapping[str, Any],
    started: int,
    vocabulary: int,
    given: Mapping[str, Any],
    searched: bool,
) -> Defaults:
    fields = typed(values, _Fields, where)
    found = {name: getattr(fields, name) for name in _RULES}
    if isinstance(found["forced_bos_token_id"], list):
        found["forced_bos_token_id"] = next(iter(found["forced_bos_token_id"]), None)
    for name in ("bad_words_ids", "suppress_tokens"):
        found[name] = _emitted(found[name] or (), vocabulary)
    # Whoever asks for beams has them without sampling.
    sampled = bool(fields.do_sample) and given.get("num_beams", 1) <= 1
    if sampled:
        for name, default in _SAMPLED.items():
            if name not in given:
                value = getattr(fields, name)
                found[name] = default if value is None else value
    nothing = {**_RULES, "top_k": 0, "top_p": 1, "min_p": 0}
    options = {
        name: value
        for name, value in found.items()
        if value is not None and value != nothing.get(name)
    }
    least, most, lengths = _lengths(fields, where, started)
    lacking = _differing(values, _LACKING)
    if sampled:
        lacking |= _differing(values, _LACKING_SAMPLED)
    beams = _differing(values, _BEAMS)
    apart: dict[str, Any] = {}
    if not searched:
        beams, lacking = {}, beams | lacking
    elif sampled or given.get("temperature", 0) > 0:
        beams, apart = {}, beams
    elif fields.do_sample:
        apart = {"do_sample": True}
    if beams or given.get("num_beams", 1) > 1:
        lacking |= _differing(values, _LACKING_SEARCHED)
    asked = options | lengths | beams
    if least:
        options["min_new_tokens"] = least
    return Defaults(where, options, beams, most, asked, lacking, apart)


def _lengths(
    fields: _Fields, where: str, started: int
) -> tuple[int, int | None, dict[str, int]]:
    """The fewest and the most new tokens, and the fields that say so.

    As ``generate`` has it, those of new tokens go before those of all.
    """
    asked = {}
    name = "min_length" if fields.min_new_tokens is None else "min_new_tokens"
    value = getattr(fields, name) or 0
    least = value - started if name == "min_length" else value
    if least > 0:
        asked[name] = value
    name = "max_length" if fields.max_new_tokens is None else "max_new_tokens"
    most = value = getattr(fields, name)
    if value is not None:
        asked[name] = value
        most = value - started if name == "max_length" else value
        if most < 1:
            raise InputError(
                f"{where} asks for a {name} of {value}, which leaves no token for an "
                f"answer after the {started} before it: give --max-tokens"
            )
    return max(0, least), most, asked


def _emitted(named: Collection[Any], vocabulary: int) -> tuple[Any, ...]:
    """Those ids, or sequences of them, that could come up: others need no ban."""
    found = []
    for one in named:
        ids = one if isinstance(one, list) else [one]
        if ids and all(0 <= token < vocabulary for token in ids):
            found.append(tuple(one) if isinstance(one, list) else one)
    return tuple(found)


def _differing(
    values: Mapping[str, Any], none: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """The fields that are there and say something."""
    return {
        name: values[name]
        for name, nothing in none.items()
        if values.get(name) is not None and values[name] not in nothing
    }


def _listed(values: Mapping[str, Any]) -> str:
    def short(value: Any) -> str:
        if isinstance(value, (list, tuple, dict)):
            return f"({len(value)})"
        return f"{value:g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {short(value)}" for name, value in values.items())
