"""Rotary position embeddings as transformers computes them, whatever a config calls
their settings.

A config has them in a group (``rope_parameters``, ``rope_scaling``) or beside it, and
by several names; each architecture of mlx-lm reads some of them. Here they are read
once, and become what every kind comes down to: an inverse frequency for each pair of
numbers, and a factor. Reference: transformers' ``modeling_rope_utils`` (version 5).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct

from system.errors import InputError
from system.files import typed

#: Kinds of scaling; "dynamic" begins beyond the positions that the model was trained
#: with, where none is fed.
TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

_Positive = Annotated[float, Meta(ge=1e-30, le=1e30)]
_Length = Annotated[int, Meta(ge=1, le=1 << 30)]


class _Group(Struct):
    """The settings, of all kinds."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: _Positive | None = None
    partial_rotary_factor: Annotated[float, Meta(ge=0, le=1)] | None = None
    factor: _Positive | None = None
    original_max_position_embeddings: _Length | None = None
    attention_factor: _Positive | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    beta_fast: _Positive | None = None
    beta_slow: _Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: list[_Positive] | None = None
    long_factor: list[_Positive] | None = None


@dataclass(frozen=True)
class Rotary:
    """How queries and keys are turned by their positions.

    Attributes:
        frequencies: (D / 2,) float32, radians per position for each pair of numbers.
        factor: what queries and keys are multiplied by on the way.
        positions: up to where this holds; None for everywhere.
    """

    frequencies: np.ndarray
    factor: float = 1.0
    positions: int | None = None

    @property
    def size(self) -> int:
        """D, how many numbers of a head are turned: its first ones."""
        return 2 * len(self.frequencies)


def read_rotary(
    config: Mapping[str, Any],
    head_size: int,
    positions: int,
    *,
    theta: float = 1e4,
    partial: float | None = None,
    names: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
    types: tuple[str, ...] = TYPES,
) -> Rotary:
    """The embedding that a config asks for.

    Args:
        head_size: numbers of a head.
        positions: those that the config says the model takes.
        theta: the base, where the config has none.
        partial: the part of a head that is turned, where the config does not say; None:
            this architecture turns all of it.
        names: what the two are called where they are beside the group.
        types: the kinds that this architecture may have.

    Raises:
        InputError: a kind that does not exist here, or a setting that is missing or
            odd; it is named.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    values = config.get(name) or {}
    if not isinstance(values, dict) or any(
        isinstance(v, dict) for v in values.values()
    ):
        raise InputError(
            f"the config has an odd value in {name}: it is no single group"
        )
    group = typed(values, _Group, name)
    beside = {
        field: config[older]
        for field, older in zip(
            ("rope_theta", "partial_rotary_factor"), names, strict=True
        )
        if config.get(older) is not None and getattr(group, field) is None
    }
    said = typed(beside, _Group, "the config")
    group.rope_theta = group.rope_theta or said.rope_theta or theta
    part = group.partial_rotary_factor
    if part is None:
        part = said.partial_rotary_factor
    if part is None:
        part = partial or 1.0
    if partial is None and part != 1:
        raise InputError(
            f"the config's partial_rotary_factor is {part}: this architecture has none"
        )
    kind = group.rope_type or group.type or "default"
    if kind == "su" or (kind == "yarn" and "yarn" not in types):
        kind = "longrope"  # as Phi-3's first configs call it
    if kind not in types:
        raise InputError(
            f"the config's rotary embedding is of the type '{kind}', which is not "
            f"verified for this architecture: {', '.join(types)} are"
        )
    size = int(head_size * part)
    if size < 2 or size % 2:
        raise InputError(
            f"the config turns {size} of a head's {head_size} numbers: they go in pairs"
        )
    steps = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    base = np.float32(group.rope_theta) ** steps
    name = "original_max_position_embeddings"
    outside = typed({name: config.get(name)}, _Group, "the config")
    trained = getattr(outside, name) or getattr(group, name) or positions
    setattr(group, name, trained)
    return _SCALED[kind](group, base, positions)


def _default(group: _Group, base: np.ndarray, positions: int) -> Rotary:
    return Rotary(1 / base)


def _linear(group: _Group, base: np.ndarray, positions: int) -> Rotary:
    return Rotary(1 / base / np.float32(_need(group, "factor")))


def _dynamic(group: _Group, base: np.ndarray, positions: int) -> Rotary:
    return Rotary(1 / base, positions=positions)


def _llama3(group: _Group, base: np.ndarray, positions: int) -> Rotary:
    """Slow turns are slowed down further, fast ones not, those between a bit."""
    factor = _need(group, "factor")
    low, high = _need(group, "low_freq_factor"), _need(group, "high_freq_factor")
    trained = group.original_max_position_embeddings
    if high <= low:
        raise InputError(
            "rope_scaling has a high_freq_factor that is not above the low"
        )
    frequencies = 1 / base
    length = 2 * math.pi / frequencies  # of a turn, in positions
    smooth = (trained / length - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    slow, fast = length > trained / low, length < trained / high
    scaled = np.where(slow, frequencies / factor, np.where(fast, frequencies, between))
    return Rotary(scaled.astype(np.float32))


def _yarn(group: _Group, base: np.ndarray, positions: int) -> Rotary:
    """Peng et al., "YaRN", 2023: between turns as they are and slowed down ones."""
    trained = group.original_max_position_embeddings
    factor = group.factor or positions / trained
    size = 2 * len(base)

    def place(turns: float) -> float:
        return (
            size
            * math.log(trained / (turns * 2 * math.pi))
            / (2 * math.log(group.rope_theta))
        )

    low, high = place(group.beta_fast or 32), place(group.beta_slow or 1)
    if group.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(size // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    frequencies = ramp / (factor * base) + (1 - ramp) / base

    def attention(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    said = group.attention_factor
    if said is None:
        said = attention(1)
        if group.mscale and group.mscale_all_dim:
            said = attention(group.mscale) / attention(group.mscale_all_dim)
    return Rotary(frequencies.astype(np.float32), said)


def _longrope(group: _Group, base: np.ndarray, positions: int) -> Rotary:
    """A factor for each frequency, one list of them for texts within the positions that
    the model was trained with first. Beyond, transformers takes another list for what
    comes, and leaves what is cached as it is: that is not verified, and nothing is fed
    there.
    """
    trained = group.original_max_position_embeddings
    short = group.short_factor
    if short is None or len(short) != len(base):
        raise InputError(
            f"rope_scaling has no short_factor of {len(base)} numbers: that is what "
            f"'longrope' needs here"
        )
    scale = group.attention_factor
    if scale is None:
        factor = group.factor or positions / trained
        scale = 1.0
        if factor > 1:
            scale = math.sqrt(1 + math.log(factor) / math.log(trained))
    return Rotary(
        1 / (np.array(short, np.float32) * base), scale, min(trained, positions)
    )


_SCALED = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _need(group: _Group, name: str) -> float:
    value = getattr(group, name)
    if value is None:
        raise InputError(f"the config's rotary embedding has no {name}")
    return value
