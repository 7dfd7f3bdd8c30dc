"""The flags of benchmark.py."""

import os
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from measuring import baselines
from measuring.figures import FEWEST
from measuring.load import LEAST
from measuring.servers import QUEUE
from measuring.variants import AUTO, Cell
from speculation.beams import NEVER, Beams
from speculation.requests import MAX_TOKENS, check_beams, check_options
from speculation.sampling import COUPLINGS
from system.errors import InputError, Parser

NAME = "benchmark.py"
DESCRIPTION = (
    "Measure how fast a pair decodes, against plain decoding in the same loop."
)
PROMPTS = Path(__file__).resolve().parents[1] / "demo" / "test.tsv"
SERVED = "transformers"  # the one that there is a server of
MOST_DRAFT = 10_000
NUM_DRAFT = f"1..8,{AUTO}"
#: Flags that say which variants there are, and how often they are timed.
SWEPT = (
    "num_draft",
    "delta",
    "temperature",
    "coupling",
    "num_beams",
    "baseline",
    "baseline_batch_size",
    "repeats",
)
SIMULATED_PROMPTS, SIMULATED_TOKENS = FEWEST, 64
TARGET_CONFIG, DRAFT_CONFIG = "t5-11b", "t5-small"
#: What --serve does not go with: it decodes greedily, with as many draft tokens as pay.
NOT_SERVED = (
    "num_draft",
    "delta",
    "temperature",
    "coupling",
    "num_beams",
    "baseline_batch_size",
    "repeats",
    "batch_size",
    "calibrate",
    "simulate_alpha",
    "target_config",
    "draft_config",
    "unverified",
    "dtype",
    "compile",
    "plot",
)
CLIENTS, REQUESTS = 64, 1000


def sweep(text: str, *, auto: bool = False) -> list[Any]:
    """``0..8``, ``2,4,8`` or ``0,2..4`` as numbers; ``auto`` may be among them."""
    values: list[Any] = []
    for part in text.split(","):
        if auto and part == AUTO:
            values.append(AUTO)
            continue
        first, dots, last = part.partition("..")
        try:
            ends = int(first), int(last if dots else first)
        except ValueError:
            ends = 1, 0
        if not 0 <= ends[0] <= ends[1]:
            raise ArgumentTypeError(
                f"'{text}' is neither a range 0..8 nor a list 2,4,8"
                + (f", nor {AUTO}" if auto else "")
            )
        if ends[1] > MOST_DRAFT:
            raise ArgumentTypeError(f"'{text}' goes beyond {MOST_DRAFT} draft tokens")
        values += range(ends[0], ends[1] + 1)
    return values


def numbers(text: str) -> list[float]:
    """``0,0.5,1`` as numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"'{text}' is no list of numbers like 0,0.5") from None


def positive(text: str) -> int:
    """``3`` as a number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def stopping(text: str) -> bool | str:
    """``true``, ``false`` or ``never`` as :class:`Beams` has it."""
    known = {"true": True, "false": False, NEVER: NEVER}
    if text not in known:
        raise ArgumentTypeError(f"'{text}' is none of {', '.join(known)}")
    return known[text]


def probability(text: str) -> float:
    """``0.75`` as a number from 0 to 1."""
    with suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise ArgumentTypeError(f"'{text}' is no number between 0 and 1")


def writable(text: str) -> Path:
    """A file to write: that it can be is worth knowing before, not after."""
    path = Path(text)
    if not path.parent.is_dir():
        raise ArgumentTypeError(f"there is no folder {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ArgumentTypeError(f"cannot write {path}")
    return path


def parse_arguments(
    add_loading: Callable[..., None],
    no_draft: str,
    arguments: list[str] | None = None,
) -> Namespace:
    """The flags, read.

    Args:
        add_loading: adds those of how models are loaded, which all programs share.
        no_draft: what --draft-model calls the target alone.

    Raises:
        InputError: they are odd, or do not go together.
    """
    parser = Parser(prog=NAME, description=DESCRIPTION)
    add = parser.add_argument
    add("--model", metavar="NAME", help="target (default: as in main.py)")
    add("--draft-model", metavar="NAME", help="draft (default: as in main.py)")
    add("--lookup", action="store_true", help="as in main.py")
    add_loading(add)
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        default=PROMPTS,
        help="a prompt a line, maybe with a tab and a reference, or JSON lines with "
        "'prompt' and 'reference' (default: short English sentences to translate)",
    )
    add(
        "--limit",
        type=positive,
        metavar="N",
        help="only the first N prompts; with --serve as many requests, from the first "
        f"prompt again after the last (default: {REQUESTS})",
    )
    add(
        "--num-draft",
        type=partial(sweep, auto=True),
        metavar="0..8|2,4,auto",
        help=f"draft tokens per round; auto: as many as pay (default: {NUM_DRAFT})",
    )
    add("--delta", type=numbers, metavar="0,0.5")
    add("--temperature", type=numbers, metavar="0,1")
    add("--coupling", choices=COUPLINGS, help="as in main.py")
    add(
        "--num-beams",
        type=int,
        metavar="N",
        help="search with N beams, with the target alone and with drafts; nothing is "
        "looked up for them",
    )
    add(
        "--length-penalty",
        type=float,
        metavar="X",
        help="with --num-beams: as in main.py",
    )
    add(
        "--early-stopping",
        type=stopping,
        nargs="?",
        const=True,
        metavar=f"true|false|{NEVER}",
        help="with --num-beams: as in main.py; CTranslate2 has a rule of its own",
    )
    add(
        "--max-tokens",
        type=positive,
        metavar="N",
        help=f"tokens per answer (default: {MAX_TOKENS}; simulated: "
        f"{SIMULATED_TOKENS}, and every answer has so many); with --serve the most "
        f"that is drawn for a request, from {LEAST} on",
    )
    add(
        "--batch-size",
        type=sweep,
        metavar="1,8,32",
        help="measure lines per second instead, so many prompts at once",
    )
    add(
        "--baseline-batch-size",
        type=sweep,
        metavar="16,64",
        help="those of the baselines (default: the same)",
    )
    add("--repeats", type=positive, metavar="N", help="timings per prompt (default: 1)")
    add(
        "--baseline",
        action="append",
        default=[],
        choices=[*baselines.MAKE, baselines.MLX_LM],
        help="also time this on the same weights, greedily, but mlx-lm in every cell; "
        f"may be repeated; with --serve {SERVED} alone, in a server of the usual kind, "
        "one request at a time",
    )
    add(
        "--calibrate",
        action="store_true",
        help="measure instead what rounds with 0, 1, 2, ... draft tokens cost here, "
        "for each --batch-size (default: 1), and keep it for --num-draft auto: a "
        "minute for each, more where the models are large",
    )
    add(
        "--serve",
        type=sweep,
        metavar="1,8,32",
        help="measure serve.py instead, with so many texts at once at most: each in "
        "turn is started, sent requests by many clients, and ended",
    )
    add(
        "--clients",
        type=positive,
        metavar="N",
        help=f"with --serve: how many at once, at most {QUEUE} (default: {CLIENTS})",
    )
    add("--json", type=writable, metavar="FILE", help="write the figures there as well")
    add("--plot", type=writable, metavar="FILE", help="draw them there (.png, .svg)")
    simulation = parser.add_argument_group(
        "simulation",
        "a pair without trained weights: the models cost what they cost in these "
        "shapes, and a draft token is right with the probability that is given",
    )
    add = simulation.add_argument
    add("--simulate-alpha", type=probability, metavar="A")
    shape = "a size by name, or a config.json (default: %s)"
    add("--target-config", metavar="NAME", help=shape % TARGET_CONFIG)
    add("--draft-config", metavar="NAME", help=shape % DRAFT_CONFIG)
    args = parser.parse_args(arguments)
    _check(args, no_draft)
    args.num_draft = args.num_draft or sweep(NUM_DRAFT, auto=True)
    args.delta, args.temperature = args.delta or [0.0], args.temperature or [0.0]
    args.repeats = args.repeats or 1
    return args


def cells(args: Namespace) -> list[Cell]:
    """The cells to measure, each temperature's plain one before those that draft.

    Raises:
        InputError: there are none like that.
    """
    for value in args.delta:
        check_options(1, 0, value)
    found: dict[Cell, None] = {}
    for temperature in args.temperature:
        found[Cell(0, 0.0, temperature, args.coupling, args.beams)] = None
        for delta, count in product(args.delta, args.num_draft):
            if count:
                cell = Cell(count, delta, temperature, args.coupling, args.beams)
                found[cell] = None
    if set(args.baseline) - {baselines.MLX_LM} and 0 not in args.temperature:
        raise InputError("the baselines decode greedily: add a --temperature of 0")
    for cell in found:
        check_beams(cell.beams, cell.sampling, cell.delta)
        cell.sampling.coupling_at(cell.delta)  # raises for what cannot be
    return list(found)


def _check(args: Namespace, no_draft: str) -> None:
    """What goes together.

    Raises:
        InputError: something that does not, or is out of range.
    """
    _check_serving(args)
    named = args.model or args.draft_model or args.unverified or args.prompts != PROMPTS
    named = named or args.lookup
    sizes = [*(args.batch_size or ()), *(args.baseline_batch_size or ())]
    drawn = args.plot and not args.calibrate
    if sizes and (min(sizes) < 1 or drawn or not args.batch_size):
        raise InputError(
            "--batch-size is at least 1 and does not go with --plot, and "
            "--baseline-batch-size needs it"
        )
    if args.batch_size and args.simulate_alpha is not None and not args.calibrate:
        raise InputError("--batch-size does not go with --simulate-alpha")
    if args.simulate_alpha is not None and named:
        raise InputError(
            "--simulate-alpha is for shapes without weights: it goes with none of "
            "--model, --draft-model, --lookup, --unverified and --prompts"
        )
    if args.lookup and args.draft_model == no_draft:
        raise InputError("--lookup drafts: it does not go with the target alone")
    if args.simulate_alpha is None and (args.target_config or args.draft_config):
        raise InputError(
            "--target-config and --draft-config are for a simulation: give "
            "--simulate-alpha as well"
        )
    _check_search(args)
    if args.calibrate:
        for name in SWEPT:
            if getattr(args, name) not in (None, []):
                raise InputError(
                    "--calibrate measures rounds, greedily and with every number of "
                    f"draft tokens: it does not go with --{name.replace('_', '-')}"
                )


def _check_search(args: Namespace) -> None:
    """What goes with --num-beams, and only with it; they become ``beams``.

    Raises:
        InputError: something that does not, or an option out of range.
    """
    options = {
        name: getattr(args, name)
        for name in ("num_beams", "length_penalty", "early_stopping")
        if getattr(args, name) is not None
    }
    args.beams = None
    if not options:
        return
    if args.num_beams is None:
        raise InputError(
            "--length-penalty and --early-stopping are those of a beam search: give "
            "--num-beams as well"
        )
    args.beams = Beams(**options)
    for name in args.baseline:
        if name not in baselines.SEARCHING:
            raise InputError(
                f"--baseline {name} searches with no beams: it does not go with "
                "--num-beams"
            )


def _check_serving(args: Namespace) -> None:
    """What goes with --serve, and only with it.

    Raises:
        InputError: something that does not.
    """
    if args.serve is None:
        if args.clients:
            raise InputError("--clients are those of a server: give --serve as well")
        return
    for name in NOT_SERVED:
        value = getattr(args, name)
        if value is not None and value is not False and value != AUTO:
            raise InputError(
                "--serve measures servers, which decode greedily and draft as much as "
                f"pays: it does not go with --{name.replace('_', '-')}"
            )
    for name in args.baseline:
        if name != SERVED:
            raise InputError(
                f"there is no server of {name}: --serve goes with --baseline {SERVED}"
            )
    if min(args.serve) < 1:
        raise InputError("--serve is at least 1: texts that are decoded at once")
    args.clients = args.clients or CLIENTS
    if args.clients > QUEUE:
        raise InputError(f"--clients is at most {QUEUE}, as so many wait at a server")
