"""A model divided among ranks, behind one session.

Rank 0 has the engine, the draft, the random numbers and the texts. What the engine asks
of the target's session there, :class:`Leader` has all ranks do on their parts: it says
over a wire what is to be done, once a round, and what is drafted, of which the host
knows nothing yet, goes from device to device. So there is nothing about which the ranks
could come to differ: the others decide nothing.

      rank 0    engine ─► Leader ──┬──► its session ─► logits
                      once a round │       ▲ sums, one for each block
                                   │       ▼
      rank 1              follow ◄─┴──► its session

The order in which passes are begun with is the same everywhere, as sums have to meet.
"""

from collections.abc import Collection
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from architectures.parts import Share
from model import T5
from speculation.session import Preparing, Session
from system import fast_blas, memory
from system.errors import NoRoomError, PromptError, TooLongError
from system.ranks import Ranks, whole

#: What may be wrong with prompts, by its name.
_FAULTS = {kind.__name__: kind for kind in (PromptError, TooLongError, NoRoomError)}


class Summed(nn.Module):
    """A matrix of which each rank has some columns: its products are parts of a sum."""

    def __init__(self, own: nn.Module, ranks: Ranks, silent: bool):
        """``silent``: another rank has these columns as well, and they do not count."""
        super().__init__()
        self.own = own
        self._add_up, self._silent = ranks.add_up, silent

    def add_to(self, x: mx.array, y: mx.array) -> mx.array:
        """``x + y @ W.T`` of the whole W, where ``y`` is this rank's part."""
        part = self.own(y)
        part = mx.zeros_like(part) if self._silent else part
        return x + self._add_up(part)


class _Unread(nn.Module):
    """In the place of an output head, where nobody looks at logits."""

    def __call__(self, x: mx.array) -> mx.array:
        return x


def join(model: T5, share: Share, ranks: Ranks) -> None:
    """Have a part of a T5 add up with the others."""
    for layer in [*model.encoder.layers, *model.decoder.layers]:
        for name in ("attention", "cross_attention"):
            if name in layer:
                block = layer[name]
                block.o = Summed(block.o, ranks, share.silent_heads)
        block = layer.feed_forward
        block.wo = Summed(block.wo, ranks, share.silent_columns)
    if not share.head:
        model.head = _Unread()


def open_part(session: Session, ranks: Ranks) -> Session:
    """On rank 0 the whole model's session, of which this is its part. Elsewhere the
    program ends here: what rank 0 asks for is done, until that ends."""
    free = memory.free()
    if ranks.rank:
        ranks.answer(free)
        _follow(_Follower(session, ranks), ranks)
    others = [n for n in ranks.heard() if n is not None]
    if free is not None and others:
        memory.limit(min(others))
    return Leader(session, ranks)


class Leader:
    """Rank 0's session: it has the others do what it does.

    What costs no pass waits until there is one. Everything else, ``lengths`` say, is
    its own session's.
    """

    def __init__(self, session: Session, ranks: Ranks):
        self._session, self._ranks = session, ranks
        self._waiting: list[list[Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def start(self, prompts: list[list[int]]) -> list[list[int]]:
        """As :meth:`Session.start`; nobody begins where one has no room for it."""
        self._require(prompts, beside=False)
        return self._together(["start", prompts], self._session.start, prompts)

    def prepare(self, prompts: list[list[int]]) -> Preparing:
        """As :meth:`Session.prepare`, likewise."""
        self._require(prompts, beside=True)
        self._together(["prepare", prompts], lambda: None)
        steps = self._session.prepare(prompts)
        while True:
            done, prepared = self._together(["go_on"], _step, steps)
            if done:
                return prepared
            yield

    def put(self, rows: list[int], prepared: Any) -> list[list[int]]:
        """As :meth:`Session.put`."""
        return self._together(["put", rows], self._session.put, rows, prepared)

    def take(self, rows: list[int], blank: int = 0) -> None:
        """As :meth:`Session.take`."""
        self._later(["take", rows, blank], self._session.take, rows, blank)

    def wipe(self, rows: list[int], holes: Collection[list[int]] = ()) -> None:
        """As :meth:`Session.wipe`."""
        self._later(["wipe", rows, list(holes)], self._session.wipe, rows, holes)

    def rewind(self, lengths: list[int]) -> None:
        """As :meth:`Session.rewind`."""
        self._later(["rewind", lengths], self._session.rewind, lengths)

    def forget(self) -> None:
        """As :meth:`Session.forget`."""
        self._together(["forget"], self._session.forget)

    def extend(self, tokens: mx.array) -> mx.array:
        """As :meth:`Session.extend`."""
        return self._together(["extend", tokens.shape], self._extend, tokens)

    def extend_tree(
        self, tokens: mx.array, slots: np.ndarray, back: mx.array
    ) -> tuple[mx.array, mx.array]:
        """As :meth:`Session.extend_tree`."""
        order = ["extend_tree", tokens.shape, slots.tolist(), back.shape]
        return self._together(order, self._extend_tree, tokens, slots, back)

    def _extend(self, tokens: mx.array) -> mx.array:
        logits = self._session.extend(_shared([tokens], self._ranks)[0])
        mx.async_eval(logits)
        return logits

    def _extend_tree(
        self, tokens: mx.array, slots: np.ndarray, back: mx.array
    ) -> tuple[mx.array, mx.array]:
        tokens, back = _shared([tokens, back], self._ranks)
        scored = self._session.extend_tree(tokens, slots, back)
        mx.async_eval(scored)
        return scored

    def _require(self, prompts: list[list[int]], beside: bool) -> None:
        """
        Raises:
            PromptError: here or elsewhere, the prompts cannot be begun with.
        """
        self._session.require(prompts, beside)
        with whole():
            faults = self._ranks.asked([["require", prompts, beside]])
        for rank, fault in enumerate(faults, start=1):
            if fault:
                kind, reason = fault
                raise _FAULTS[kind](f"rank {rank}: {reason}")

    def _later(self, order: list[Any], do: Any, *arguments: Any) -> None:
        with whole():
            self._waiting.append(order)
            do(*arguments)

    def _together(self, order: list[Any], do: Any, *arguments: Any) -> Any:
        """Have all ranks do something."""
        with whole():
            orders, self._waiting = [*self._waiting, order], []
            self._ranks.tell(orders)
            try:
                return do(*arguments)
            except Exception as error:
                # The others wait for sums that never come.
                self._ranks.give_up(f"{type(error).__name__}: {error}")


class _Follower:
    """Another rank's session, and what :class:`Leader` asks of it."""

    def __init__(self, session: Session, ranks: Ranks):
        self._session, self._ranks = session, ranks
        self._steps: Preparing | None = None
        self._prepared: Any = None

    def require(self, prompts: list[list[int]], beside: bool) -> None:
        fault = None
        try:
            self._session.require(prompts, beside)
        except PromptError as error:
            fault = [type(error).__name__, str(error)]
        self._ranks.answer(fault)

    def start(self, prompts: list[list[int]]) -> None:
        self._have_threads(len(prompts))
        self._session.start(prompts)

    def prepare(self, prompts: list[list[int]]) -> None:
        self._steps = self._session.prepare(prompts)

    def go_on(self) -> None:
        done, self._prepared = _step(self._steps)
        self._steps = None if done else self._steps

    def put(self, rows: list[int]) -> None:
        prepared, self._prepared = self._prepared, None
        self._session.put(rows, prepared)

    def take(self, rows: list[int], blank: int) -> None:
        self._have_threads(len(rows) + blank)
        self._session.take(rows, blank)

    def wipe(self, rows: list[int], holes: list[list[int]]) -> None:
        self._session.wipe(rows, holes)

    def rewind(self, lengths: list[int]) -> None:
        self._session.rewind(lengths)

    def forget(self) -> None:
        self._steps = self._prepared = None
        self._session.forget()

    def extend(self, shape: list[int]) -> None:
        (tokens,) = _shared([mx.zeros(shape, mx.int32)], self._ranks)
        mx.async_eval(self._session.extend(tokens))

    def extend_tree(
        self, shape: list[int], slots: list[list[int]], seen: list[int]
    ) -> None:
        none = [mx.zeros(shape, mx.int32), mx.zeros(seen, mx.int32)]
        tokens, back = _shared(none, self._ranks)
        scored = self._session.extend_tree(tokens, np.array(slots, np.int32), back)
        mx.async_eval(scored[0])

    def _have_threads(self, rows: int) -> None:
        fast_blas.fit_threads(self._session.parameters * rows)


def _follow(follower: _Follower, ranks: Ranks) -> NoReturn:
    while True:
        for order, *arguments in ranks.hear():
            getattr(follower, order)(*arguments)


def _shared(arrays: list[mx.array], ranks: Ranks) -> list[mx.array]:
    """Rank 0's integers, which the others have zeros for: they are sums, too."""
    flat = [array.astype(mx.int32).flatten() for array in arrays]
    sent = flat[0] if len(flat) == 1 else mx.concatenate(flat)
    sent = ranks.add_up(sent)
    ends = np.cumsum([array.size for array in arrays]).tolist()
    parts = [sent] if len(flat) == 1 else mx.split(sent, ends[:-1])
    return [p.reshape(a.shape) for p, a in zip(parts, arrays, strict=True)]


def _step(steps: Preparing) -> tuple[bool, Any]:
    """One step of preparing: whether it was the last, and what is prepared then."""
    try:
        next(steps)
    except StopIteration as done:
        mx.async_eval(done.value)
        return True, done.value
    return False, None
