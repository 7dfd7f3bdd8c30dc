"""What the training scripts learn from: tokenized text, and a teacher's answers."""

import hashlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from torch.nn.functional import softmax
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system.errors import InputError

HELD_OUT = 1000  # examples kept from training, to measure on
SENTINELS = 100  # <extra_id_0> …, as every T5 has them
TOP = 8  # how many of the teacher's probabilities are kept per position
LABEL_TOKENS = 8192  # source tokens that the teacher answers at once


@dataclass
class Examples:
    """Tokenized training text, flat: example i is [starts[i], starts[i + 1]).

    Attributes:
        sources: the sources' ids, end-of-sequence included, one after the other.
        source_starts: (N + 1,).
        targets: the targets' ids, likewise.
        target_starts: (N + 1,).
        top_ids, top_probs: (target ids, k): what the loss expects at each position.
            From text alone, k = 1: the target's id, with probability 1.
    """

    sources: np.ndarray
    source_starts: np.ndarray
    targets: np.ndarray
    target_starts: np.ndarray
    top_ids: np.ndarray
    top_probs: np.ndarray

    def __len__(self) -> int:
        return len(self.source_starts) - 1


@dataclass
class Batch:
    """B examples of about the same length, padded: S source and T target positions.

    ``sources`` (B, S), ``mask`` (B, S), ``inputs`` (B, T): the targets moved right by
    one; ``targets`` (B, T), -1 at padding; ``top_ids`` (B, T, k), ``top_probs``
    (B, T, k), 0 at padding.
    """

    sources: torch.Tensor
    mask: torch.Tensor
    inputs: torch.Tensor
    targets: torch.Tensor
    top_ids: torch.Tensor
    top_probs: torch.Tensor


def flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    starts = np.cumsum([0, *map(len, rows)])
    return np.concatenate([np.asarray(row, np.int32) for row in rows]), starts


def read_columns(path: Path, columns: int, above: int) -> list[list[str]]:
    """The first columns of a tab-separated file, empty lines left out.

    Raises:
        InputError: it cannot be read, a line has fewer columns, or its different
            sources are not above that many.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        row = line.split("\t")[:columns]
        if line.strip():
            if len(row) < columns or not all(map(str.strip, row)):
                raise InputError(f"{path}, line {number}: no source, tab and target")
            rows.append(row)
    sources = len({row[0] for row in rows})
    if sources <= above:
        raise InputError(
            f"{path}: {sources} different sources are too few: above {above} are needed"
        )
    return rows


def learn_tokenizer(
    rows: list[list[str]], size: int, output: Path
) -> PreTrainedTokenizerBase:
    """A SentencePiece unigram tokenizer of the rows' text, in T5's conventions."""
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text for row in rows for text in row]),
            model_prefix=str(output / "spiece"),
            vocab_size=size - SENTINELS,
            hard_vocab_limit=False,  # fewer pieces, where the text has no more
            character_coverage=1.0,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(f"no tokenizer with --vocabulary {size}: {error}") from None
    return T5Tokenizer.from_pretrained(
        output, extra_ids=SENTINELS, trust_remote_code=False
    )


def from_text(rows: list[list[str]], tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Examples whose targets are the text's own."""
    sources, source_starts = flat(tokenizer([row[0] for row in rows]).input_ids)
    targets, target_starts = flat(tokenizer([row[1] for row in rows]).input_ids)
    ones = np.ones((len(targets), 1), np.float16)
    return Examples(
        sources, source_starts, targets, target_starts, targets[:, None], ones
    )


@torch.inference_mode()
def from_teacher(
    sources: list[str],
    teacher: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    max_tokens: int,
) -> Examples:
    """Examples whose targets are the teacher's greedy output, with its probabilities.

    Ids that the tokenizer has no token for are never written. Answers that did not end
    within ``max_tokens`` are left out: most are loops.

    Raises:
        InputError: the teacher ended none, or its logits are not finite.
    """
    vocabulary = used_ids(tokenizer, teacher.config.vocab_size)
    ban = torch.full((1 + max(vocabulary),), -torch.inf, device=device)
    ban[vocabulary] = 0
    special = special_ids(teacher.config, teacher.generation_config)
    ends = np.atleast_1d(special["eos_token_id"])
    # The longest first: if memory does not do, that shows at once.
    ids = sorted(tokenizer(sorted(set(sources))).input_ids, key=len, reverse=True)
    rows, targets, top_ids, top_probs = [], [], [], []
    began = said = time.monotonic()
    done = 0
    while done < len(ids):
        chunk = ids[done : done + max(LABEL_TOKENS // len(ids[done]), 1)]
        inputs, mask = padded(chunk, device)
        # Its own cache: generate() takes its depth from the encoder.
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        encoded = teacher.encoder(input_ids=inputs, attention_mask=mask)
        tokens = torch.full(
            (len(chunk), 1), special["decoder_start_token_id"], device=device
        )
        answers = [([], []) for _ in chunk]
        decoding = np.arange(len(chunk))  # which of the chunk the cache's rows are
        going = np.ones(len(chunk), bool)  # which of these have not ended
        for _ in range(max_tokens):
            logits = teacher(
                encoder_outputs=encoded,
                attention_mask=mask,
                decoder_input_ids=tokens,
                cache=cache,
                use_cache=True,
            ).logits[:, -1, : len(ban)]
            best = softmax(logits + ban, -1).topk(TOP)
            tokens = best.indices[:, :1]
            best_ids = best.indices.cpu().numpy().astype(np.int32)
            best_probs = best.values.cpu().numpy().astype(np.float16)
            if not np.isfinite(best_probs).all():
                raise InputError("the teacher's logits are not finite: it is damaged")
            for place in np.flatnonzero(going):
                answer_ids, answer_probs = answers[decoding[place]]
                answer_ids.append(best_ids[place])
                answer_probs.append(best_probs[place])
            going &= ~np.isin(best_ids[:, 0], ends)
            if not going.any():
                break
            if going.mean() < 0.75:  # copying the caches is not free either
                keep = torch.from_numpy(np.flatnonzero(going)).to(device)
                cache.batch_select_indices(keep)
                encoded.last_hidden_state = encoded.last_hidden_state[keep]
                tokens, mask = tokens[keep], mask[keep]
                decoding, going = decoding[going], going[going]
        for source, (answer_ids, answer_probs) in zip(chunk, answers, strict=True):
            if answer_ids[-1][0] in ends:
                rows.append(source)
                targets.append([each[0] for each in answer_ids])
                top_ids.append(np.stack(answer_ids))
                top_probs.append(np.stack(answer_probs))
        done += len(chunk)
        now = time.monotonic()
        if now - said >= 10 or done == len(ids):
            said = now
            left = (now - began) / done * (len(ids) - done) / 60
            say(f"labelled {done:,} of {len(ids):,}, {left:.1f} min left at most")
    if not rows:
        raise InputError(
            f"the teacher ended none of its answers within {max_tokens} tokens"
        )
    flat_sources, source_starts = flat(rows)
    flat_targets, target_starts = flat(targets)
    return Examples(
        flat_sources,
        source_starts,
        flat_targets,
        target_starts,
        np.concatenate(top_ids),
        np.concatenate(top_probs),
    )


def used_ids(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[int]:
    """The ids below ``rows`` that stand for a token: T5's embedding has more rows."""
    return sorted(i for i in set(tokenizer.get_vocab().values()) if i < rows)


def special_ids(config: T5Config, generation: Any) -> dict[str, Any]:
    """Start, padding and end-of-sequence ids of a T5, as generation takes them."""

    def first(name: str, *others: Any) -> Any:
        found = (getattr(generation, name, None), getattr(config, name, None), *others)
        return next(value for value in found if value is not None)

    pad = first("pad_token_id", 0)
    return {
        "pad_token_id": pad,
        "decoder_start_token_id": first("decoder_start_token_id", pad),
        "eos_token_id": first("eos_token_id", 1),
    }


def padded(
    rows: list[list[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as (B, longest), padded with 0, and the mask of what is real."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


def collate(
    examples: Examples, chosen: np.ndarray, start: int, device: torch.device
) -> Batch:
    def spans(starts: np.ndarray) -> np.ndarray:
        """(B, longest) positions into the flat array; -1 is padding."""
        lengths = starts[chosen + 1] - starts[chosen]
        steps = np.arange(lengths.max())
        return np.where(steps < lengths[:, None], starts[chosen][:, None] + steps, -1)

    source_at = spans(examples.source_starts)
    target_at = spans(examples.target_starts)
    real = target_at >= 0
    targets = np.where(real, examples.targets[target_at], 0)
    inputs = np.concatenate([np.full((len(chosen), 1), start), targets[:, :-1]], 1)
    probs = examples.top_probs[target_at].astype(np.float32) * real[..., None]

    def tensor(array: np.ndarray) -> torch.Tensor:
        array = torch.from_numpy(np.ascontiguousarray(array))
        return (array if array.is_floating_point() else array.long()).to(device)

    return Batch(
        sources=tensor(np.where(source_at >= 0, examples.sources[source_at], 0)),
        mask=tensor(source_at >= 0),
        inputs=tensor(inputs),
        targets=tensor(np.where(real, targets, -1)),
        top_ids=tensor(examples.top_ids[target_at]),
        top_probs=tensor(probs),
    )


def epoch_order(
    examples: Examples, among: np.ndarray, size: int, seed: int
) -> list[np.ndarray]:
    """The batches of one pass, each of examples of about the same length."""
    rng = np.random.default_rng(seed)
    lengths = np.diff(examples.target_starts) * 1000 + np.diff(examples.source_starts)
    order = rng.permutation(among)
    batches = []
    for first in range(0, len(order), 64 * size):
        pool = order[first : first + 64 * size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def split(examples: Examples, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which examples are held out and which not: all of a source, or none.

    By a hash, so that what one run holds out another with more sources mostly does too.
    """
    starts = examples.source_starts
    groups: dict[bytes, list[int]] = {}
    for i in range(len(examples)):
        source = examples.sources[starts[i] : starts[i + 1]]
        groups.setdefault(source.tobytes(), []).append(i)

    def order(source: bytes) -> bytes:
        return hashlib.blake2b(source, salt=str(seed).encode()[-16:]).digest()

    chosen = sorted(groups, key=order)[:HELD_OUT]
    held_out = np.array(sorted(i for source in chosen for i in groups[source]))
    return held_out, np.setdiff1d(np.arange(len(examples)), held_out)


def joined(parts: list[Examples]) -> Examples:
    """All examples, with nothing known of a position but the target's id."""

    def starts(name: str) -> np.ndarray:
        lengths = [np.diff(getattr(part, name)) for part in parts]
        return np.cumsum([0, *np.concatenate(lengths)])

    targets = np.concatenate([part.targets for part in parts])
    return Examples(
        np.concatenate([part.sources for part in parts]),
        starts("source_starts"),
        targets,
        starts("target_starts"),
        targets[:, None],
        np.ones((len(targets), 1), np.float16),
    )


def say(line: str) -> None:
    """One line of progress: on a terminal it replaces the one before."""
    end = "" if sys.stderr.isatty() and not line.endswith("\n") else "\n"
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    print(clear + line.rstrip("\n"), end=end, file=sys.stderr, flush=True)
