"""Train a target and its draft on together, so that they agree more often.

    python demo/together.py pairs.tsv --target runs/target --draft runs/draft \\
        --output runs/pair --decoder-layers 20 --minutes 72

Distillation alone moves the draft. Here the target learns the text's translations, and
each of the two learns the other's distribution at every token (deep mutual learning:
Zhang et al., arXiv 1706.00384), on the text and on what the target writes itself. Where
several words would do, they come to prefer the same one. That makes sense for a target
of your own that is still to be trained; one that has to stay as it is wants ``train.py
--teacher``.

``--sources`` adds prompts without an answer. The target can be given more layers first,
as by ``train.py --from``. Both end as Hugging Face folders, ``target`` and ``draft`` in
the output; a killed run goes on when the same command is started again.
"""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import train
from demo.train import Batch, Examples, T5Config, Trainer
from errors import run


class Together(Trainer):
    """A target and a draft that learn from each other.

    Held-out sources are those of this run: the models may have seen them in one before.
    """

    def optimizers_of(self, model: torch.nn.ModuleDict) -> list[torch.optim.Optimizer]:
        both = map(super().optimizers_of, model.values())
        return [optimizer for each in both for optimizer in each]

    @property
    def config(self) -> T5Config:
        return self.model["target"].config

    def measure(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Sums over a batch: the loss, tokens, where both agree, Σ min(p, q)."""
        real = batch.targets >= 0
        target, draft = (
            model(
                input_ids=batch.sources,
                attention_mask=batch.mask,
                decoder_input_ids=batch.inputs,
                use_cache=False,
            )
            .logits[real]
            .float()
            .log_softmax(-1)
            for model in self.model.values()
        )
        p, q = target.detach().exp(), draft.detach().exp()
        loss = -target.gather(-1, batch.targets[real][:, None]).sum()
        loss += self.args.pull * (q * (draft.detach() - target)).sum()
        loss += (p * (target.detach() - draft)).sum()
        with torch.no_grad():
            agreed = (target.argmax(-1) == draft.argmax(-1)).sum()
            overlap = torch.minimum(p, q).sum()
        return loss, real.sum(), agreed, overlap


def joined(parts: list[Examples]) -> Examples:
    """All examples, of whose positions only the target's id is kept."""

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


def arguments() -> Namespace:
    parser = train.parser("together.py", __doc__)
    parser.add_argument("--target", dest="teacher", type=Path, required=True)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--sources", type=Path, help="more prompts, one a line")
    parser.add_argument("--decoder-layers", type=int, help="of the target, to grow to")
    parser.add_argument(
        "--pull", type=float, default=0.75, help="weight of the draft's pull on p"
    )
    parser.set_defaults(learning_rate=1e-3, matrix_rate=2.5e-3, max_tokens=24)
    return train.checked(parser.parse_args())


def main() -> None:
    args = arguments()
    device = train.prepare(args)
    rows = train.read_columns(args.text, 2)
    more = train.read_columns(args.sources, 1) if args.sources else []
    tokenizer = train.same_tokenizer(args.teacher, args.draft)
    train.begin(args)
    sources = [row[0] for row in [*rows, *more]]
    own = train.labels(args, sources, tokenizer, device)
    target = train.grown(train.load_t5(args.teacher), None, args.decoder_layers)
    pair = {"target": target, "draft": train.load_t5(args.draft)}
    text = train.from_text(rows, tokenizer)
    trainer = Together(torch.nn.ModuleDict(pair), joined([text, own]), args, device)
    train.complete(trainer)
    for name, model in pair.items():
        model.save_pretrained(args.output / name)
        tokenizer.save_pretrained(args.output / name)


if __name__ == "__main__":
    sys.exit(run(main, "together.py"))
