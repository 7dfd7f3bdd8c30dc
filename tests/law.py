"""The law of sampled text, measured against the target's exact law.

    python tests/law.py [--samples 50000] [--draft model] [--coupling shared]

prints a chi-square test for every way of sampling, drafting and coupling. The pairs are
tiny T5s with a vocabulary of 8, so that the probability of every first three tokens can
be computed: by transformers' model, processors and warpers, not by ours.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import numpy as np
import torch
import transformers
from conftest import save_checkpoint, tiny_torch
from scripted import Scripted

import convert
from architectures import t5
from architectures.t5_session import T5Session
from decoder import generate
from speculation.drafting import ModelDrafter
from speculation.lookup import Lookup
from speculation.policy import Policy
from speculation.sampling import COUPLINGS, Sampling
from speculation.session import Session

VOCABULARY = 8
END = 1
LENGTH = 3  # the first tokens, whose joint law is tested
PROMPT = [5, 3, 6, 4, 1]
SEED = 2
TINIER = {
    "vocab_size": VOCABULARY,
    "num_heads": 2,
    "num_layers": 1,
    "num_decoder_layers": 1,
}
BATCH = 1000
LEAST_EXPECTED = 5.0  # rarer outcomes are pooled


@dataclass
class TinyPair:
    """A target and a draft over the same few tokens, and transformers' twins.

    Attributes:
        oracle, draft_oracle: prefixes (N, L) -> logits (N, V) of the token after each.
        begin: the tokens that decoding goes on from.
    """

    target: Session
    drafter: ModelDrafter
    oracle: Callable[[torch.Tensor], torch.Tensor]
    draft_oracle: Callable[[torch.Tensor], torch.Tensor]
    begin: list[int]

    @classmethod
    def make(cls, folder: Path) -> "TinyPair":
        sessions, oracles = [], []
        for name, noise in (("target", 0.0), ("draft", 0.6)):
            oracle = tiny_torch(SEED, untied=True, noise=noise, **TINIER)
            with torch.no_grad():
                oracle.lm_head.weight *= 0.15  # no token is certain
            save_checkpoint(oracle, folder / name / "hf", untied=True)
            convert.convert(folder / name / "hf", folder / name / "mlx")
            session = T5Session(t5.load(folder / name / "mlx"))
            session.first_capacity = 16  # the texts are short, and there are many
            sessions.append(session)
            oracles.append(partial(_t5_logits, oracle))
        return cls(sessions[0], ModelDrafter(sessions[1]), *oracles, [0])


def _t5_logits(oracle, prefixes: torch.Tensor) -> torch.Tensor:
    inputs = torch.tensor([PROMPT] * len(prefixes))
    return oracle(input_ids=inputs, decoder_input_ids=prefixes).logits[:, -1]


class Point(Scripted):
    """Drafts for certain, whatever."""

    def __init__(self):
        super().__init__(lambda s, n: [3 + (sum(s) + i) % 4 for i in range(n)])


def chain(
    sampling: Sampling, begin: int = 1, prompt: Sequence[int] = ()
) -> transformers.LogitsProcessorList:
    """What transformers' ``generate`` applies for these options, in its order."""
    listed = transformers.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        listed.append(
            transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        )
    if sampling.no_repeat_ngram_size:
        listed.append(
            transformers.NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size)
        )
    if sampling.encoder_no_repeat_ngram_size:
        listed.append(
            transformers.EncoderNoRepeatNGramLogitsProcessor(
                sampling.encoder_no_repeat_ngram_size, torch.tensor([prompt])
            )
        )
    if sampling.bad_words_ids:
        listed.append(
            transformers.NoBadWordsLogitsProcessor(
                [list(word) for word in sampling.bad_words_ids], END
            )
        )
    if sampling.min_new_tokens:
        listed.append(
            transformers.MinNewTokensLengthLogitsProcessor(
                begin, sampling.min_new_tokens, END
            )
        )
    if sampling.forced_bos_token_id is not None:
        listed.append(
            transformers.ForcedBOSTokenLogitsProcessor(sampling.forced_bos_token_id)
        )
    if sampling.suppress_tokens:
        listed.append(
            transformers.SuppressTokensLogitsProcessor(list(sampling.suppress_tokens))
        )
    if sampling.temperature not in (0, 1):
        listed.append(transformers.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        listed.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        listed.append(transformers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        listed.append(transformers.MinPLogitsWarper(sampling.min_p))
    return listed


def next_probs(
    oracle: Callable[[torch.Tensor], torch.Tensor],
    begin: list[int],
    texts: list[tuple[int, ...]],
    sampling: Sampling,
) -> np.ndarray:
    """(N, V): the law of the token after each of N texts of one length."""
    before = torch.tensor([[*begin, *text] for text in texts])
    with torch.no_grad():
        logits = oracle(before)
    return chain(sampling, len(begin))(before, logits).double().softmax(-1).numpy()


def exact_law(pair: TinyPair, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """The probability of everything that the first tokens can be."""
    law, running = {}, {(): 1.0}
    for _ in range(LENGTH):
        if not running:
            break  # every text has ended
        texts = list(running)
        probs = next_probs(pair.oracle, pair.begin, texts, sampling)
        reached = {
            (*text, token): running[text] * float(probs[row, token])
            for row, text in enumerate(texts)
            for token in range(VOCABULARY)
            if probs[row, token] > 0
        }
        ended = {text: p for text, p in reached.items() if text[-1] == END}
        law |= ended
        running = {text: p for text, p in reached.items() if text not in ended}
    return law | running


def distance(pair: TinyPair, sampling: Sampling) -> float:
    """TV(p, q) of the first token."""
    p, q = (
        next_probs(oracle, pair.begin, [()], sampling)
        for oracle in (pair.oracle, pair.draft_oracle)
    )
    return float(np.abs(p - q).sum()) / 2


def sample(
    pair: TinyPair,
    drafter,
    sampling: Sampling,
    num_draft: int,
    samples: int,
    batch: int = BATCH,
    delta: float = 0.0,
    most: int | None = None,
    lookup: Lookup | None = None,
    policy: Policy | None = None,
) -> tuple[Counter, int, int]:
    """Sample texts in batches of copies.

    Args:
        lookup: goes before the drafter.
        policy: what decides on each round; None for ``num_draft`` in all.
        most: tokens to a text; None for so many that no draft is cut short.

    Returns:
        How often each beginning was sampled; draft tokens accepted, and judged.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    accepted = tested = 0
    for start in range(0, samples, batch):
        texts: list[list[int]] = [[] for _ in range(min(batch, samples - start))]
        stats = [None] * len(texts)
        waiting = len(texts)
        for commit in generate(
            pair.target,
            drafter,
            [PROMPT] * len(texts),
            eos_tokens={END},
            max_tokens=most or LENGTH + num_draft,
            num_draft=num_draft if policy is None else policy,
            lookup=lookup,
            delta=delta,
            sampling=sampling,
            streams=[(start + row,) for row in range(len(texts))],
        ):
            text = texts[commit.id]
            waiting -= len(text) < LENGTH and (
                len(text) + len(commit.tokens) >= LENGTH
                or commit.finish_reason is not None
            )
            text += commit.tokens
            stats[commit.id] = commit.stats
            if not waiting:
                break
        seen.update(tuple(text[:LENGTH]) for text in texts)
        accepted += sum(one.accepted for one in stats)
        tested += sum(one.tested for one in stats)
    return seen, accepted, tested


def chi_square(seen: Counter, law: dict[tuple[int, ...], float]) -> float:
    """The p-value of the observed counts; 0 for an outcome that is impossible."""
    total = sum(seen.values())
    if set(seen) - set(law):
        return 0.0
    outcomes = sorted(law, key=law.get)
    expected = np.array([law[text] * total for text in outcomes])
    observed = np.array([seen[text] for text in outcomes], float)
    # The rarest are pooled until the pool is common enough as well.
    pooled = int(np.searchsorted(expected, LEAST_EXPECTED))
    while 0 < pooled < len(expected) and expected[:pooled].sum() < LEAST_EXPECTED:
        pooled += 1
    if pooled:
        expected = np.append(expected[pooled:], expected[:pooled].sum())
        observed = np.append(observed[pooled:], observed[:pooled].sum())
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2)))


WAYS = {
    "temperature 0.5": Sampling(temperature=0.5),
    "temperature 1": Sampling(temperature=1.0),
    "temperature 1.5": Sampling(temperature=1.5),
    "top-k 3": Sampling(temperature=1.0, top_k=3),
    "top-p 0.7": Sampling(temperature=1.0, top_p=0.7),
    "min-p 0.3": Sampling(temperature=1.0, min_p=0.3),
    "top-k 5, top-p 0.8": Sampling(temperature=1.5, top_k=5, top_p=0.8),
    "repetition penalty 2": Sampling(temperature=1.0, repetition_penalty=2.0),
    "no bigram twice": Sampling(temperature=1.0, no_repeat_ngram_size=2),
    "3 tokens at least, one banned": Sampling(
        temperature=1.0, min_new_tokens=3, suppress_tokens=(6,)
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--draft", choices=("model", "point mass"), help="only this")
    parser.add_argument("--coupling", nargs=1, choices=COUPLINGS, help="only this")
    args = parser.parse_args()
    samples = args.samples
    seeds = count(1)
    p_values = []
    with tempfile.TemporaryDirectory() as folder:
        pair = TinyPair.make(Path(folder))
        tests = [
            (way, kind, drafter, num_draft, samples, BATCH)
            for way in WAYS
            for kind, drafter in (("model", pair.drafter), ("point mass", Point()))
            for num_draft in (1, 3, 5)
        ]
        tests.append(("temperature 1", "model", pair.drafter, 3, samples // 5, 1))
        if args.draft:
            tests = [test for test in tests if test[1] == args.draft]
        for way, kind, drafter, num_draft, size, batch in tests:
            for coupling in args.coupling or COUPLINGS:
                sampling = replace(WAYS[way], seed=next(seeds), coupling=coupling)
                law = exact_law(pair, sampling)
                seen, accepted, tested = sample(
                    pair, drafter, sampling, num_draft, size, batch
                )
                p_values.append(chi_square(seen, law))
                print(
                    f"{way:30} TV {distance(pair, sampling):.2f}  {kind:10} "
                    f"{coupling:8}  num_draft {num_draft}  batch {batch:4}  "
                    f"{size} samples  alpha {accepted / tested:.3f}  "
                    f"p-value {p_values[-1]:.4f}",
                    flush=True,
                )
    lowest, made = min(p_values), len(p_values)
    print(
        f"{made} tests; by chance the lowest p-value would be below {lowest:.2g} "
        f"with probability {1 - (1 - lowest) ** made:.2g}"
    )


if __name__ == "__main__":
    sys.exit(main())
