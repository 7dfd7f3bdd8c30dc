"""Which part of a T5 each rank has, where one is divided among several.

Attention heads and the feed-forward's columns are divided: a rank has some of both in
every layer, whole ones, and computes what they contribute; the contributions are added
up (Shoeybi et al., "Megatron-LM", arXiv 1909.08053, section 3). So a part of a T5 is a
T5 with fewer heads and columns. Norms and the embedding every rank has; an output head
of its own only rank 0, which alone looks at the logits.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import mlx.core as mx

from checkpoints.config import T5Config
from checkpoints.reading import Part

Range = tuple[int, int]


@dataclass(frozen=True)
class Share:
    """What one rank has of a T5.

    Attributes:
        whole: the config of all.
        heads, columns: of every attention and feed-forward, from and up to which.
        silent_heads, silent_columns: whether what they contribute does not count, as
            another rank has them too: there are more ranks than parts. (Arrays of no
            heads are nothing that one can be sure of with every kernel.)
        head: whether it has the output head, if there is one.
    """

    whole: T5Config
    heads: Range
    columns: Range
    silent_heads: bool
    silent_columns: bool
    head: bool

    @classmethod
    def of(cls, config: T5Config, rank: int, size: int, groups: bool) -> "Share":
        """The one of a rank.

        Args:
            groups: whether matrices are quantized: no group of columns is divided.
        """
        group = config.quantization.group_size if groups else 1
        # Matrices whose columns are no whole groups are not quantized.
        inner = config.num_heads * config.d_kv
        of_heads, of_columns = (
            group if count % group == 0 else 1 for count in (inner, config.d_ff)
        )
        # Heads that are whole groups together.
        together = math.lcm(config.d_kv, of_heads) // config.d_kv
        heads, silent_heads = _share(config.num_heads, together, rank, size)
        columns, silent_columns = _share(config.d_ff, of_columns, rank, size)
        return cls(config, heads, columns, silent_heads, silent_columns, rank == 0)

    @property
    def config(self) -> T5Config:
        """Of the T5 that it is."""
        return replace(
            self.whole,
            num_heads=self.heads[1] - self.heads[0],
            d_ff=self.columns[1] - self.columns[0],
        )

    def parts(self, whole: Mapping[str, mx.array]) -> dict[str, Part]:
        """What it has of tensors; those it has whole are left out.

        Args:
            whole: by their names, as stored: packed ones have fewer columns.
        """
        if self.config == self.whole and self.head:
            return {}
        found = {name: self._part(name, array.shape) for name, array in whole.items()}
        return {name: part for name, part in found.items() if part}

    def _part(self, name: str, shape: tuple[int, ...]) -> Part | None:
        path = f".{name}".rpartition(".")[0]
        if path.endswith(".head"):
            return None if self.head else Part(0, ())
        if ".position_bias" in path:
            return Part(1, (self.heads,))
        first, stop = self.heads
        size = self.whole.d_kv
        inner = self.whole.num_heads * size
        heads, columns = (first * size, stop * size), self.columns
        if path.endswith((".qkv", ".kv", ".attention.q", ".cross_attention.q")):
            return Part(0, _each(heads, shape[0] // inner, inner))
        if path.endswith(".wi"):
            d_ff = self.whole.d_ff
            return Part(0, _each(columns, shape[0] // d_ff, d_ff))
        if path.endswith(".o"):
            return Part(1, (_scaled(heads, shape[1], inner),))
        if path.endswith(".wo"):
            return Part(1, (_scaled(columns, shape[1], self.whole.d_ff),))
        return None


def _share(count: int, together: int, rank: int, size: int) -> tuple[Range, bool]:
    """From and up to which of ``count`` a rank has, of which so many stay together;
    and whether another rank has them as well."""
    units = count // together
    first, stop = units * rank // size, units * (rank + 1) // size
    if first < stop:
        return (first * together, stop * together), False
    return (0, together), True


def _each(part: Range, times: int, whole: int) -> tuple[Range, ...]:
    """The same part of each of several matrices on top of each other."""
    return tuple((n * whole + part[0], n * whole + part[1]) for n in range(times))


def _scaled(part: Range, stored: int, whole: int) -> Range:
    """The part of columns that are stored packed."""
    return part[0] * stored // whole, part[1] * stored // whole
