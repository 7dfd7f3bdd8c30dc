"""Measure how fast a pair decodes, against plain decoding in the same loop.

    python benchmark.py [--model NAME --draft-model NAME] [--prompts FILE]
        [--num-draft 0..8,auto] [--delta 0,0.5] [--temperature 0,1] [--baseline NAME]
    python benchmark.py --num-beams 4 [--length-penalty X] [--early-stopping WHEN]
    python benchmark.py --batch-size 1,8,32 --num-draft 0,2,auto
    python benchmark.py --calibrate [--batch-size 1,8]
    python benchmark.py --serve 1,8,32 [--clients 64] [--baseline transformers]
    python benchmark.py --simulate-alpha 0.75 --target-config t5-base
        --draft-config t5-small

Every variant answers every prompt, one after the other and in an order that is drawn
for each, so that a machine that slows down slows all of them. A prompt's seconds,
encoding included, are the median of its repeats. A speed-up is the quotient of seconds
per token, those of all prompts over their tokens, with a 95 % bootstrap interval over
prompts: per token, since texts that are sampled, or relaxed by delta, differ in length.
It is over the target alone in the same loop, at the same temperature.

With translations to compare with in the file (a tab after the prompt, then one), there
is a column of sacreBLEU: a prompt's lines together are its references.

With --num-beams everything is a beam search, the target's alone as well, which is what
others are compared with; and the baselines search with as many beams.

With --calibrate it is the rounds that are measured, see :mod:`measuring.calibration`,
and what they cost is kept for --num-draft auto, here and in main.py.

With --serve it is serve.py that is measured, one started for each batch limit, by
clients that each send a request, read its answer to the end and send the next one. All
servers are asked the same, and the texts are compared with plain decoding's.
"""

if __name__ == "__main__":
    import system.startup  # (first: see there)

import system.fast_blas  # noqa: F401  (before mlx: see there)

import asyncio
import gc
import json
import os
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx

from console.choosing import NO_DRAFT, add_loading, choose_pair, loading_of
from measuring import baselines, batches
from measuring.batches import BatchRow, measure_batches
from measuring.calibration import calibrate
from measuring.figures import FEWEST, Row, rows_of, sacrebleu
from measuring.load import (
    LEAST,
    WARM,
    Asked,
    LoadRow,
    draw,
    http,
    load,
    plain_texts,
    row_of,
)
from measuring.machine import header
from measuring.plot import plot, plot_costs, require_matplotlib
from measuring.prompts import read_prompts
from measuring.servers import Models, Terminated, models_of, running
from measuring.simulation import SimulatedPair
from measuring.table import (
    BATCH_COLUMNS,
    BATCH_LEGEND,
    BEAM_COLUMNS,
    BEAM_LEGEND,
    COLUMNS,
    COST_COLUMNS,
    COST_LEGEND,
    LEGEND,
    LOAD_COLUMNS,
    LOAD_LEGEND,
    table,
)
from measuring.timing import measure
from measuring.variants import AUTO, Cell, ours, simulated, theirs
from speculation.beams import NEVER, Beams
from speculation.requests import MAX_TOKENS, check_beams, check_options
from speculation.sampling import COUPLINGS
from system import remembering
from system.errors import InputError, Parser, run, say

HERE = Path(__file__).resolve().parent
PROMPTS = HERE / "demo" / "test.tsv"
SERVE = HERE / "serve.py"
MLX_LM = "mlx-lm"  # of the baselines the one that drafts and samples as well
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
#: Requests that wait at a server: more than there can be clients.
QUEUE = 4096


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


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """The flags, read.

    Raises:
        InputError: they are odd.
    """
    parser = Parser(
        prog="benchmark.py", description=(__doc__ or "").partition("\n\n")[0]
    )
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
        choices=[*baselines.MAKE, MLX_LM],
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
    if args.lookup and args.draft_model == NO_DRAFT:
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
    args.num_draft = args.num_draft or sweep(NUM_DRAFT, auto=True)
    args.delta, args.temperature = args.delta or [0.0], args.temperature or [0.0]
    args.repeats = args.repeats or 1
    return args


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


def cells(args: Namespace) -> list[Cell]:
    """The cells to measure, each temperature's plain one before those that draft."""
    for value in args.delta:
        check_options(1, 0, value)
    found: dict[Cell, None] = {}
    for temperature in args.temperature:
        found[Cell(0, 0.0, temperature, args.coupling, args.beams)] = None
        for delta, count in product(args.delta, args.num_draft):
            if count:
                cell = Cell(count, delta, temperature, args.coupling, args.beams)
                found[cell] = None
    if set(args.baseline) - {MLX_LM} and 0 not in args.temperature:
        raise InputError("the baselines decode greedily: add a --temperature of 0")
    for cell in found:
        check_beams(cell.beams, cell.sampling, cell.delta)
        cell.sampling.coupling_at(cell.delta)  # raises for what cannot be
    return list(found)


def main() -> None:
    """Measure as the flags say; the table goes to stdout.

    Raises:
        InputError: the flags, the models or the prompts are not what they have to be.
    """
    args = parse_arguments()
    swept = cells(args)
    require_matplotlib(args.plot)
    about = header(args.repeats)
    if args.calibrate:
        _calibrate(args, about)
        return
    columns, legend = COLUMNS, LEGEND
    if args.beams:
        about |= asdict(args.beams)
        columns, legend = BEAM_COLUMNS, BEAM_LEGEND
    rows: list[Any]
    if args.serve:
        rows = _served(args, about)
        columns, legend = LOAD_COLUMNS, LOAD_LEGEND
    elif args.batch_size:
        rows = _batched(args, swept, about)
        columns, legend = BATCH_COLUMNS, BATCH_LEGEND
    elif args.simulate_alpha is None:
        rows = _measured(args, swept, about)
    else:
        rows = _simulated(args, swept, about)
    for line in table(rows, columns):
        print(line)
    say(legend)
    _write(args.json, about, rows)
    if args.plot:
        plot(rows, args.plot, about.get("simulation", about["device"]))


def _write(path: Path | None, about: dict[str, Any], rows: list[Any]) -> None:
    """The figures as JSON, if they are wanted."""
    if path:
        value = {**about, "rows": [asdict(row) for row in rows]}
        path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def _asked(args: Namespace, swept: list[Cell]) -> tuple[Any, dict[str, list[str]], int]:
    """The pair, the prompts with their references, and the most tokens of an answer.

    Raises:
        InputError: they are odd, or there is no draft for what is swept.
    """
    references = read_prompts(args.prompts, args.limit)
    prompts = list(references)
    sacrebleu(prompts, list(references.values()))  # if it is missing, say so now
    max_tokens = _room_for(swept, args.max_tokens or MAX_TOKENS)
    return _pair(args, any(cell.num_draft for cell in swept)), references, max_tokens


def _pair(args: Namespace, drafts: bool) -> Any:
    """The models that the flags name.

    Raises:
        InputError: they cannot be loaded, or there is no draft, and one is needed.
    """
    pair = choose_pair(
        args.model,
        args.draft_model,
        plain=False,
        how=loading_of(args),
        lookup=args.lookup,
    )
    if drafts and not pair.drafts:
        raise InputError("there is no draft to measure: name one with --draft-model")
    if drafts and not pair.drafter and (args.num_beams or 1) > 1:
        raise InputError(
            "nothing is looked up for beams: name a model with --draft-model"
        )
    return pair


def _measured(args: Namespace, swept: list[Cell], about: dict[str, Any]) -> list[Row]:
    """The table of a pair and its prompts."""
    pair, references, max_tokens = _asked(args, swept)
    prompts = list(references)
    variants = [ours(pair, cell, max_tokens) for cell in swept]
    for name in args.baseline:
        if name == MLX_LM:
            variants += [
                theirs(
                    pair,
                    baselines.mlx_lm(
                        pair, max_tokens, cell.num_draft, cell.temperature
                    ),
                )
                for cell in swept
                if not cell.delta and cell.num_draft != AUTO
            ]
        else:
            variants.append(theirs(pair, _baseline(args, name, pair, max_tokens)))
    about |= {"prompts": len(prompts), "max_tokens": max_tokens}
    _say_all(about)
    answers = measure(variants, prompts, args.repeats)
    about["prompts"] = len(answers[0])
    ids = pair.tokenizer.encode(prompts[0])
    return rows_of(
        variants,
        answers,
        list(references.values()),
        pair.target,
        pair.drafter,
        pair.lookup,
        ids,
    )


def _baseline(
    args: Namespace, name: str, pair: Any, max_tokens: int
) -> baselines.Baseline:
    """The other program of that name, searching as the flags say."""
    options = {"beams": args.beams} if args.beams else {}
    return baselines.MAKE[name](pair, max_tokens, **options)


def _batched(
    args: Namespace, swept: list[Cell], about: dict[str, Any]
) -> list[BatchRow]:
    """The table of a pair, its prompts and batch sizes."""
    if MLX_LM in args.baseline:
        raise InputError("--baseline mlx-lm does not go with --batch-size")
    kept = [cell for cell in swept if cell.num_draft in args.num_draft]
    pair, references, max_tokens = _asked(args, kept or swept)
    prompts = list(references)
    variants = [
        batches.ours(pair, cell, size, max_tokens)
        for cell in kept or swept
        for size in args.batch_size
    ]
    for name in args.baseline:
        baseline = _baseline(args, name, pair, max_tokens)
        if baseline.generate_batch is None:
            raise InputError(f"--baseline {name} does not go with --batch-size")
        sizes = args.baseline_batch_size or args.batch_size
        variants += [batches.theirs(pair, baseline, size) for size in sizes]
    about |= {"prompts": len(prompts), "max_tokens": max_tokens}
    _say_all(about)
    return measure_batches(variants, prompts, list(references.values()), args.repeats)


def _served(args: Namespace, about: dict[str, Any]) -> list[LoadRow]:
    """The table of servers under load: ours with each batch limit, then the usual one.

    Raises:
        InputError: the models or the prompts are odd, or a server does not come up.
    """
    http()  # if it is missing, say so now
    del about["repeats"]
    max_tokens = args.max_tokens or MAX_TOKENS
    count = args.limit or REQUESTS
    requests = draw(list(read_prompts(args.prompts, None)), count, max_tokens)
    about |= {"requests": count, "clients": args.clients, "max_tokens": max_tokens}
    _say_all(about)
    models, expected = _plain(args, requests)
    # Servers have the machine to themselves: nothing of a pair stays here.
    gc.collect()
    mx.clear_cache()
    rows: list[LoadRow] = []
    for name, size, command in _servers(args, models, max_tokens):
        try:
            with running(name, command) as server:
                asyncio.run(load(server.url, requests[:WARM], args.clients, quiet=True))
                replies, seconds = asyncio.run(load(server.url, requests, args.clients))
        except KeyboardInterrupt as error:
            if not rows or isinstance(error, Terminated):
                raise
            say(f"interrupted: nothing is known of {name}")
            break
        row = row_of(name, size, requests, replies, seconds, expected)
        rows.append(row)
        if row.lost:
            say(f"{name}: {row.lost} requests are lost, the first: {row.why}")
            say(f"its last line: {server.last or 'none'}")
    return rows


def _plain(args: Namespace, requests: list[Asked]) -> tuple[Models, dict[Asked, str]]:
    """The models to serve, by the flags that name them, and the target's own texts.

    Raises:
        InputError: the models cannot be loaded, or not answer, or not be served.
    """
    pair = _pair(args, drafts=False)
    if args.baseline and not pair.target.has_encoder:
        raise InputError(f"--baseline {SERVED} is for T5, with --serve as without")
    return models_of(pair), plain_texts(pair, requests)


def _servers(
    args: Namespace, models: Models, max_tokens: int
) -> Iterator[tuple[str, int | None, list[str]]]:
    """The servers to measure: a name, the batch limit, and what starts it."""
    for size in dict.fromkeys(args.serve):
        limits = {"max-batch": size, "max-queue": QUEUE, "max-tokens": max_tokens}
        flags = [flag for name, n in limits.items() for flag in (f"--{name}", str(n))]
        command = [sys.executable, str(SERVE), "--port", "0", *flags]
        yield f"serve.py, max-batch {size}", size, [*command, *models.all]
    if args.baseline:
        command = [sys.executable, "-m", "measuring.their_server", *models.target]
        yield "transformers, one at a time", None, command


def _room_for(swept: list[Cell], max_tokens: int) -> int:
    """``max_tokens``, if every cell's drafts fit."""
    most = max(cell.asked or 0 for cell in swept)
    if most >= max_tokens:
        raise InputError(
            f"of {max_tokens} tokens at most {max_tokens - 1} can be drafted: give a "
            f"smaller --num-draft than {most}, or a larger --max-tokens"
        )
    return max_tokens


def _simulated(args: Namespace, swept: list[Cell], about: dict[str, Any]) -> list[Row]:
    """The table of a pair that exists only as shapes."""
    if any(cell.temperature or cell.delta for cell in swept) or args.baseline:
        raise InputError(
            "--simulate-alpha decides what is accepted: it goes with neither --delta "
            "nor --temperature nor --baseline"
        )
    if args.beams:
        raise InputError("--simulate-alpha does not go with --num-beams")
    max_tokens = _room_for(swept, args.max_tokens or SIMULATED_TOKENS)
    count = args.limit or SIMULATED_PROMPTS
    make = _simulation(args, about)
    about["simulation"] += f", alpha {args.simulate_alpha:g} by construction"
    about |= {"prompts": count, "max_tokens": max_tokens}
    _say_all(about)
    pair = make(max_tokens)
    prompts = [str(number) for number in range(count)]

    variants = [simulated(pair, cell) for cell in swept]
    for number in range(count):
        pair.prepare(number)
    answers = measure(variants, prompts, args.repeats)
    about["prompts"] = len(answers[0])
    none = [[] for _ in prompts]
    return rows_of(
        variants, answers, none, pair.target, pair.drafter, None, pair.prompt(0)
    )


def _simulation(
    args: Namespace, about: dict[str, Any]
) -> Callable[[int], SimulatedPair]:
    """What makes the pair that exists only as shapes, for so many tokens."""
    target = args.target_config or TARGET_CONFIG
    draft = args.draft_config or DRAFT_CONFIG
    about["simulation"] = (
        f"SIMULATION: random weights in the shapes of {target} and {draft}"
    )
    alpha, how = args.simulate_alpha, loading_of(args)
    return partial(SimulatedPair, target, draft, alpha, how=how)


def _calibrate(args: Namespace, about: dict[str, Any]) -> None:
    """Measure what rounds cost, print it, and keep it for ``--num-draft auto``.

    Raises:
        InputError: the models or the prompts are not what they have to be.
    """
    del about["repeats"]
    max_tokens = args.max_tokens or MAX_TOKENS
    sizes = list(dict.fromkeys(args.batch_size or [1]))
    pair: Any
    if args.simulate_alpha is not None:
        # What is accepted is no matter here, and so the draft is told nothing.
        make = _simulation(args, about)
        count = args.limit or SIMULATED_PROMPTS
        about |= {"prompts": count, "max_tokens": max_tokens}
        _say_all(about)
        pair = make(max_tokens)
        prompts = [pair.prompt(number) for number in range(count)]
        drafter = pair.untold
    else:
        given = read_prompts(args.prompts, args.limit)
        pair = _pair(args, drafts=True)
        if not pair.batches and max(sizes) > 1:
            raise InputError(
                "this model's texts are decoded one after another: it goes with no "
                "--batch-size above 1"
            )
        prompts = [pair.request(prompt).prompt for prompt in given]
        drafter = pair.drafter
        about |= {"prompts": len(prompts), "max_tokens": max_tokens}
        _say_all(about)
    policy, curves = pair.policy, []
    for size in sizes:
        try:
            curve = calibrate(
                pair.target, drafter, prompts, size, max_tokens, policy.most
            )
        except KeyboardInterrupt:
            if not curves:
                raise
            say(f"interrupted: nothing is known of batch {size}")
            break
        curves.append(curve)
        for line in table(curve.rows, COST_COLUMNS):
            print(line, flush=True)
        if curve.restless:
            say(
                f"batch {size}: this machine is busy with other things as well; the "
                "figures are better where it is not"
            )
        if not curve.complete:
            break
        policy.calibrate(size, curve.plain, curve.costs, curve.sweeps)
    say(COST_LEGEND)
    _write(args.json, about, [row for curve in curves for row in curve.rows])
    if args.plot:
        plot_costs(curves, args.plot, about.get("simulation", about["device"]))
    if isinstance(pair, SimulatedPair) or not any(curve.complete for curve in curves):
        return
    kept = pair.remember()
    say(
        f"--num-draft auto goes by this from now on: it is kept in {kept}"
        if kept
        else f"nothing is kept: {remembering.folder()} cannot be written"
    )


def _say_all(about: dict[str, Any]) -> None:
    for name, value in about.items():
        say(f"{name}: {value}")


if __name__ == "__main__":
    sys.exit(run(main, "benchmark.py"))
