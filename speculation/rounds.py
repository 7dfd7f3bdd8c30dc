"""One round on its way through the device: a pass of the target, and its verdict."""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from speculation.acceptance import Draft
from speculation.policy import Plan
from speculation.rows import Outcome, Row
from speculation.samplers import RoundSampler
from speculation.session import Session
from system.errors import InputError


@dataclass
class Round:
    """A round on its way through the device."""

    next_token: mx.array  # (B,) int32
    report: mx.array  # (B, 3 + K) int32: accepted, finite, next token, draft
    counts: list[int] | None
    logits: mx.array  # the model's own, to say what is wrong with them
    rows: "list[Row | None]" = field(default_factory=list)  # whose it is
    plan: Plan | None = None
    found: list[bool] | None = None  # which rows' drafts were looked up

    def read(self) -> list["Outcome"]:
        """Wait for it: what became of each row's draft."""
        report = np.array(self.report).tolist()
        counts = self.counts or [None] * len(report)
        found = self.found or [False] * len(report)
        return [
            Outcome(accepted, finite, next_token, draft[:count], has)
            for (accepted, finite, next_token, *draft), count, has in zip(
                report, counts, found, strict=True
            )
        ]

    @property
    def positions(self) -> int:
        """K + 1."""
        return self.report.shape[1] - 2

    def fault(self, row: int) -> InputError:
        """Why there is no next token in that row."""
        return fault_of(self.logits[row])


def fault_of(logits: mx.array) -> InputError:
    """Why there is no next token, of a row's logits (T, V)."""
    if mx.isfinite(logits.max(axis=-1)).all().item():
        return InputError(
            "no token is left to choose: the rules together (suppressed tokens, "
            "no-repeat-ngram-size, min-new-tokens, ...) ban them all"
        )
    return InputError(
        "the model's logits are not finite: its activations overflow in this dtype "
        "or its weights are damaged; convert it again, with --dtype bfloat16 or "
        "float32"
    )


def launch(target: Session, sampler: RoundSampler, draft: Draft | None) -> Round:
    """Build a round's graph: run the target over last token and draft, and judge."""
    last = sampler.last
    draft = draft or Draft(mx.zeros((last.shape[0], 0), mx.int32))
    fed = last[:, None]
    if draft.tokens.shape[1]:
        # No device checks an embedding's bounds. An id cut here is rejected later.
        inside = mx.clip(draft.tokens, 0, target.vocabulary - 1)
        if draft.counts:
            # What is not judged is nothing that could do harm.
            real = mx.arange(inside.shape[1]) < mx.array(draft.counts)[:, None]
            inside = mx.where(real, inside, fed)
        fed = mx.concatenate([fed, inside], axis=1)
    logits = target.extend(fed)
    verdict = sampler.judge(logits, draft)
    verdict_columns = (verdict.accepted, verdict.finite, verdict.next_token)
    columns = [column[:, None].astype(mx.int32) for column in verdict_columns]
    report = mx.concatenate([*columns, draft.tokens], axis=1)
    return Round(verdict.next_token, report, draft.counts, logits)
