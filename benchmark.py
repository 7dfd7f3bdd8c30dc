"""Measure how fast a pair decodes, against plain decoding in the same loop.

    python benchmark.py [--model NAME --draft-model NAME] [--prompts FILE]
        [--num-draft 0..8] [--delta 0,0.5] [--temperature 0,1] [--baseline NAME]
    python benchmark.py --simulate-alpha 0.75 --target-config t5-base
        --draft-config t5-small

Every variant answers every prompt, one after the other and in an order that is drawn
for each, so that a machine that slows down slows all of them. A prompt's seconds,
encoding included, are the median of its repeats. A speed-up is the quotient of two
sums over all prompts of seconds per token, with a 95 % bootstrap interval over prompts:
per token, since texts that are sampled, or relaxed by delta, differ in length. It is
over the target alone in the same loop, at the same temperature.

With translations to compare with in the file (a tab after the prompt, then one), there
is a column of sacreBLEU: a prompt's lines together are its references.
"""

if __name__ == "__main__":
    import system.startup

import system.fast_blas  # noqa: F401  (before mlx: see there)

import json
import os
import platform
import statistics
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice, product, zip_longest
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from console.choosing import choose_pair
from decoder import MAX_TOKENS, Stats, check_options, launch
from measuring import baselines
from pair import Pair
from speculation.drafting import Draft, Drafter
from speculation.lookup import LookupDrafter
from speculation.samplers import BatchSampler
from speculation.sampling import Sampling
from speculation.session import Session
from system import fast_blas
from system.device import on_gpu
from system.errors import InputError, Parser, run, say

PROMPTS = Path(__file__).resolve().parent / "demo" / "test.tsv"
RESAMPLES = 2000  # of the bootstrap
FEWEST = 6  # prompts from which an interval says something
COST_REPEATS = 60  # timings per entry of the cost table
COST_PREFIX = 8  # tokens decoded before the timed step
# OpenMP's idle threads spin for a fifth of a second before they sleep, on the cores
# that the next program needs: without this pause that one takes up to twice as long,
# and it still wakes slowly: the first answer after the pause is not timed.
SPIN_SECONDS = 0.25
MLX_LM = "mlx-lm"  # of the baselines the one that drafts and samples as well
SIMULATED_PROMPTS, SIMULATED_TOKENS = FEWEST, 64
TARGET_CONFIG, DRAFT_CONFIG = "t5-11b", "t5-small"


@dataclass(frozen=True)
class Cell:
    """What is swept: draft tokens per round, delta, temperature."""

    num_draft: int
    delta: float = 0.0
    temperature: float = 0.0

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature)

    def __str__(self) -> str:
        name = f"num-draft {self.num_draft}"
        if self.temperature:
            name += f", temperature {self.temperature:g}"
        return name + (f", delta {self.delta:g}" if self.delta else "")


@dataclass(frozen=True)
class Answer:
    """What a variant made of a prompt: text, seconds with encoding, our figures."""

    text: str
    tokens: list[int]
    seconds: float
    stats: Stats | None = None


@dataclass(frozen=True)
class Variant:
    """One way to answer a prompt: ours in a cell, or another program's.

    Attributes:
        cell: ours; None for another program.
        answer: of a prompt and its number.
        temperature: at which it decodes.
        threads: whose threads compute: "mlx" or another library's name.
    """

    name: str
    cell: Cell | None
    answer: Callable[[str, int], Answer]
    temperature: float = 0.0
    threads: str = "mlx"


@dataclass(frozen=True)
class Cost:
    """Seconds of the steps that a round is made of, medians.

    Attributes:
        plain: a pass of the target over one token, and choosing the next one.
        verify: a pass over K + 1, and judging them.
        draft: drafting K tokens.
        always: whether every round has K: prompt lookup's has what it finds.
    """

    plain: float
    verify: float
    draft: float
    always: bool = True


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        speedup: over plain decoding, in seconds per token; ``low`` and ``high`` bound
            its 95 % interval, None for too few prompts.
        alpha: accepted over judged draft tokens.
        tokens_per_round: tokens per pass of the target, which is the speed-up in
            passes over plain decoding.
        c, v: a draft token's and the verifying pass's cost, in plain passes.
        expected: the speed-up of decoding that alpha, c and v predict.
        paper: likewise with v = 1, the paper's formula.
        equal: prompts whose tokens are plain decoding's; None where it is sampled.
        bleu: sacreBLEU, where there are references.
        peak_memory: bytes, of MLX's allocations.
    """

    name: str
    num_draft: int | None
    delta: float | None
    temperature: float | None
    seconds: float
    tokens_per_second: float
    speedup: float
    low: float | None
    high: float | None
    alpha: float | None = None
    tokens_per_round: float | None = None
    c: float | None = None
    v: float | None = None
    expected: float | None = None
    paper: float | None = None
    equal: int | None = None
    bleu: float | None = None
    peak_memory: int | None = None


def ours(pair: Pair, cell: Cell, max_tokens: int) -> Variant:
    """Decoding with this project's loop."""

    def answer(prompt: str, number: int) -> Answer:
        pair.forget()
        began = time.perf_counter()
        done = pair.generate(
            prompt,
            max_tokens=max_tokens,
            num_draft=cell.num_draft,
            delta=cell.delta,
            sampling=cell.sampling,
            stream=number,
        ).finish()
        return Answer(done.text, done.tokens, time.perf_counter() - began, done.stats)

    return Variant(str(cell), cell, answer, cell.temperature)


def theirs(pair: Pair, baseline: baselines.Baseline) -> Variant:
    """Decoding with another program, on the same weights."""

    def answer(prompt: str, number: int) -> Answer:
        began = time.perf_counter()
        tokens, passes = baseline.generate(pair.tokenizer.encode(prompt))
        text = pair.tokenizer.decode(tokens)
        seconds = time.perf_counter() - began
        stats = passes and Stats(new_tokens=len(tokens), rounds=passes)
        return Answer(text, tokens, seconds, stats)

    return Variant(baseline.name, None, answer, baseline.temperature, baseline.threads)


def measure(
    variants: list[Variant], prompts: list[str], repeats: int
) -> list[list[Answer]]:
    """Every variant's answer to every prompt, with the median seconds of its repeats.

    The first prompt is answered once more beforehand, to warm up. After Ctrl-C, the
    answers to the prompts that every variant has answered by then, if there are any.
    """
    for variant in variants:
        variant.answer(prompts[0], 0)
    answers: list[list[Answer]] = [[] for _ in variants]
    rng = np.random.default_rng(0)
    threads = variants[-1].threads  # which the warm-up ended with
    for number, prompt in enumerate(tqdm(prompts, unit="prompt", disable=None)):
        runs: list[list[Answer]] = [[] for _ in variants]
        try:
            for _ in range(repeats):
                for which in rng.permutation(len(variants)):
                    mx.synchronize()  # what a variant may have left queued on a GPU
                    if variants[which].threads != threads:
                        threads = variants[which].threads
                        time.sleep(SPIN_SECONDS)
                        variants[which].answer(prompt, number)  # all is cold now
                    runs[which].append(variants[which].answer(prompt, number))
        except KeyboardInterrupt:
            if not number:
                raise
            say(f"interrupted: what follows is of the first {number} prompts")
            break
        for which, its in enumerate(runs):
            seconds = statistics.median(run.seconds for run in its)
            answers[which].append(replace(its[0], seconds=seconds))
    return answers


def step_cost(
    target: Session, drafter: Drafter, ids: list[int], cell: Cell
) -> Cost | None:
    """Time the steps of a round by themselves, alternating, on one prompt's ids.

    None where a model has not enough positions for that.
    """
    vocabulary, size = target.vocabulary, cell.num_draft
    for positions in (target.positions, drafter.positions):
        if positions and len(ids) + COST_PREFIX + size > positions:
            return None
    begin = target.start([ids])[0]
    rng = np.random.default_rng(0)
    sequence = [*begin, *rng.integers(0, vocabulary, COST_PREFIX).tolist()]
    # A decoder-only model has its prompt's tokens already, but the last.
    mx.eval(target.extend(mx.array([sequence[len(begin) - 1 : -1]])))
    known = len(sequence) - 1
    drafter.start([ids])
    batch_sampler = BatchSampler(cell.sampling, [begin], vocabulary)
    tokens = mx.array(rng.integers(0, vocabulary, (1, size)).astype(np.int32))
    probs = None
    if cell.temperature:
        probs = mx.full((1, size, vocabulary), 1 / vocabulary)
        mx.eval(probs)

    def judge(draft: Draft | None) -> float:
        began = time.perf_counter()
        mx.eval(
            launch(
                target, batch_sampler.round([sequence], size), draft, cell.delta
            ).report
        )
        seconds = time.perf_counter() - began
        target.rewind([known])
        return seconds

    def draft() -> float:
        began = time.perf_counter()
        sampler = batch_sampler.round([sequence], size)
        mx.eval(drafter.propose([sequence], size, sampler).tokens)
        return time.perf_counter() - began

    timed = [
        (judge(None), judge(Draft(tokens, probs)), draft())
        for _ in range(COST_REPEATS + 2)
    ][2:]
    medians = (statistics.median(column) for column in zip(*timed, strict=True))
    return Cost(*medians, always=not isinstance(drafter, LookupDrafter))


def speedup(
    base: list[Answer], other: list[Answer], seed: int = 0
) -> tuple[float, float | None, float | None]:
    """Seconds per token of ``base`` over those of ``other``: ratio, 95 % interval.

    No interval from fewer than ``FEWEST`` prompts: a bootstrap would find it too small.
    """
    each = np.array(
        [
            [a.seconds, len(a.tokens), b.seconds, len(b.tokens)]
            for a, b in zip(base, other, strict=True)
        ]
    )

    def ratio(sums: np.ndarray) -> np.ndarray:
        return (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3])

    if len(each) < FEWEST:
        return float(ratio(each.sum(axis=0))), None, None
    rng = np.random.default_rng(seed)
    drawn = each[rng.integers(0, len(each), (RESAMPLES, len(each)))].sum(axis=1)
    low, high = np.percentile(ratio(drawn), [2.5, 97.5])
    return float(ratio(each.sum(axis=0))), float(low), float(high)


def sacrebleu(texts: list[str], references: list[list[str]]) -> float | None:
    """Corpus BLEU of the texts, each with its references; None where one has none."""
    if not all(references):
        return None
    try:
        from sacrebleu import corpus_bleu
    except ImportError:
        raise InputError(
            "the prompts have references, which needs sacrebleu: pip install sacrebleu"
        ) from None
    # One stream for the first references, one for the second, …
    streams = [list(stream) for stream in zip_longest(*references)]
    return corpus_bleu(texts, streams).score


def summarise(
    variant: Variant,
    answers: list[Answer],
    plain: list[Answer],
    references: list[list[str]],
    cost: Cost | None = None,
) -> Row:
    """One line of the table; ``cost`` for variants that draft."""
    seconds = sum(answer.seconds for answer in answers)
    ratio, low, high = speedup(plain, answers)
    cell = variant.cell
    row = Row(
        name=variant.name,
        num_draft=cell and cell.num_draft,
        delta=cell and cell.delta,
        temperature=cell and cell.temperature,
        seconds=seconds,
        tokens_per_second=sum(len(answer.tokens) for answer in answers) / seconds,
        speedup=ratio,
        low=low,
        high=high,
        bleu=sacrebleu([answer.text for answer in answers], references),
    )
    if not variant.temperature:
        same = [a.tokens == b.tokens for a, b in zip(answers, plain, strict=True)]
        row = replace(row, equal=sum(same))
    stats = [answer.stats for answer in answers if answer.stats]
    if not stats:
        return row
    tested = sum(each.tested for each in stats)
    row = replace(
        row,
        tokens_per_round=sum(each.new_tokens for each in stats)
        / sum(each.rounds for each in stats),
        peak_memory=max(each.peak_memory_bytes for each in stats) or None,
    )
    if cost is None or not tested:
        return row
    alpha = sum(each.accepted for each in stats) / tested
    k = cell.num_draft
    c, v = cost.draft / k / cost.plain, cost.verify / cost.plain
    row = replace(row, alpha=alpha, c=c, v=v)
    if not cost.always:
        return row
    tokens = k + 1 if alpha == 1 else (1 - alpha ** (k + 1)) / (1 - alpha)
    expected, paper = tokens / (k * c + v), tokens / (k * c + 1)
    return replace(row, expected=expected, paper=paper)


def header(args: Namespace) -> dict[str, Any]:
    """What the figures were measured on and with."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "command": " ".join(["python benchmark.py", *sys.argv[1:]]),
        "device": mx.device_info().get("device_name", processor)
        if on_gpu()
        else processor,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "blas": fast_blas.library,
        "repeats": args.repeats,
    }


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


COLUMNS = (
    ("speed-up", 8, lambda r: f"{r.speedup:.2f}"),
    ("95 %", 11, lambda r: "" if r.low is None else f"{r.low:.2f}-{r.high:.2f}"),
    ("tokens/s", 8, lambda r: f"{r.tokens_per_second:.1f}"),
    ("per pass", 8, lambda r: _shown(r.tokens_per_round, ".2f")),
    ("alpha", 6, lambda r: _shown(r.alpha, ".3f")),
    ("c", 5, lambda r: _shown(r.c, ".2f")),
    ("v", 5, lambda r: _shown(r.v, ".2f")),
    ("expected", 8, lambda r: _shown(r.expected, ".2f")),
    ("paper", 5, lambda r: _shown(r.paper, ".2f")),
    ("same text", 9, lambda r: _shown(r.equal, "d")),
    ("BLEU", 5, lambda r: _shown(r.bleu, ".1f")),
    ("MB", 6, lambda r: _shown(r.peak_memory and r.peak_memory / 1e6, ".0f")),
)
LEGEND = (
    "speed-up: seconds per token against the target alone, in this loop; per pass: "
    "tokens per pass of the target, the speed-up in passes; c, v: a draft token and "
    "the verifying pass, in plain passes; expected: of decoding, by alpha, c and v; "
    "paper: the same with v = 1"
)


def table(rows: list[Row]) -> Iterator[str]:
    """The lines of the table, for a person, without columns that are empty."""
    names = max(len(row.name) for row in rows)
    columns = [column for column in COLUMNS if any(column[2](row) for row in rows)]
    yield "  ".join([" " * names, *(title.rjust(width) for title, width, _ in columns)])
    for row in rows:
        cells = (show(row).rjust(width) for _, width, show in columns)
        yield "  ".join([row.name.ljust(names), *cells]).rstrip()


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Draw the speed-up, measured with its interval and as expected.

    Over draft tokens per round, a line for each temperature and delta; or, where only
    deltas were swept, over those, with sacreBLEU beside it.
    """
    from matplotlib.figure import Figure  # without a display

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title)
    axes.set_ylabel("speed-up over the target alone")
    axes.axhline(1, color="gray", linewidth=0.8)
    swept = [row for row in rows if row.num_draft]
    by_delta = (
        len({row.num_draft for row in swept}) == 1 < len({row.delta for row in swept})
    )
    x, other = ("delta", "num_draft") if by_delta else ("num_draft", "delta")
    if by_delta:
        axes.set_xlabel(f"delta, at {swept[0].num_draft} draft tokens per round")
    else:
        axes.set_xlabel("draft tokens per round")
    lines: dict[tuple, list[Row]] = {}
    for row in swept:
        lines.setdefault((row.temperature, getattr(row, other)), []).append(row)
    quality = None
    for number, ((temperature, value), its) in enumerate(lines.items()):
        its.sort(key=lambda row: getattr(row, x))
        name = f"temperature {temperature:g}"
        if not by_delta and value:
            name += f", delta {value:g}"
        places = [getattr(row, x) for row in its]
        measured = [row.speedup for row in its]
        spread = None
        if its[0].low is not None:
            spread = [
                [row.speedup - row.low for row in its],
                [row.high - row.speedup for row in its],
            ]
        style = {"color": f"C{number}", "marker": "o", "capsize": 2}
        axes.errorbar(places, measured, spread, label=name, **style)
        if not by_delta:
            predicted = [(row.num_draft, row.expected) for row in its if row.expected]
            style = {"color": f"C{number}", "linestyle": "--"}
            if predicted:
                expected = f"{name}, expected of decoding"
                axes.plot(*zip(*predicted, strict=True), label=expected, **style)
        elif all(row.bleu is not None for row in its):
            quality = quality or axes.twinx()
            quality.set_ylabel("sacreBLEU (dotted)")
            style = {"color": f"C{number}", "linestyle": ":", "marker": "."}
            quality.plot(places, [row.bleu for row in its], **style)
    for number, row in enumerate(row for row in rows if row.num_draft is None):
        style = {"color": f"C{number + len(lines)}", "linestyle": ":"}
        axes.axhline(row.speedup, label=row.name, **style)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", loc="lower right" if by_delta else "best")
    figure.savefig(path, dpi=150)


def read_prompts(path: Path, limit: int | None) -> dict[str, list[str]]:
    """The prompts of a file, each once, with what it has of references.

    A line is a prompt, or a prompt, a tab and a reference, or a JSON object with
    "prompt" and maybe "reference", one or a list of them.

    Raises:
        InputError: the file cannot be read, or a line is none of these.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    prompts: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt, _, given = line.partition("\t")
        if line.startswith("{"):
            try:
                value = json.loads(line)
                prompt, given = value["prompt"], value.get("reference")
            except (ValueError, KeyError, TypeError):
                prompt = None
        if not isinstance(prompt, str):
            raise InputError(f'{path}, line {number}: no JSON object with "prompt"')
        if not prompt.strip():
            raise InputError(f"{path}, line {number}: an empty prompt")
        references = given if isinstance(given, list) else [given] if given else []
        if not all(isinstance(each, str) for each in references):
            raise InputError(f"{path}, line {number}: a reference that is no text")
        prompts.setdefault(prompt, []).extend(references)
    if not prompts:
        raise InputError(f"{path} has no prompts")
    return dict(islice(prompts.items(), limit))


def sweep(text: str) -> list[int]:
    """``0..8`` or ``2,4,8`` as numbers."""
    try:
        if ".." in text:
            first, last = map(int, text.split(".."))
            values = list(range(first, last + 1))
        else:
            values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 0:
        raise ArgumentTypeError(f"'{text}' is neither a range 0..8 nor a list 2,4,8")
    return values


def numbers(text: str) -> list[float]:
    """``0,0.5,1`` as numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"'{text}' is no list of numbers like 0,0.5") from None


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def probability(text: str) -> float:
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
    parser = Parser(prog="benchmark.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", metavar="NAME", help="target (default: as in main.py)")
    add("--draft-model", metavar="NAME", help="draft (default: as in main.py)")
    add("--unverified", action="store_true", help="as in main.py")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        default=PROMPTS,
        help="a prompt a line, maybe with a tab and a reference, or JSON lines with "
        "'prompt' and 'reference' (default: short English sentences to translate)",
    )
    add("--limit", type=positive, metavar="N", help="only the first N prompts")
    add("--num-draft", type=sweep, default=sweep("1..8"), metavar="0..8|2,4")
    add("--delta", type=numbers, default=[0.0], metavar="0,0.5")
    add("--temperature", type=numbers, default=[0.0], metavar="0,1")
    add(
        "--max-tokens",
        type=positive,
        metavar="N",
        help=f"tokens per answer (default: {MAX_TOKENS}; simulated: "
        f"{SIMULATED_TOKENS}, and never fewer)",
    )
    add("--repeats", type=positive, default=1, metavar="N", help="timings per prompt")
    add(
        "--baseline",
        action="append",
        default=[],
        choices=[*baselines.MAKE, MLX_LM],
        help="also time this on the same weights, greedily, but mlx-lm in every cell; "
        "may be repeated",
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
    if args.simulate_alpha is None and (args.target_config or args.draft_config):
        raise InputError(
            "--target-config and --draft-config are for a simulation: give "
            "--simulate-alpha as well"
        )
    return args


def cells(args: Namespace) -> list[Cell]:
    """The cells to measure, each temperature's plain one before those that draft."""
    for value in args.delta:
        check_options(1, 0, value)
    found: dict[Cell, None] = {}
    for temperature in args.temperature:
        found[Cell(0, 0.0, temperature)] = None
        for delta, count in product(args.delta, args.num_draft):
            if count:
                found[Cell(count, delta, temperature)] = None
    if set(args.baseline) - {MLX_LM} and Cell(0) not in found:
        raise InputError("the baselines decode greedily: add a --temperature of 0")
    for cell in found:
        _ = cell.sampling  # raises for what is no temperature
    return list(found)


def main() -> None:
    args = parse_arguments()
    swept = cells(args)
    _need_matplotlib(args.plot)
    about = header(args)
    if args.simulate_alpha is None:
        rows = _measured(args, swept, about)
    else:
        rows = _simulated(args, swept, about)
    for line in table(rows):
        print(line)
    say(LEGEND)
    if args.json:
        value = {**about, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    if args.plot:
        plot(rows, args.plot, about.get("simulation", about["device"]))


def _measured(args: Namespace, swept: list[Cell], about: dict[str, Any]) -> list[Row]:
    """The table of a pair and its prompts."""
    references = read_prompts(args.prompts, args.limit)
    prompts = list(references)
    sacrebleu(prompts, list(references.values()))  # if it is missing, say so now
    max_tokens = _room_for(swept, args.max_tokens or MAX_TOKENS)
    pair = choose_pair(
        args.model, args.draft_model, plain=False, unverified=args.unverified
    )
    if pair.drafter is None and any(cell.num_draft for cell in swept):
        raise InputError("there is no draft to measure: name one with --draft-model")
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
                if not cell.delta
            ]
        else:
            variants.append(theirs(pair, baselines.MAKE[name](pair, max_tokens)))
    about |= {"prompts": len(prompts), "max_tokens": max_tokens}
    _say_all(about)
    answers = measure(variants, prompts, args.repeats)
    about["prompts"] = len(answers[0])
    ids = pair.tokenizer.encode(prompts[0])
    return _rows(
        variants, answers, list(references.values()), pair.target, pair.drafter, ids
    )


def _room_for(swept: list[Cell], max_tokens: int) -> int:
    """``max_tokens``, if every cell's drafts fit."""
    most = max(cell.num_draft for cell in swept)
    if most >= max_tokens:
        raise InputError(
            f"of {max_tokens} tokens at most {max_tokens - 1} can be drafted: give a "
            f"smaller --num-draft than {most}, or a larger --max-tokens"
        )
    return max_tokens


def _simulated(args: Namespace, swept: list[Cell], about: dict[str, Any]) -> list[Row]:
    """The table of a pair that exists only as shapes."""
    from measuring.simulation import SimulatedPair

    if any(cell.temperature or cell.delta for cell in swept) or args.baseline:
        raise InputError(
            "--simulate-alpha decides what is accepted: it goes with neither --delta "
            "nor --temperature nor --baseline"
        )
    max_tokens = _room_for(swept, args.max_tokens or SIMULATED_TOKENS)
    target, draft = (
        args.target_config or TARGET_CONFIG,
        args.draft_config or DRAFT_CONFIG,
    )
    count = args.limit or SIMULATED_PROMPTS
    about["simulation"] = (
        f"SIMULATION: random weights in the shapes of {target} and {draft}, alpha "
        f"{args.simulate_alpha:g} by construction"
    )
    about |= {"prompts": count, "max_tokens": max_tokens}
    _say_all(about)
    pair = SimulatedPair(target, draft, args.simulate_alpha, max_tokens)
    prompts = [str(number) for number in range(count)]

    def simulated(cell: Cell) -> Variant:
        def answer(prompt: str, number: int) -> Answer:
            began = time.perf_counter()
            tokens, stats = pair.generate(number, cell.num_draft)
            return Answer("", tokens, time.perf_counter() - began, stats)

        return Variant(f"{cell} (simulated)", cell, answer)

    variants = [simulated(cell) for cell in swept]
    for number in range(count):
        pair.prepare(number)
    answers = measure(variants, prompts, args.repeats)
    about["prompts"] = len(answers[0])
    none = [[] for _ in prompts]
    return _rows(variants, answers, none, pair.target, pair.drafter, pair.prompt(0))


def _rows(
    variants: list[Variant],
    answers: list[list[Answer]],
    references: list[list[str]],
    target: Session,
    drafter: Drafter | None,
    ids: list[int],
) -> list[Row]:
    """The table's rows; what a round's steps cost is measured for each cell."""
    plain = {
        variant.cell: its
        for variant, its in zip(variants, answers, strict=True)
        if variant.cell and not variant.cell.num_draft
    }
    rows = []
    for variant, its in zip(variants, answers, strict=True):
        cost = None
        if variant.cell and variant.cell.num_draft:
            cost = step_cost(target, drafter, ids, variant.cell)
        base = plain[Cell(0, 0.0, variant.temperature)]
        rows.append(summarise(variant, its, base, references[: len(its)], cost))
    return rows


def _say_all(about: dict[str, Any]) -> None:
    for name, value in about.items():
        say(f"{name}: {value}")


def _need_matplotlib(path: Path | None) -> None:
    if path is None:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    kinds = Figure().canvas.get_supported_filetypes().keys() - {"pgf"}  # needs TeX
    if path.suffix[1:].lower() not in kinds:
        raise InputError(f"{path}: a plot is one of {', '.join(sorted(kinds))}")


if __name__ == "__main__":
    sys.exit(run(main, "benchmark.py"))
