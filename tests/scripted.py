"""A drafter and a policy without a model or a rule, for tests."""

import random
from itertools import cycle

import mlx.core as mx

from speculation.acceptance import Draft
from speculation.policy import Fixed, Plan


class Scripted:
    """A drafter that answers with a function of the committed tokens."""

    positions = None

    def __init__(self, guess, ragged=None):
        self.guess = guess
        self.ragged = ragged

    def start(self, prompts):
        pass

    def prepare(self, prompts):
        yield from ()

    def put(self, rows, prepared):
        pass

    def take(self, rows, blank=0):
        pass

    def batch_bytes(self, rows, prompt, answer):
        return 0

    def follow(self, sequences):
        pass

    def propose(self, sequences, num_draft, sampler):
        rows = [self.guess(sequence, num_draft) for sequence in sequences]
        counts = self.ragged and [self.ragged(s) % (num_draft + 1) for s in sequences]
        return Draft(mx.array(rows, mx.int32), counts=counts)


class Whims:
    """A policy that drafts what occurs to it: any number, from the model or found."""

    def __init__(self, seed, most=8):
        self.most = most
        self.random = random.Random(seed)

    @property
    def drafting(self):
        return self.random.random() < 0.5

    def choose(self, batch, rows):
        likes = [row.found > 0 and self.random.random() < 0.7 for row in rows]
        both = list(zip(rows, likes, strict=True))
        most = max(row.most for row in rows)
        found = max(
            (min(row.found, row.most) for row, has in both if has),
            default=0,
        )
        asked = any(row.model and row.most and not has for row, has in both)
        steps = self.random.randint(0, most) if asked and most else 0
        size = steps or self.random.randint(0, found)
        return Plan(steps, size, tuple(likes) if size else (False,) * len(rows))

    def stays_plain(self, batch, rows):
        return self.random.random() < 0.5

    def observe(self, batch, plan, fates, seconds, entering=0.0, entered=0):
        for fate in fates:
            assert 0 <= fate.taken <= fate.drafted <= self.most
            assert fate.tokens >= fate.taken


class Cycle(Fixed):
    """A policy that drafts another number of tokens each round, come what may."""

    def __init__(self, *sizes):
        super().__init__(max(sizes))
        self.sizes = cycle(sizes)

    def choose(self, batch, rows):
        size = next(self.sizes)
        rows = [row._replace(most=min(row.most, size)) for row in rows]
        plan = super().choose(batch, rows)
        return plan if plan.size else Plan(0, 0, (False,) * len(rows))
