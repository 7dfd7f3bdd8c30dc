"""Convert a Hugging Face T5 checkpoint into a folder that MLX loads at disk speed.

    python convert.py --model t5-11b [--output DIR] [--dtype DTYPE] [-q]
    python convert.py --list

Tensors stream block by block from the memory-mapped source into ``weights.npz``, so
the memory needed does not grow with the model. The folder appears by a rename when it
is complete; until then an earlier one stays.
"""

if __name__ == "__main__":
    import system.startup  # noqa: F401  (first: see there)

import errno
import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from system.errors import InputError, Parser, one_line, run

# What takes time to import is imported inside functions, so that Ctrl-C is clean from
# the first moment on.
if TYPE_CHECKING:
    from checkpoints.config import Quantization
    from checkpoints.sources import Tensor

#: Above this, ``--dtype auto`` stores float32 checkpoints as bfloat16.
BILLION = 1_000_000_000

#: Where the embedding may be; the others are copies. MADLAD-400 has no shared.weight.
EMBEDDINGS = (
    "shared.weight",
    "decoder.embed_tokens.weight",
    "encoder.embed_tokens.weight",
)
#: A bias that old checkpoints have and nothing reads.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

#: What frameworks put before every name: DataParallel, torch.compile, Lightning, and
#: transformers where the T5 is a part of a model.
PREFIXES = {"module", "_orig_mod", "model", "transformer"}
#: What reinforcement learning leaves, and nothing that is written depends on.
VALUE_HEADS = ("v_head.", "value_head.")
BARE = ["T5Model"]
CLASSIFIERS = ("classification_head.", "qa_outputs.", "classifier.")

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def recipe(
    config: Any, tied: bool, embedding: str = EMBEDDINGS[0]
) -> dict[str, list[str]]:
    """For every tensor of ours the checkpoint's tensors that it stacks, by rows.

    Projections of the same input are one matrix here: q, k and v of self-attention, k
    and v of cross-attention, the two of a gated feed-forward.
    """
    names = {"embedding.weight": [embedding]}
    if not tied:
        names["head.weight"] = ["lm_head.weight"]

    for stack, layers in (
        ("encoder", config.num_layers),
        ("decoder", config.num_decoder_layers),
    ):
        names[f"{stack}.norm.weight"] = [f"{stack}.final_layer_norm.weight"]
        for layer in range(1 if config.shared_bias else layers):
            bias = "position_bias" if config.shared_bias else f"position_bias.{layer}"
            names[f"{stack}.{bias}.weight"] = [
                f"{stack}.block.{layer}.layer.0.SelfAttention"
                ".relative_attention_bias.weight"
            ]
        for layer in range(layers):
            ours = f"{stack}.layers.{layer}"
            theirs = [f"{stack}.block.{layer}.layer.{part}" for part in range(3)]

            def add(name: str, *sources: str, ours: str = ours) -> None:
                names[f"{ours}.{name}.weight"] = [f"{name}.weight" for name in sources]

            attention = f"{theirs[0]}.SelfAttention"
            add("attention_norm", f"{theirs[0]}.layer_norm")
            add("attention.qkv", *(f"{attention}.{part}" for part in "qkv"))
            add("attention.o", f"{attention}.o")
            if stack == "decoder":
                cross = f"{theirs[1]}.EncDecAttention"
                add("cross_attention_norm", f"{theirs[1]}.layer_norm")
                add("cross_attention.q", f"{cross}.q")
                add("cross_attention.kv", f"{cross}.k", f"{cross}.v")
                add("cross_attention.o", f"{cross}.o")
            last = theirs[2] if stack == "decoder" else theirs[1]
            feed_forward = f"{last}.DenseReluDense"
            add("feed_forward_norm", f"{last}.layer_norm")
            inputs = ("wi_0", "wi_1") if config.gated else ("wi",)
            add("feed_forward.wi", *(f"{feed_forward}.{part}" for part in inputs))
            add("feed_forward.wo", f"{feed_forward}.wo")
    return names


def plan(config: Any, tensors: "Mapping[str, Tensor]") -> "dict[str, list[Tensor]]":
    """The source tensors of each of ours.

    Raises:
        InputError: a tensor is missing, or has another shape than the config says; or
            they are no T5 that writes text.
    """
    from model import T5, parameter_shapes

    _require_t5(tensors)
    sizes = [tensor.bits.nbytes for tensor in tensors.values()]
    config.require(sum(map(bool, sizes)), sum(sizes))
    embedding = next((name for name in EMBEDDINGS if name in tensors), EMBEDDINGS[0])
    tied = _is_tied(tensors, embedding)
    names = recipe(config, tied, embedding)
    shapes = parameter_shapes(T5(config, tied))
    assert names.keys() == shapes.keys()
    steps: dict[str, list[Tensor]] = {}
    for ours, theirs in names.items():
        missing = next((name for name in theirs if name not in tensors), None)
        if missing:
            raise InputError(f"the checkpoint has no {missing}, which its config needs")
        parts = [tensors[name] for name in theirs]
        stacked = _stacked(parts)
        if stacked != shapes[ours] or len({part.shape for part in parts}) > 1:
            found = ", ".join(f"{part.name} {part.shape}" for part in parts)
            raise InputError(
                f"the config does not fit the weights: {found} would make "
                f"{stacked}, but the config asks for {shapes[ours]}"
            )
        steps[ours] = parts
    for parts in steps.values():
        for part in parts:
            part.require_floats()
    for name in EMBEDDINGS:
        if name in tensors and not _are_equal(tensors[name], tensors[embedding]):
            raise InputError(f"{name} is another than {embedding}: a T5 has one")
    return steps


def unused(
    steps: "Mapping[str, list[Tensor]]", tensors: "Mapping[str, Tensor]"
) -> list[str]:
    """The tensors that a T5 has no place for and that change nothing.

    Args:
        steps: what :func:`plan` made of ``tensors``.

    Raises:
        InputError: one of them may change what the model writes.
    """
    used = {id(part) for parts in steps.values() for part in parts}
    copies = {*EMBEDDINGS, UNUSED, "lm_head.weight"}
    left = [
        name
        for name, tensor in tensors.items()
        if id(tensor) not in used and name not in copies
    ]
    for name in left:
        value_head = name.startswith(VALUE_HEADS)
        if not (value_head or _is_buffer(tensors[name]) or _is_zero(tensors[name])):
            raise InputError(f"the checkpoint has {name}, which T5 has no place for")
    return left


def _is_buffer(tensor: "Tensor") -> bool:
    """Whether it holds counters or masks: integers, where weights are none."""
    from checkpoints.sources import FLOATS

    return tensor.dtype not in FLOATS and not tensor.name.endswith(".weight")


def _is_zero(tensor: "Tensor") -> bool:
    """Whether it adds nothing: t5-small of 2020 had biases of its norms, all 0."""
    return tensor.name.endswith(".bias") and not tensor.bits.any()


def _require_t5(tensors: "Mapping[str, Tensor]") -> None:
    """
    Raises:
        InputError: the tensors are of something else that is made from T5s.
    """
    from checkpoints.sources import ADAPTER

    if any("lora_" in name for name in tensors):
        raise InputError(f"the checkpoint {ADAPTER}")
    if any(name.startswith(CLASSIFIERS) for name in tensors):
        raise InputError(
            "the checkpoint is a T5 with a classification head, which writes no text"
        )
    if not any(name.startswith("decoder.") for name in tensors) and any(
        name.startswith("encoder.") for name in tensors
    ):
        raise InputError(
            "the checkpoint is an encoder alone (as sentence-t5 and text encoders of "
            "image models are), which writes no text"
        )


def by_t5s_names(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """The tensors without the prefixes that frameworks put before all names.

    Raises:
        InputError: two have one name then.
    """
    first = "encoder.block.0.layer.0.SelfAttention.q.weight"
    whole = next((name for name in tensors if name.endswith(first)), first)
    prefix = whole.removesuffix(first)
    if not prefix or not {*prefix.rstrip(".").split(".")} <= PREFIXES:
        return dict(tensors)
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(prefix)
        if short in named:
            raise InputError(f"the checkpoint has {short} twice, once as {name}")
        named[short] = tensor
    return named


def _stacked(parts: "list[Tensor]") -> tuple[int, ...]:
    """The shape of all parts, one below the other."""
    if any(not part.shape for part in parts):
        return ()  # a number stacks with nothing, and no weight is one
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])


def _is_tied(tensors: "Mapping[str, Tensor]", embedding: str) -> bool:
    """Whether the output head is the embedding: there is no other, or it is a copy."""
    head, shared = tensors.get("lm_head.weight"), tensors.get(embedding)
    if head is None or shared is None:
        return head is None
    return _are_equal(head, shared)


def _are_equal(head: "Tensor", shared: "Tensor") -> bool:
    """Whether two tensors hold the same."""
    import numpy as np

    if head is shared:
        return True
    if head.shape != shared.shape:
        return False
    if head.dtype != shared.dtype:  # of files that were saved differently
        rows = [*map(_wide, (head, shared))]
        return np.array_equal(*rows, equal_nan=True)
    # A thousand rows at a time: mT5's largest would take a gigabyte at once. By their
    # bits, of which even what is no number has some.
    rows = head.shape[0] if head.shape else 0
    for start in range(0, rows, 1024):
        part = slice(start, start + 1024)
        bits = [np.ascontiguousarray(each.bits[part]) for each in (head, shared)]
        if not np.array_equal(*(each.view("u1") for each in bits)):
            return False
    return True


def _wide(tensor: "Tensor") -> Any:
    """A tensor as float32."""
    import mlx.core as mx
    import numpy as np

    return np.concatenate(
        [np.array(block.astype(mx.float32)) for block in tensor.blocks()]
    )


def choose_dtype(wanted: str, tensors: "Mapping[str, Tensor]") -> str:
    """The dtype to store: as asked, or for ``auto`` what most of the checkpoint is in,
    but bfloat16 for float32 models of over a billion parameters."""
    if wanted != "auto":
        return wanted
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += math.prod(tensor.shape)
    most = max(sizes, key=sizes.__getitem__, default="F32")
    if most == "F32" and sizes.total() > BILLION:
        print("storing bfloat16, half of float32 (--dtype says else)", file=sys.stderr)
        return "bfloat16"
    return DTYPES.get(most, "float32")


@dataclass(frozen=True)
class Storage:
    """How the tensors are stored: in what dtype, and whether quantized."""

    dtype: str
    quantization: "Quantization | None" = None

    def dtype_of(self, name: str) -> str:
        """What exceeds float16 when it is computed with stays float32."""
        wide = self.dtype == "float16" and name.endswith("feed_forward.wo.weight")
        return "float32" if wide else self.dtype

    def quantizes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Matrices whose rows are whole groups; position biases are none."""
        return (
            self.quantization is not None
            and len(shape) == 2
            and "position_bias" not in name
            and shape[1] % self.quantization.group_size == 0
        )

    def bytes(self, name: str, shape: tuple[int, ...]) -> int:
        """What a tensor takes."""
        width = 4 if self.dtype_of(name) == "float32" else 2
        if not self.quantizes(name, shape):
            return width * math.prod(shape)
        groups = math.prod(shape) // self.quantization.group_size
        affine = self.quantization.mode == "affine"
        packed = math.prod(shape) * self.quantization.bits // 8
        return packed + groups * (2 * width if affine else 1)


def convert(
    source: Path,
    output: Path,
    dtype: str = "auto",
    quantization: "Quantization | None" = None,
    tokenizer: Path | None = None,
) -> None:
    """Convert the checkpoint in ``source`` into the folder ``output``.

    Args:
        dtype: of :data:`DTYPES`, or ``auto``, see :func:`choose_dtype`.
        quantization: how to quantize the matrices; None leaves them.
        tokenizer: the folder that has it; None for the source.

    Raises:
        InputError: the source is no T5 checkpoint that can be read whole, the output
            would replace something else, or the disk is full.
    """
    from checkpoints.config import T5Config
    from checkpoints.converted import CONFIG, GENERATION_CONFIG, WEIGHTS
    from checkpoints.replacing import replacing
    from checkpoints.sources import open_checkpoint
    from system.files import is_file, read_json

    try:
        output = output.resolve()  # a link stays, and what it leads to is replaced
        inside = output in (source.resolve(), *source.resolve().parents)
    except (OSError, RuntimeError) as error:  # links in a circle, a folder barred
        raise InputError(f"cannot write {output}: {error}") from None
    if inside:
        raise InputError(
            f"{output} would replace the source: it stays as it is; give another "
            f"--output"
        )
    tensors = by_t5s_names(open_checkpoint(source))
    steps = plan(T5Config.read(source), tensors)
    values = read_json(source / CONFIG)
    _say_what_is_odd(values, unused(steps, tensors), steps)
    storage = Storage(choose_dtype(dtype, tensors), quantization)
    try:
        with replacing(output) as folder:
            save_tokenizer(tokenizer or source, folder)
            if is_file(source / GENERATION_CONFIG):
                shutil.copyfile(source / GENERATION_CONFIG, folder / GENERATION_CONFIG)
            values.pop("quantization", None)
            if quantization:
                values["quantization"] = asdict(quantization)
            (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
            _require_space(folder, steps, storage)
            _write_weights(folder / WEIGHTS, steps, storage)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(f"no space left on the disk of {output.parent}") from None
        raise InputError(f"cannot write {output}: {error}") from None


def _say_what_is_odd(
    config: Mapping[str, Any], unused: list[str], steps: Mapping[str, Any]
) -> None:
    """A line about what is left out, and one about what is missing and made up for."""
    if unused:
        names = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        print(f"not used, as T5 has no place for them: {names}", file=sys.stderr)
    untied = config.get("tie_word_embeddings") is False
    if "head.weight" not in steps and (untied or config.get("architectures") == BARE):
        print(
            "the checkpoint has no output head, which its config wants: the embedding "
            "takes its place",
            file=sys.stderr,
        )


def _require_space(
    folder: Path, steps: "Mapping[str, list[Tensor]]", storage: Storage
) -> None:
    needed = sum(storage.bytes(name, _stacked(parts)) for name, parts in steps.items())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the weights need {needed / 1e9:.1f} GB, but the disk of {folder.parent} "
            f"has {free / 1e9:.1f} GB left"
        )


def _write_weights(
    path: Path, steps: "Mapping[str, list[Tensor]]", storage: Storage
) -> None:
    import mlx.core as mx

    from checkpoints.config import QUANTIZED
    from checkpoints.converted import WeightsWriter

    total = sum(part.bits.nbytes for parts in steps.values() for part in parts)
    with (
        WeightsWriter(path) as writer,
        _progress(total) as progress,
    ):
        for name, parts in steps.items():
            dtype = getattr(mx, storage.dtype_of(name))
            blocks = _blocks(parts, dtype, progress)
            if storage.quantizes(name, _stacked(parts)):
                packed = _quantized(blocks, storage.quantization)
                for part, value in zip(QUANTIZED, packed, strict=False):
                    member = name.removesuffix("weight") + part
                    writer.write(member, value.shape, value.dtype, [value])
            else:
                writer.write(name, _stacked(parts), dtype, blocks)


def _blocks(parts: "list[Tensor]", dtype: Any, progress: Any) -> Iterator[Any]:
    """The rows of all parts, one part after the other, converted.

    Raises:
        InputError: a number is beyond float16, which is to be stored.
    """
    import mlx.core as mx

    for part in parts:
        for block in part.blocks():
            converted = block.astype(dtype)
            if dtype == mx.float16 and not mx.isfinite(converted).all().item():
                raise InputError(
                    f"{part.name} has numbers beyond float16: give another --dtype"
                )
            yield converted
            progress.update(block.nbytes)


def _quantized(blocks: Iterator[Any], how: "Quantization") -> list[Any]:
    """A matrix packed block by block: its integers, scales and, for affine, biases."""
    import mlx.core as mx

    packed = []
    for block in blocks:
        packed.append(mx.quantize(block, **asdict(how)))
        mx.eval(packed[-1])
    return [mx.concatenate(part) for part in zip(*packed, strict=True)]


def _progress(total: int) -> Any:
    """A progress bar over bytes, with rate and time left; none in a log file."""
    from tqdm import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=None)


#: Texts of many kinds, that a tokenizer has to read as it did before.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  spaces   of all kinds,\ttabs\nand lines \u00a0 \u3000 ",
    "Grüße, naïve façade; ŁÓDŹ № ½ ﬁne ﷺ",
    "漢字とかな 한국어 हिन्दी العربية עברית ไทย Ελληνικά кириллица",
    "😀👩‍👩‍👧 {braces} [brackets] <tags> `code` a_b = x*y != 0;",
    "<extra_id_0> between <extra_id_1>, <2de> </s> <pad> at the end <extra_id_99>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 1234567890 Donaudampfschifffahrtsgesellschaft",
)


def save_tokenizer(source: Path, folder: Path) -> None:
    """Write the source's tokenizer into ``folder``: its own files, as they are.

    Only what has no other form is written anew: CodeT5's two files as a tokenizer.json,
    others through transformers.

    Raises:
        InputError: there is none, it is damaged, takes more than it may, or reads
            texts in another way afterwards.
    """
    from system.files import is_file
    from text.confined import Confined
    from text.fast_tokenizer import FILE
    from text.tokenizer import Tokenizer, reader_of
    from text.tokenizer_files import SPIECE

    reader = Confined(reader_of(source), source)
    reader.call("save", str(folder.resolve()))
    saved = Tokenizer(folder)
    read = [reader.call("encode", probe) for probe in PROBES]
    if [saved.encode(probe) for probe in PROBES] != read:
        raise InputError(
            f"the tokenizer of {source} reads texts in another way once it is saved: "
            f"it is not converted"
        )
    del reader
    if is_file(source / SPIECE) and is_file(source / FILE):
        with suppress(InputError):  # it is not used
            pieces = Confined("text.spiece_tokenizer", source)
            if [pieces.call("encode", probe) for probe in PROBES] != read:
                print(
                    f"{FILE} and {SPIECE} read some texts differently: {FILE} is used, "
                    f"as transformers does",
                    file=sys.stderr,
                )


def parse_arguments(arguments: list[str] | None = None) -> Any:
    parser = Parser(prog="convert.py", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a checkpoint: a folder, or a model on the hub (t5-11b, say)",
    )
    parser.add_argument(
        "--revision",
        metavar="R",
        help="branch, tag or commit of a model on the hub (default: main)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the converted model goes (default: models/ and the model's name)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="the folder whose tokenizer it has, where it was saved without one",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES.values()),
        default="auto",
        help="what the weights are stored in (default: auto, as the checkpoint has "
        "them, but bfloat16 for float32 models of over a billion parameters)",
    )
    parser.add_argument(
        "-q",
        "--quantize",
        action="store_true",
        help="store the matrices as integers of few bits, with scales",
    )
    parser.add_argument(
        "--q-mode",
        metavar="MODE",
        help="affine (2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128), mxfp4, "
        "mxfp8 or nvfp4 (default: affine)",
    )
    parser.add_argument(
        "--q-bits", type=int, metavar="N", help="bits of a weight (affine: 4)"
    )
    parser.add_argument(
        "--q-group-size",
        type=int,
        metavar="N",
        help="weights that share a scale (affine: 64)",
    )
    parser.add_argument(
        "--list", action="store_true", help="show what is converted, and do no more"
    )
    chosen = parser.parse_args(arguments)
    if not chosen.model and not chosen.list:
        parser.error("--model is missing: which checkpoint is to be converted?")
    if not chosen.quantize and (
        chosen.q_mode or chosen.q_bits or chosen.q_group_size is not None
    ):
        parser.error("--q-mode, --q-bits and --q-group-size go with -q")
    return chosen


def list_models(models: Path) -> Iterator[str]:
    """A line for each converted model in ``models``: name, parameters, size, dtypes."""
    from checkpoints.config import T5Config
    from checkpoints.converted import WEIGHTS, MappedWeights
    from checkpoints.replacing import recover
    from model import T5, parameter_count

    for killed in models.glob(".*.replaced"):
        recover(models / killed.name[1:].removesuffix(".replaced"))
    for path in sorted(models.glob(f"[!.]*/{WEIGHTS}")):
        try:
            weights = MappedWeights(path)
            config = T5Config.read(path.parent)
            config.require(len(weights), weights.bytes())
        except InputError as error:
            yield f"{path.parent.name}: {error}"
            continue
        model = T5(config, tied="head.weight" not in weights)
        parameters = parameter_count(model)
        dtypes = [str(dtype).rpartition(".")[2] for dtype in weights.dtypes()]
        kind = str(config.quantization or ", ".join(sorted(dtypes)))
        yield (
            f"{path.parent.name}: {parameters / 1e6:.1f} M parameters, "
            f"{path.stat().st_size / 1e9:.2f} GB, {kind}"
        )


def say_defaults(folder: Path) -> None:
    """Say what a model's makers ask of whoever generates with it."""
    from checkpoints.config import T5Config
    from checkpoints.defaults import Files

    vocabulary = T5Config.read(folder).vocab_size
    try:
        lines = list(Files.read(folder).of("", 1, vocabulary).lines(applied=False))
    except InputError as error:
        lines = [f"what the model asks for when it generates is not known: {error}"]
    for line in lines:
        print(one_line(line), file=sys.stderr)


def main() -> None:
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    arguments = parse_arguments()
    from checkpoints.converted import MODELS

    if arguments.list:
        lines = [one_line(line) for line in list_models(MODELS)]
        print("\n".join(lines) if lines else f"nothing is converted in {MODELS} yet")
        return
    quantization = None
    if arguments.quantize:
        from checkpoints.config import Quantization

        quantization = Quantization.choose(
            arguments.q_mode or "affine", arguments.q_bits, arguments.q_group_size
        )
    from checkpoints.sources import fetch

    source = fetch(arguments.model, arguments.revision)
    # The hub's cache names folders by commit; a local one may be '.'.
    local = Path(arguments.model)
    name = local.resolve().name if local.is_dir() else local.name
    output = arguments.output or MODELS / name
    convert(source, output, arguments.dtype, quantization, arguments.tokenizer)
    say_defaults(output)
    print(f"converted into {output}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(main, "convert.py"))
