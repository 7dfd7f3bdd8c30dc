"""Beam search once more, in plain Python over a table of log-probabilities, and what
transformers' own makes of a tiny model.

The search here is written from what transformers' does, without its tensors. It knows
how close every decision was: where two implementations of the same model's arithmetic
end with different texts, that tells whether rounding may have decided. And it tells
texts that there are from what transformers fills its tensors with where there are fewer
of those than beams.
"""

from collections.abc import Callable, Collection
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import transformers

from speculation.sampling import Sampling

#: Log-probabilities after a prefix, processed: (V,) float32.
Table = Callable[[tuple[int, ...]], np.ndarray]

#: Below, a score is no text's: transformers marks with -1e9 what there is none of.
NOTHING = -1e8


class Found(NamedTuple):
    """What a search ends with.

    Attributes:
        hypotheses: (tokens, score), best first.
        steps: tokens that its longest text has: how often a model is asked.
        margin: the least difference of two sums of log-probabilities that anything
            hung on.
        short: whether at some step fewer texts could go on, or end, than there are
            beams: there transformers goes on with copies of texts.
    """

    hypotheses: list[tuple[list[int], float]]
    steps: int
    margin: float
    short: bool


def search(
    table: Table,
    ends: Collection[int],
    num_beams: int,
    length_penalty: float,
    early_stopping: bool | str,
    max_tokens: int,
    forced: bool = False,
) -> Found:
    """Search with beams.

    Args:
        forced: whether rules leave one first token: a single beam after it is no want.
    """
    margin, short = np.inf, False
    running: list[tuple[np.float32, tuple[int, ...]]] = [(np.float32(0), ())]
    done: list[tuple[np.float32, tuple[int, ...]]] = []

    def closest(*gaps: float) -> None:
        nonlocal margin
        margin = min(margin, *map(float, map(abs, gaps)))

    def weight(tokens: tuple[int, ...]) -> float:
        return len(tokens) ** length_penalty

    for step in range(1, max_tokens + 1):
        last = step == max_tokens
        rows = np.stack([table(tokens) for _, tokens in running])
        sums = rows + np.array([score for score, _ in running], np.float32)[:, None]
        order = np.argsort(-sums, axis=None, kind="stable")
        kept = (max(2, 1 + len(ends)) + 1) * num_beams  # one more than is chosen
        candidates = []
        for place in order[:kept]:
            beam, token = divmod(int(place), sums.shape[1])
            if sums[beam, token] > -np.inf:
                text = (*running[beam][1], token)
                candidates.append((sums[beam, token], text))

        def ended(text: tuple[int, ...], last: bool = last) -> bool:
            return last or text[-1] in ends

        top = candidates[:num_beams]
        new = [
            (np.float32(score / step**length_penalty), text)
            for score, text in top
            if ended(text)
        ]
        if len(candidates) > num_beams:
            inside, outside = candidates[num_beams - 1 : num_beams + 1]
            if ended(inside[1]) or ended(outside[1]):
                closest(inside[0] - outside[0])
        merged = sorted(done + new, key=lambda each: -each[0])  # stable
        done = merged[:num_beams]
        if len(merged) > num_beams:
            worst, dropped = merged[num_beams - 1 : num_beams + 1]
            least = min(weight(worst[1]), weight(dropped[1]))
            closest((worst[0] - dropped[0]) * least)
        live = [each for each in candidates if not ended(each[1])]
        if len(live) > num_beams:
            closest(live[num_beams - 1][0] - live[num_beams][0])
        running = live[:num_beams]
        short |= len(top if last else running) < num_beams and not (
            step == 1 and forced and running
        )
        if not running:
            break
        if len(done) == num_beams:
            if early_stopping is True:
                break
            far = early_stopping == "never" and length_penalty > 0
            length = max_tokens if far else step
            best = running[0][0] / length**length_penalty
            closest(
                (best - done[-1][0]) * min(weight(done[-1][1]), length**length_penalty)
            )
            if best <= done[-1][0]:
                break
    for (better, text), (worse, other) in pairwise(done):
        closest((better - worse) * min(weight(text), weight(other)))
    hypotheses = [(list(text), float(score)) for score, text in done]
    return Found(hypotheses, step, margin, short)


class Recorded(transformers.LogitsProcessor):
    """Stands behind all processors and notes what they leave."""

    def __init__(self):
        self.rows: dict[tuple[int, ...], np.ndarray] = {}

    def __call__(self, input_ids, scores):
        for text, row in zip(input_ids[:, 1:].tolist(), scores.numpy(), strict=True):
            self.rows[tuple(text)] = row.copy()
        return scores


def keywords(sampling: Sampling) -> dict:
    """These rules as arguments of transformers' ``generate``."""
    named = {
        "repetition_penalty": sampling.repetition_penalty,
        "no_repeat_ngram_size": sampling.no_repeat_ngram_size,
        "encoder_no_repeat_ngram_size": sampling.encoder_no_repeat_ngram_size,
        "min_new_tokens": sampling.min_new_tokens,
        "suppress_tokens": list(sampling.suppress_tokens),
        "bad_words_ids": [list(word) for word in sampling.bad_words_ids],
        "forced_bos_token_id": sampling.forced_bos_token_id,
    }
    given = {name: value for name, value in named.items() if value}
    return given | {"forced_bos_token_id": sampling.forced_bos_token_id}


def theirs(
    oracle, prompt: list[int], beams, ends: Collection[int], max_tokens: int, sampling
) -> tuple[list[tuple[list[int], float]], "Model"]:
    """The n best of transformers' ``generate``, and the table that it went by."""
    recorded = Recorded()
    with torch.no_grad():
        result = oracle.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            do_sample=False,
            num_beams=beams.num_beams,
            num_return_sequences=beams.num_beams,
            length_penalty=beams.length_penalty,
            early_stopping=beams.early_stopping,
            max_new_tokens=max_tokens,
            eos_token_id=sorted(ends),
            return_dict_in_generate=True,
            output_scores=True,
            logits_processor=transformers.LogitsProcessorList([recorded]),
            **keywords(sampling),
        )
    lengths = (result.beam_indices >= 0).sum(dim=1).tolist()
    texts = [
        text[1 : 1 + length].tolist()
        for text, length in zip(result.sequences, lengths, strict=True)
    ]
    scores = result.sequences_scores.tolist()
    model = Model(oracle, prompt, ends, sampling, recorded.rows)
    return list(zip(texts, scores, strict=True)), model


class Model:
    """The table of a model of transformers, for one prompt and its rules; rows that are
    not yet known are computed from the whole prefix."""

    def __init__(self, oracle, prompt, ends, sampling, rows=None):
        self.rows = dict(rows or {})
        self._oracle = oracle
        self._prompt = torch.tensor([prompt])
        self._rules = rules(sampling, ends, self._prompt)

    def __call__(self, prefix: tuple[int, ...]) -> np.ndarray:
        if prefix not in self.rows:
            before = torch.tensor([[0, *prefix]])
            with torch.no_grad():
                logits = self._oracle(self._prompt, decoder_input_ids=before).logits
            scores = self._rules(before, logits[:, -1].float().log_softmax(-1))
            self.rows[prefix] = scores[0].numpy()
        return self.rows[prefix]

    def score(self, tokens: list[int], length_penalty: float) -> float:
        """Of a text, as a finished hypothesis."""
        total = np.float32(0)
        for place, token in enumerate(tokens):
            total += self(tuple(tokens[:place]))[token]
        return float(total / len(tokens) ** length_penalty)


def rules(
    sampling: Sampling, ends: Collection[int], prompt: torch.Tensor
) -> transformers.LogitsProcessorList:
    """transformers' processors for these options, in its order."""
    ends = torch.tensor(sorted(ends))
    listed = transformers.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        listed.append(transformers.RepetitionPenaltyLogitsProcessor(penalty))
    if sampling.no_repeat_ngram_size:
        size = sampling.no_repeat_ngram_size
        listed.append(transformers.NoRepeatNGramLogitsProcessor(size))
    if sampling.encoder_no_repeat_ngram_size:
        size = sampling.encoder_no_repeat_ngram_size
        listed.append(transformers.EncoderNoRepeatNGramLogitsProcessor(size, prompt))
    if sampling.bad_words_ids:
        words = [list(word) for word in sampling.bad_words_ids]
        listed.append(transformers.NoBadWordsLogitsProcessor(words, ends))
    if sampling.min_new_tokens:
        least = sampling.min_new_tokens
        listed.append(transformers.MinNewTokensLengthLogitsProcessor(1, least, ends))
    if sampling.forced_bos_token_id is not None:
        forced = sampling.forced_bos_token_id
        listed.append(transformers.ForcedBOSTokenLogitsProcessor(forced))
    if sampling.suppress_tokens:
        banned = list(sampling.suppress_tokens)
        listed.append(transformers.SuppressTokensLogitsProcessor(banned))
    return listed
