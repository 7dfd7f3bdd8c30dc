"""Decoder-only architectures that give transformers' text here: a table.

mlx-lm has a hundred architectures, and each of its models reads some fields of a config
and passes over the others, whatever they say. For those below it is known which: every
field that transformers' own code reads is in the row, and the suite compares each row
with transformers. A field that matters and is not honoured is refused by its name.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from architectures.rotary import Rotary, read_rotary
from checkpoints.config import ACTIVATIONS
from system.errors import InputError

Config = Mapping[str, Any]

#: Stands where transformers has a default that no checkpoint relies on.
NEEDED: Any = object()


@dataclass(frozen=True)
class Row:
    """What is verified of an architecture. Names are those of its config.

    Attributes:
        fields: honoured whatever they say, with transformers' defaults.
        only: honoured where they have one of these values, the default first.
        idle: what has no effect with the values that ``only`` has.
        follow: honoured where they are missing, or what other fields make of them.
        activation: the field that names the feed-forward's activation, transformers'
            default, and the names of the one that mlx-lm has whatever it says.
        feed_forward: the names of its matrices in mlx-lm's layer: in and out, or gate,
            in and out.
        fused: whether gate and in are one matrix.
        attention: the name of a layer's attention.
        rotary: settings of :func:`rotary.read_rotary`; None: no such embedding.
        windows: how far back each layer sees, from the honoured fields.
        aliases: other names that transformers takes for fields.
        grouped: whether its attention wants a mask with an axis for groups of heads.
    """

    fields: Config
    activation: tuple[str, str, tuple[str, ...]]
    feed_forward: tuple[str, ...]
    fused: bool = False
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    follow: Mapping[str, Callable[[Config], Any]] = field(default_factory=dict)
    attention: str = "self_attn"
    rotary: Mapping[str, Any] | None = field(default_factory=dict)
    windows: Callable[[Config], list[int | None]] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    grouped: bool = False


@dataclass(frozen=True)
class Verified:
    """A config of a verified architecture, read.

    Attributes:
        row: the architecture's.
        arguments: what mlx-lm's model is made from: every field that it has.
        activation: the feed-forward's; None for mlx-lm's own.
        rotary: the position embedding; None where positions are learned.
        windows: for each layer how many positions it sees, its own counted; None for
            all.
        positions: how many the model takes.
        tied: whether the embedding is the head as well.
        grouped: whether attention wants a mask with an axis for groups of heads.
    """

    row: Row
    arguments: dict[str, Any]
    activation: str | None
    rotary: Rotary | None
    windows: list[int | None]
    positions: int
    tied: bool
    grouped: bool


def head_size(config: Config) -> int:
    """The numbers of a head, where a config has no field for them."""
    return config["hidden_size"] // config["num_attention_heads"]


def _every_layer(config: Config) -> list[int | None]:
    return [config["sliding_window"]] * config["num_hidden_layers"]


def _one_type(config: Config) -> list[str]:
    """Of every layer alike: by another list transformers takes another model."""
    kind = FULL if config["sliding_window"] is None else SLIDING
    return [kind] * config["num_hidden_layers"]


def _full(config: Config) -> list[str]:
    return [FULL] * config["num_hidden_layers"]


def _every_other_layer(config: Config) -> list[int | None]:
    types = config["layer_types"] or [
        FULL if layer % 2 else SLIDING for layer in range(config["num_hidden_layers"])
    ]
    return _by_type(types, config["sliding_window"])


def _upper_layers(config: Config) -> list[int | None]:
    """Qwen's: from a layer on, and only where a switch says so."""
    layers = config["num_hidden_layers"]
    window = config["sliding_window"] if config["use_sliding_window"] else None
    first = layers if window is None else config["max_window_layers"]
    types = [SLIDING if layer >= first else FULL for layer in range(layers)]
    return _by_type(config["layer_types"] or types, window)


def _by_type(types: list[str], window: int | None) -> list[int | None]:
    if not isinstance(types, list) or not {*map(str, types)} <= {FULL, SLIDING}:
        raise InputError(f"the config has layer_types other than {FULL} and {SLIDING}")
    if SLIDING in types and window is None:
        raise InputError("the config has layers of sliding_attention, and no window")
    return [window if kind == SLIDING else None for kind in types]


FULL, SLIDING = "full_attention", "sliding_attention"

_POSITIONS = "max_position_embeddings", "n_positions"
_SIZES = {
    "vocab_size": NEEDED,
    "hidden_size": NEEDED,
    "num_hidden_layers": NEEDED,
    "num_attention_heads": NEEDED,
    "num_key_value_heads": None,
    "max_position_embeddings": NEEDED,
}
_GATED = "gate_proj", "up_proj", "down_proj"
_GELU, _TANH_GELU = ("gelu", "gelu_python"), ("gelu_new", "gelu_pytorch_tanh")
_SILU = "hidden_act", "silu", ("silu", "swish")
_TIE = "tie_word_embeddings"
_TIED, _UNTIED = {_TIE: True}, {_TIE: False}
_LLAMA = {**_SIZES, "intermediate_size": NEEDED, "rms_norm_eps": 1e-6}
_QWEN_WINDOWS = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

#: By a config's model_type.
ROWS: dict[str, Row] = {
    "gpt2": Row(
        fields={
            "vocab_size": NEEDED,
            "n_embd": NEEDED,
            "n_head": NEEDED,
            "n_layer": NEEDED,
            "n_positions": NEEDED,
            "n_inner": None,
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            **_TIED,
        },
        only={"add_cross_attention": (False,)},
        activation=("activation_function", "gelu_new", _TANH_GELU),
        feed_forward=("c_fc", "c_proj"),
        attention="attn",
        rotary=None,
        aliases={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
    ),
    "llama": Row(
        fields={
            **_LLAMA,
            "head_dim": None,
            "attention_bias": False,
            "mlp_bias": False,
            **_UNTIED,
        },
        activation=_SILU,
        feed_forward=_GATED,
    ),
    "mistral": Row(
        fields={**_LLAMA, "head_dim": None, "sliding_window": 4096, **_UNTIED},
        follow={"layer_types": _one_type},
        activation=_SILU,
        feed_forward=_GATED,
        windows=_every_layer,
    ),
    "qwen2": Row(
        fields={**_LLAMA, **_QWEN_WINDOWS, **_UNTIED},
        follow={"head_dim": head_size},
        activation=_SILU,
        feed_forward=_GATED,
        windows=_upper_layers,
    ),
    "qwen3": Row(
        fields={**_LLAMA, **_QWEN_WINDOWS, "head_dim": 128, **_UNTIED},
        only={"attention_bias": (False,)},
        activation=_SILU,
        feed_forward=_GATED,
        windows=_upper_layers,
    ),
    "gemma": Row(
        fields={**_LLAMA, "head_dim": 256},
        only={
            "attention_bias": (False,),
            "use_bidirectional_attention": (None, False),
            "tie_word_embeddings": (True,),
        },
        activation=("hidden_act", "gelu_pytorch_tanh", _GELU),
        feed_forward=_GATED,
    ),
    "gemma2": Row(
        fields={
            **_LLAMA,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
            "layer_types": None,
        },
        only={
            "attention_bias": (False,),
            "use_bidirectional_attention": (None, False),
            "tie_word_embeddings": (True,),
        },
        activation=("hidden_activation", "gelu_pytorch_tanh", _TANH_GELU),
        feed_forward=_GATED,
        windows=_every_other_layer,
        grouped=True,
    ),
    "phi": Row(
        fields={**_SIZES, "intermediate_size": NEEDED, "layer_norm_eps": 1e-5},
        only={"qk_layernorm": (False,), "tie_word_embeddings": (False,)},
        follow={"head_dim": head_size},
        activation=("hidden_act", "gelu_new", _TANH_GELU),
        feed_forward=("fc1", "fc2"),
        rotary={"partial": 0.5},
    ),
    "phi3": Row(
        fields={
            **_LLAMA,
            "rms_norm_eps": 1e-5,
            "original_max_position_embeddings": 4096,
            "sliding_window": None,
            **_UNTIED,
        },
        follow={"head_dim": head_size, "layer_types": _one_type},
        activation=_SILU,
        feed_forward=("gate_up_proj", "down_proj"),
        fused=True,
        rotary={"partial": 1.0, "types": ("default", "longrope")},
        windows=_every_layer,
    ),
    "gpt_neox": Row(
        fields={
            **_SIZES,
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
        },
        only={"attention_bias": (True,), "tie_word_embeddings": (False,)},
        follow={
            "head_dim": head_size,
            "intermediate_size": lambda config: 4 * config["hidden_size"],
        },
        activation=("hidden_act", "gelu", _TANH_GELU),
        feed_forward=("dense_h_to_4h", "dense_4h_to_h"),
        attention="attention",
        rotary={"partial": 0.25, "names": ("rotary_emb_base", "rotary_pct")},
    ),
    "stablelm": Row(
        fields={
            **_SIZES,
            "intermediate_size": NEEDED,
            "layer_norm_eps": 1e-5,
            "use_qkv_bias": False,
            "qk_layernorm": False,
            "use_parallel_residual": False,
        },
        only={"tie_word_embeddings": (False,)},
        follow={"head_dim": head_size},
        activation=_SILU,
        feed_forward=_GATED,
        rotary={"partial": 0.25},
    ),
    "starcoder2": Row(
        fields={
            **_SIZES,
            "intermediate_size": NEEDED,
            "norm_epsilon": 1e-5,
            "sliding_window": None,
            **_TIED,
        },
        only={"use_bias": (True,)},
        follow={"head_dim": head_size, "layer_types": _one_type},
        activation=("hidden_act", "gelu_pytorch_tanh", _GELU),
        feed_forward=("c_fc", "c_proj"),
        windows=_every_layer,
    ),
    "olmo2": Row(
        fields={**_LLAMA, "rms_norm_eps": 1e-5, "attention_bias": False, **_UNTIED},
        follow={"head_dim": head_size},
        activation=_SILU,
        feed_forward=_GATED,
    ),
    "smollm3": Row(
        fields={
            **_LLAMA,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "attention_bias": False,
            "mlp_bias": False,
            **_TIED,
        },
        only={"use_sliding_window": (False,)},
        idle=("sliding_window",),
        follow={"head_dim": head_size, "layer_types": _full},
        activation=_SILU,
        feed_forward=_GATED,
        rotary={"theta": 2e6},
    ),
    "granite": Row(
        fields={
            **_LLAMA,
            "attention_bias": False,
            "mlp_bias": False,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            **_UNTIED,
        },
        follow={"head_dim": head_size},
        activation=_SILU,
        feed_forward=_GATED,
    ),
}

#: Fields of any architecture that transformers' masks and caches look at, whatever the
#: model is, and the values that are honoured.
OF_ALL: dict[str, tuple[Any, ...]] = {
    "is_causal": (True, None),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None, {}),
    "per_layer_config": (None, {}),
}

#: Fields of any architecture that change no text: of training, of other heads, of what
#: else transformers returns, and those that others than the model read (the tokens that
#: begin and end a text, ``generate``'s settings).
WITHOUT_EFFECT = frozenset(
    (
        *("attention_dropout", "attn_pdrop", "classifier_dropout", "embd_pdrop"),
        *("embedding_dropout", "hidden_dropout", "resid_pdrop", "residual_dropout"),
        *("initializer_range", "num_labels", "problem_type", "use_cache"),
        *("summary_activation", "summary_first_dropout", "summary_last_dropout"),
        *("summary_proj_to_labels", "summary_type", "summary_use_proj"),
        *("reorder_and_upcast_attn", "pretraining_tp", "is_decoder"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
)


def read(config: Config) -> Verified | None:
    """A config as its architecture's row has it; None where the table has no such row.

    Raises:
        InputError: a field is missing, or says what is not honoured; it is named.
    """
    kind = config.get("model_type")
    row = ROWS.get(kind) if isinstance(kind, str) else None
    if row is None:
        return None
    aliased = {own: config[name] for name, own in row.aliases.items() if name in config}
    for name, value in aliased.items():
        _require(kind, name, config.get(name, value), (value,))
    config = {**aliased, **config}
    found = {
        name: _honoured(config, name, default) for name, default in row.fields.items()
    }
    for name, values in {**OF_ALL, **row.only}.items():
        _require(kind, name, config.get(name, values[0]), values)
    for name, follow in _follow(row).items():
        value = follow(found)
        _require(kind, name, config.get(name, value), (value, None))
    if not {"sliding_window"} & {*row.fields, *row.idle}:
        # The model has none, but generate's cache would forget what is beyond it.
        value = config.get("sliding_window")
        known = (None, value) if _reaches(value, found) else (None,)
        _require(kind, "sliding_window", value, known)
    own, default, built_in = row.activation
    activation = config.get(own, default)
    if activation is None:
        activation = default
    _require(kind, own, activation, ACTIVATIONS)
    if kind == "gemma" and activation == "gelu":
        activation = default  # as its first configs call it
    positions = _positions(found)
    rotary = None
    if row.rotary is not None:
        size = found.get("head_dim") or head_size(found)
        rotary = read_rotary({**config, **found}, size, positions, **row.rotary)
        positions = min(positions, rotary.positions or positions)
    heads = found.get("num_attention_heads")
    return Verified(
        row,
        # What mlx-lm wants and is put in its place afterwards, or follows.
        {
            "num_key_value_heads": heads,
            "rope_theta": 1e4,
            "rotary_emb_base": 1e4,
            "rotary_pct": 1.0,
            "partial_rotary_factor": 1.0,
            "n_ctx": positions,
            **{name: value for name, value in found.items() if value is not None},
            "model_type": kind,
        },
        None if activation in built_in else activation,
        rotary,
        row.windows(found) if row.windows else [],
        min(positions, (1 << 31) - 1),  # some say a trillion, for any number
        found.get("tie_word_embeddings", row.only.get(_TIE, (None,))[0]),
        row.grouped and found["num_key_value_heads"] not in (None, heads),
    )


def require(config: Config, where: str, unverified: bool) -> Verified | None:
    """A config as :func:`read` has it, refused where that is None.

    Args:
        where: the file that it is, for the messages.
        unverified: not then.

    Raises:
        InputError: the architecture has no row, or a field is not honoured.
    """
    try:
        known = read(config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if known is None and not unverified:
        raise InputError(
            f"{where} has the model_type '{config.get('model_type')}', and nobody has "
            f"compared its text with transformers': --unverified runs it as mlx-lm has "
            f"it (compared are {', '.join(sorted(ROWS))})"
        )
    return known


def _positions(found: Config) -> int:
    return next(found[name] for name in _POSITIONS if name in found)


def _reaches(window: Any, found: Config) -> bool:
    """Whether a window is no limit: the positions end before it does."""
    return type(window) is int and window >= _positions(found)


def _follow(row: Row) -> Mapping[str, Callable[[Config], Any]]:
    if "layer_types" in row.fields or "num_hidden_layers" not in row.fields:
        return row.follow
    return {"layer_types": _full, **row.follow}


def _honoured(config: Config, name: str, default: Any) -> Any:
    """A field's value, or its default, of a type that goes with that."""
    value = config.get(name, default)
    if value is NEEDED:
        raise InputError(f"the config has no {name}")
    if value is None and (default is None or name == "sliding_window"):
        return None
    if name in ("layer_types", "no_rope_layers"):
        fine = isinstance(value, list) and len(value) == config["num_hidden_layers"]
    elif isinstance(default, bool):
        fine = isinstance(value, bool)
    elif isinstance(default, float):
        fine = type(value) in (int, float) and 0 < value < math.inf
    else:
        # In a window of 1 generate's cache sees everything.
        least = {"sliding_window": 2, "max_window_layers": 0}.get(name, 1)
        most = 1 << 63 if name in _POSITIONS else 1 << 31
        fine = type(value) is int and least <= value < most
    if not fine:
        raise InputError(f"the config has an odd value in {name}")
    return value


def _require(kind: str, name: str, value: Any, values: Collection[Any]) -> None:
    if not any(value is known or value == known for known in values):
        said = ", ".join(map(str, list(values)[:3]))
        raise InputError(
            f"the config's {name} is {value}, which a {kind} does not have here "
            f"({said}): its text would be another"
        )
