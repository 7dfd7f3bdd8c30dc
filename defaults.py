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
from typing import Annotated, Any

from msgspec import Meta, Struct

from checkpoint import CONFIG, GENERATION_CONFIG
from config import with_text
from errors import InputError
from files import is_file, read_json, typed

Count = Annotated[int, Meta(ge=0, le=1 << 24)]
Id = Annotated[int, Meta(ge=-1, lt=1 << 31)]
Share = Annotated[float, Meta(ge=0, le=1)]
Word = Annotated[list[Id], Meta(max_length=1 << 8)]


class _Fields(Struct):
    """The fields that this program has a rule for."""

    max_length: Count | None = None
    max_new_tokens: Count | None = None
    min_length: Count | None = None
    min_new_tokens: Count | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1e30)] | None = None
    top_k: Count | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Meta(ge=1e-30, le=1e30)] | None = None
    no_repeat_ngram_size: Count | None = None
    encoder_no_repeat_ngram_size: Count | None = None
    bad_words_ids: Annotated[list[Word], Meta(max_length=1 << 16)] | None = None
    suppress_tokens: list[Id] | None = None
    forced_bos_token_id: Id | None = None


#: The rules of these names that :class:`sampling.Sampling` has, and what is no rule.
_RULES = {
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "forced_bos_token_id": -1,
}
#: How transformers samples where a file says that it is to, and no more.
_SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
#: Fields that change the text and that this program has no rule for; what of theirs is
#: no rule.
_LACKING: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
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


@dataclass(frozen=True)
class Defaults:
    """What is asked for, as this program can do it.

    Attributes:
        where: which file says so, and of which task.
        options: of :class:`sampling.Sampling`, by name.
        max_tokens: the most new tokens; None where nothing is said.
        lacking: fields that this program has nothing for, as they were found.
    """

    where: str
    options: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    lacking: Mapping[str, Any] = field(default_factory=dict)

    def lines(self, applied: bool, given: Collection[str] = ()) -> Iterator[str]:
        """What a person should know of it.

        Args:
            applied: whether it is, or what has to be done about that is said.
            given: options that the user has chosen, which hold.
        """
        rules = {**self.options, "max_tokens": self.max_tokens}
        rules = {k: v for k, v in rules.items() if k not in given and v is not None}
        if rules:
            if applied:
                yield f"as the model's {self.where} asks for: {_listed(rules)}"
            else:
                yield (
                    f"the model's {self.where} asks for {_listed(rules)}, which "
                    f"--task-defaults applies"
                )
        if self.lacking:
            yield (
                f"the model's {self.where} asks for {_listed(self.lacking)}, which "
                f"this program cannot do: the text may be another than its makers'"
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

    def of(self, prompt: str, started: int, vocabulary: int) -> Defaults:
        """What is asked for when a prompt is answered.

        Args:
            prompt: its text; the task is the one with the longest prefix that fits.
            started: how many tokens stand before the first new one, which
                ``max_length`` and ``min_length`` count: 1 for a T5, the prompt's for a
                decoder-only model.
            vocabulary: the number of ids; bans of others are none.

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
        return _defaults(where, values, started, vocabulary)


def _defaults(
    where: str, values: Mapping[str, Any], started: int, vocabulary: int
) -> Defaults:
    fields = typed(values, _Fields, where)
    options = {
        name: value
        for name, none in _RULES.items()
        if (value := getattr(fields, name)) not in (None, none)
    }
    for name in ("bad_words_ids", "suppress_tokens"):
        if name in options:
            options[name] = _emitted(options[name], vocabulary)
            if not options[name]:
                del options[name]
    lacking = _differing(values, _LACKING)
    if "num_beams" in lacking:  # without beams they say nothing
        lacking |= _differing(
            values, {"length_penalty": (1,), "early_stopping": (False,)}
        )
    if fields.do_sample:
        for name, default in _SAMPLED.items():
            value = getattr(fields, name)
            options[name] = default if value is None else value
        if options["temperature"] == 0:
            raise InputError(f"{where} has do_sample with a temperature of 0")
        options = {k: v for k, v in options.items() if not _is_off(k, v)}
        lacking |= _differing(values, _LACKING_SAMPLED)
    least = fields.min_new_tokens or max(0, (fields.min_length or 0) - started)
    if least:
        options["min_new_tokens"] = least
    most = fields.max_new_tokens
    if most is None and fields.max_length is not None:
        most = fields.max_length - started
    if most is not None and most < 1:
        raise InputError(
            f"{where} has a length of {fields.max_length or most}, which leaves no "
            f"token for an answer"
        )
    return Defaults(where, options, most, lacking)


def _is_off(name: str, value: Any) -> bool:
    """Whether a filter of sampling lets everything through."""
    return name != "temperature" and value == {"top_p": 1}.get(name, 0)


def _emitted(named: list[Any], vocabulary: int) -> tuple[Any, ...]:
    """Those ids, or sequences of them, that could come up: others need no ban."""
    if named and isinstance(named[0], list):
        words = [tuple(word) for word in named if word]
        return tuple(w for w in words if all(0 <= t < vocabulary for t in w))
    return tuple(token for token in named if 0 <= token < vocabulary)


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
