"""The bundled pair, as `make run` uses it."""

import random
from pathlib import Path

import pytest

import main
from console import choosing, prompts
from measuring import figures
from measuring.arguments import PROMPTS
from measuring.prompts import read_prompts
from pair import Pair

EXAMPLES = Path(main.__file__).parent / "demo" / "examples.txt"


@pytest.fixture(scope="module")
def bundled():
    return Pair.load(*map(str, choosing.BUNDLED))


def test_speculation_changes_nothing(bundled):
    """On sentences that the pair never saw; the draft is right more often than not."""
    references = read_prompts(PROMPTS, None)
    prompts = random.Random(0).sample(sorted(references), 25)
    drafted = [bundled.generate(prompt, max_tokens=32).finish() for prompt in prompts]
    plain = [
        bundled.generate(prompt, max_tokens=32, num_draft=0).finish()
        for prompt in prompts
    ]
    assert [each.tokens for each in drafted] == [each.tokens for each in plain]
    accepted = sum(each.stats.accepted for each in drafted)
    assert accepted / sum(each.stats.tested for each in drafted) > 0.7
    bleu = figures.sacrebleu(
        [each.text for each in plain], [references[prompt] for prompt in prompts]
    )
    assert bleu > 20


def test_examples_are_translated(bundled):
    """What a newcomer sees first ends, and is German."""
    sentences = [prompts.EXAMPLE, *EXAMPLES.read_text().splitlines()]
    for prompt in sentences:
        answer = bundled.generate(prompt).finish()
        assert answer.finish_reason == "eos"
        assert 3 <= len(answer.text.split()) <= 12
