"""Which architecture a model is of, and where it lies: the one place that decides.

Another architecture is a module with these functions, and its names in ``BY_TYPE``.
What is not named there is decoder-only, mlx-lm's or nobody's, and the one kind that is
run as it is found; all others are converted first.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from architectures import causal, t5
from architectures.loading import Loading
from checkpoints.config import FAMILY, require_family
from checkpoints.converted import CONFIG, locate
from checkpoints.hub import fetch, fetch_config
from checkpoints.sources import Steps, Tensor
from speculation.session import Session
from system.errors import InputError
from system.files import read_json
from text.tokenizer import Tokenizer


class Architecture(Protocol):
    """What a module has that knows an architecture."""

    @staticmethod
    def embedding_rows(folder: Path) -> int:
        """How many ids a model has embeddings for."""

    @staticmethod
    def eos_tokens(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
        """The ids that end a text."""

    @staticmethod
    def open_session(
        folder: Path, tokenizer: Tokenizer, vocabulary: int, how: Loading
    ) -> Session:
        """Load a model into a session that emits ids below ``vocabulary``, but for
        those that no token stands for."""


class Converted(Architecture, Protocol):
    """What it has besides, where its models are converted before they are run."""

    @staticmethod
    def plan(
        config: Mapping[str, Any], source: Path, tensors: dict[str, Tensor]
    ) -> tuple[Steps, list[str]]:
        """How a checkpoint is converted, and what is odd about it, in lines."""


#: By a config's model_type; all others are decoder-only, mlx-lm's or nobody's.
BY_TYPE: dict[str, Converted] = dict.fromkeys(FAMILY, t5)

#: What the names of T5s on the hub begin with.
_T5S = re.compile(r"(flan-)?(u?m?t5|byt5|codet5p?|madlad400|aya-101|ul2)\b", re.I)


def of_config(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a model with this config."""
    kind = config.get("model_type")
    return BY_TYPE.get(kind, causal) if isinstance(kind, str) else causal


def of_folder(folder: Path) -> Architecture:
    """The architecture of the model in a folder."""
    return of_config(read_json(folder / CONFIG))


def require_convertible(config: Mapping[str, Any]) -> None:
    """Raise an InputError for a config of what is run as it is, or not at all."""
    try:
        require_family(config)
    except InputError as error:
        advice = "decoder-only models are run as they are (python main.py --model ...)"
        raise InputError(f"{error}; {advice}") from None


def plan(
    config: Mapping[str, Any], source: Path, tensors: dict[str, Tensor]
) -> tuple[Steps, list[str]]:
    """How a checkpoint is converted: see :class:`Converted`.

    Raises:
        InputError: it is not, or not this one.
    """
    require_convertible(config)
    return BY_TYPE[config["model_type"]].plan(config, source, tensors)


def find(name: str, unverified: bool = False) -> Path:
    """The folder of a model.

    A converted T5, by folder or by its name in ``models/``; or a decoder-only model: a
    folder with its config, or a name on the hub, from where it is fetched.

    Raises:
        InputError: there is none, or it cannot be fetched, or nothing here runs it.
    """
    try:
        return locate(name)
    except InputError as error:
        folder = _find_causal(name, unverified)
        if folder is None:
            raise error from None
        return folder


def _find_causal(name: str, unverified: bool) -> Path | None:
    """The folder of a decoder-only model; None for what would have to be converted."""
    folder = Path(name)
    try:
        here = folder.is_dir()
    except (OSError, ValueError):  # a name that no file system takes
        return None
    if not here:
        # A T5 has to be converted, whatever the hub has to say after a while.
        return None if _T5S.match(folder.name) else fetch_causal(name, unverified)
    config = read_json(folder / CONFIG, optional=True)
    if not config or of_config(config) is not causal:
        return None
    if config.get("model_file") is None and config.get("auto_map") is None:
        # Of code it is said that it is not run.
        causal.refuse_encoder_decoder(config, name)
    return folder


def fetch_causal(name: str, unverified: bool = False) -> Path | None:
    """The folder of a decoder-only model on the hub; None if it has to be converted.

    Its config alone decides, before any weights are fetched.

    Raises:
        InputError: there is no such model, no access, no network; nothing here runs it.
    """
    config = read_json(fetch_config(name))
    if of_config(config) is not causal:
        return None
    causal.require(config, name, unverified)
    return fetch(name)
