"""Ways to answer a prompt: this program in a cell of the sweep, and others."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from measuring import baselines
from measuring.simulation import SimulatedPair
from pair import Pair
from speculation.beams import Beams
from speculation.requests import Stats
from speculation.sampling import SHARED, Sampling

#: As many draft tokens per round as pay.
AUTO: Literal["auto"] = "auto"


@dataclass(frozen=True)
class Cell:
    """What is swept (draft tokens per round, delta, temperature), and what is not: the
    coupling of :class:`Sampling`, and a beam search."""

    num_draft: int | Literal["auto"]
    delta: float = 0.0
    temperature: float = 0.0
    coupling: str | None = None
    beams: Beams | None = None

    @property
    def asked(self) -> int | None:
        """The draft tokens as :meth:`pair.Pair.samples` takes them."""
        return None if self.num_draft == AUTO else self.num_draft

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, coupling=self.coupling)

    @property
    def compared(self) -> bool:
        """Whether its text is compared with that of the target alone, which has the
        same random numbers, if any."""
        return not self.temperature or (self.sampling.coupling_at(self.delta) == SHARED)

    def __str__(self) -> str:
        name = f"num-draft {self.num_draft}"
        if self.temperature:
            name += f", temperature {self.temperature:g}"
        name += f", delta {self.delta:g}" if self.delta else ""
        return name + baselines.searched(self.beams)


@dataclass(frozen=True)
class Answer:
    """What a variant made of a prompt: text, seconds with encoding, our figures."""

    text: str
    tokens: list[int]
    seconds: float
    stats: Stats | None = None


@dataclass(frozen=True)
class Variant:
    """One way to answer a prompt: ours in a cell, or another program's.

    Attributes:
        cell: ours; None for another program.
        answer: of a prompt and its number.
        temperature: at which it decodes.
        threads: whose threads compute: "mlx" or another library's name.
    """

    name: str
    cell: Cell | None
    answer: Callable[[str, int], Answer]
    temperature: float = 0.0
    threads: str = "mlx"


def ours(pair: Pair, cell: Cell, max_tokens: int) -> Variant:
    """Decoding with this project's loop."""

    def answer(prompt: str, number: int) -> Answer:
        pair.forget()
        began = time.perf_counter()
        done = pair.generate(
            prompt,
            max_tokens=max_tokens,
            num_draft=cell.asked,
            delta=cell.delta,
            sampling=cell.sampling,
            stream=number,
            beams=cell.beams,
        ).finish()
        return Answer(done.text, done.tokens, time.perf_counter() - began, done.stats)

    return Variant(str(cell), cell, answer, cell.temperature)


def theirs(pair: Pair, baseline: baselines.Baseline) -> Variant:
    """Decoding with another program, on the same weights."""

    def answer(prompt: str, number: int) -> Answer:
        began = time.perf_counter()
        tokens, passes = baseline.generate(pair.tokenizer.encode(prompt))
        text = pair.tokenizer.decode(tokens)
        seconds = time.perf_counter() - began
        stats = passes and Stats(new_tokens=len(tokens), rounds=passes)
        return Answer(text, tokens, seconds, stats)

    return Variant(baseline.name, None, answer, baseline.temperature, baseline.threads)


def simulated(pair: SimulatedPair, cell: Cell) -> Variant:
    """Decoding with this project's loop what exists as shapes alone."""

    def answer(prompt: str, number: int) -> Answer:
        began = time.perf_counter()
        tokens, stats = pair.generate(number, cell.asked)
        return Answer("", tokens, time.perf_counter() - began, stats)

    return Variant(f"{cell} (simulated)", cell, answer)


def variants_of(
    pair: Pair, cells: list[Cell], others: list[str], max_tokens: int
) -> list[Variant]:
    """This program in every cell, and the others by their names: mlx-lm in every cell
    that is its, another one once, with the beams of the cells."""
    variants = [ours(pair, cell, max_tokens) for cell in cells]
    for name in others:
        if name == baselines.MLX_LM:
            each = [
                baselines.mlx_lm(pair, max_tokens, cell.num_draft, cell.temperature)
                for cell in cells
                if not cell.delta and cell.num_draft != AUTO
            ]
        else:
            each = [baselines.named(name, pair, max_tokens, cells[0].beams)]
        variants += [theirs(pair, baseline) for baseline in each]
    return variants
