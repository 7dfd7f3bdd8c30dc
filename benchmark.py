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

import gc
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from console.choosing import NO_DRAFT, add_loading, choose_pair, loading_of
from measuring import baselines, batches
from measuring.arguments import (
    DRAFT_CONFIG,
    NAME,
    REQUESTS,
    SERVED,
    SIMULATED_PROMPTS,
    SIMULATED_TOKENS,
    TARGET_CONFIG,
    cells,
    parse_arguments,
)
from measuring.batches import BatchRow, measure_batches
from measuring.calibration import calibrate_each
from measuring.figures import Row, rows_of, sacrebleu
from measuring.load import Asked, LoadRow, draw, http, plain_texts
from measuring.machine import header
from measuring.plot import plot, plot_costs, require_matplotlib
from measuring.prompts import read_prompts
from measuring.servers import Models, measure_servers, models_of, servers_of
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
from measuring.variants import Cell, simulated, variants_of
from speculation.requests import MAX_TOKENS
from system import remembering
from system.errors import InputError, run, say
from system.ranks import meet


def main() -> None:
    """Measure as the flags say; the table goes to stdout.

    Raises:
        InputError: the flags, the models or the prompts are not what they have to be.
    """
    ranks = meet(NAME)
    args = parse_arguments(add_loading, NO_DRAFT)
    if ranks and (args.serve or args.simulate_alpha is not None):
        raise InputError("--serve and --simulate-alpha are for one process")
    swept = cells(args)
    require_matplotlib(args.plot)
    about = header(args.repeats)
    if ranks:
        about["ranks"] = ranks.size
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
    variants = variants_of(pair, swept, args.baseline, max_tokens)
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


def _batched(
    args: Namespace, swept: list[Cell], about: dict[str, Any]
) -> list[BatchRow]:
    """The table of a pair, its prompts and batch sizes."""
    if baselines.MLX_LM in args.baseline:
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
        baseline = baselines.named(name, pair, max_tokens, args.beams)
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
    servers = servers_of(models, args.serve, max_tokens, others=bool(args.baseline))
    return measure_servers(servers, requests, args.clients, expected)


def _plain(args: Namespace, requests: list[Asked]) -> tuple[Models, dict[Asked, str]]:
    """The models to serve, by the flags that name them, and the target's own texts.

    Raises:
        InputError: the models cannot be loaded, or not answer, or not be served.
    """
    pair = _pair(args, drafts=False)
    if args.baseline and not pair.target.has_encoder:
        raise InputError(f"--baseline {SERVED} is for T5, with --serve as without")
    return models_of(pair), plain_texts(pair, requests)


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
    curves = []
    for curve in calibrate_each(
        pair.target, drafter, prompts, sizes, max_tokens, pair.policy
    ):
        curves.append(curve)
        for line in table(curve.rows, COST_COLUMNS):
            print(line, flush=True)
        if curve.restless:
            say(
                f"batch {curve.batch_size}: this machine is busy with other things as "
                "well; the figures are better where it is not"
            )
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
    sys.exit(run(main, NAME))
