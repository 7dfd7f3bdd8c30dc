"""A drafter without a model or a rule, for tests: it does as it is told."""

import mlx.core as mx

from speculation.acceptance import Draft


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

    def propose(self, sequences, num_draft, sampler):
        rows = [self.guess(sequence, num_draft) for sequence in sequences]
        counts = self.ragged and [self.ragged(s) % (num_draft + 1) for s in sequences]
        return Draft(mx.array(rows, mx.int32), counts=counts)
