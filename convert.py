"""Convert a Hugging Face T5 checkpoint into a folder that MLX loads at disk speed.

    python convert.py --model t5-11b [--output DIR] [--dtype DTYPE] [-q]
    python convert.py --list

Tensors stream block by block from the memory-mapped source into ``weights.npz``, so
the memory needed does not grow with the model. The folder appears by a rename when it
is complete; until then an earlier one stays.
"""

if __name__ == "__main__":
    import system.startup

import system.fast_blas  # noqa: F401  (before mlx: see there)

import errno
import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from architectures import registry
from architectures.parameters import parameter_count
from checkpoints import converted
from checkpoints.config import Quantization, T5Config
from checkpoints.converted import CONFIG, GENERATION_CONFIG, WEIGHTS, MappedWeights
from checkpoints.defaults import Files
from checkpoints.hub import fetch
from checkpoints.replacing import recover, replacing
from checkpoints.sources import open_checkpoint
from checkpoints.storing import (
    DTYPES,
    Storage,
    choose_dtype,
    require_space,
    write_weights,
)
from model import T5
from system.errors import InputError, Parser, one_line, run, say
from system.files import is_file, read_json
from text.saving import save_tokenizer


def convert(
    source: Path,
    output: Path,
    dtype: str = "auto",
    quantization: Quantization | None = None,
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
    tensors = open_checkpoint(source)
    values = read_json(source / CONFIG)
    steps, odd = registry.plan(values, source, tensors)
    for line in odd:
        say(line)
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
            require_space(folder, steps, storage)
            write_weights(folder / WEIGHTS, steps, storage)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(f"no space left on the disk of {output.parent}") from None
        raise InputError(f"cannot write {output}: {error}") from None


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """The flags, read.

    Raises:
        InputError: they are odd.
    """
    parser = Parser(prog="convert.py", description=(__doc__ or "").partition("\n\n")[0])
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
        chosen.q_mode or (chosen.q_bits, chosen.q_group_size) != (None, None)
    ):
        parser.error("--q-mode, --q-bits and --q-group-size go with -q")
    return chosen


def list_models(models: Path) -> Iterator[str]:
    """A line for each converted model in ``models``: name, parameters, size, dtypes.

    What a conversion that was killed has left is cleared away.
    """
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
    vocabulary = T5Config.read(folder).vocab_size
    try:
        lines = list(Files.read(folder).of("", 1, vocabulary).lines(applied=False))
    except InputError as error:
        lines = [f"what the model asks for when it generates is not known: {error}"]
    for line in lines:
        say(one_line(line))


def main() -> None:
    """Convert, or list, as the flags say.

    Raises:
        InputError: as :func:`convert` and :func:`checkpoints.hub.fetch`.
    """
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    arguments = parse_arguments()
    if arguments.list:
        models = converted.MODELS
        lines = [one_line(line) for line in list_models(models)]
        print("\n".join(lines) if lines else f"nothing is converted in {models} yet")
        return
    quantization = None
    if arguments.quantize:
        quantization = Quantization.choose(
            arguments.q_mode or "affine", arguments.q_bits, arguments.q_group_size
        )
    source = fetch(arguments.model, arguments.revision, registry.require_convertible)
    # The hub's cache names folders by commit; a local one may be '.'.
    local = Path(arguments.model)
    name = local.resolve().name if local.is_dir() else local.name
    output = arguments.output or converted.MODELS / name
    convert(source, output, arguments.dtype, quantization, arguments.tokenizer)
    say_defaults(output)
    say(f"converted into {output}")


if __name__ == "__main__":
    sys.exit(run(main, "convert.py"))
