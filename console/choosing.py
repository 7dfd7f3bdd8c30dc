"""Which models answer: those that flags name, or those that there are."""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from architectures.loading import Loading
from architectures.registry import find
from checkpoints import converted
from checkpoints.converted import WEIGHTS
from checkpoints.storing import DTYPES
from pair import LOOKUP, TENSOR, DifferentTokenizersError, Pair
from system.device import emulates_bfloat16
from system.errors import InputError, say

DEFAULT_DRAFT = "t5-small"

BUNDLED = tuple(
    Path(__file__).resolve().parents[1] / "demo" / n for n in ("target", "draft")
)

NO_DRAFT = "none"


def add_loading(add: Callable[..., Any]) -> None:
    """The flags of how models are loaded."""
    add(
        "--unverified",
        action="store_true",
        help="take decoder-only models whose text nobody has compared with "
        "transformers', too",
    )
    add(
        "--dtype",
        choices=("auto", *DTYPES.values()),
        default="auto",
        help="what T5 computes in (default: auto, what its weights are stored in, and "
        "float32 on a CPU); float16 is faster than bfloat16 on an M1 or M2",
    )
    add(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="compile T5's decoder passes (default: auto, on a GPU where make check "
        "has found that faster)",
    )


def loading_of(arguments: Namespace) -> Loading:
    """What those flags say."""
    compiled = {"on": True, "off": False}.get(arguments.compile)
    dtype = None if arguments.dtype == "auto" else arguments.dtype
    return Loading(arguments.unverified, dtype, compiled)


def choose_pair(
    model: str | None,
    draft: str | None,
    *,
    plain: bool,
    how: Loading,
    lookup: bool = False,
    parallel: str = TENSOR,
) -> Pair:
    """Load the models that are asked for, or those that there are.

    Args:
        model, draft: as flags name them; None where they do not.
        plain: decode with the target alone: no draft is loaded.
        how: they are loaded.
        lookup, parallel: of :meth:`pair.Pair.load`.

    Raises:
        InputError: there are none, or they cannot be loaded.
    """
    if model is None:
        model, default_draft = _default_models()
        draft = draft or default_draft
        if Path(model) == BUNDLED[0]:
            say("using the bundled pair: English to German, sentences of up to 8 words")
        else:
            say(f"using {model}" + (f" with {draft}" if not plain else ""))
    pair_of = partial(
        Pair.load,
        lookup=lookup and not plain,
        unverified=how.unverified,
        dtype=how.dtype,
        compiled=how.compiled,
        parallel=parallel,
    )
    if plain or draft == NO_DRAFT:
        pair = pair_of(model)
    elif draft:
        pair = pair_of(model, draft)
    else:
        model = str(find(model, how.unverified))  # once: it may ask the hub
        pair = _load_with_default_draft(model, pair_of)
    model = pair.target.model if pair.target.has_encoder else None
    if model is not None and model.dtype == mx.bfloat16 and emulates_bfloat16():
        say(
            "hint: this Mac has no arithmetic in bfloat16: --dtype float16 may be "
            "faster, and is as exact (docs/mac.md)"
        )
    if not pair.batches:
        say(
            "not verified: nobody has compared this model's text with transformers'; "
            "samples are decoded one after another"
        )
    return pair


def _default_models() -> tuple[str, str]:
    large = converted.MODELS / "t5-11b", converted.MODELS / DEFAULT_DRAFT
    for target, draft in (large, BUNDLED):
        if (target / WEIGHTS).is_file() and (draft / WEIGHTS).is_file():
            return str(target), str(draft)
    raise InputError(
        "no model is converted yet: convert two (python convert.py --model t5-11b, "
        "then --model t5-small), or name a converted one with --model"
    )


def _load_with_default_draft(model: str, pair_of: Callable[..., Pair]) -> Pair:
    """The target with the converted t5-small, where that has the same tokenizer."""
    draft = converted.MODELS / DEFAULT_DRAFT
    why = "no draft model"
    if (draft / WEIGHTS).is_file() and Path(model).resolve() != draft.resolve():
        try:
            pair = pair_of(model, str(draft))
        except DifferentTokenizersError:
            why = f"{DEFAULT_DRAFT} is no draft for this tokenizer"
        else:
            say(f"drafting with {DEFAULT_DRAFT}")
            return pair
    pair = pair_of(model, LOOKUP)
    say(f"{why}: drafting by prompt lookup (see --draft-model)")
    return pair
