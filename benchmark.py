"""Measure how fast a pair decodes: per number of draft tokens, against plain decoding.

    python benchmark.py [--model NAME --draft-model NAME] [--prompts FILE]
        [--num-draft 0..8] [--baseline transformers]

Every variant answers every prompt, one after the other and in an order that is drawn
for each, so that a machine that slows down slows all of them. A prompt's seconds,
encoding included, are the median of its repeats; a speed-up is the quotient of two sums
over all prompts, with a 95 % bootstrap interval over prompts. The baseline is the same
loop with no draft tokens.

With translations to compare with in the file (a tab after the prompt, then one), there
is a column of sacreBLEU: a prompt's lines together are its references.
"""

import fast_blas

import json
import os
import platform
import statistics
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from decoder import MAX_TOKENS, Stats
from errors import InputError, Parser, run
from main import load_pair, say
from model import T5
from pair import Pair
from sampling import GREEDY, Choices

PROMPTS = Path(__file__).resolve().parent / "demo" / "test.tsv"
RESAMPLES = 2000  # of the bootstrap
COST_REPEATS = 60  # timings per entry of the cost table
COST_PREFIX = 8  # tokens decoded before the timed step


@dataclass(frozen=True)
class Answer:
    """What a variant made of a prompt: text, seconds with encoding, our figures."""

    text: str
    tokens: list[int]
    seconds: float
    stats: Stats | None = None


@dataclass(frozen=True)
class Variant:
    """One way to answer a prompt."""

    name: str
    num_draft: int | None
    answer: Callable[[str], Answer]


@dataclass(frozen=True)
class Cost:
    """Seconds of the steps that a round is made of, medians.

    Attributes:
        plain: a pass of the target over one token.
        verify: a pass over K + 1.
        draft: drafting K tokens.
    """

    plain: float
    verify: float
    draft: float


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        speedup: over plain decoding, in seconds; ``low`` and ``high`` bound its 95 %
            interval.
        forwards: over plain decoding, in passes of the target.
        alpha: accepted over judged draft tokens.
        c, v: a draft token's and the verifying pass's cost, in plain passes.
        expected: the speed-up of decoding that alpha, c and v predict.
        equal: prompts whose tokens are plain decoding's.
        bleu: sacreBLEU, where there are references.
    """

    name: str
    num_draft: int | None
    seconds: float
    tokens_per_second: float
    speedup: float
    low: float
    high: float
    forwards: float | None = None
    alpha: float | None = None
    tokens_per_round: float | None = None
    c: float | None = None
    v: float | None = None
    expected: float | None = None
    equal: int = 0
    bleu: float | None = None


def ours(pair: Pair, num_draft: int, max_tokens: int) -> Variant:
    """Decoding with this project's loop."""

    def answer(prompt: str) -> Answer:
        began = time.perf_counter()
        done = pair.generate(
            prompt, max_tokens=max_tokens, num_draft=num_draft
        ).finish()
        return Answer(done.text, done.tokens, time.perf_counter() - began, done.stats)

    return Variant(f"num-draft {num_draft}", num_draft, answer)


def transformers_generate(pair: Pair, max_tokens: int) -> Variant:
    """transformers' greedy ``generate`` on the same weights, in float32.

    On a GPU where PyTorch knows the one that MLX uses.

    Raises:
        InputError: PyTorch is not installed.
    """
    try:
        import torch
        from transformers import DynamicCache, EncoderDecoderCache
    except ImportError:
        raise InputError(
            "--baseline transformers needs torch: pip install torch"
        ) from None

    device = torch.device("cpu")
    if mx.default_device() == mx.gpu:
        if torch.cuda.is_available():
            device = torch.device("cuda")
        elif torch.backends.mps.is_available():
            device = torch.device("mps")
    model = pair.target.model
    reference = to_transformers(model, pair.folder).to(device)
    end = sorted(model.config.eos_tokens)
    # transformers would emit rows that no token stands for.
    rows = reference.config.vocab_size
    size = pair.target.vocabulary
    banned = [*pair.tokenizer.gaps(size), *range(size, rows)] or None

    def answer(prompt: str) -> Answer:
        began = time.perf_counter()
        ids = torch.tensor([pair.tokenizer.encode(prompt)], device=device)
        with torch.inference_mode():
            out = reference.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                num_beams=1,
                suppress_tokens=banned,
                eos_token_id=end,
                decoder_start_token_id=model.config.start_token,
                # Its own cache: generate() takes its depth from the encoder.
                past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            )
        tokens = out[0, 1:].tolist()
        text = pair.tokenizer.decode(tokens)
        return Answer(text, tokens, time.perf_counter() - began)

    return Variant(f"transformers, {device.type}", None, answer)


def to_transformers(model: T5, folder: Path) -> Any:
    """The model that was loaded from ``folder`` as transformers' T5, in float32."""
    import torch
    from transformers import T5Config as TheirConfig
    from transformers import T5ForConditionalGeneration

    from convert import recipe

    config = TheirConfig.from_pretrained(folder)
    tied = "head" not in model
    config.scale_decoder_outputs = model.config.scale_outputs
    reference = T5ForConditionalGeneration(config)
    if not tied:
        # transformers 5 ties every T5 that it makes.
        reference.lm_head.weight = torch.nn.Parameter(reference.lm_head.weight.clone())
    state = {}
    parameters = dict(tree_flatten(model.parameters()))
    for name, theirs in recipe(model.config, tied).items():
        parts = np.array(parameters[name].astype(mx.float32))
        for part, their_name in zip(np.split(parts, len(theirs)), theirs, strict=True):
            state[their_name] = torch.from_numpy(part)
    copies = reference.load_state_dict(state, strict=False).missing_keys
    assert all("embed_tokens" in name or name == "lm_head.weight" for name in copies)
    return reference.eval()


def measure(
    variants: list[Variant], prompts: list[str], repeats: int
) -> list[list[Answer]]:
    """Every variant's answer to every prompt, with the median seconds of its repeats.

    The first prompt is answered once more beforehand, to warm up.
    """
    for variant in variants:
        variant.answer(prompts[0])
    answers: list[list[Answer]] = [[] for _ in variants]
    rng = np.random.default_rng(0)
    for prompt in tqdm(prompts, unit="prompt", disable=None):
        runs: list[list[Answer]] = [[] for _ in variants]
        for _ in range(repeats):
            for which in rng.permutation(len(variants)):
                mx.synchronize()  # what a variant may have left queued on a GPU
                runs[which].append(variants[which].answer(prompt))
        for which, its in enumerate(runs):
            seconds = statistics.median(run.seconds for run in its)
            answers[which].append(replace(its[0], seconds=seconds))
    return answers


def step_cost(pair: Pair, num_draft: int, prompt: str) -> Cost:
    """Time the steps of a round by themselves, alternating, on one prompt."""
    ids = pair.tokenizer.encode(prompt)
    target, drafter = pair.target, pair.drafter
    begin = target.start([ids])[0]
    rng = np.random.default_rng(0)
    sequence = [*begin, *rng.integers(0, target.vocabulary, COST_PREFIX).tolist()]
    mx.eval(target.extend(mx.array([sequence[:-1]])))
    known = len(sequence) - 1
    drafter.start([ids])

    def extend(width: int) -> float:
        tokens = mx.array([[sequence[-1]] * width])
        began = time.perf_counter()
        mx.eval(mx.argmax(target.extend(tokens), axis=-1))
        seconds = time.perf_counter() - began
        target.rewind([known])
        return seconds

    choices = Choices(GREEDY, [begin], target.vocabulary)

    def draft() -> float:
        began = time.perf_counter()
        chooser = choices.begin([sequence])
        mx.eval(drafter.propose([sequence], num_draft, chooser).tokens)
        return time.perf_counter() - began

    timed = [
        (extend(1), extend(num_draft + 1), draft()) for _ in range(COST_REPEATS + 2)
    ][2:]
    return Cost(*(statistics.median(column) for column in zip(*timed, strict=True)))


def speedup(
    base: list[Answer], other: list[Answer], seed: int = 0
) -> tuple[float, float, float]:
    """Seconds of ``base`` over those of ``other``: the ratio, its 95 % interval."""
    seconds = np.array(
        [[a.seconds, b.seconds] for a, b in zip(base, other, strict=True)]
    )
    rng = np.random.default_rng(seed)
    drawn = seconds[rng.integers(0, len(seconds), (RESAMPLES, len(seconds)))].sum(
        axis=1
    )
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    total = seconds.sum(axis=0)
    return float(total[0] / total[1]), float(low), float(high)


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
    cost: Cost | None,
) -> Row:
    """One line of the table; ``cost`` for variants that draft."""
    seconds = sum(answer.seconds for answer in answers)
    ratio, low, high = speedup(plain, answers)
    row = Row(
        name=variant.name,
        num_draft=variant.num_draft,
        seconds=seconds,
        tokens_per_second=sum(len(answer.tokens) for answer in answers) / seconds,
        speedup=ratio,
        low=low,
        high=high,
        equal=sum(a.tokens == b.tokens for a, b in zip(answers, plain, strict=True)),
        bleu=sacrebleu([answer.text for answer in answers], references),
    )
    stats = [answer.stats for answer in answers if answer.stats is not None]
    if not stats:
        return row
    rounds = sum(each.rounds for each in stats)
    tested = sum(each.tested for each in stats)
    row = replace(
        row,
        forwards=sum(answer.stats.rounds for answer in plain) / rounds,
        tokens_per_round=sum(each.new_tokens for each in stats) / rounds,
    )
    if cost is None or not tested:
        return row
    alpha = sum(each.accepted for each in stats) / tested
    k = variant.num_draft
    c, v = cost.draft / k / cost.plain, cost.verify / cost.plain
    tokens = k + 1 if alpha == 1 else (1 - alpha ** (k + 1)) / (1 - alpha)
    return replace(row, alpha=alpha, c=c, v=v, expected=tokens / (k * c + v))


def header(args: Namespace, prompts: int) -> dict[str, Any]:
    """What the figures were measured on and with."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "command": " ".join(["python benchmark.py", *sys.argv[1:]]),
        "device": mx.device_info().get("device_name", processor)
        if mx.default_device() == mx.gpu
        else processor,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "blas": fast_blas.library,
        "prompts": prompts,
        "repeats": args.repeats,
        "max_tokens": args.max_tokens,
    }


COLUMNS = (
    ("speed-up", 8, lambda r: f"{r.speedup:.2f}"),
    ("95 %", 11, lambda r: f"{r.low:.2f}-{r.high:.2f}"),
    ("tokens/s", 8, lambda r: f"{r.tokens_per_second:.1f}"),
    ("forwards", 8, lambda r: f"{r.forwards:.2f}" if r.forwards else ""),
    ("alpha", 6, lambda r: f"{r.alpha:.3f}" if r.alpha is not None else ""),
    ("per round", 9, lambda r: f"{r.tokens_per_round:.2f}" if r.forwards else ""),
    ("c", 5, lambda r: f"{r.c:.2f}" if r.c is not None else ""),
    ("v", 5, lambda r: f"{r.v:.2f}" if r.v is not None else ""),
    ("expected", 8, lambda r: f"{r.expected:.2f}" if r.expected is not None else ""),
    ("same text", 9, lambda r: str(r.equal)),
    ("BLEU", 5, lambda r: f"{r.bleu:.1f}" if r.bleu is not None else ""),
)


def table(rows: list[Row]) -> Iterator[str]:
    """The lines of the table, for a person."""
    names = max(len(row.name) for row in rows)
    yield "  ".join([" " * names, *(title.rjust(width) for title, width, _ in COLUMNS)])
    for row in rows:
        cells = (show(row).rjust(width) for _, width, show in COLUMNS)
        yield "  ".join([row.name.ljust(names), *cells]).rstrip()


def read_prompts(path: Path, limit: int | None) -> dict[str, list[str]]:
    """The prompts of a file, each once, with what it has of references.

    A line is a prompt, or a prompt, a tab and a reference, or a JSON object with
    "prompt" and maybe "reference".

    Raises:
        InputError: the file cannot be read, or a line is none of these.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    prompts: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt, _, reference = line.partition("\t")
        if line.startswith("{"):
            try:
                value = json.loads(line)
                prompt, reference = value["prompt"], value.get("reference", "")
            except (ValueError, KeyError, TypeError, AttributeError):
                prompt = None
        if not isinstance(prompt, str) or not isinstance(reference, str):
            raise InputError(f'{path}, line {number}: no JSON object with "prompt"')
        if not prompt.strip():
            raise InputError(f"{path}, line {number}: an empty prompt")
        prompts.setdefault(prompt, []).extend([reference] if reference else [])
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


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    parser = Parser(prog="benchmark.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", metavar="NAME", help="target (default: as in main.py)")
    add("--draft-model", metavar="NAME", help="draft (default: as in main.py)")
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
    add("--max-tokens", type=positive, default=MAX_TOKENS, metavar="N")
    add("--repeats", type=positive, default=1, metavar="N", help="timings per prompt")
    add(
        "--baseline",
        action="append",
        default=[],
        choices=["transformers"],
        help="also time this, on the same weights",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    references = read_prompts(args.prompts, args.limit)
    prompts = list(references)
    sacrebleu(prompts, list(references.values()))  # if it is missing, say so now
    args.regular_decode = False
    pair = load_pair(args)
    if pair.drafter is None:
        raise InputError("there is no draft to measure: name one with --draft-model")
    drafts = [count for count in args.num_draft if count]
    variants = [ours(pair, count, args.max_tokens) for count in [0, *drafts]]
    if "transformers" in args.baseline:
        variants.append(transformers_generate(pair, args.max_tokens))

    about = header(args, len(prompts))
    for name, value in about.items():
        say(f"{name}: {value}")
    answers = measure(variants, prompts, args.repeats)
    costs = {count: step_cost(pair, count, prompts[0]) for count in drafts}
    rows = [
        summarise(
            variant,
            its,
            answers[0],
            list(references.values()),
            costs.get(variant.num_draft),
        )
        for variant, its in zip(variants, answers, strict=True)
    ]
    for line in table(rows):
        print(line)
    if args.json:
        value = {**about, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(run(main, "benchmark.py"))
