"""What tests of --input have in common: models, and sentences in tiny words."""

import random

WORDS = ["the", "cat", "sat", "on", "a", "b", "c", "e", "t", "s"]
FLAGS = ("--max-tokens", 8)


def models(pair) -> tuple:
    return "--model", pair[0], "--draft-model", pair[1]


def sentences(count, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(count)]
