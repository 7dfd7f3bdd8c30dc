"""A target and its draft, loaded: from text to text.

In use::

    pair = Pair.load("t5-11b", "t5-small")
    answer = pair.generate("translate English to German: Good morning.")
    for piece in answer:
        print(piece.text, end="", flush=True)
    print(answer.stats.tokens_per_round)
"""

import system.fast_blas  # noqa: F401  (before mlx: see there)

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from answering import Answers, Generation, Question, Source, source_of
from architectures import registry
from architectures.loading import USUAL, Loading
from checkpoints.defaults import Defaults, DefaultsError, Files
from checkpoints.storing import DTYPES
from decoder import Engine
from speculation.beams import Beams
from speculation.drafting import Drafter, ModelDrafter
from speculation.lookup import Lookup
from speculation.policy import Auto
from speculation.requests import DELTA, MAX_TOKENS, Commit, Request
from speculation.sampling import GREEDY, Sampling
from speculation.session import Session
from speculation.trees import WIDER
from system import memory, remembering
from system.device import most_drafted, on_gpu
from system.errors import InputError, PromptError, TooLongError, blame_prompt
from system.ranks import Ranks, meet
from text.messages import last_text, read_prompt
from text.tokenizer import Tokenizer, have_equal_files

LOOKUP = "prompt-lookup"  # a draft without a model

#: What several processes do together: each has a part of the target, or all of the
#: models and a part of the prompts.
TENSOR, DATA = "tensor", "data"

#: Tokens that have to agree for what followed them to be taken before a draft model's.
LEAST_MATCH = 3

#: The most texts that are decoded at once where nobody says how many.
MOST_ROWS = 32
#: Seconds after which what was measured is kept again.
_SECONDS = 5.0
#: Draft tokens that a large batch has at most where nobody says how many.
_MANY = 5
#: The share of the free memory that a batch of them may take.
SHARE = 0.6


class DifferentTokenizersError(InputError):
    """The draft's ids do not mean what the target's mean."""


class Pair:
    """A target with its tokenizer, and who drafts for it, or nobody.

    Attributes:
        target: the target's session.
        tokenizer: the target's.
        drafter: a draft model that shares its ids; None for none.
        lookup: guesses without a model; None for none.
        eos_tokens: the ids that end a text.
        folder, draft_folder: where the models were loaded from, and ``how``.
    """

    def __init__(
        self,
        target: Session,
        tokenizer: Tokenizer,
        eos_tokens: frozenset[int],
        drafter: Drafter | None = None,
        lookup: Lookup | None = None,
    ):
        self.target = target
        self.tokenizer = tokenizer
        self.eos_tokens = eos_tokens
        self.drafter = drafter
        self.lookup = lookup
        self.folder: Path | None = None
        self.draft_folder: Path | None = None
        self.how = USUAL
        self._remembered = -math.inf  # when that was
        self._latest: object = None  # whoever decodes on these caches

    @classmethod
    def load(
        cls,
        model: str,
        draft_model: str | None = None,
        *,
        lookup: bool = False,
        unverified: bool = False,
        dtype: str | None = None,
        compiled: bool | None = None,
        parallel: str = TENSOR,
    ) -> "Pair":
        """Load models by folder or by name.

        Where a launcher began several processes (:mod:`system.ranks`), the target is
        divided among them, once. All call this; it returns on rank 0 alone, and
        elsewhere the process ends with it, when rank 0 has.

        Args:
            model: a converted T5, or a decoder-only model; see
                :func:`registry.find`.
            draft_model: likewise, or :data:`LOOKUP`; None for no draft.
            lookup: where words occurred before, take what followed them, and ask the
                draft model elsewhere.
            unverified, dtype, compiled: of :class:`loading.Loading`, for both.
            parallel: :data:`DATA` has every process load all of it, and return. Who
                ends before rank 0 is then taken for one that failed.

        Raises:
            InputError: a folder is missing or damaged, or the draft's embedding has too
                few rows for the target's ids.
            DifferentTokenizersError: they are no pair; no weights are read.
        """
        how = Loading(unverified, dtype, compiled)
        ranks = meet()
        divided = ranks if parallel == TENSOR else None
        follows = divided is not None and divided.rank > 0
        if divided and divided.together:
            raise InputError("these ranks hold a target already, and it is all they do")
        if dtype not in (None, *DTYPES.values()):
            raise InputError(
                f"dtype is {dtype!r}: it has to be None or one of "
                f"{', '.join(DTYPES.values())}"
            )
        folder = registry.find(model, how.unverified)
        draft_folder = None
        if draft_model not in (None, LOOKUP) and not follows:
            draft_folder = registry.find(draft_model, how.unverified)
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
        drafter: Drafter | None = None
        if draft_folder:
            rows = architecture.embedding_rows(draft_folder)
            if rows < vocabulary:
                raise InputError(
                    f"the draft has {rows} embedding rows, but the target emits ids up "
                    f"to {vocabulary - 1}: they are no pair"
                )
        if ranks:
            _agree(ranks, divided is not None, folder, draft_folder)
        if draft_folder:
            session = architecture.open_session(
                draft_folder, tokenizer, vocabulary, how
            )
            drafter = ModelDrafter(session)
        how = how._replace(ranks=divided)
        target = architecture.open_session(folder, tokenizer, vocabulary, how)
        ends = architecture.eos_tokens(folder, tokenizer)
        looks: Lookup | None = None
        if lookup or draft_model == LOOKUP:
            # Beside a model that asks for more, as the model is better at chance.
            looks = Lookup(LEAST_MATCH if drafter else 2)
        pair = cls(target, tokenizer, ends, drafter, looks)
        pair.folder, pair.draft_folder, pair.how = folder, draft_folder, how
        return pair

    @property
    def batches(self) -> bool:
        """Whether several texts are decoded together, or one after another: models
        that are not verified are not known to be right about rows."""
        drafts = self.drafter
        sessions = [drafts.session] if isinstance(drafts, ModelDrafter) else []
        return all(session.batches for session in (self.target, *sessions))

    @property
    def drafts(self) -> bool:
        """Whether there is anybody to draft."""
        return self.drafter is not None or self.lookup is not None

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
        num_draft: int | None = None,
        delta: float = DELTA,
        sampling: Sampling = GREEDY,
        stream: int = 0,
        keep_special: bool = False,
        beams: Beams | None = None,
    ) -> list[Generation]:
        """Answer a prompt ``count`` times, together: it is encoded once.

        With ``beams`` these are the best texts of one search, best first.

        The texts are decoded as a result is iterated; iterating one decodes all.

        Args:
            prompt: a text, or a conversation: messages with "role" and "content", for
                models with a chat template (see :func:`messages.read_prompt`).
            max_tokens, delta, sampling: of :class:`requests.Request`.
            num_draft: K, draft tokens per round; None for as many as pay, which
                :attr:`policy` finds out.
            stream: with another number a sample of the same seed is another one.
            keep_special: show special tokens, ``<extra_id_0>`` say, in the text, but
                not what ends or pads it.
            beams: of :class:`requests.Request`.

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
            num_draft,
            stream,
            max_tokens=max_tokens,
            delta=delta,
            sampling=sampling,
            beams=beams,
        )
        decode = self.decoder(keep_special)
        text = last_text(prompt)
        searched = beams is not None and beams.num_beams > 1
        return [
            Generation(text, decode, row, searched=searched)
            for row in _by_row(commits, count)
        ]

    def answers(
        self,
        prompts: "Iterable[str | list[dict[str, str]] | Question] | Source",
        *,
        batch_size: int | None = None,
        num_draft: int | None = None,
        in_order: bool = True,
        keep_special: bool = False,
        **options: Any,
    ) -> Iterator[Generation]:
        """Answer any number of prompts, several at a time.

        Nothing is read or decoded before it is asked for. Prompts are read ahead, a
        few times the batch size, to decode those of a like length together; where they
        take their time, a :class:`answering.Source` can say so. A text is what
        :meth:`generate` makes of its prompt, with the prompt's place, from 0 on, as
        its stream.

        Args:
            prompts: as :meth:`samples` takes one, or a :class:`answering.Question`.
                Instead of what can be iterated, a :class:`answering.Source`.
            batch_size: the most that are decoded at once; None for as many as the
                memory has room for, up to :data:`MOST_ROWS`.
            in_order: yield answers in the order of the prompts, not as they finish.
            num_draft, keep_special, options: of :meth:`samples`.

        Yields:
            Finished answers, one for each prompt. One that cannot be given has an
            ``error`` instead of a text, and does not disturb the others.

        Raises:
            InputError: bad options. Those of a :class:`Question` are its own error.
            RuntimeError: after another generation has begun.
            Whatever the prompts raise as they are read: then no more answers come.
        """
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch-size is {batch_size}: it has to be at least 1")
        mine = self._latest = object()
        decode = self.decoder(keep_special)

        def begin(question: Question, place: int) -> tuple[Generation, Request | None]:
            its = {"stream": place, **options, **question.options}
            prompt, answer = question.prompt, Generation("", decode, tag=question.tag)
            try:
                if question.error:
                    raise question.error
                prompt = read_prompt(prompt)
                answer.prompt = last_text(prompt)
                request = self.request(prompt, **its)
                answer.searched = request.width > 1
                return answer, request
            except InputError as error:
                if not isinstance(error, PromptError) and not question.options:
                    raise  # it is everybody's
                answer.fail(error)
                return answer, None

        def engine_for(requests: list[Request]) -> tuple[Engine, int]:
            rows = batch_size
            if rows is None:
                rows = self.batch_size(
                    max(len(request.prompt) for request in requests),
                    max(request.max_tokens for request in requests),
                    num_draft,
                    max(request.width for request in requests),
                )
            return self.engine(rows, num_draft), rows

        source = prompts if callable(prompts) else source_of(prompts)
        yield from Answers(
            source, begin, engine_for, in_order, partial(self._require_latest, mine)
        )
        self._remember_sometimes()

    def request(
        self,
        prompt: "str | list[dict[str, str]]",
        *,
        max_tokens: int = MAX_TOKENS,
        delta: float = DELTA,
        sampling: Sampling = GREEDY,
        stream: int = 0,
        sample: int = 0,
        num_draft: int | None = None,
        beams: Beams | None = None,
    ) -> Request:
        """What asks an :meth:`engine` for the answer to a prompt; see :meth:`samples`.
        ``num_draft`` is for this text alone, see :class:`requests.Request`.

        Raises:
            PromptError: the prompt is empty, or no text.
            InputError: bad options.
        """
        with blame_prompt():
            encoded = self._encode(prompt)
        streams = stream, sample
        return Request(
            encoded,
            self.eos_tokens,
            max_tokens,
            delta,
            sampling,
            streams,
            num_draft,
            beams,
        )

    def engine(self, rows: int, num_draft: int | None = None) -> Engine:
        """What decodes up to so many texts at once, on this pair's caches: whatever
        used them before is to be done. One at a time, where :attr:`batches` says so."""
        rows = rows if self.batches else min(rows, 1)
        return Engine(
            self.target,
            self.drafter,
            num_draft=self.policy if num_draft is None else num_draft,
            lookup=self.lookup,
            rows=rows,
        )

    @cached_property
    def policy(self) -> Auto:
        """What decides how much is drafted where nobody says it.

        It goes on from what it found out before, in this process or on this machine.
        """
        drafts = self.drafter
        policy = policy_for(
            self.target, drafts.session if isinstance(drafts, ModelDrafter) else None
        )
        if self._subject:
            policy.restore(remembering.recall(self._subject))
        return policy

    @cached_property
    def _subject(self) -> str | None:
        """What costs and acceptance are of; None where that cannot be told."""
        if self.folder is None:
            return None
        parts = [remembering.fingerprint(self.folder)]
        if self.draft_folder:
            parts.append(remembering.fingerprint(self.draft_folder))
        parts += [LOOKUP] if self.lookup else []
        parts += [self.how.dtype] if self.how.dtype else []
        compiles = self.target.has_encoder and self.how.compiles
        parts += ["compiled"] if compiles else []
        parts += [f"in {self.how.ranks.size} parts"] if self.how.ranks else []
        return " with ".join(parts)

    def remember(self) -> Path | None:
        """Keep what :attr:`policy` has found out, for the next run on this machine.

        Returns:
            Where; None where nothing is kept.
        """
        if "policy" in self.__dict__ and self._subject:
            return remembering.remember(self._subject, self.policy.as_dict())
        return None

    def _remember_sometimes(self) -> None:
        """:meth:`remember`, if it is the first time or some time ago."""
        if time.monotonic() - self._remembered > _SECONDS:
            self._remembered = time.monotonic()
            self.remember()

    def batch_size(
        self, prompt: int, answer: int, num_draft: int | None, width: int = 1
    ) -> int:
        """How many texts, of prompts and answers of up to so many tokens, are decoded
        at once where nobody says how many; each with so many beams."""
        free = memory.free()
        rows = max(1, MOST_ROWS // width)
        answer *= width
        # A pass has logits for every draft token, and judging makes more of them.
        size = _MANY if num_draft is None else num_draft
        size *= WIDER if width > 1 else 1
        judged = 4 * 4 * (size + 1) * width * self.target.vocabulary
        while free is not None and rows > 1:
            size = rows * judged + self.target.batch_bytes(rows, prompt, answer)
            if self.drafter and num_draft != 0:
                size += self.drafter.batch_bytes(rows, prompt, answer)
            if size <= SHARE * free:
                break
            rows //= 2
        return rows

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
            return self._files.of(text, started, vocabulary, given, self.target.trees)
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

    def decoder(self, keep_special: bool) -> Callable[[list[int]], str]:
        """What makes a text of tokens; ``keep_special`` of :meth:`samples`."""
        return self._decode_with_special if keep_special else self.tokenizer.decode

    def _decode_with_special(self, tokens: list[int]) -> str:
        padding = self.tokenizer.ids.get("<pad>")
        silent = {*self.eos_tokens, padding}
        shown = [token for token in tokens if token not in silent]
        return self.tokenizer.decode_with_special(shown)

    def _commits(
        self,
        prompt: "str | list[dict[str, str]]",
        count: int,
        num_draft: int | None,
        stream: int,
        **options: Any,
    ) -> Iterator[Commit]:
        request = self.request(prompt, stream=stream, **options)
        searched = request.width > 1
        if searched and count > request.width:
            raise InputError(
                f"num-return-sequences is {count}: a search with {request.width} beams "
                "has no more texts than that"
            )
        mine = self._latest = object()
        texts = 1 if searched else count
        engine = self.engine(texts, num_draft)
        for sample in range(texts):
            engine.admit(replace(request, stream=(stream, sample)))
        while engine.busy:
            commits = engine.step()
            if not engine.busy:  # nobody asks for more than the last commit
                self._remember_sometimes()
            for commit in commits:
                yield commit
                self._require_latest(mine)
                if searched and commit.finish_reason:
                    yield from commit.others(count)

    def _require_latest(self, mine: object) -> None:
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


def _agree(
    ranks: Ranks, divided: bool, folder: Path, draft_folder: Path | None
) -> None:
    """See to it that all ranks load the same; together, where it is divided.

    Raises:
        InputError: they do not.
    """
    ranks.require_same("target", remembering.fingerprint(folder))
    if divided:
        ranks.come_together()
    else:
        its = draft_folder and remembering.fingerprint(draft_folder)
        ranks.require_same("draft", its)


def policy_for(target: Session, draft: Session | None) -> Auto:
    """A policy for these models, of which it has seen nothing yet."""
    step = draft.parameters / target.parameters if draft else 0.1
    return Auto(
        most_drafted(),
        step=min(max(step, 0.02), 1.0),
        token=0.03 if on_gpu() else 0.1,
        ahead=on_gpu(),
    )


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
