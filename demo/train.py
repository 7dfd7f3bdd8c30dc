"""Train a small T5 from scratch, or distil a draft from any T5.

    python demo/train.py pairs.tsv --output runs/target --minutes 75
    python demo/train.py pairs.tsv --output runs/draft --teacher runs/target \\
        --width 128 --decoder-layers 1 --minutes 25

The file has one source and its target a line, separated by a tab. With ``--teacher``
only the sources are used: the draft learns what the teacher itself writes for them
(sequence-level distillation: Kim and Rush, arXiv 1606.07947) and how the teacher
distributed its probability at each of those positions (word-level, its TOP most
probable tokens), which is what speculative decoding rewards: DistillSpec, arXiv
2310.08461. The draft shares the teacher's tokenizer.

``--from`` begins with a trained model instead of a random one, and may give it more
layers: the new ones change nothing until they are trained (block expansion: arXiv
2401.02415). ``together.py`` goes on with a target and its draft at once.

All end as a Hugging Face folder (transformers loads it, convert.py converts it). What
a run needs to go on after it was killed is kept in ``training/`` in that folder: start
the same command again. (Labelling is saved when it is complete.) The learning rate
follows the time that was spent, so the budget is always spent on a whole schedule;
held-out loss and accuracy are printed at every save.
"""

import copy
import ctypes
import hashlib
import json
import sys
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from torch.nn.functional import softmax
from transformers import (
    AutoTokenizer,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from errors import InputError, Parser, run

HELD_OUT = 1000  # examples kept from training, to measure on
SENTINELS = 100  # <extra_id_0> …, as every T5 has them
TOP = 8  # how many of the teacher's probabilities are kept per position
LABEL_TOKENS = 8192  # source tokens that the teacher answers at once
WARM_UP = 0.03  # share of the budget in which the learning rate rises


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


def read_columns(path: Path, columns: int) -> list[list[str]]:
    """The first columns of a tab-separated file, empty lines left out.

    Raises:
        InputError: it cannot be read, a line has fewer columns, or there are too few
            different sources.
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
    if sources <= HELD_OUT:
        raise InputError(
            f"{path}: {sources} different sources are too few: {HELD_OUT} are held out"
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
    return T5Tokenizer.from_pretrained(output, extra_ids=SENTINELS)


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
                past_key_values=cache,
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


def measure(
    model: T5ForConditionalGeneration, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over a batch: cross-entropy (nats), tokens, hits of the argmax, overlap.

    The overlap is Σ min(p, q) over the tokens whose p is known: at temperature 1 it is
    the acceptance rate, but for what p puts on other tokens.
    """
    logits = model(
        input_ids=batch.sources,
        attention_mask=batch.mask,
        decoder_input_ids=batch.inputs,
        use_cache=False,
    ).logits.float()
    chosen = logits.gather(-1, batch.top_ids)
    total = logits.logsumexp(-1)
    loss = (batch.top_probs.sum(-1) * total - (batch.top_probs * chosen).sum(-1)).sum()
    with torch.no_grad():
        hits = (logits.argmax(-1) == batch.targets).sum()
        q = (chosen - total[..., None]).exp()
        overlap = torch.minimum(batch.top_probs, q).sum()
    return loss, (batch.targets >= 0).sum(), hits, overlap


def split(examples: Examples, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which examples are held out and which not: all of a source, or none."""
    starts = examples.source_starts
    groups: dict[bytes, list[int]] = {}
    for i in range(len(examples)):
        source = examples.sources[starts[i] : starts[i + 1]]
        groups.setdefault(source.tobytes(), []).append(i)
    order = np.random.default_rng(seed).permutation(len(groups))
    members = list(groups.values())
    held_out = np.array([i for g in order[:HELD_OUT] for i in members[g]])
    return held_out, np.setdiff1d(np.arange(len(examples)), held_out)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for the matrices between the layers.

    Keller Jordan's optimizer, its step scaled to AdamW's (arXiv 2502.16982, section
    2.2). In the same time on a CPU it reaches a loss that AdamW takes several times as
    long for. torch.optim.Muon works in bfloat16 and one matrix at a time, which a CPU
    pays dearly for; here matrices of one shape share batched float32 products.
    """

    MOMENTUM = 0.95
    # Newton-Schulz steps to the nearest orthogonal matrix: a x + b xx'x + c (xx')²x.
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    STEPS = 5

    def __init__(self, parameters: list[torch.nn.Parameter]):
        super().__init__(parameters, {"lr": 0.0})

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for parameter in group["params"]:
            shapes.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in shapes.items():
            updates = self._orthogonal(torch.stack([*map(self._momentum, parameters)]))
            scale = -group["lr"] * 0.2 * max(shape) ** 0.5
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.add_(update, alpha=scale)

    def _momentum(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["average"] = torch.zeros_like(parameter)
        average = state["average"].lerp_(parameter.grad, 1 - self.MOMENTUM)
        return parameter.grad.lerp(average, self.MOMENTUM)

    def _orthogonal(self, matrices: torch.Tensor) -> torch.Tensor:
        """The nearest orthogonal matrices, about, to each of (N, rows, columns)."""
        a, b, c = self.COEFFICIENTS
        tall = matrices.shape[1] > matrices.shape[2]
        x = matrices.mT if tall else matrices
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(self.STEPS):
            square = x @ x.mT
            x = torch.baddbmm(
                x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a
            )
        return x.mT if tall else x


class Trainer:
    """One run: model, optimizer, and where in time and data it stands."""

    def __init__(
        self,
        model: T5ForConditionalGeneration,
        examples: Examples,
        args: Namespace,
        device: torch.device,
    ):
        self.model = model.to(device)
        self.examples = examples
        self.args = args
        self.device = device
        self.elapsed = 0.0  # seconds of training, over all runs
        self.epoch = 0
        self.batch = 0  # within the epoch
        self.held_out, self.among = split(examples, args.seed)
        self.optimizers = self.optimizers_of(self.model)
        self.folder = args.output / "training"
        self.folder.mkdir(parents=True, exist_ok=True)

    def optimizers_of(
        self, model: T5ForConditionalGeneration
    ) -> list[torch.optim.Optimizer]:
        """Muon for the matrices between the layers, AdamW for everything else."""
        embedding = model.get_input_embeddings().weight
        head = model.get_output_embeddings().weight
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            if parameter is embedding:
                continue
            inner = parameter.ndim == 2 and parameter is not head
            inner = inner and "relative_attention_bias" not in name
            (matrices if inner else others).append(parameter)
        optimizers = [
            Muon(matrices),
            torch.optim.AdamW(
                [
                    # T5 starts its embedding at that much larger values.
                    {"params": [embedding], "peak": 10 * self.args.learning_rate},
                    {"params": others, "peak": self.args.learning_rate},
                ],
                betas=(0.9, 0.98),
                weight_decay=0.0,
            ),
        ]
        optimizers[0].param_groups[0]["peak"] = self.args.matrix_rate
        return optimizers

    def resume(self) -> bool:
        """Go on where ``training/state.pt`` was left; false if there is none."""
        path = self.folder / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, its in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its)
        self.elapsed, self.epoch, self.batch = state["at"]
        return True

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [each.state_dict() for each in self.optimizers],
            "at": (self.elapsed, self.epoch, self.batch),
        }
        # Renamed into place: a run killed while saving keeps the state before.
        torch.save(state, self.folder / "state.new")
        (self.folder / "state.new").replace(self.folder / "state.pt")

    @property
    def config(self) -> T5Config:
        return self.model.config

    def measure(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        return measure(self.model, batch)

    def batches(self) -> Iterator[Batch]:
        """Endless, from where the run stands."""
        start = self.config.decoder_start_token_id
        while True:
            order = epoch_order(
                self.examples, self.among, self.args.batch, self.args.seed + self.epoch
            )
            for chosen in order[self.batch :]:
                self.batch += 1
                yield collate(self.examples, chosen, start, self.device)
            self.epoch += 1
            self.batch = 0

    def autocast(self) -> torch.autocast:
        # On a CPU without its instructions bfloat16 is several times slower.
        on = self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)

    def step(self, batch: Batch) -> tuple[float, int]:
        budget = self.args.minutes * 60
        spent = min(self.elapsed / budget, 1.0)
        rate = min(max(spent, 1e-3) / WARM_UP, 1.0) * (1 - spent)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.zero_grad()
        with self.autocast():
            loss, tokens, *_ = self.measure(batch)
        (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item(), int(tokens)

    @torch.inference_mode()
    def evaluate(self) -> tuple[float, float, float]:
        """Loss, hits and overlap (see :func:`measure`) per held-out token."""
        start = self.config.decoder_start_token_id
        totals = torch.zeros(4)
        for chosen in epoch_order(self.examples, self.held_out, self.args.batch, 0):
            batch = collate(self.examples, chosen, start, self.device)
            with self.autocast():
                totals += torch.stack(self.measure(batch)).cpu()
        loss, tokens, hits, overlap = totals.tolist()
        return loss / tokens, hits / tokens, overlap / tokens

    def run(self) -> None:
        """Train until the budget is spent; say and save how it goes."""
        budget = self.args.minutes * 60
        before = said = saved = time.monotonic()
        total, tokens = 0.0, 0
        for batch in self.batches():
            if self.elapsed >= budget:
                break
            loss, count = self.step(batch)
            now = time.monotonic()
            self.elapsed += now - before
            before = now
            total, tokens = total + loss, tokens + count
            if now - said >= 10:
                left = (budget - self.elapsed) / 60
                say(
                    f"epoch {self.epoch + 1}, loss {total / tokens:.3f}, "
                    f"{tokens / (now - said):,.0f} target tokens/s, {left:.1f} min left"
                )
                self.log(loss=total / tokens, tokens=tokens)
                total, tokens, said = 0.0, 0, now
            if now - saved >= self.args.save_minutes * 60:
                self.checkpoint()
                before = said = saved = time.monotonic()
                total, tokens = 0.0, 0
        self.checkpoint()

    def checkpoint(self) -> None:
        loss, hits, overlap = self.evaluate()
        self.log(held_out_loss=loss, held_out_hits=hits, held_out_overlap=overlap)
        self.save()
        line = f"{self.elapsed / 60:.1f} min, held out: loss {loss:.3f}"
        if self.args.teacher:
            line += f", alpha {hits:.3f}, {overlap:.3f} at temperature 1\n"
        else:
            line += f", accuracy {hits:.3f}\n"
        say(line)

    def log(self, **values: float) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            record = {"seconds": round(self.elapsed, 1), "epoch": self.epoch, **values}
            file.write(json.dumps(record) + "\n")


def say(line: str) -> None:
    """One line of progress: on a terminal it replaces the one before."""
    end = "" if sys.stderr.isatty() and not line.endswith("\n") else "\n"
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    print(clear + line.rstrip("\n"), end=end, file=sys.stderr, flush=True)


def keep_memory() -> None:
    """Have glibc keep freed memory: giving it back costs a third of the time on CPU."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def new_model(
    args: Namespace, vocabulary: int, special: dict[str, Any]
) -> T5ForConditionalGeneration:
    """A T5 with random weights and the shape that the arguments give.

    Args:
        vocabulary: rows of the embedding.
        special: as :func:`special_ids` gives them.
    """
    width = args.width or 192
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=64,
        num_heads=max(width // 64, 1),
        d_ff=args.feed_forward or 4 * width,
        num_layers=args.encoder_layers or 2,
        num_decoder_layers=args.decoder_layers or 10,
        feed_forward_proj="gated-gelu" if args.v1_1 else "relu",
        tie_word_embeddings=not args.v1_1,
        dropout_rate=0.0,
        **special,
    )
    model = T5ForConditionalGeneration(config)
    if args.v1_1:
        # transformers 5 ties the head whatever the config says.
        head = torch.randn(vocabulary, width) * width**-0.5
        model.lm_head.weight = torch.nn.Parameter(head)
        model.config.tie_word_embeddings = False
    return model


def grown(
    model: T5ForConditionalGeneration,
    encoder_layers: int | None,
    decoder_layers: int | None,
) -> T5ForConditionalGeneration:
    """A model that computes the same with more layers, None for as many as it has.

    The old layers lie spread among the new ones. A new one is a copy of the old one
    before it, but for the matrices that write its results, which are zero.

    Raises:
        InputError: it has more layers than that.
    """
    config = copy.deepcopy(model.config)
    before = {"encoder": config.num_layers, "decoder": config.num_decoder_layers}
    after = {
        "encoder": encoder_layers or config.num_layers,
        "decoder": decoder_layers or config.num_decoder_layers,
    }
    for stack, layers in after.items():
        if layers < before[stack]:
            raise InputError(
                f"--{stack}-layers is {layers}, but the model to begin with has "
                f"{before[stack]}: layers can only be added"
            )
    config.num_layers, config.num_decoder_layers = after["encoder"], after["decoder"]
    weights = {}
    for name, weight in model.state_dict().items():
        stack, _, rest = name.partition(".block.")
        if not rest:
            weights[name] = weight
            continue
        old, _, rest = rest.partition(".")
        copies = [
            new
            for new in range(after[stack])
            if new * before[stack] // after[stack] == int(old)
        ]
        if "relative_attention_bias" in rest:  # only the first layer has it
            copies = copies[:1]
        for new in copies:
            silent = new != copies[0] and rest.endswith((".o.weight", ".wo.weight"))
            weights[f"{stack}.block.{new}.{rest}"] = weight * (not silent)
    larger = T5ForConditionalGeneration(config)
    if not config.tie_word_embeddings:  # transformers 5 ties it whatever config says
        larger.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    larger.load_state_dict(weights)
    larger.generation_config = model.generation_config
    return larger


def parser(prog: str, description: str) -> Parser:
    """With the arguments that every training has."""
    parser = Parser(
        prog=prog,
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("text", type=Path, help="source, tab, target: one pair a line")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=60, help="of training")
    parser.add_argument("--batch", type=int, default=256, help="pairs a step")
    parser.add_argument("--matrix-rate", type=float, default=5e-3, help="Muon's peak")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of the rest")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest label")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", help="cuda, mps or cpu (default: the best there is)"
    )
    return parser


def arguments() -> Namespace:
    own = parser("train.py", __doc__)
    own.add_argument("--teacher", type=Path, help="distil from this T5 (a folder)")
    own.add_argument(
        "--from", dest="start", type=Path, help="begin with this T5 (a folder)"
    )
    own.add_argument("--vocabulary", type=int, help="default 4096, or the teacher's")
    own.add_argument("--width", type=int, help="d_model, 64 a head (default 192)")
    own.add_argument("--feed-forward", type=int, help="d_ff (default 4 x width)")
    own.add_argument("--encoder-layers", type=int, help="default 2")
    own.add_argument("--decoder-layers", type=int, help="default 10")
    own.add_argument("--v1-1", action="store_true", help="T5 1.1: gated, untied")
    args = own.parse_args()
    if args.start:
        for name in ("vocabulary", "width", "feed_forward", "v1_1"):
            if getattr(args, name):
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} is given by --from: leave it out")
    return checked(args)


def checked(args: Namespace) -> Namespace:
    """The arguments, none of whose numbers is one that makes no sense."""
    for name, value in vars(args).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            least = 0 if name == "seed" else 1e-9
            if not value >= least:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} is {value}: it has to be above 0")
    return args


def choose_device(name: str | None) -> torch.device:
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"no device '{name}' here: {reason}") from None


def weight_files(folder: Path) -> list[Path]:
    """Those of a Hugging Face checkpoint.

    Raises:
        InputError: the folder is none.
    """
    files = sorted(folder.glob("*.safetensors"))
    files += sorted(folder.glob("pytorch_model*.bin"))
    if not files or not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is no Hugging Face checkpoint: no config.json with "
            f"*.safetensors or pytorch_model*.bin"
        )
    return files


def describe(args: Namespace) -> dict[str, Any]:
    """What a run has to have in common with the one that it goes on with."""
    free = {"output", "minutes", "save_minutes", "device"}
    description = {k: v for k, v in vars(args).items() if k not in free}
    for name, path in description.items():
        if name in ("text", "sources") and path:
            try:
                description[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise InputError(f"cannot read {path}: {error}") from None
        elif isinstance(path, Path):
            # Not their bytes, which may be many: a file's size and time.
            stats = [each.stat() for each in weight_files(path)]
            description[name] = [[s.st_size, s.st_mtime_ns] for s in stats]
    return description


def begin(args: Namespace) -> bool:
    """Make the output folder, or recognise it as this run's own; true if it is.

    Raises:
        InputError: the folder holds something else, or another run.
    """
    record = args.output / "training" / "run.json"
    description = describe(args)
    if record.is_file():
        before = json.loads(record.read_text("utf-8"))
        other = sorted(k for k in description if description[k] != before.get(k))
        if other:
            raise InputError(
                f"{args.output} holds another run, with a different "
                f"{', '.join(other).replace('_', '-')}: give another --output"
            )
        return True
    if args.output.exists() and (
        not args.output.is_dir() or any(args.output.iterdir())
    ):
        raise InputError(f"{args.output} exists and is no run of this: it stays")
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(description) + "\n", "utf-8")
    return False


def load_t5(folder: Path) -> T5ForConditionalGeneration:
    # In float32 as on our CPUs: rounded logits would tie, and float16 overflow.
    return T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def labels(
    args: Namespace,
    sources: list[str],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> Examples:
    """The teacher's answers, from ``training/labels.npz`` if they are there already."""
    path = args.output / "training" / "labels.npz"
    if path.exists():
        return Examples(**np.load(path))
    teacher = load_t5(args.teacher).to(device).eval()
    examples = from_teacher(sources, teacher, tokenizer, device, args.max_tokens)
    np.savez(path.with_suffix(".new.npz"), **vars(examples))
    path.with_suffix(".new.npz").replace(path)
    return examples


def same_tokenizer(*folders: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that models have in common.

    Raises:
        InputError: a folder is no checkpoint, or has another than the first.
    """
    tokenizers = []
    for folder in folders:
        weight_files(folder)
        try:
            tokenizers.append(AutoTokenizer.from_pretrained(folder))
        except (OSError, ValueError):
            raise InputError(f"{folder} holds no tokenizer") from None
        if tokenizers[-1].get_vocab() != tokenizers[0].get_vocab():
            raise InputError(f"{folder} and {folders[0]} have different tokenizers")
    return tokenizers[0]


def prepare(args: Namespace) -> torch.device:
    """The device to train on, set up."""
    device = choose_device(args.device)
    if device.type == "cpu":
        keep_memory()
        # Before any thread is started: they inherit it. Gradients of attention that has
        # made up its mind are denormal, which halves the speed of a CPU.
        torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    return device


def complete(trainer: Trainer) -> None:
    """The run, from where an earlier start left it."""
    examples, args = trainer.examples, trainer.args
    if not len(trainer.among):
        raise InputError(f"{len(examples)} examples are too few: all are held out")
    parameters = sum(each.numel() for each in trainer.model.parameters())
    say(
        f"{parameters / 1e6:.2f} M parameters, {len(examples):,} examples, "
        f"{len(examples.targets):,} target tokens, on {trainer.device}\n"
    )
    if trainer.resume():
        say(f"resumed at {trainer.elapsed / 60:.1f} of {args.minutes:g} minutes\n")
    trainer.run()


def main() -> None:
    args = arguments()
    device = prepare(args)
    rows = read_columns(args.text, 1 if args.teacher else 2)
    given = [folder for folder in (args.teacher, args.start) if folder]
    tokenizer = same_tokenizer(*given) if given else None
    resumed = begin(args)
    if args.teacher:
        config = T5Config.from_pretrained(args.teacher)
        generation = None
        if (args.teacher / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(args.teacher)
        special = special_ids(config, generation)
        vocabulary = 1 + used_ids(tokenizer, config.vocab_size)[-1]
        examples = labels(args, [row[0] for row in rows], tokenizer, device)
    else:
        special = special_ids(T5Config(decoder_start_token_id=0), None)
        if resumed and (args.output / "tokenizer.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(args.output)
        elif not args.start:
            tokenizer = learn_tokenizer(rows, args.vocabulary or 4096, args.output)
        vocabulary = len(tokenizer)
        examples = from_text(rows, tokenizer)
    tokenizer.save_pretrained(args.output)
    if args.start:
        model = grown(load_t5(args.start), args.encoder_layers, args.decoder_layers)
    else:
        model = new_model(args, vocabulary, special)
    trainer = Trainer(model, examples, args, device)
    complete(trainer)
    trainer.model.save_pretrained(args.output)


if __name__ == "__main__":
    sys.exit(run(main, "train.py"))
