"""The device that computes, and what the whole process is set to because of it."""

import mlx.core as mx

#: Head sizes for which MLX's attention on a GPU is one kernel, which stores no squares.
FUSED = (64, 80, 128)


def on_cpu() -> bool:
    """Whether MLX computes on a CPU, unless it is told otherwise."""
    return mx.default_device() == mx.cpu


def on_gpu() -> bool:
    """Likewise on a GPU, Apple's or another."""
    return mx.default_device() == mx.gpu


def on_metal() -> bool:
    """Whether it is Apple's."""
    return on_gpu() and mx.metal.is_available()


def most_drafted() -> int:
    """The most draft tokens that a pass takes well, with the one before them: Metal's
    attention for few queries is for 8 of them."""
    return 7 if on_metal() else 16


def fewest_keys() -> int:
    """How many keys attention should have at least: Metal's for few queries is for no
    more of them than there are keys."""
    return most_drafted() + 1 if on_metal() else 1


def compute_early(*arrays: mx.array) -> None:
    """Have a CPU compute these while Python builds what comes next.

    For small models that takes as long as computing it: 40 test sentences took the
    bundled pair a seventh less time. Not on a GPU, where it has not been timed.
    """
    if on_cpu():
        mx.async_eval(*arrays)


def emulates_bfloat16() -> bool:
    """Whether this GPU has no arithmetic in bfloat16: Apple's M1 and M2 have none."""
    if not on_metal():
        return False
    architecture = str(mx.device_info().get("architecture", ""))
    return architecture.startswith(("applegpu_g13", "applegpu_g14"))


def prepare(dtype: str | None = None, compiled: bool = False) -> mx.Dtype | None:
    """Set the process up for a model, before it is made.

    Args:
        dtype: what it is to compute in, by MLX's name; None where nobody says.
        compiled: whether its passes will be compiled.

    Returns:
        What its weights become: ``dtype``, else float32 on a CPU, where half precision
        and packed integers are slow, and None elsewhere: they stay what they are.
    """
    if on_cpu():
        # MLX would have g++ compile each fused kernel, for seconds, and gain little.
        (mx.enable_compile if compiled else mx.disable_compile)()
    if dtype:
        return getattr(mx, dtype)
    return mx.float32 if on_cpu() else None
