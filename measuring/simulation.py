"""A pair that exists only as shapes, to study hardware without trained weights.

The weights are random. Every step of the draft is really computed, but which token it
proposes is decided here: with a given probability the one that the target will write,
else another. So a round costs what it would cost, and accepts what it is told to.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from architectures import t5
from architectures.loading import USUAL, Loading
from checkpoints.config import T5Config
from checkpoints.converted import CONFIG
from decoder import generate
from pair import policy_for
from speculation.acceptance import Draft
from speculation.drafting import ModelDrafter
from speculation.requests import Stats
from speculation.samplers import RoundSampler
from system.errors import InputError
from system.files import read_json

PROMPT_TOKENS = 32

#: d_model, d_kv, d_ff, heads, layers of encoder and decoder: T5's published sizes, of
#: Raffel et al., arXiv 1910.10683, and of T5 1.1, with a gated feed-forward.
SIZES = {
    "t5-small": (512, 64, 2048, 8, 6),
    "t5-base": (768, 64, 3072, 12, 12),
    "t5-large": (1024, 64, 4096, 16, 24),
    "t5-3b": (1024, 128, 16384, 32, 24),
    "t5-11b": (1024, 128, 65536, 128, 24),
    "t5-v1_1-small": (512, 64, 1024, 6, 8),
    "t5-v1_1-base": (768, 64, 2048, 12, 12),
    "t5-v1_1-large": (1024, 64, 2816, 16, 24),
    "t5-v1_1-xl": (2048, 64, 5120, 32, 24),
    "t5-v1_1-xxl": (4096, 64, 10240, 64, 24),
}


def named_config(name: str) -> T5Config:
    """The config of a published size, or of a config.json or a folder that has one.

    Raises:
        InputError: it is none of these.
    """
    if name in SIZES:
        d_model, d_kv, d_ff, heads, layers = SIZES[name]
        config = {
            "model_type": "t5",
            "vocab_size": 32128,
            "d_model": d_model,
            "d_kv": d_kv,
            "d_ff": d_ff,
            "num_heads": heads,
            "num_layers": layers,
            "relative_attention_num_buckets": 32,
            "feed_forward_proj": "gated-gelu" if "v1_1" in name else "relu",
            "tie_word_embeddings": "v1_1" not in name,
            "decoder_start_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 0,
        }
        return T5Config.from_dict(config, {})
    path = Path(name)
    if path.is_dir():
        path = path / CONFIG
    if not path.is_file():
        raise InputError(
            f"{name} is neither a config.json nor one of {', '.join(SIZES)}"
        )
    return T5Config.from_dict(read_json(path), {})


class SimulatedPair:
    """A target and a draft in given shapes, with random weights.

    Attributes:
        target: as of a real pair.
        drafter: proposes what it is told to, at a real draft's cost.
        untold: the draft behind it, which proposes what occurs to it.
        policy: decides how much is drafted where nobody says it, and goes on from
            prompt to prompt.
    """

    def __init__(
        self,
        target: str,
        draft: str,
        alpha: float,
        max_tokens: int,
        how: Loading = USUAL,
    ):
        """
        Args:
            target, draft: of :func:`named_config`.
            alpha: the probability with which a draft token is right.
            max_tokens: tokens of every answer.
            how: the models are made.

        Raises:
            InputError: no such config, or the weights do not fit the memory.
        """
        configs = named_config(target), named_config(draft)
        vocabulary = min(config.vocab_size for config in configs)
        models = [
            t5.random(config, name, how)
            for config, name in zip(configs, (target, draft), strict=True)
        ]
        drafting = t5.session(models[1], vocabulary, compiled=how.compiles)
        self.target = t5.session(models[0], vocabulary, compiled=how.compiles)
        self.untold = ModelDrafter(drafting)
        self.drafter = SimulatedDrafter(self.untold, vocabulary, alpha)
        self.policy = policy_for(self.target, drafting)
        self._max_tokens = max_tokens
        self._texts: dict[int, list[int]] = {}

    def prompt(self, number: int) -> list[int]:
        """The ids of a prompt."""
        rng = np.random.default_rng(number)
        return rng.integers(0, self.target.vocabulary, PROMPT_TOKENS).tolist()

    def prepare(self, number: int) -> None:
        """Find out what the target writes for a prompt; the draft has to know."""
        self._texts[number] = self._decode(number, 0)[0]

    def generate(self, number: int, num_draft: int | None) -> tuple[list[int], Stats]:
        """Decode a prompt, with as many draft tokens as pay for None: the tokens and
        the figures."""
        self.drafter.expect(self._texts[number], seed=number)
        return self._decode(number, num_draft)

    def _decode(self, number: int, num_draft: int | None) -> tuple[list[int], Stats]:
        tokens: list[int] = []
        for commit in generate(
            self.target,
            self.drafter,
            [self.prompt(number)],
            eos_tokens=frozenset(),  # so that all answers are equally long
            max_tokens=self._max_tokens,
            num_draft=self.policy if num_draft is None else num_draft,
        ):
            tokens += commit.tokens
        return tokens, commit.stats


class SimulatedDrafter:
    """A draft whose tokens are right with a given probability."""

    positions = None

    def __init__(self, drafter: ModelDrafter, vocabulary: int, alpha: float):
        self._drafter = drafter
        self._vocabulary = vocabulary
        self._alpha = alpha
        self._text: list[int] = []

    def expect(self, text: list[int], seed: int) -> None:
        """From now on, draft for a target that writes this."""
        self._text = text
        self._random = np.random.default_rng(seed)

    def start(self, prompts: list[list[int]]) -> None:
        """As :class:`Drafter` has it."""
        self._drafter.start(prompts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafter, name)

    def propose(
        self, sequences: list[list[int]], num_draft: int, sampler: RoundSampler
    ) -> Draft:
        """As :class:`Drafter` has it."""
        (sequence,) = sequences
        place = len(sequence) - 1  # the start token is not of the text
        right = self._text[place : place + num_draft]
        right += [0] * (num_draft - len(right))
        wrong = self._random.random(num_draft) >= self._alpha
        tokens = (np.array(right) + wrong) % self._vocabulary
        told = _Told(sampler, mx.array(tokens.astype(np.int32)))
        return self._drafter.propose(sequences, num_draft, told)


class _Told:
    """Chooses the tokens that it is told to, when the draft's own are computed."""

    def __init__(self, sampler: RoundSampler, tokens: mx.array):
        self.ends = sampler.ends
        self._sampler = sampler
        self._tokens = tokens

    def draft(
        self, logits: mx.array, drafted: list[mx.array]
    ) -> tuple[mx.array, mx.array | None]:
        own, probs = self._sampler.draft(logits, drafted)
        # MLX computes what a result depends on, whatever it is multiplied with.
        return self._tokens[len(drafted)][None] + 0 * own, probs
