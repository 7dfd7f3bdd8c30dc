"""How each prompt is answered, as flags and the model's files have it."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from checkpoints.defaults import DefaultsError
from pair import Pair, require_text
from speculation.requests import DELTA, MAX_TOKENS
from speculation.sampling import Sampling
from system.errors import InputError, one_line, say
from text.messages import Messages

#: Samples of a prompt, which are decoded at once.
MOST_SAMPLES = 1000


def read_given(arguments: Namespace) -> dict[str, Any]:
    """The options of how tokens are chosen that flags were given for."""
    names = {"max_tokens", *(field.name for field in fields(Sampling))}
    given = {k: v for k, v in vars(arguments).items() if k in names and v is not None}
    if "suppress_tokens" in given:
        given["suppress_tokens"] = tuple(given["suppress_tokens"])
    return given


def read_sampling(
    options: Mapping[str, Any], num_samples: int, delta: float
) -> Sampling:
    """How tokens are chosen.

    Raises:
        InputError: an option is out of range, or they do not go together.
    """
    if not 1 <= num_samples <= MOST_SAMPLES:
        raise InputError(
            f"num-samples is {num_samples}: it has to be from 1 to {MOST_SAMPLES}"
        )
    sampling = Sampling(**{k: v for k, v in options.items() if k != "max_tokens"})
    if sampling.greedy and num_samples > 1:
        raise InputError(
            "at temperature 0 all samples are the same: give a --temperature above 0"
        )
    sampling.coupling_at(delta)  # raises where they do not go together
    return sampling


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
        num_samples: int = 1,
        delta: float = DELTA,
        said: set[str] | None = None,
    ):
        """
        Args:
            given: options of :class:`Sampling`, and ``max_tokens``, where it is asked
                for any.
            bad_words, task_defaults, num_samples, delta: as the flags have them.
            said: what was said already.

        Raises:
            InputError: a bad word is none.
        """
        self._pair = pair
        self._applied = task_defaults
        self._num_samples = num_samples
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
            num_samples=arguments.num_samples,
            delta=arguments.delta,
        )

    def of(self, prompt: str | Messages) -> tuple[Sampling, int]:
        """How tokens are chosen, and the most that may be.

        Raises:
            PromptError: the prompt cannot be read.
            InputError: the rules are odd, or do not go together.
        """
        options = {"max_tokens": MAX_TOKENS, **self._asked_for(prompt), **self._given}
        sampling = read_sampling(options, self._num_samples, self._delta)
        # Of no prompt in particular: said before one is answered.
        sampling.chain(self._pair.target.vocabulary, self._pair.eos_tokens)
        return sampling, options["max_tokens"]

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
        return {**asked.options, "max_tokens": asked.max_tokens or MAX_TOKENS}

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
