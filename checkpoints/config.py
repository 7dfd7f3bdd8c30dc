"""What a checkpoint's config.json says about its model: the T5 family's rules.

T5 1.0, T5 1.1 (FLAN-T5, FLAN-UL2, MADLAD-400, ByT5, CodeT5 and CodeT5+ are one or the
other), mT5 (aya-101) and umT5 are one architecture that differs in a few fields. The
reference is how transformers reads them, versions 4 and 5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from checkpoints.converted import CONFIG, GENERATION_CONFIG
from system.errors import InputError
from system.files import read_json, typed

#: Feed-forward activations by transformers' names; see ``model.activation``.
ACTIVATIONS = (
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python"),
    *("gelu_python_tanh", "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu"),
    *("linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu"),
    *("sqrtsoftplus", "swish", "tanh"),
)
FAMILY = ("t5", "mt5", "umt5")

#: Quantization modes of MLX: the bits and group sizes each has, the default first.
MODES = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}

#: The tensors of a quantized matrix, where a whole one has its weight; the modes for
#: floating-point numbers have no biases.
QUANTIZED = ("weight", "scales", "biases")


@dataclass(frozen=True)
class Quantization:
    """How the matrices are stored: integers with a scale per group of columns."""

    mode: str
    bits: int
    group_size: int

    @classmethod
    def choose(
        cls,
        mode: str = "affine",
        bits: int | None = None,
        group_size: int | None = None,
    ) -> "Quantization":
        """With the mode's defaults for what is None.

        Raises:
            InputError: the mode does not exist, or not with these values.
        """
        if mode not in MODES:
            raise InputError(f"q-mode '{mode}' is not one of {', '.join(MODES)}")
        for name, value, known in (
            ("q-bits", bits, MODES[mode][0]),
            ("q-group-size", group_size, MODES[mode][1]),
        ):
            if value is not None and value not in known:
                values = ", ".join(map(str, sorted(known)))
                raise InputError(f"{name} is {value}: {mode} has {values}")
        return cls(mode, bits or MODES[mode][0][0], group_size or MODES[mode][1][0])

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.mode}, groups of {self.group_size}"


#: What is believed of a config. The largest T5s have 24 layers a stack, 256,384 ids and
#: matrices of 65,536 columns.
Size = Annotated[int, Meta(ge=1, le=1 << 24)]
Layers = Annotated[int, Meta(ge=1, le=1000)]
Buckets = Annotated[int, Meta(ge=1, le=1 << 16)]
Distance = Annotated[int, Meta(ge=1, le=1 << 30)]
# Not gt=0: that is compared with the smallest number there is, which equals 0 where a
# library has told the processor to take such numbers for it.
Epsilon = Annotated[float, Meta(ge=1e-30, le=1)]
Id = Annotated[int, Meta(ge=-1, lt=1 << 31)]  # -1: none, in some older files


class Special(Struct):
    """The ids that either config may name."""

    decoder_start_token_id: Id | None = None
    bos_token_id: Id | None = None
    pad_token_id: Id | None = None
    eos_token_id: Id | list[Id] | None = None


class _Quantized(Struct):
    """What convert.py noted in the config, in mlx-lm's form."""

    bits: int
    group_size: int
    mode: str = "affine"


class _Fields(Special, kw_only=True):
    """The fields of ``config.json`` that shape the computation."""

    vocab_size: Size
    d_model: Size
    d_kv: Size
    d_ff: Size
    num_heads: Size
    num_layers: Layers
    num_decoder_layers: Layers | None = None
    relative_attention_num_buckets: Buckets = 32
    relative_attention_max_distance: Distance = 128
    layer_norm_epsilon: Epsilon = 1e-6
    feed_forward_proj: str | None = None
    dense_act_fn: str | None = None
    is_gated_act: bool | None = None
    tie_word_embeddings: bool | None = None
    scale_decoder_outputs: bool | None = None
    quantization: _Quantized | None = None


#: Names that transformers takes as well.
_ALIASES = {
    "hidden_size": "d_model",
    "head_dim": "d_kv",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
}


@dataclass(frozen=True)
class T5Config:
    """What of a Hugging Face ``config.json`` shapes the computation."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    num_decoder_layers: int
    num_buckets: int
    max_distance: int
    epsilon: float
    activation: str
    gated: bool
    shared_bias: bool  # by a stack's layers: umT5 has a position bias in each
    scale_outputs: bool
    start_token: int
    eos_tokens: frozenset[int]
    quantization: Quantization | None

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> "T5Config":
        """Read ``config.json`` and ``generation_config.json`` (may be empty).

        Raises:
            InputError: another architecture, or a field that is missing or odd.
        """
        kind = require_family(config)
        names = {ours: theirs for theirs, ours in _ALIASES.items() if theirs in config}
        aliased = {ours: config[theirs] for ours, theirs in names.items()}
        fields = typed({**aliased, **config}, _Fields, "the config")
        said = typed(generation, Special, "the generation config")
        activation, gated = _feed_forward(kind, fields)

        def either(name: str, default: int) -> Any:
            found = (getattr(said, name), getattr(fields, name), default)
            return next(value for value in found if value is not None)

        eos = either("eos_token_id", 1)
        result = cls(
            vocab_size=fields.vocab_size,
            d_model=fields.d_model,
            d_kv=fields.d_kv,
            d_ff=fields.d_ff,
            num_heads=fields.num_heads,
            num_layers=fields.num_layers,
            num_decoder_layers=fields.num_decoder_layers or fields.num_layers,
            num_buckets=fields.relative_attention_num_buckets,
            max_distance=fields.relative_attention_max_distance,
            epsilon=fields.layer_norm_epsilon,
            activation=activation,
            gated=gated,
            shared_bias=kind != "umt5",
            scale_outputs=_scales_outputs(config),
            start_token=either(
                "decoder_start_token_id",
                either("bos_token_id", fields.pad_token_id or 0),
            ),
            eos_tokens=frozenset(eos if isinstance(eos, list) else [eos]),
            quantization=_quantization(fields.quantization),
        )
        result._check()
        return result

    @classmethod
    def read(cls, folder: Path) -> "T5Config":
        """The config of a checkpoint folder, Hugging Face's or converted."""
        return cls.from_dict(
            read_json(folder / CONFIG),
            read_json(folder / GENERATION_CONFIG, optional=True),
        )

    def _check(self) -> None:
        """Refuse what would make an index run out of its array: MLX does not."""
        if self.num_heads * self.d_kv > 1 << 24:
            raise InputError("the config's heads are beyond all reason")
        if not 0 <= self.start_token < self.vocab_size:
            raise InputError(
                f"decoding would start from token {self.start_token}, but the config "
                f"has {self.vocab_size}"
            )
        # Below these there is no logarithm to number the distant buckets by.
        if self.num_buckets < 4 or self.max_distance <= self.num_buckets // 2:
            raise InputError(
                f"no relative position bias has {self.num_buckets} buckets for "
                f"distances up to {self.max_distance}"
            )

    def require(self, tensors: int, size: int) -> None:
        """See to it that weights could be of this config, before it is built.

        Building takes memory for every layer; afterwards each tensor is compared.

        Args:
            tensors: how many there are that are not empty.
            size: the bytes of all of them.

        Raises:
            InputError: there are fewer tensors than the layers have, or a matrix is
                larger than all of the weights.
        """
        # With projections of one input as one matrix; norms and outputs apart.
        if 6 * self.num_layers + 10 * self.num_decoder_layers > tensors:
            raise InputError(
                f"the config does not fit the weights: it has {self.num_layers} and "
                f"{self.num_decoder_layers} layers, and they are {tensors} tensors"
            )
        inner = self.num_heads * self.d_kv
        for rows in (self.vocab_size, self.d_ff, inner):
            # The fewest bits that a number is stored in are two.
            if rows * self.d_model > 4 * size:
                raise InputError(
                    f"the config does not fit the weights: a matrix of {rows} x "
                    f"{self.d_model} is more than all of them"
                )


def with_text(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config, and its part about the text model if it has one."""
    inner = config.get("text_config")
    return [config, inner] if isinstance(inner, dict) else [config]


def require_family(config: Mapping[str, Any]) -> str:
    """The model_type of a config of the T5 family.

    Raises:
        InputError: it is of another.
    """
    kind = config.get("model_type")
    if kind is None:
        raise InputError(
            'the config has no model_type: of a T5 it says "t5", "mt5" or "umt5"'
        )
    if not isinstance(kind, str) or kind not in FAMILY:
        raise InputError(
            f"model_type '{kind}' is another architecture: of encoder-decoders "
            f"{', '.join(FAMILY)} are supported"
        )
    return kind


def find_size(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these fields that a config has, or its part about the text model.

    Raises:
        InputError: it is there, and no positive number.
    """
    for values in with_text(config):
        for name in names:
            value = values.get(name)
            if value is not None:
                if type(value) is not int or value < 1:
                    raise InputError(f"the config has an odd value in {name}")
                return value
    return None


def _feed_forward(kind: str, fields: _Fields) -> tuple[str, bool]:
    """The feed-forward's activation, and whether it has a gate.

    As transformers has it: one field says both, and two others, where they are, say
    else: FLAN-T5's configs of 2022 have "gelu" beside "gated-gelu".

    Raises:
        InputError: there is no such activation.
    """
    said = fields.feed_forward_proj
    if said is None:
        said = "relu" if kind == "t5" else "gated-gelu"
    *gate, activation = said.split("-")
    if activation not in ACTIVATIONS or gate not in ([], ["gated"]):
        raise InputError(f"feed_forward_proj '{said}' is not supported")
    if said == "gated-gelu":
        activation = "gelu_new"  # transformers' reading of T5 1.1's configs
    if fields.dense_act_fn is not None:
        activation = fields.dense_act_fn
        if activation not in ACTIVATIONS:
            raise InputError(f"dense_act_fn '{activation}' is not supported")
    gated = bool(gate) if fields.is_gated_act is None else fields.is_gated_act
    return activation, gated


def _scales_outputs(config: Mapping[str, Any]) -> bool:
    """Whether the decoder's output is multiplied by d_model^-0.5 before the head.

    T5 1.0 does, T5 1.1, mT5 and umT5 as published do not. transformers 5 says so in a
    field of its own, and then writes ``tie_word_embeddings: true`` whatever it was;
    before, T5 1.0 was told from 1.1 by that field. For umT5 transformers 4 went by it
    as well, and version 5, which ties all, scales all: where its configs leave the
    field as it was published, the weights were trained without.
    """
    if config.get("model_type") == "mt5":
        return False
    explicit = config.get("scale_decoder_outputs")
    if explicit is not None:
        return explicit
    return config.get("tie_word_embeddings") is not False


def _quantization(noted: _Quantized | None) -> Quantization | None:
    if noted is None:
        return None
    return Quantization.choose(noted.mode, noted.bits, noted.group_size)
