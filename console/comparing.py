"""How much drafting gains here, and on what."""

from collections import Counter
from collections.abc import Callable
from statistics import median
from time import perf_counter

import mlx.core as mx

from answering import Generation
from system import fast_blas
from system.errors import say


def compare(
    answer: Callable[[int | None], list[Generation]],
    num_draft: int | None,
    forget: Callable[[], None],
) -> None:
    """Say by how much drafting is faster here, encoding included.

    Decodes with and without in turn: once each, oftener while that takes no second.
    Sampled texts differ in length, so it is the time per token that is compared.

    Args:
        answer: begins the answers to the prompt, with that many draft tokens.
        num_draft: how many to compare with none; None for as many as pay.
        forget: drops what is cached of the answer before.
    """
    began = perf_counter()
    seconds: dict[int | None, list[float]] = {num_draft: [], 0: []}
    texts, tokens, sizes = {}, {}, Counter()
    while not texts or (perf_counter() - began < 1 and len(seconds[0]) < 15):
        for drafts, its in seconds.items():
            mx.synchronize()  # a GPU may still be at what the run before queued
            forget()
            start = perf_counter()
            done = [one.finish() for one in answer(drafts)]
            its.append(perf_counter() - start)
            texts[drafts] = [one.text for one in done]
            tokens[drafts] = sum(len(one.tokens) for one in done)
            if drafts is None:
                for one in done[:1] if done[0].searched else done:
                    for size, times in one.stats.sizes:
                        sizes[size] += times
    fast, plain = median(seconds[num_draft]), median(seconds[0])
    if texts[num_draft] == texts[0]:
        what, unit = "the same text", "s"
    else:
        fast, plain = fast / tokens[num_draft] * 1e3, plain / tokens[0] * 1e3
        what, unit = "another text", "ms a token"
    say(
        f"compared: {plain / fast:.2f} times as fast as the target alone "
        f"({fast:.3f} {unit} against {plain:.3f} {unit}), {what}"
    )
    if sizes:
        rounds = sizes.total()
        shares = ", ".join(
            f"{size} in {100 * times / rounds:.0f} %"
            for size, times in sizes.most_common(4)
        )
        say(f"draft tokens per round, as auto had it: {shares} of {rounds} rounds")


def describe_machine() -> None:
    """Say what computes."""
    blas = f", BLAS {fast_blas.library}" if fast_blas.library else ""
    say(f"MLX {mx.__version__} on {mx.default_device()}{blas}")
