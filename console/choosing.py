"""Which models answer: those that flags name, or those that there are."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from architectures.registry import find
from checkpoints import converted
from checkpoints.converted import WEIGHTS
from pair import LOOKUP, DifferentTokenizersError, Pair
from system.errors import InputError, say

DEFAULT_DRAFT = "t5-small"

BUNDLED = tuple(
    Path(__file__).resolve().parents[1] / "demo" / n for n in ("target", "draft")
)

NO_DRAFT = "none"


def choose_pair(
    model: str | None,
    draft: str | None,
    *,
    plain: bool,
    unverified: bool,
    lookup: bool = False,
) -> Pair:
    """Load the models that are asked for, or those that there are.

    Args:
        model, draft: as flags name them; None where they do not.
        plain: decode with the target alone: no draft is loaded.
        unverified, lookup: of :meth:`pair.Pair.load`.

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
    pair_of = partial(Pair.load, unverified=unverified, lookup=lookup and not plain)
    if plain or draft == NO_DRAFT:
        pair = pair_of(model)
    elif draft:
        pair = pair_of(model, draft)
    else:
        model = str(find(model, unverified))  # once: it may ask the hub
        pair = _load_with_default_draft(model, pair_of)
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
