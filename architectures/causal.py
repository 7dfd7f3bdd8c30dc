"""Decoder-only models: mlx-lm's layers, in the decoding loop of this program.

What there is to know of one before it is loaded is here; :mod:`causal_model` loads it,
for which mlx-lm has to be imported, and that takes a second.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from architectures.loading import Loading
from architectures.parallel import open_part
from checkpoints.config import Special, find_size, with_text
from checkpoints.converted import CONFIG, GENERATION_CONFIG
from speculation.session import Session
from system.errors import InputError
from system.files import is_file, read_json, typed
from text.tokenizer import Tokenizer

HINT = "decoder-only models need mlx-lm: pip install -r requirements-causal.txt"


def require(config: Mapping[str, Any], name: str, unverified: bool) -> None:
    """See to it that a model on the hub can be run, before its weights are fetched.

    Raises:
        InputError: it is an encoder-decoder, mlx-lm is missing or does not have its
            architecture, or that is not verified.
    """
    from architectures import verified  # T5 has no use for it

    refuse_encoder_decoder(config, name)
    where = f"{name}'s {CONFIG}"
    _require_architecture(config.get("model_type"), where)
    verified.require(config, where, unverified)


def refuse_encoder_decoder(config: Mapping[str, Any], name: str) -> None:
    """
    Raises:
        InputError: the config is that of an encoder-decoder outside the T5 family.
    """
    if config.get("is_encoder_decoder") is True:
        raise InputError(
            f"{name} is an encoder-decoder ({config.get('model_type')}): of those only "
            f"the T5 family is run here"
        )


def _require_architecture(kind: Any, where: str) -> None:
    """See to it that mlx-lm has what a config names, without importing a name of it.

    Raises:
        InputError: it has not, or is missing.
    """
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(HINT)
    if not isinstance(kind, str) or not kind.isidentifier():
        raise InputError(f"{where} has no model_type that is a name")
    models = Path(spec.submodule_search_locations[0]) / "models"
    if is_file(models / f"{kind}.py"):
        return
    from mlx_lm.utils import MODEL_REMAPPING  # takes seconds, so only now

    if kind not in MODEL_REMAPPING:
        raise InputError(
            f"{where} has the model_type '{kind}', which is neither of the T5 family "
            f"nor one that mlx-lm has"
        )


def embedding_rows(folder: Path) -> int:
    """How many ids a model has embeddings for.

    Raises:
        InputError: its config does not say.
    """
    rows = find_size(read_json(folder / CONFIG), "vocab_size")
    if rows is None:
        raise InputError(f"{folder / CONFIG} has no vocab_size")
    return rows


def eos_tokens(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end a text; there may be several.

    What generation_config.json says counts before the config, as in ``generate``; where
    neither says, the end that the tokenizer has, as in mlx-lm.

    Raises:
        InputError: an id is no number.
    """
    for name in (GENERATION_CONFIG, CONFIG):
        for values in with_text(read_json(folder / name, optional=name != CONFIG)):
            ends = typed(values, Special, str(folder / name)).eos_token_id
            if ends is not None:
                return frozenset(ends if isinstance(ends, list) else [ends])
    end = tokenizer.end
    return frozenset([] if end is None else [end])


def open_session(
    folder: Path, tokenizer: Tokenizer, vocabulary: int, how: Loading
) -> Session:
    """Load a model into a session that emits the tokenizer's ids alone.

    Raises:
        InputError: as :func:`causal_model.load`, or it cannot emit them, or it is to
            be loaded as only T5 is.
    """
    if how.dtype or how.compiled:
        raise InputError(
            f"{folder} is no T5: it is computed in what it is stored in, on a CPU in "
            "float32, and not compiled (--dtype and --compile are for T5)"
        )
    from architectures import causal_model

    try:
        found = causal_model.load(folder, how.unverified, how.ranks)
    except ImportError:
        raise InputError(HINT) from None
    from architectures.causal_session import CausalSession  # of mlx-lm's caches

    if vocabulary > found.rows:
        raise InputError(
            f"{folder / CONFIG} has a vocab_size that its weights have not: "
            f"{vocabulary} ids, and {found.rows} rows"
        )
    session = CausalSession(
        found.model,
        vocabulary,
        tokenizer.gaps(vocabulary),
        found.positions,
        batches=found.verified,
        heads=found.heads,
    )
    return open_part(session, how.ranks) if how.ranks else session
