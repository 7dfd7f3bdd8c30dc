"""What is asked of a target, whole or divided; as a program, in every rank of it.

A process takes seconds to begin, so one has many models, one after the other: each
rank but the first leaves the loop that it follows rank 0 in when it is told so, which
the program itself never does.
"""

import system.fast_blas  # noqa: F401  (before mlx: see there)

import json
import sys
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
from scripted import Cycle, Scripted

from architectures import parallel
from decoder import Engine, generate
from pair import Pair
from speculation.beams import Beams
from speculation.requests import Request
from speculation.sampling import Sampling
from system.errors import InputError
from system.ranks import Ranks, meet

PROMPTS = [
    "the cat sat on the cat",
    "a",
    "the the on sat w3 w4 w5 w6 w7 w8 w9 w10 w11",
    "w20 w21 é 漢",
    "sat on a b c e t",
    "the cat sat on the cat",
    "on on on",
]
#: Tokens of texts that have no end of their own in view.
LONG = 14
SOURCES = [
    [5, 9, 1],
    [4, 30, 31, 32, 33, 34, 35, 36, 6, 7, 8, 90, 91, 92, 93, 94, 1],
    [60, 61, 62, 63, 64, 65, 66, 67, 1],
]
#: Tokens of passes that come after one another, how many of those stay, and one more.
BLOCKS, KEPT, LAST = (1, 4, 1, 7, 30), (9, 0, 43), 3


def blocks():
    """What is fed to each of three rows, pass by pass; the first token begins."""
    generator = np.random.default_rng(3)
    found = [generator.integers(3, 90, (3, size)) for size in (*BLOCKS, LAST)]
    found[0][:] = 0
    return [block.tolist() for block in found]


def logits(pair):
    """Of several passes, after the last of which some tokens do not stay."""
    session = pair.target
    session.start(SOURCES)
    *passes, last = blocks()
    found = [session.extend(mx.array(block)) for block in passes]
    session.rewind(list(KEPT))
    found.append(session.extend(mx.array(last)))
    return [np.array(each.astype(mx.float32)).tolist() for each in found]


def texts(pair):
    """Of every way to decode: by its name, the tokens of each."""
    hostile = np.random.default_rng(5)

    def guess(sequence, count):
        return hostile.integers(0, 90, count).tolist()

    def one(prompt, **options):
        options = {"max_tokens": LONG, "num_draft": 3} | options
        return pair.generate(prompt, **options).finish().tokens

    def batch(**options):
        options = {"max_tokens": 9, "num_draft": 3, "batch_size": 3} | options
        return [answer.tokens for answer in pair.answers(PROMPTS, **options)]

    def scripted(policy):
        ids = [pair.tokenizer.encode(prompt) for prompt in PROMPTS[:3]]
        found = [[] for _ in ids]
        drafter = Scripted(guess)
        options = {"eos_tokens": pair.eos_tokens, "max_tokens": LONG}
        for each in generate(pair.target, drafter, ids, num_draft=policy, **options):
            found[each.id] += each.tokens
        return found

    shared = Sampling(temperature=1.0, seed=7, coupling="shared")
    residual = Sampling(temperature=0.9, top_k=20, seed=8, coupling="residual")
    rules = Sampling(
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        encoder_no_repeat_ngram_size=3,
        bad_words_ids=((4, 5), (9,)),
        min_new_tokens=6,
        suppress_tokens=(11,),
    )
    plain = [one(prompt, num_draft=0) for prompt in PROMPTS[:3]]
    found = {
        "plain": plain,
        "three drafted": [one(prompt) for prompt in PROMPTS[:3]],
        "auto": [one(prompt, num_draft=None) for prompt in PROMPTS[:3]],
        "hostile": scripted(4),
        "other numbers": scripted(Cycle(0, 3, 1, 7)),
        "shared": [one(prompt, sampling=shared) for prompt in PROMPTS[:2]],
        "residual": [one(prompt, sampling=residual) for prompt in PROMPTS[:2]],
        "rules": [one(prompt, sampling=rules) for prompt in PROMPTS[:2]],
        "batch": batch(),
        "sampled batch": batch(sampling=shared),
        "batch with rules": batch(sampling=rules),
        "two samples": [
            each.finish().tokens
            for each in pair.samples(PROMPTS[0], 2, max_tokens=9, sampling=shared)
        ],
    }
    for beams in (2, 4):
        for drafted in (0, 3):
            options = {"max_tokens": 8, "num_draft": drafted, "beams": Beams(beams)}
            found[f"{beams} beams, {drafted} drafted"] = [
                each.finish().tokens
                for each in pair.samples(PROMPTS[0], beams, **options)
            ]
    found["batch of beams"] = batch(beams=Beams(3), max_tokens=6)
    return found


def few_texts(pair):
    """Some of them."""
    options = {"max_tokens": LONG}
    return {
        str(drafted): [
            pair.generate(prompt, num_draft=drafted, **options).finish().tokens
            for prompt in (PROMPTS[0], PROMPTS[2])
        ]
        for drafted in (0, 3)
    }


def errors(pair):
    """Prompts that cannot be begun with are refused, and the next one is answered."""
    found = []
    for prompts in ([[]], [[5, 1], [3, 10**6]]):
        try:
            pair.target.start(prompts)
        except InputError as error:
            found.append(str(error))
    found.append(pair.generate("a", max_tokens=3).finish().tokens)
    return found


def counts(pair):
    """How many sums there are of an encoding and of passes of several kinds, and how
    many messages in a round of plain decoding, of speculation and of beams."""
    model = pair.target.model
    summed, told = [], []
    all_sum, tell = mx.distributed.all_sum, Ranks.tell
    mx.distributed.all_sum = lambda x, **more: summed.append(x) or all_sum(x, **more)
    Ranks.tell = lambda self, message: told.append(message) or tell(self, message)

    def sums(do, *arguments):
        summed.clear()
        mx.eval(do(*arguments))
        return len(summed)

    def rounds(drafted, drafter, **options):
        engine = Engine(pair.target, drafter, num_draft=drafted, rows=2)
        for prompt in PROMPTS[:2]:
            ids = pair.tokenizer.encode(prompt)
            engine.admit(Request(ids, frozenset(), 12, **options))
        seen = []
        while engine.busy:
            told.clear()
            engine.step()
            seen.append([engine.decoded, len(told)])
        return seen[1:]  # the first has them encoded

    slots = np.zeros((1, 2), np.int32) + np.arange(2)
    back = mx.array([[[0, -1], [1, 0]]])
    try:
        return {
            "encoder layers": len(model.encoder.layers),
            "decoder layers": len(model.decoder.layers),
            "encoding": sums(lambda: pair.target.start([SOURCES[0]]) and []),
            "one token": sums(pair.target.extend, mx.array([[0]])),
            "five": sums(pair.target.extend, mx.array([[5, 6, 7, 8, 9]])),
            "tree": sums(pair.target.extend_tree, mx.array([[5, 6]]), slots, back),
            "plain": rounds(0, None),
            "drafted": rounds(3, pair.drafter),
            "beams": rounds(0, None, beams=Beams(2)),
        }
    finally:
        mx.distributed.all_sum, Ranks.tell = all_sum, tell


class _Told(Exception):
    """This model is done with."""


def _stop(follower):
    raise _Told


def ask(job):
    """Load a pair, whole or in parts, and ask of it what the job names."""
    if job.get("packed"):  # on a CPU quantized weights are unpacked
        mx.default_device = lambda: mx.gpu
    if meet():
        meet().together = False  # as if they held none yet
    pair = Pair.load(job["model"], job.get("draft"), **job.get("how", {}))
    found = {name: globals()[name](pair) for name in job["wanted"]}
    if meet():
        pair.target.forget()
        meet().tell([["stop"]])
    return found


def main():
    parallel._Follower.stop = _stop
    found, device = [], mx.default_device
    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            found.append(ask(job))
        except _Told:
            pass
        finally:
            mx.default_device = device
    if meet() and meet().rank:
        threading.Event().wait()  # until rank 0 ends, and this one with it
    print(json.dumps(found))


if __name__ == "__main__":
    main()
