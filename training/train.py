"""Train a small T5 from scratch, or distil a draft from any T5.

    python training/train.py pairs.tsv --output runs/target --minutes 75
    python training/train.py pairs.tsv --output runs/draft --teacher runs/target \\
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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system.errors import InputError, Parser, run
from training import corpus
from training.corpus import Batch, Examples, say

WARM_UP = 0.03  # share of the budget in which the learning rate rises


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


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether products are faster in bfloat16: without instructions for it a CPU takes
    several times as long."""
    if device.type != "cpu":
        return device.type == "cuda"
    has = torch.cpu.get_capabilities()
    return has.get("avx512_bf16", False) or has.get("amx_bf16", False)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for the matrices between the layers.

    Keller Jordan's optimizer, its step scaled to AdamW's (arXiv 2502.16982, section
    2.2). In the same time on a CPU it reaches a loss that AdamW takes several times as
    long for. torch.optim.Muon takes one matrix at a time, which a CPU pays dearly for;
    here matrices of one shape share batched products.
    """

    MOMENTUM = 0.95
    # Newton-Schulz steps to the nearest orthogonal matrix: a x + b xx'x + c (xx')²x.
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    STEPS = 5

    def __init__(self, parameters: list[torch.nn.Parameter]):
        super().__init__(parameters, {"lr": 0.0})
        fast = has_fast_bfloat16(parameters[0].device)
        self._dtype = torch.bfloat16 if fast else torch.float32

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
        x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(self._dtype)
        for _ in range(self.STEPS):
            square = x @ x.mT
            x = torch.baddbmm(
                x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a
            )
        return x.mT if tall else x


def optimizers(
    model: T5ForConditionalGeneration, args: Namespace
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
    muon = Muon(matrices)
    muon.param_groups[0]["peak"] = args.matrix_rate
    adam = torch.optim.AdamW(
        [
            # T5 starts its embedding at that much larger values.
            {"params": [embedding], "peak": 10 * args.learning_rate},
            {"params": others, "peak": args.learning_rate},
        ],
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    return [muon, adam]


class Trainer:
    """One run: models, optimizers, and where in time and data it stands."""

    def __init__(
        self,
        models: list[T5ForConditionalGeneration],
        sums: Callable[[Batch], tuple[torch.Tensor, ...]],
        examples: Examples,
        args: Namespace,
        device: torch.device,
    ):
        """
        Args:
            models: what is trained, without dropout.
            sums: of a batch, as :func:`measure` gives them; the first is the loss.
        """
        self.models = torch.nn.ModuleList(models).to(device).eval()
        self.sums = sums
        self.examples = examples
        self.args = args
        self.device = device
        self.elapsed = 0.0  # seconds of training, over all runs
        self.epoch = 0
        self.batch = 0  # within the epoch
        self.held_out, self.among = corpus.split(examples, args.seed)
        self.optimizers = [each for model in models for each in optimizers(model, args)]
        self.folder = args.output / "training"
        self.folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> bool:
        """Go on where ``training/state.pt`` was left; false if there is none."""
        path = self.folder / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.models.load_state_dict(state["models"])
        for optimizer, its in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its)
        self.elapsed, self.epoch, self.batch = state["at"]
        return True

    def save(self) -> None:
        state = {
            "models": self.models.state_dict(),
            "optimizers": [each.state_dict() for each in self.optimizers],
            "at": (self.elapsed, self.epoch, self.batch),
        }
        # Renamed into place: a run killed while saving keeps the state before.
        torch.save(state, self.folder / "state.new")
        (self.folder / "state.new").replace(self.folder / "state.pt")

    def collate(self, chosen: np.ndarray) -> Batch:
        start = self.models[0].config.decoder_start_token_id
        return corpus.collate(self.examples, chosen, start, self.device)

    def batches(self) -> Iterator[Batch]:
        """Endless, from where the run stands."""
        while True:
            order = corpus.epoch_order(
                self.examples, self.among, self.args.batch, self.args.seed + self.epoch
            )
            for chosen in order[self.batch :]:
                self.batch += 1
                yield self.collate(chosen)
            self.epoch += 1
            self.batch = 0

    def autocast(self) -> torch.autocast:
        on = has_fast_bfloat16(self.device)
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
            loss, tokens, *_ = self.sums(batch)
        (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(self.models.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item(), int(tokens)

    @torch.inference_mode()
    def evaluate(self) -> tuple[float, float, float]:
        """Loss, hits and overlap (see :func:`measure`) per held-out token."""
        totals = torch.zeros(4)
        order = corpus.epoch_order(self.examples, self.held_out, self.args.batch, 0)
        for chosen in order:
            with self.autocast():
                totals += torch.stack(self.sums(self.collate(chosen))).cpu()
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
        say(
            f"{self.elapsed / 60:.1f} min, held out: loss {loss:.3f}, "
            f"{self.args.hits} {hits:.3f}, overlap {overlap:.3f}\n"
        )

    def log(self, **values: float) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            record = {"seconds": round(self.elapsed, 1), "epoch": self.epoch, **values}
            file.write(json.dumps(record) + "\n")


def new_model(
    args: Namespace, vocabulary: int, special: dict[str, Any]
) -> T5ForConditionalGeneration:
    """A T5 with random weights and the shape that the arguments give.

    Args:
        vocabulary: rows of the embedding.
        special: as :func:`special_ids` gives them.
    """
    config = T5Config(
        vocab_size=vocabulary,
        d_model=args.width,
        d_kv=64,
        num_heads=max(args.width // 64, 1),
        d_ff=args.feed_forward,
        num_layers=args.encoder_layers,
        num_decoder_layers=args.decoder_layers,
        feed_forward_proj="gated-gelu" if args.v1_1 else "relu",
        tie_word_embeddings=not args.v1_1,
        dropout_rate=0.0,
        **special,
    )
    model = T5ForConditionalGeneration(config)
    if args.v1_1:
        # transformers 5 ties the head whatever the config says.
        head = torch.randn(vocabulary, args.width) * args.width**-0.5
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
    if model.lm_head.weight is not model.shared.weight:  # transformers 5 ties them all
        larger.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        larger.config.tie_word_embeddings = False
    larger.load_state_dict(weights)
    larger.generation_config = model.generation_config
    return larger


def keep_memory() -> None:
    """Have glibc keep freed memory: giving it back costs a third of the time on CPU."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


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


def same_tokenizer(*folders: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that checkpoints have in common.

    Raises:
        InputError: a folder has none, or another than the first.
    """
    tokenizers = []
    for folder in folders:
        # Without a file of it transformers makes one up.
        if not any([*folder.glob("tokenizer*"), *folder.glob("*piece*.model")]):
            raise InputError(f"{folder} holds no tokenizer")
        try:
            tokenizers.append(
                AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            )
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} holds no usable tokenizer: {error}") from None
        if tokenizers[-1].get_vocab() != tokenizers[0].get_vocab():
            raise InputError(f"{folder} and {folders[0]} have different tokenizers")
    return tokenizers[0]


def check_t5(folder: Path) -> None:
    """
    Raises:
        InputError: the folder holds no checkpoint of a T5.
    """
    weight_files(folder)
    kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    if kind != "t5":
        raise InputError(f"{folder} holds a model of type {kind}, not t5")


def load_t5(folder: Path) -> T5ForConditionalGeneration:
    check_t5(folder)
    # In float32 as on our CPUs: rounded logits would tie, and float16 overflow.
    return T5ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )


def describe(args: Namespace) -> dict[str, Any]:
    """What a run has to have in common with the one that it goes on with."""
    free = {"output", "minutes", "save_minutes", "device", "hits"}
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
        if not other:
            return True
        if any((record.parent / name).exists() for name in ("labels.npz", "state.pt")):
            flags = ", ".join(other).replace("_", "-").replace("origin", "from")
            raise InputError(
                f"{args.output} holds another run, with a different {flags}: give "
                f"another --output"
            )
    elif args.output.exists() and (
        not args.output.is_dir() or any(args.output.iterdir())
    ):
        raise InputError(f"{args.output} exists and is no run of this: it stays")
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(description) + "\n", "utf-8")
    return False


def labels(
    folder: Path,
    sources: list[str],
    tokenizer: PreTrainedTokenizerBase,
    args: Namespace,
    device: torch.device,
) -> Examples:
    """The answers of the T5 in a folder, or ``training/labels.npz`` if it is there."""
    path = args.output / "training" / "labels.npz"
    if path.exists():
        return Examples(**np.load(path))
    teacher = load_t5(folder).to(device).eval()
    examples = corpus.from_teacher(sources, teacher, tokenizer, device, args.max_tokens)
    np.savez(path.with_suffix(".new.npz"), **vars(examples))
    path.with_suffix(".new.npz").replace(path)
    return examples


def go_on(trainer: Trainer) -> None:
    """The run, from where an earlier start left it, to its end."""
    examples, args = trainer.examples, trainer.args
    if not len(trainer.among):
        raise InputError(f"{len(examples)} examples are too few: all are held out")
    parameters = sum(each.numel() for each in trainer.models.parameters())
    say(
        f"{parameters / 1e6:.2f} M parameters, {len(examples):,} examples, "
        f"{len(examples.targets):,} target tokens, on {trainer.device}\n"
    )
    if trainer.resume():
        say(f"resumed at {trainer.elapsed / 60:.1f} of {args.minutes:g} minutes\n")
    trainer.run()


def new_parser(prog: str, description: str) -> Parser:
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


def checked(args: Namespace) -> Namespace:
    """The arguments, none of whose numbers is one that makes no sense."""
    for name, value in vars(args).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            flag = name.replace("_", "-")
            if name in ("seed", "pull"):
                if not value >= 0:
                    raise InputError(f"--{flag} is {value}: it has to be at least 0")
            elif not value >= 1e-9:
                raise InputError(f"--{flag} is {value}: it has to be above 0")
    return args


def arguments() -> Namespace:
    parser = new_parser("train.py", __doc__)
    add = parser.add_argument
    add("--teacher", type=Path, help="distil from this T5 (a folder)")
    add("--from", dest="origin", type=Path, help="begin with this T5 (a folder)")
    add("--vocabulary", type=int, help="without --teacher and --from (default 4096)")
    add("--width", type=int, help="d_model, 64 a head (default 192)")
    add("--feed-forward", type=int, help="d_ff (default 4 x width)")
    add("--encoder-layers", type=int, help="default 2; with --from as many as it has")
    add("--decoder-layers", type=int, help="default 10; with --from as many as it has")
    add("--v1-1", action="store_true", help="T5 1.1: gated, untied")
    args = parser.parse_args()
    args.hits = "alpha" if args.teacher else "accuracy"
    given = {
        "--teacher": ("vocabulary",) if args.teacher else (),
        "--from": ("vocabulary", "width", "feed_forward", "v1_1")
        if args.origin
        else (),
    }
    for flag, names in given.items():
        for name in names:
            if getattr(args, name):
                fixed = name.replace("_", "-")
                raise InputError(f"--{fixed} is what {flag} has: leave it out")
    if not args.origin:
        args.width = 192 if args.width is None else args.width
        defaults = {
            "vocabulary": None if args.teacher else 4096,
            "feed_forward": 4 * args.width,
            "encoder_layers": 2,
            "decoder_layers": 10,
        }
        for name, value in defaults.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    return checked(args)


def teachers_ids(
    folder: Path, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, dict[str, Any]]:
    """Rows of embedding and the special ids that a draft of this teacher needs."""
    config = T5Config.from_pretrained(folder, trust_remote_code=False)
    generation = None
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
    rows = 1 + corpus.used_ids(tokenizer, config.vocab_size)[-1]
    return rows, corpus.special_ids(config, generation)


def main() -> None:
    args = arguments()
    device = prepare(args)
    rows = corpus.read_columns(args.text, 1 if args.teacher else 2, corpus.HELD_OUT)
    # Whatever may be wrong with the models is found before anything is written.
    model = tokenizer = None
    if args.teacher:
        check_t5(args.teacher)
        tokenizer = same_tokenizer(args.teacher, args.origin or args.teacher)
    if args.origin:
        model = grown(load_t5(args.origin), args.encoder_layers, args.decoder_layers)
        tokenizer = tokenizer or same_tokenizer(args.origin)
    if begin(args) and (args.output / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(args.output, trust_remote_code=False)
    if tokenizer is None:
        tokenizer = corpus.learn_tokenizer(rows, args.vocabulary, args.output)
    tokenizer.save_pretrained(args.output)
    if args.teacher:
        sources = [row[0] for row in rows]
        examples = labels(args.teacher, sources, tokenizer, args, device)
    else:
        examples = corpus.from_text(rows, tokenizer)
    if model is None and args.teacher:
        model = new_model(args, *teachers_ids(args.teacher, tokenizer))
    elif model is None:
        special = corpus.special_ids(T5Config(decoder_start_token_id=0), None)
        model = new_model(args, len(tokenizer), special)
    go_on(Trainer([model], partial(measure, model), examples, args, device))
    model.save_pretrained(args.output)


if __name__ == "__main__":
    sys.exit(run(main, "train.py"))
