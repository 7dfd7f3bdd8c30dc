"""Train a target and its draft on together, so that they agree more often.

    python training/together.py pairs.tsv --target runs/target --draft runs/draft \\
        --output runs/pair --decoder-layers 20 --minutes 72

Distillation alone moves the draft. Here the target learns the text's translations, and
to go on writing what it writes by itself; and at every token of both, either model
learns the other's distribution (deep mutual learning: Zhang et al., arXiv 1706.00384).
Where several words would do, they come to prefer the same one. That makes sense for a
target that is still to be trained; one that has to stay as it is wants ``train.py
--teacher``.

``--sources`` adds prompts without an answer. The target can be given more layers first,
as by ``train.py --from``. Both end as Hugging Face folders, ``target`` and ``draft`` in
the output; a killed run goes on when the same command is started again.

The agreement that is printed is that of the most probable tokens, on text and on what
the target wrote when the run began, of sources that this run holds out: the models may
have seen them before.
"""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from transformers import T5ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system.errors import run
from training import corpus, train
from training.corpus import Batch


def mutual(
    target: T5ForConditionalGeneration,
    draft: T5ForConditionalGeneration,
    pull: float,
    batch: Batch,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over a batch: the loss (nats), tokens, agreement of argmaxes, Σ min(p, q).

    The loss is -log p of the text, ``pull`` times KL(q, p), by which the target learns,
    and KL(p, q), by which the draft does.
    """
    real = batch.targets >= 0
    # A draft's embedding can have fewer rows, or more: none of these is a token.
    rows = min(target.config.vocab_size, draft.config.vocab_size)
    log_p, log_q = (
        model(
            input_ids=batch.sources,
            attention_mask=batch.mask,
            decoder_input_ids=batch.inputs,
            use_cache=False,
        )
        .logits[real][:, :rows]
        .float()
        .log_softmax(-1)
        for model in (target, draft)
    )
    p, q = log_p.detach().exp(), log_q.detach().exp()
    loss = -log_p.gather(-1, batch.targets[real][:, None]).sum()
    loss = loss + pull * (q * (log_q.detach() - log_p)).sum()
    loss = loss + (p * (log_p.detach() - log_q)).sum()
    agreed = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
    return loss, real.sum(), agreed, torch.minimum(p, q).sum()


def arguments() -> Namespace:
    parser = train.new_parser("together.py", __doc__)
    add = parser.add_argument
    add("--target", type=Path, required=True, help="a folder")
    add("--draft", type=Path, required=True, help="a folder")
    add("--sources", type=Path, help="more prompts, one a line")
    add("--decoder-layers", type=int, help="that the target is to have, if more")
    add("--pull", type=float, default=0.75, help="weight of what the draft teaches")
    parser.set_defaults(
        learning_rate=1e-3, matrix_rate=2.5e-3, max_tokens=24, hits="agreement"
    )
    return train.checked(parser.parse_args())


def main() -> None:
    args = arguments()
    device = train.prepare(args)
    rows = corpus.read_columns(args.text, 2, corpus.HELD_OUT)
    more = corpus.read_columns(args.sources, 1, 0) if args.sources else []
    target = train.grown(train.load_t5(args.target), None, args.decoder_layers)
    draft = train.load_t5(args.draft)
    tokenizer = train.same_tokenizer(args.target, args.draft)
    train.begin(args)
    sources = [row[0] for row in [*rows, *more]]
    own = train.labels(args.target, sources, tokenizer, args, device)
    examples = corpus.joined([corpus.from_text(rows, tokenizer), own])
    sums = partial(mutual, target, draft, args.pull)
    train.go_on(train.Trainer([target, draft], sums, examples, args, device))
    for name, model in (("target", target), ("draft", draft)):
        model.save_pretrained(args.output / name)
        tokenizer.save_pretrained(args.output / name)


if __name__ == "__main__":
    sys.exit(run(main, "together.py"))
