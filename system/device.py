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


def compute_early(*arrays: mx.array) -> None:
    """Have a CPU compute these while Python builds what comes next.

    For small models that takes as long as computing it: 40 test sentences took the
    bundled pair a seventh less time. Not on a GPU, where it has not been timed.
    """
    if on_cpu():
        mx.async_eval(*arrays)


def prepare() -> mx.Dtype | None:
    """Set the process up for a model, before it is made.

    Returns:
        What its weights become: float32 on a CPU, where half precision and packed
        integers are slow; None elsewhere, where they stay what they are.
    """
    if not on_cpu():
        return None
    # MLX would have g++ compile each fused kernel, for seconds, and gain little.
    mx.disable_compile()
    return mx.float32
