"""A target and its draft, loaded: from text to text.

In use::

    pair = Pair.load("t5-11b", "t5-small")
    answer = pair.generate("translate English to German: Good morning.")
    for piece in answer:
        print(piece.text, end="", flush=True)
    print(answer.stats.tokens_per_round)
"""

import system.fast_blas  # noqa: F401  (before mlx: see there)

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from architectures import registry
from checkpoints.defaults import Defaults, DefaultsError, Files
from decoder import DELTA, MAX_TOKENS, NUM_DRAFT, Commit, Stats, generate
from speculation.drafting import Drafter, ModelDrafter
from speculation.lookup import LookupDrafter
from speculation.sampling import GREEDY, Sampling
from speculation.session import Session
from system.errors import InputError, PromptError, TooLongError
from text.messages import last_text, read_prompt
from text.tokenizer import TextStream, Tokenizer, have_equal_files

LOOKUP = "prompt-lookup"  # a draft without a model


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
    """A target with its tokenizer, and who drafts for it, or nobody.

    Attributes:
        target: the target's session.
        tokenizer: the target's.
        drafter: a draft model that shares its ids, or prompt lookup; None for nobody.
        eos_tokens: the ids that end a text.
        folder, draft_folder: where the models were loaded from.
    """

    def __init__(
        self,
        target: Session,
        tokenizer: Tokenizer,
        eos_tokens: frozenset[int],
        drafter: Drafter | None = None,
    ):
        self.target = target
        self.tokenizer = tokenizer
        self.eos_tokens = eos_tokens
        self.drafter = drafter
        self.folder: Path | None = None
        self.draft_folder: Path | None = None
        self._latest: object = None  # whoever decodes on these caches

    @classmethod
    def load(
        cls, model: str, draft_model: str | None = None, *, unverified: bool = False
    ) -> "Pair":
        """Load models by folder or by name.

        Args:
            model: a converted T5, or a decoder-only model; see
                :func:`registry.find`.
            draft_model: likewise, or :data:`LOOKUP`; None for no draft.
            unverified: take decoder-only models, too, whose text nobody has compared
                with transformers' (:mod:`verified`).

        Raises:
            InputError: a folder is missing or damaged, or the draft's embedding has too
                few rows for the target's ids.
            DifferentTokenizersError: they are no pair; no weights are read.
        """
        folder = registry.find(model, unverified)
        draft_folder = None
        if draft_model not in (None, LOOKUP):
            draft_folder = registry.find(draft_model, unverified)
        tokenizer = Tokenizer(folder)
        if draft_folder and not have_equal_files(folder, draft_folder):
            difference = tokenizer.difference(Tokenizer(draft_folder))
            if difference:
                raise DifferentTokenizersError(
                    f"{draft_folder} and {folder} have different tokenizers, and a "
                    f"draft has to be of the target's family: {difference}"
                )
        architecture = registry.of_folder(folder)
        if draft_folder and registry.of_folder(draft_folder) is not architecture:
            raise InputError(
                f"{draft_folder} is no draft for {folder}: one of them has no encoder"
            )
        # Rows of padding beyond the tokenizer's ids are never emitted.
        vocabulary = min(tokenizer.size, architecture.embedding_rows(folder))
        drafter: Drafter | None = LookupDrafter() if draft_model == LOOKUP else None
        if draft_folder:
            rows = architecture.embedding_rows(draft_folder)
            if rows < vocabulary:
                raise InputError(
                    f"the draft has {rows} embedding rows, but the target emits ids up "
                    f"to {vocabulary - 1}: they are no pair"
                )
            session = architecture.open_session(
                draft_folder, tokenizer, vocabulary, unverified
            )
            drafter = ModelDrafter(session)
        target = architecture.open_session(folder, tokenizer, vocabulary, unverified)
        ends = architecture.eos_tokens(folder, tokenizer)
        pair = cls(target, tokenizer, ends, drafter)
        pair.folder, pair.draft_folder = folder, draft_folder
        return pair

    @property
    def batches(self) -> bool:
        """Whether several texts are decoded together, or one after another: models
        that are not verified are not known to be right about rows."""
        drafts = self.drafter
        sessions = [drafts.session] if isinstance(drafts, ModelDrafter) else []
        return all(session.batches for session in (self.target, *sessions))

    def generate(self, prompt: str, **options: Any) -> Generation:
        """Answer a prompt; the options are those of :meth:`samples`."""
        (answer,) = self.samples(prompt, 1, **options)
        return answer

    def samples(
        self,
        prompt: "str | list[dict[str, str]]",
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
            prompt: a text, or a conversation: messages with "role" and "content", for
                models with a chat template (see :func:`messages.read_prompt`).
            max_tokens, num_draft, delta, sampling: of :func:`decoder.generate`.
            stream: with another number a sample of the same seed is another one.
            keep_special: show special tokens, ``<extra_id_0>`` say, in the text, but
                not what ends or pads it.

        Raises:
            PromptError: at once, for a conversation that is none; while iterating, for
                a prompt that is empty, not text or too long.
            InputError: while iterating, for bad options.
            RuntimeError: while iterating after another generation has begun: a pair
                has caches for one.
        """
        prompt = read_prompt(prompt)
        commits = self._commits(
            prompt,
            count,
            max_tokens=max_tokens,
            num_draft=num_draft,
            delta=delta,
            sampling=sampling,
            streams=[(stream, row) for row in range(count)],
        )
        decode = self._decode_with_special if keep_special else self.tokenizer.decode
        text = last_text(prompt)
        return [Generation(text, row, decode) for row in _by_row(commits, count)]

    def defaults(
        self,
        prompt: "str | list[dict[str, str]]",
        given: Mapping[str, Any] = MappingProxyType({}),
    ) -> Defaults:
        """What the target's makers ask of whoever has it answer this prompt.

        Nothing of it is applied unless :meth:`samples` is told so.

        Args:
            given: options that are chosen already, see :meth:`defaults.Files.of`.

        Raises:
            DefaultsError: their files are odd.
            PromptError: the prompt is.
        """
        if self.folder is None:
            return Defaults("")
        prompt = read_prompt(prompt)
        started = 1 if self.target.has_encoder else len(self._encode(prompt))
        text, vocabulary = last_text(prompt), self.target.vocabulary
        try:
            return self._files.of(text, started, vocabulary, given)
        except InputError as error:
            raise DefaultsError(str(error)) from None

    @cached_property
    def _files(self) -> Files:
        return Files.read(self.folder)

    def require_positions(
        self, prompt: "str | list[dict[str, str]]", max_tokens: int
    ) -> None:
        """See to it that an answer may have so many tokens.

        Raises:
            TooLongError: the prompt leaves fewer positions.
            PromptError: it cannot be read.
        """
        positions = self.target.positions
        if positions is None or self.target.has_encoder:
            return
        length = len(self._encode(read_prompt(prompt)))
        if length + max_tokens > positions:
            raise TooLongError(
                f"the prompt has {length} tokens, which leave {positions - length} for "
                f"an answer of {max_tokens}: shorten it"
            )

    def forget(self) -> None:
        """Drop what is cached: the next prompt is encoded whole.

        Decoder-only models keep what it has in common with the last one.
        """
        self.target.forget()
        if isinstance(self.drafter, ModelDrafter):
            self.drafter.session.forget()

    def _decode_with_special(self, tokens: list[int]) -> str:
        padding = self.tokenizer.ids.get("<pad>")
        silent = {*self.eos_tokens, padding}
        shown = [token for token in tokens if token not in silent]
        return self.tokenizer.decode_with_special(shown)

    def _commits(
        self, prompt: "str | list[dict[str, str]]", count: int, **options: Any
    ) -> Iterator[Commit]:
        encoded = [self._encode(prompt)] * count
        mine = self._latest = object()
        together = self.batches or count == 1
        streams = options.pop("streams")
        for first in [0] if together else range(count):
            end = None if together else first + 1
            for commit in generate(
                self.target,
                self.drafter,
                encoded[first:end],
                eos_tokens=self.eos_tokens,
                streams=streams[first:end],
                **options,
            ):
                yield replace(commit, id=first + commit.id)
                if self._latest is not mine:
                    raise RuntimeError("another generation has begun on this pair")

    def _encode(self, prompt: "str | list[dict[str, str]]") -> list[int]:
        if not last_text(prompt).strip():
            raise PromptError("the prompt is empty: say what to do with which text")
        if isinstance(prompt, str):
            require_text(prompt, "the prompt")
            return self.tokenizer.encode(prompt)
        for message in prompt:
            require_text(message["role"], "a message's role")
            require_text(message["content"], f"the {message['role']}'s message")
        return self.tokenizer.encode_chat(prompt)


def require_text(text: str, what: str) -> None:
    """Raise a PromptError for what is no text: bytes that were no UTF-8, or NULs."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PromptError(f"{what} is not valid UTF-8 text")
    if "\0" in text:
        raise PromptError(f"{what} has NUL characters in it, as UTF-16 text has")


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
                waiting[commit.id].append(commit)
            commit = waiting[row].popleft()
            reason = commit.finish_reason
            yield commit

    return [of_row(row) for row in range(count)]
