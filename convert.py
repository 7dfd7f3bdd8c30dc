"""Convert a Hugging Face T5 checkpoint into a folder that MLX loads at disk speed.

    python convert.py --model t5-11b [--output DIR] [--dtype auto|float32|bfloat16]
    python convert.py --list

Tensors stream block by block from the memory-mapped source into ``weights.npz``, so
the memory needed does not grow with the model. The folder appears by a rename when it
is complete; until then an earlier one stays.
"""

import errno
import glob
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errors import InputError, Parser, run
from sources import Tensor, fetch, open_checkpoint

#: Above this, ``--dtype auto`` stores float32 checkpoints as bfloat16.
BILLION = 1_000_000_000

#: Copies of the embedding, and a bias that old checkpoints have and nothing reads.
UNUSED = frozenset(
    {
        "shared.weight",
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    }
)


def recipe(config: Any, tied: bool) -> dict[str, list[str]]:
    """For every tensor of ours the checkpoint's tensors that it stacks, by rows.

    Projections of the same input are one matrix here: q, k and v of self-attention, k
    and v of cross-attention, the two of a gated feed-forward.
    """
    names = {"embedding.weight": ["shared.weight"]}
    if not tied:
        names["head.weight"] = ["lm_head.weight"]

    for stack, layers in (
        ("encoder", config.num_layers),
        ("decoder", config.num_decoder_layers),
    ):
        names[f"{stack}.norm.weight"] = [f"{stack}.final_layer_norm.weight"]
        names[f"{stack}.position_bias.weight"] = [
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
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


def plan(config: Any, tensors: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """The source tensors of each of ours, every one of the checkpoint accounted for.

    Raises:
        InputError: a tensor is missing, has another shape than the config says, or has
            no place in T5.
    """
    from model import T5, parameter_shapes

    tied = _is_tied(tensors)
    names = recipe(config, tied)
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
    used = {name for theirs in names.values() for name in theirs}
    known = used | UNUSED | ({"lm_head.weight"} if tied else set())
    stray = next((name for name in tensors if name not in known), None)
    if stray:
        raise InputError(f"the checkpoint has {stray}, which T5 has no place for")
    return steps


def _stacked(parts: list[Tensor]) -> tuple[int, ...]:
    """The shape of all parts, one below the other."""
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])


def _is_tied(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the output head is the embedding: there is no other, or it is a copy."""
    import numpy as np

    head, embedding = tensors.get("lm_head.weight"), tensors.get("shared.weight")
    if head is None or embedding is None:
        return head is None
    return head.shape == embedding.shape and np.array_equal(head.bits, embedding.bits)


def choose_dtype(wanted: str, tensors: Mapping[str, Tensor]) -> str:
    """The dtype to store: as asked, or for ``auto`` what the checkpoint has.

    float32 becomes bfloat16 for models of over a billion parameters, and float16, whose
    range T5's activations exceed, float32 or bfloat16 by the same rule.
    """
    if wanted != "auto":
        return wanted
    stored = {tensor.dtype for tensor in tensors.values()}
    if stored == {"BF16"}:
        return "bfloat16"
    large = sum(math.prod(tensor.shape) for tensor in tensors.values()) > BILLION
    if large:
        print("storing bfloat16, half of float32 (--dtype says else)", file=sys.stderr)
    return "bfloat16" if large else "float32"


def convert(source: Path, output: Path, dtype: str = "auto") -> None:
    """Convert the checkpoint in ``source`` into the folder ``output``.

    Raises:
        InputError: the source is no T5 checkpoint that can be read whole, the output
            would replace something else, or the disk is full.
    """
    from checkpoint import CONFIG, GENERATION_CONFIG, WEIGHTS
    from model import T5Config

    tensors = open_checkpoint(source)
    steps = plan(T5Config.read(source), tensors)
    dtype = choose_dtype(dtype, tensors)
    if output.exists() and not (output / WEIGHTS).is_file():
        raise InputError(
            f"{output} exists and is no converted model: it stays as it is"
        )
    if output.resolve() in (source.resolve(), *source.resolve().parents):
        raise InputError(f"{output} would replace the source: give another --output")
    try:
        with _replacing(output) as folder:
            save_tokenizer(source, folder)
            for name in (CONFIG, GENERATION_CONFIG):
                if (source / name).is_file():
                    shutil.copyfile(source / name, folder / name)
            _require_space(folder, steps, dtype)
            _write_weights(folder / WEIGHTS, steps, dtype)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(f"no space left on the disk of {output.parent}") from None
        raise InputError(f"cannot write {output}: {error}") from None


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of ``output`` when all went well.

    Until then an earlier ``output`` stays. What a killed conversion left is cleared
    away, or, had it come as far as setting the earlier folder aside, put back.
    """
    parent, name = output.parent, output.name
    aside = parent / f".{name}.replaced"
    parent.mkdir(parents=True, exist_ok=True)
    if aside.exists() and not output.exists():
        aside.rename(output)
    for stale in parent.glob(f".{glob.escape(name)}.partial-*"):
        if not _is_running(stale.name.rpartition("-")[2]):
            shutil.rmtree(stale, ignore_errors=True)
    partial = parent / f".{name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        shutil.rmtree(aside, ignore_errors=True)
        if output.exists():
            output.rename(aside)
        try:
            partial.rename(output)
        except BaseException:
            if aside.exists():
                aside.rename(output)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass  # another user's
    return True


def _require_space(folder: Path, steps: Mapping[str, list[Tensor]], dtype: str) -> None:
    width = 4 if dtype == "float32" else 2
    needed = width * sum(
        math.prod(part.shape) for parts in steps.values() for part in parts
    )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the weights need {needed / 1e9:.1f} GB, but the disk of {folder.parent} "
            f"has {free / 1e9:.1f} GB left"
        )


def _write_weights(path: Path, steps: Mapping[str, list[Tensor]], dtype: str) -> None:
    import mlx.core as mx

    from checkpoint import WeightsWriter

    total = sum(part.bits.nbytes for parts in steps.values() for part in parts)
    with (
        WeightsWriter(path) as writer,
        _progress(total) as progress,
    ):
        for name, parts in steps.items():
            writer.write(
                name,
                _stacked(parts),
                getattr(mx, dtype),
                _blocks(parts, getattr(mx, dtype), progress),
            )


def _blocks(parts: list[Tensor], dtype: Any, progress: Any) -> Iterator[Any]:
    """The rows of all parts, one part after the other, converted."""
    for part in parts:
        for block in part.blocks():
            yield block.astype(dtype)
            progress.update(block.nbytes)


def _progress(total: int) -> Any:
    """A progress bar over bytes, with rate and time left; none in a log file."""
    from tqdm import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=None)


def save_tokenizer(source: Path, folder: Path) -> None:
    """Write the source's tokenizer, as transformers understands it, into ``folder``.

    What it saves includes a ``tokenizer.json`` wherever the tokenizer has that form,
    made from ``spiece.model`` where the checkpoint has that alone.
    """
    from text import load_with_transformers

    load_with_transformers(source).save_pretrained(str(folder))


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
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="what the weights are stored in (default: auto, as the checkpoint has "
        "them, but bfloat16 for models of over a billion parameters)",
    )
    parser.add_argument(
        "--list", action="store_true", help="show what is converted, and do no more"
    )
    chosen = parser.parse_args(arguments)
    if not chosen.model and not chosen.list:
        parser.error("--model is missing: which checkpoint is to be converted?")
    return chosen


def list_models(models: Path) -> Iterator[str]:
    """A line for each converted model in ``models``: name, parameters, size, dtypes."""
    from checkpoint import WEIGHTS, MappedWeights

    for path in sorted(models.glob(f"*/{WEIGHTS}")):
        try:
            weights = MappedWeights(path)
        except InputError as error:
            yield f"{path.parent.name}: {error}"
            continue
        dtypes = sorted(str(dtype).rpartition(".")[2] for dtype in weights.dtypes())
        yield (
            f"{path.parent.name}: {weights.parameters() / 1e6:.1f} M parameters, "
            f"{path.stat().st_size / 1e9:.2f} GB, {', '.join(dtypes)}"
        )


def main() -> None:
    arguments = parse_arguments()
    from checkpoint import MODELS

    if arguments.list:
        lines = list(list_models(MODELS))
        print("\n".join(lines) if lines else f"nothing is converted in {MODELS} yet")
        return
    source = fetch(arguments.model, arguments.revision)
    # The hub's cache names folders by commit; a local one may be '.'.
    local = Path(arguments.model)
    name = local.resolve().name if local.is_dir() else local.name
    output = arguments.output or MODELS / name
    convert(source, output, arguments.dtype)
    print(f"converted into {output}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(main, "convert.py"))
