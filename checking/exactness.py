"""Whether texts with drafts are the target's own, in each dtype that weights have."""

import system.fast_blas  # noqa: F401  (before mlx: see there)

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checking import footprint, margins
from checking.task import Task
from checking.variants import VARIANTS, load
from console.choosing import BUNDLED
from measuring.prompts import read_prompts
from pair import Pair

PROMPTS = BUNDLED[0].parent / "test.tsv"
TEXTS, QUICK_TEXTS = 200, 60
MAX_TOKENS = 32
#: Ways to decode with drafts, by K; None for as many as pay.
WAYS = {"K = 4": 4, "auto": None}
#: Texts for which it is measured how far a pass over several tokens rounds otherwise,
#: and how many tokens that are.
_ROUNDED, _ROWS = 5, 5
#: The share of the time for the first dtype, float32, in which no text may differ.
_FIRST = 0.5
#: Flips that are told one by one.
_TOLD = 20


def section(task: Task) -> Iterator[dict[str, Any]]:
    """Each dtype's texts, compared; as far as the time allows, and the first most."""
    prompts = list(read_prompts(PROMPTS, QUICK_TEXTS if task.quick else TEXTS))
    done: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, storage) in enumerate(VARIANTS.items()):
            left = len(VARIANTS) - number
            share = task.left * (1 / left if number else _FIRST)
            part = Task(task.quick, share)
            pair = load(storage, Path(folder, name))
            its = compare(pair, prompts, part)
            size = footprint.weights(pair.target, pair.drafter.session)
            done.append({"name": name, **its, **footprint.entry(name, size)})
            yield {"wanted": len(prompts), "variants": done, "all": left == 1}
            del pair


def compare(pair: Pair, prompts: list[str], task: Task) -> dict[str, Any]:
    """Decode prompts without and with drafts, as many as there is time for, but one."""
    differ = dict.fromkeys(WAYS, 0)
    flips: list[dict[str, Any]] = []
    texts, rounding = 0, 0.0
    measured = 0
    for prompt in prompts:
        if texts and task.left <= 0:
            break
        ids = pair.tokenizer.encode(prompt)
        plain = _tokens(pair, prompt, 0)
        for name, size in WAYS.items():
            other = _tokens(pair, prompt, size)
            if other != plain:
                differ[name] += 1
                flip = margins.flip(pair.target, ids, plain, other)
                flips.append({"way": name, "prompt": prompt, **flip})
        if measured < _ROUNDED:
            its = margins.rounding(pair.target, ids, plain, _ROWS)
            measured += its is not None
            rounding = max(rounding, its or 0.0)
        texts += 1
    return {
        "computed": str(pair.target.model.dtype).rpartition(".")[2],
        "texts": texts,
        "differ": differ,
        "ties": sum(flip["tie"] for flip in flips),
        "unexplained": sum(not flip["tie"] for flip in flips),
        "flips": sorted(flips, key=lambda flip: flip["tie"])[:_TOLD],
        "rounding": rounding if measured else None,
    }


def _tokens(pair: Pair, prompt: str, size: int | None) -> list[int]:
    answer = pair.generate(prompt, max_tokens=MAX_TOKENS, num_draft=size)
    return answer.finish().tokens
