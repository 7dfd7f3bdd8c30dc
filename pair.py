"""A target and its draft, loaded: from text to text.

In use::

    pair = Pair.load("t5-11b", "t5-small")
    answer = pair.generate("translate English to German: Good morning.")
    for piece in answer:
        print(piece.text, end="", flush=True)
    print(answer.stats.tokens_per_round)
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint import locate
from decoder import DELTA, MAX_TOKENS, NUM_DRAFT, Commit, Stats, generate
from drafting import ModelDrafter
from errors import InputError
from model import T5, T5Session, load
from sampling import GREEDY, Sampling
from text import TextStream, Tokenizer


class DifferentTokenizersError(InputError):
    """The draft's ids do not mean what the target's mean."""


@dataclass(frozen=True)
class Piece:
    """A bit of text, as soon as it stands.

    Attributes:
        text: characters, never part of one; all pieces joined are the text.
        drafted: whether the token that completed it was a draft token.
    """

    text: str
    drafted: bool


class Generation:
    """One prompt being answered: iterate once for the pieces; the rest fills up.

    Attributes:
        prompt: as given.
        text: what has been yielded so far.
        tokens: committed ids, with end-of-sequence where that was produced.
        finish_reason: "eos" or "length" once finished, None before.
        stats: the figures so far (:class:`decoder.Stats`).
    """

    def __init__(
        self,
        prompt: str,
        commits: Iterator[Commit],
        decode: Callable[[list[int]], str],
    ):
        self.prompt = prompt
        self.text = ""
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.stats = Stats()
        self._pieces = self._stream(commits, TextStream(decode))

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def finish(self) -> "Generation":
        """Decode to the end, and return this very object."""
        for _ in self:
            pass
        return self

    def _stream(self, commits: Iterator[Commit], stream: TextStream) -> Iterator[Piece]:
        drafted = False
        for commit in commits:
            self.stats = commit.stats
            self.finish_reason = commit.finish_reason
            self.tokens += commit.tokens
            for place, token in enumerate(commit.tokens):
                drafted = place < commit.accepted
                yield from self._piece(stream.push(token), drafted)
        yield from self._piece(stream.finish(), drafted)

    def _piece(self, text: str, drafted: bool) -> Iterator[Piece]:
        if text:
            self.text += text
            yield Piece(text, drafted)


class Pair:
    """A target with its tokenizer, and a draft that shares its ids, or none."""

    def __init__(self, target: T5, tokenizer: Tokenizer, draft: T5 | None = None):
        """
        Raises:
            InputError: the draft's embedding has too few rows for the target's ids.
        """
        # Rows of padding beyond the tokenizer's ids are never emitted.
        vocabulary = min(tokenizer.size, target.config.vocab_size)
        gaps = tokenizer.gaps(vocabulary)
        self.folder: Path | None = None  # where the target was loaded from
        self.draft_folder: Path | None = None
        self.tokenizer = tokenizer
        self.target = T5Session(target, vocabulary, gaps)
        self.drafter: ModelDrafter | None = None
        self._latest: object = None  # whoever decodes on these caches
        if draft is not None:
            if draft.config.vocab_size < vocabulary:
                raise InputError(
                    f"the draft has {draft.config.vocab_size} embedding rows, but the "
                    f"target emits ids up to {vocabulary - 1}: they are no pair"
                )
            self.drafter = ModelDrafter(T5Session(draft, vocabulary, gaps))

    @classmethod
    def load(cls, model: str, draft_model: str | None = None) -> "Pair":
        """Load converted models by folder or by name.

        Raises:
            InputError: a folder is missing or damaged.
            DifferentTokenizersError: they are no pair; no weights are read.
        """
        folder = locate(model)
        draft_folder = locate(draft_model) if draft_model else None
        tokenizer = Tokenizer(folder)
        if draft_folder and not tokenizer.same_ids(Tokenizer(draft_folder)):
            raise DifferentTokenizersError(
                f"{draft_folder} and {folder} have different tokenizers: a draft has "
                f"to be of the target's family"
            )
        draft = load(draft_folder) if draft_folder else None
        pair = cls(load(folder), tokenizer, draft)
        pair.folder, pair.draft_folder = folder, draft_folder
        return pair

    def generate(self, prompt: str, **options: Any) -> Generation:
        """Answer a prompt; the options are those of :meth:`samples`."""
        (answer,) = self.samples(prompt, 1, **options)
        return answer

    def samples(
        self,
        prompt: str,
        count: int,
        *,
        max_tokens: int = MAX_TOKENS,
        num_draft: int = NUM_DRAFT,
        delta: float = DELTA,
        sampling: Sampling = GREEDY,
        stream: int = 0,
        keep_special: bool = False,
    ) -> list[Generation]:
        """Answer a prompt ``count`` times, together: it is encoded once.

        The texts are decoded as a result is iterated; iterating one decodes all.

        Args:
            max_tokens, num_draft, delta, sampling: of :func:`decoder.generate`.
            stream: with another number a sample of the same seed is another one.
            keep_special: show special tokens, ``<extra_id_0>`` say, in the text, but
                not what ends or pads it.

        Raises:
            InputError: while iterating, for bad options or a prompt that is empty or
                not text.
            RuntimeError: while iterating after another generation has begun: a pair
                has caches for one.
        """
        commits = self._commits(
            [prompt] * count,
            max_tokens=max_tokens,
            num_draft=num_draft,
            delta=delta,
            sampling=sampling,
            streams=[(stream, row) for row in range(count)],
        )
        decode = self._decode_with_special if keep_special else self.tokenizer.decode
        return [Generation(prompt, row, decode) for row in _by_row(commits, count)]

    def _decode_with_special(self, tokens: list[int]) -> str:
        config = self.target.model.config
        silent = {*config.eos_tokens, config.start_token}
        shown = [token for token in tokens if token not in silent]
        return self.tokenizer.decode_with_special(shown)

    def _commits(self, prompts: list[str], **options: Any) -> Iterator[Commit]:
        for prompt in prompts:
            if not prompt.strip():
                raise InputError("the prompt is empty: say what to do with which text")
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise InputError("the prompt is not valid UTF-8 text")
        mine = self._latest = object()
        for commit in generate(
            self.target,
            self.drafter,
            [self.tokenizer.encode(prompt) for prompt in prompts],
            eos_tokens=self.target.model.config.eos_tokens,
            **options,
        ):
            yield commit
            if self._latest is not mine:
                raise RuntimeError("another generation has begun on this pair")


def _by_row(commits: Iterator[Commit], count: int) -> list[Iterator[Commit]]:
    """The commits of each row; those of the others wait until they are asked for."""
    waiting: list[deque[Commit]] = [deque() for _ in range(count)]

    def of_row(row: int) -> Iterator[Commit]:
        reason = None
        while reason is None:
            while not waiting[row]:
                commit = next(commits, None)
                if commit is None:
                    return  # it ended in an error, which another row has raised
                waiting[commit.row].append(commit)
            commit = waiting[row].popleft()
            reason = commit.finish_reason
            yield commit

    return [of_row(row) for row in range(count)]
