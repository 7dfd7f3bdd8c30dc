"""Decoder-only models through mlx-lm: GPT-2, Llama, Qwen and the others that it has.

mlx-lm computes the forward pass; the decoding loop, acceptance and sampling are this
project's. A session is what the loop asks for: prefill, extend, rewind to a length.
"""

import fast_blas  # noqa: F401  (before mlx: see there)

from collections.abc import Collection
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from checkpoint import CONFIG, GENERATION_CONFIG
from config import Special, find_size, with_text
from errors import InputError, TooLongError
from files import read_json, typed
from model import check_prompts, check_rewind, prepare_memory
from sampling import ban
from sources import open_checkpoint, weight_files

HINT = "decoder-only models need mlx-lm: pip install -r requirements-causal.txt"

#: What a config may call the number of its layers, and the most of anything else that
#: it counts: heads, experts, inputs.
_LAYERS = {"num_hidden_layers", "num_layers", "n_layers", "n_layer"}
_MOST = 4096

PREFILL = 2048  # prompt tokens that go through the model at a time
ROOM = 256  # positions by which a cache grows


def load(folder: Path) -> nn.Module:
    """Load a checkpoint as it is: Hugging Face's or mlx-community's, quantized or not.

    On a CPU the weights become float32, quantized ones too.

    Raises:
        InputError: mlx-lm is missing or does not have this architecture, the files are
            damaged, or the weights do not fit the memory.
    """
    config = read_json(folder / CONFIG)
    refuse_code(config, folder)
    require_weights(config, folder)
    try:
        from mlx_lm.utils import _get_classes, dequantize_model, load_model
    except ImportError:
        raise InputError(HINT) from None
    on_cpu = mx.default_device() == mx.cpu
    if on_cpu:
        mx.disable_compile()  # see model.load

    def classes(config: dict[str, Any]) -> tuple[type, type]:
        model_class, arguments = _get_classes(config)
        if config.get("model_type") == "gpt2":
            model_class = _with_saved_names(model_class)
        return model_class, arguments

    try:
        model, _ = load_model(
            folder,
            lazy=True,
            model_config=_rope(config) | _context(config),
            get_model_classes=classes,
        )
    except Exception as error:  # of any kind, for whatever a folder may hold
        raise InputError(f"mlx-lm cannot load {folder}: {error}") from None
    if on_cpu:
        model = dequantize_model(model)
        model.update(tree_map(_widen, model.parameters()))
    weights = tree_flatten(model.parameters())
    prepare_memory(sum(weight.nbytes for _, weight in weights), folder)
    mx.eval(model.parameters())
    model.eval()
    return model


def refuse_code(config: dict[str, Any], folder: Path) -> None:
    """See to it that the folder's model is one of mlx-lm's, not Python that it brings.

    No code of a folder is ever run. ``auto_map`` names code as well; where transformers
    has the architecture itself, as it has Phi-3, that is a leftover and not needed.

    Raises:
        InputError: the model is defined by code in its folder.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind.isidentifier():
        raise InputError(f"{folder / CONFIG} has no model_type that is a name")
    needed = "model_file" if config.get("model_file") is not None else None
    if not needed and config.get("auto_map") is not None:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        needed = None if kind in CONFIG_MAPPING_NAMES else "auto_map"
    if needed:
        raise InputError(
            f"{folder / CONFIG} wants Python of the folder run ({needed}): no code "
            f"that comes with a model is run here"
        )


def require_weights(config: dict[str, Any], folder: Path) -> None:
    """See to it that the weights are whole, and that there are some for every layer.

    mlx-lm makes the layers that a config asks for before it looks at the weights.

    Raises:
        InputError: they are damaged, missing, or fewer than the layers.
    """
    tensors = open_checkpoint(folder)
    read = set(weight_files(folder))
    for path in folder.glob("model*.safetensors"):
        if path not in read:
            raise InputError(
                f"{path} is no part of the checkpoint, but mlx-lm would read it: move "
                f"it away"
            )
    read_json(folder / "hf_quant_config.json", optional=True)  # mlx-lm reads it, too
    filled = sum(tensor.bits.size > 0 for tensor in tensors.values())
    for values in with_text(config):
        for name, value in values.items():
            most = _most(name, filled)
            number = isinstance(value, int | float)
            if most is not None and number and not value <= most:
                raise InputError(
                    f"{folder / CONFIG} does not fit the weights: its {name} is over "
                    f"{most}, and they are {filled} tensors"
                )


def _most(name: str, tensors: int) -> int | None:
    """The most that a number of this name may be, with so many tensors; None for one
    that counts nothing."""
    if name.endswith(("_size", "_dim")):
        return 1 << 24
    if name in _LAYERS:
        return min(tensors // 2, 1000)
    counts = any(word in name for word in ("num_", "layers", "expert"))
    return _MOST if counts else None


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding's settings where mlx-lm looks for them.

    transformers 5 saves them in a group; mlx-lm's models that look for them beside it
    would take their own defaults.
    """
    group = config.get("rope_parameters")
    if not isinstance(group, dict) or "rope_theta" not in group:
        return {}
    found = {"rope_theta": group["rope_theta"]}
    if group.get("rope_type", "default") != "default":
        found["rope_scaling"] = group
    return {name: value for name, value in found.items() if name not in config}


def _context(config: dict[str, Any]) -> dict[str, Any]:
    """GPT-2's positions by their older name, which transformers 5 leaves out."""
    if config.get("model_type") != "gpt2" or "n_ctx" in config:
        return {}
    return {"n_ctx": config.get("n_positions")}


def _with_saved_names(model_class: type) -> type:
    """GPT-2 that also takes the names which transformers saves: mlx-lm has only those
    of the first checkpoints, that the hub's ``gpt2`` to ``gpt2-xl`` still have."""

    class Named(model_class):
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            return super().sanitize(
                {
                    name.removeprefix("transformer."): weight
                    for name, weight in weights.items()
                    if name != "lm_head.weight"  # the embedding once more
                    and not name.endswith(".attn.masked_bias")
                }
            )

    return Named


def _widen(weight: mx.array) -> mx.array:
    floating = mx.issubdtype(weight.dtype, mx.floating)
    return weight.astype(mx.float32) if floating else weight


def eos_tokens(folder: Path) -> frozenset[int]:
    """The ids that end a text, of either config; there may be several.

    Raises:
        InputError: an id is no number.
    """
    found: set[int] = set()
    for name in (CONFIG, GENERATION_CONFIG):
        config = read_json(folder / name, optional=name != CONFIG)
        ends = typed(config, Special, str(folder / name)).eos_token_id
        found.update(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return frozenset(found)


def positions(folder: Path, model: nn.Module) -> int | None:
    """How many positions the model takes: those that it was trained with, and has an
    embedding for where they are not computed; None where nothing says.

    Raises:
        InputError: the config says it, and no number.
    """
    config = read_json(folder / CONFIG)
    said = find_size(config, "n_positions", "max_position_embeddings")
    learned = [
        weight.shape[0]
        for name, weight in tree_flatten(model.parameters())
        if name.endswith(("wpe.weight", "embed_positions.weight"))
    ]
    if said is not None:
        learned.append(min(said, np.iinfo(np.int32).max))
    return min(learned, default=None)


def rows(model: nn.Module) -> int:
    """How many ids a model has logits for, whatever its config says.

    Raises:
        InputError: its parts do not go together.
    """
    try:
        return model(mx.array([[0]])).shape[-1]  # lazy: nothing is computed
    except Exception as error:  # of any kind, for whatever a config may say
        raise InputError(f"mlx-lm cannot run this model: {error}") from None


class CausalSession:
    """One mlx-lm model and the decoding state of one batch of prompts.

    One prompt uses mlx-lm's own caches, and what it begins with in common with the text
    before it stays cached. In a batch, whose rows are at different lengths, each layer
    has a cache with a length for each row.
    """

    def __init__(
        self,
        model: nn.Module,
        vocabulary: int,
        banned: Collection[int] = (),
        positions: int | None = None,
    ):
        """
        Args:
            vocabulary: how many ids may be emitted: logits are cut to it.
            banned: ids below it that stand for nothing: their logits are -inf.
            positions: the most that may be fed.

        Raises:
            InputError: the model's caches cannot be rewound.
        """
        from mlx_lm.models.cache import KVCache, make_prompt_cache

        self.model = model
        self.vocabulary = vocabulary
        self.positions = positions
        self.lengths: list[int] = []
        self._ban = ban(vocabulary, banned) if banned else None
        self._new_caches = lambda: make_prompt_cache(model)
        self._caches: list[Any] = self._new_caches()
        # What was fed to a single row: (place, tokens) in order.
        self._fed: list[tuple[int, mx.array]] = []
        for cache in self._caches:
            if type(cache) is not KVCache:
                raise InputError(
                    f"this model keeps its state in a {type(cache).__name__}, which "
                    f"cannot be rewound: sliding windows and state-space layers do "
                    f"not go with speculative decoding"
                )

    def start(self, prompts: list[list[int]]) -> list[list[int]]:
        """Prefill a batch of prompts (B lists of ids, none empty), but the last token
        of each. Returns when the device has finished.

        Returns:
            The prompts: decoding goes on from their last tokens.

        Raises:
            InputError: an empty prompt, or one that leaves no position to write to.
        """
        check_prompts(prompts, self.vocabulary)
        for prompt in prompts:
            if self.positions and len(prompt) >= self.positions:
                raise TooLongError(
                    f"the prompt has {len(prompt)} tokens, but the model has positions "
                    f"for {self.positions} with its answer: shorten it"
                )
        known = 0
        if len(prompts) == 1:
            known = self._reuse(prompts[0])
        else:
            self._caches = [
                RowCache(len(prompts), self.positions) for _ in self._new_caches()
            ]
        longest = max(map(len, prompts)) - 1
        tokens = np.zeros((len(prompts), longest), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt) - 1] = prompt[:-1]
        self.lengths = [known] * len(prompts)
        for place in range(known, longest, PREFILL):
            mx.eval(self.extend(mx.array(tokens[:, place : place + PREFILL]))[:, -1:])
        self.rewind([len(prompt) - 1 for prompt in prompts])
        return [list(prompt) for prompt in prompts]

    def extend(self, tokens: mx.array) -> mx.array:
        """Append tokens (B, T), each row at its own length.

        Returns:
            Logits (B, T, vocabulary): those at [b, t] are for the token after it.
        """
        if len(self.lengths) == 1:
            self._fed.append((self.lengths[0], tokens))
        logits = self.model(tokens, cache=self._caches)
        self.lengths = [length + tokens.shape[1] for length in self.lengths]
        logits = logits[..., : self.vocabulary]
        return logits if self._ban is None else logits + self._ban.astype(logits.dtype)

    def rewind(self, lengths: list[int]) -> None:
        """Forget all but the first ``lengths[b]`` cached positions of each row b.

        Raises:
            ValueError: a length beyond what is cached.
        """
        check_rewind(self.lengths, lengths)
        for cache in self._caches:
            if isinstance(cache, RowCache):
                cache.rewind(lengths)
            else:
                # To a place, not by a count: a pass that Ctrl-C cut short may have
                # reached some layers and not others.
                cache.trim(cache.offset - lengths[0])
        self.lengths = list(lengths)

    def forget(self) -> None:
        """Drop the batch and its caches: nothing of it is kept for the next prompt."""
        self._caches, self._fed = self._new_caches(), []
        self.lengths = []

    def _reuse(self, prompt: list[int]) -> int:
        """Keep of the cache what ``prompt`` begins with; how many positions that is."""
        held: list[int] = []
        if len(self.lengths) == 1:
            for place, tokens in self._fed:
                held[place:] = np.array(tokens)[0].tolist()
            held = held[: self.lengths[0]]
        else:
            self._caches = self._new_caches()
            self.lengths = [0]
        known = 0
        for cached, token in zip(held, prompt[:-1], strict=False):
            if cached != token:
                break
            known += 1
        self.rewind([known])
        self._fed = [(0, mx.array([held[:known]], mx.int32))]
        return known


class RowCache:
    """Keys and values of one layer, with a length of its own for each row.

    It stands where mlx-lm's caches do: models ask it for ``offset``, for a mask, and to
    take in new keys and values. What lies beyond a row's length is masked and later
    overwritten, so a rewind only changes lengths.
    """

    def __init__(self, rows: int, positions: int | None):
        self._lengths = np.zeros(rows, np.int32)
        # A finished row is fed on while others are not: not beyond the last position.
        self._last = (positions or np.iinfo(np.int32).max) - 1
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    @property
    def offset(self) -> mx.array:
        """(B,) int32, where each row's next position is."""
        return mx.array(np.minimum(self._lengths, self._last))

    def rewind(self, lengths: list[int]) -> None:
        self._lengths = np.array(lengths, np.int32)

    def make_mask(
        self, size: int, return_array: bool = True, window_size: int | None = None
    ) -> mx.array:
        """(B, 1, T, keys) bool: what each of ``size`` new positions may attend to."""
        places = self._lengths[:, None] + np.arange(size)
        seen = np.arange(places.max() + 1) <= places[..., None]
        return mx.array(seen[:, None])

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, H, T, D); all of them, up to the longest row."""
        size = keys.shape[2]
        places = self._lengths[:, None] + np.arange(size, dtype=np.int32)
        end = int(places.max()) + 1
        self._keys = _with_room(self._keys, keys, end)
        self._values = _with_room(self._values, values, end)
        at = mx.array(places[:, None, :, None])
        self._keys = mx.put_along_axis(
            self._keys, mx.broadcast_to(at, keys.shape), keys, 2
        )
        self._values = mx.put_along_axis(
            self._values, mx.broadcast_to(at, values.shape), values, 2
        )
        self._lengths = self._lengths + size
        return self._keys[:, :, :end], self._values[:, :, :end]


def _with_room(held: mx.array | None, new: mx.array, end: int) -> mx.array:
    """``held`` with at least ``end`` positions, zeroed: masked NaN would spread."""
    batch, heads, _, size = new.shape
    have = 0 if held is None else held.shape[2]
    if end <= have:
        return held
    room = -(-end // ROOM) * ROOM - have
    empty = mx.zeros((batch, heads, room, size), new.dtype)
    return empty if held is None else mx.concatenate([held, empty], axis=2)
