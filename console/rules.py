"""How each prompt is answered, as flags and the model's files have it."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from checkpoints.defaults import DefaultsError
from pair import Pair, require_text
from speculation.beams import Beams
from speculation.requests import DELTA, MAX_TOKENS, check_beams, check_searched
from speculation.sampling import Sampling
from system.errors import InputError, one_line, say
from text.messages import Messages

#: Texts of a prompt; samples are decoded at once.
MOST_TEXTS = 1000

#: What asks for several texts of a prompt: drawn ones, and the best ones of a search.
SAMPLES, SEQUENCES = "num-samples", "num-return-sequences"

#: The options of how a prompt is answered.
OPTIONS = frozenset(
    {"max_tokens", *(each.name for each in (*fields(Sampling), *fields(Beams)))}
)


class Texts(NamedTuple):
    """How many texts a prompt gets, and what asks for them."""

    count: int = 1
    name: str = SAMPLES


class Way(NamedTuple):
    """How a prompt is answered: options of :meth:`pair.Pair.samples`."""

    sampling: Sampling
    max_tokens: int
    beams: Beams | None


ONE = Texts()
_NO_BEAMS = Beams(1)


def read_given(arguments: Namespace) -> dict[str, Any]:
    """The options of how a prompt is answered that flags were given for."""
    given = {k: v for k, v in vars(arguments).items() if k in OPTIONS and v is not None}
    if "suppress_tokens" in given:
        given["suppress_tokens"] = tuple(given["suppress_tokens"])
    return given


def read_texts(arguments: Namespace) -> Texts:
    """How many texts of a prompt the flags ask for.

    Raises:
        InputError: they ask for samples and for those of a search.
    """
    if arguments.num_return_sequences is None:
        return Texts(arguments.num_samples, SAMPLES)
    if arguments.num_samples != 1:
        raise InputError(
            f"--{SAMPLES} are drawn, and --{SEQUENCES} are a beam search's: give one "
            "of them"
        )
    return Texts(arguments.num_return_sequences, SEQUENCES)


def check_given(
    given: Mapping[str, Any], texts: Texts, delta: float, task_defaults: bool
) -> None:
    """See to it that options go together, whatever a model's files ask for.

    Raises:
        InputError: one is out of range, or they do not.
    """
    # What the files ask for may make others go together, but nothing with beams.
    if not task_defaults or given.get("num_beams", 1) != 1:
        read_way(given, texts, delta)


def read_way(options: Mapping[str, Any], texts: Texts, delta: float) -> Way:
    """How a prompt is answered.

    Raises:
        InputError: an option is out of range, or they do not go together.
    """
    count, name = texts
    if not 1 <= count <= MOST_TEXTS:
        raise InputError(f"{name} is {count}: it has to be from 1 to {MOST_TEXTS}")
    sampling = Sampling(**_those_of(Sampling, options))
    sampling.coupling_at(delta)  # raises where they do not go together
    beams = Beams(**{"num_beams": 1, **_those_of(Beams, options)})
    if beams.num_beams == 1:
        for each in fields(Beams):
            if getattr(beams, each.name) != getattr(_NO_BEAMS, each.name):
                option = each.name.replace("_", "-")
                raise InputError(f"{option} needs num-beams above 1")
        if name == SEQUENCES and count > 1:
            raise InputError(f"{name} needs num-beams above 1")
        if sampling.greedy and count > 1:
            raise InputError(
                f"{name} is {count}, but at temperature 0 all samples are the same: "
                "give a temperature above 0"
            )
        return Way(sampling, options.get("max_tokens", MAX_TOKENS), None)
    check_beams(beams, sampling, delta)
    if name == SAMPLES and count > 1:
        raise InputError(
            f"{name} is {count}, but a beam search draws nothing: {SEQUENCES} are its "
            "best texts"
        )
    if count > beams.num_beams:
        raise InputError(
            f"{name} is {count}: a search with {beams.num_beams} beams has no more "
            "texts than that"
        )
    return Way(sampling, options.get("max_tokens", MAX_TOKENS), beams)


def _those_of(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    names = {each.name for each in fields(kind)}
    return {name: value for name, value in options.items() if name in names}


class Rules:
    """How each prompt is answered: as is asked, and with --task-defaults as the
    model's files ask for. What they ask for is said, once."""

    def __init__(
        self,
        pair: Pair,
        given: Mapping[str, Any],
        *,
        bad_words: Sequence[str] | None = None,
        task_defaults: bool = False,
        texts: Texts = ONE,
        delta: float = DELTA,
        said: set[str] | None = None,
    ):
        """
        Args:
            given: options of :class:`Sampling` and :class:`Beams`, and
                ``max_tokens``, where it is asked for any.
            bad_words, task_defaults, texts, delta: as the flags have them.
            said: what was said already.

        Raises:
            InputError: a bad word is none, or the model cannot be searched with beams.
        """
        check_searched(given.get("num_beams", 1), pair.target.trees)
        self._pair = pair
        self._applied = task_defaults
        self._texts = texts
        self._delta = delta
        self._given = dict(given)
        self._said = set() if said is None else said
        if bad_words:
            self._given["bad_words_ids"] = _word_ids(pair, bad_words)

    @classmethod
    def of_flags(cls, arguments: Namespace, pair: Pair) -> "Rules":
        """As main.py's flags have it."""
        return cls(
            pair,
            read_given(arguments),
            bad_words=arguments.bad_words,
            task_defaults=arguments.task_defaults,
            texts=read_texts(arguments),
            delta=arguments.delta,
        )

    def of(self, prompt: str | Messages) -> Way:
        """How a prompt is answered.

        Raises:
            PromptError: the prompt cannot be read.
            InputError: the rules are odd, or do not go together.
        """
        options = {**self._asked_for(prompt), **self._given}
        way = read_way(options, self._texts, self._delta)
        # Of no prompt in particular: said before one is answered.
        way.sampling.chain(self._pair.target.vocabulary, self._pair.eos_tokens)
        return way

    def _asked_for(self, prompt: str | Messages) -> dict[str, Any]:
        """What the model's files ask for, which is said, as far as it is applied."""
        try:
            asked = self._pair.defaults(prompt, self._given)
        except DefaultsError as error:
            if self._applied:
                raise
            self._say(f"{error}: what the model asks for is not known")
            return {}
        for line in asked.lines(self._applied):
            self._say(line)
        if not self._applied:
            return {}
        most = asked.max_tokens or MAX_TOKENS
        return {**asked.options, **asked.beams, "max_tokens": most}

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            say(one_line(line))


def _word_ids(pair: Pair, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word, at the start of a text and after a space."""
    found = []
    for word in words:
        if not word.strip():
            raise InputError("a bad word is empty")
        require_text(word, "a bad word")
        for text in (word, f" {word}"):
            tokens = tuple(pair.tokenizer.encode_word(text))
            if not tokens or (len(tokens) == 1 and tokens[0] in pair.eos_tokens):
                raise InputError(
                    f"the bad word '{word}' has no token that could be banned"
                )
            found.append(tokens)
    return tuple(dict.fromkeys(found))
