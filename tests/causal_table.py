"""What :mod:`verified` promises of each architecture, against transformers.

    python tests/causal_table.py [NAME ...]

prints a line of docs/architectures.md for each: tiny random models, one field of the
config after another with another value, saved by transformers 5 and as the hub's older
checkpoints are; the largest error of the logits, of one text and of a ragged batch.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MODELS,
)

from architectures import causal_model, rotary, verified
from architectures.causal_session import CausalSession
from architectures.verified import ROWS
from decoder import generate
from speculation.drafting import ModelDrafter
from speculation.lookup import Lookup
from speculation.requests import Stats

VOCABULARY = 96
POSITIONS = 300
LENGTH = 50
WINDOW = 12
HEAD = 8

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 4 * HEAD,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "head_dim": HEAD,
}
GPT2_SIZES = {
    "vocab_size": VOCABULARY,
    "n_embd": 4 * HEAD,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": POSITIONS,
}
ENDS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}

#: Another value than the default for each field that is honoured, but sizes.
OTHER = {
    "attention_bias": True,
    "attention_multiplier": 0.7,
    "attn_logit_softcapping": 2.0,
    "embedding_multiplier": 0.7,
    "final_logit_softcapping": 2.0,
    "layer_norm_eps": 0.3,
    "layer_norm_epsilon": 0.3,
    "logits_scaling": 0.7,
    "mlp_bias": True,
    "n_inner": 48,
    "no_rope_layer_interval": 2,
    "no_rope_layers": [0, 1, 0],
    "norm_epsilon": 0.3,
    "qk_layernorm": True,
    "query_pre_attn_scalar": 20,
    "residual_multiplier": 0.7,
    "rms_norm_eps": 0.3,
    "scale_attn_by_inverse_layer_idx": True,
    "scale_attn_weights": False,
    "use_qkv_bias": True,
}
SCALINGS = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"factor": 4.0},
}


def sizes(kind: str) -> dict:
    """The fields of a tiny model."""
    if kind == "gpt2":
        return GPT2_SIZES | ENDS
    values = SIZES | ENDS
    if kind == "gpt_neox":
        values |= {"intermediate_size": 4 * values["hidden_size"]}
    if "head_dim" not in ROWS[kind].fields:
        del values["head_dim"]
    return values


def build(kind: str, seed: int = 3, noise: float = 0.0, **fields):
    """A random model of transformers, whose texts vary."""
    config = CONFIG_MAPPING[kind](**sizes(kind) | fields)
    torch.manual_seed(seed)
    model = getattr(transformers, MODELS[kind])(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and not any(n in name for n in ("embed", "wte", "wpe")):
                weight.normal_(0, 2 * min(weight.shape) ** -0.5)
            elif weight.ndim == 2:  # tied ones would say what was said before
                weight.normal_(0, 0.1 if config.tie_word_embeddings else 1)
            else:
                weight += 0.1 * torch.randn_like(weight)
                if kind == "gemma2" and "post_" in name:  # what layers add counts
                    weight += 1.5
        for weight in model.parameters():
            weight += noise * weight.std().nan_to_num() * torch.randn_like(weight)
    return model


def save(model, folder: Path, older: bool = False) -> Path:
    """As transformers 5 does, or with the config that the hub's older models have."""
    model.save_pretrained(folder)
    if older:
        path = folder / "config.json"
        config = as_before(json.loads(path.read_text()))
        path.write_text(json.dumps(config))
    return folder


def as_before(config: dict) -> dict:
    """A config as transformers 4 wrote it: rotary settings beside their group, and no
    field that has its default."""
    row = ROWS[config["model_type"]]
    config["torch_dtype"] = config.pop("dtype", "float32")
    group = config.pop("rope_parameters", None)
    if group is not None:
        theta, part = (row.rotary or {}).get(
            "names", ("rope_theta", "partial_rotary_factor")
        )
        config[theta] = group.pop("rope_theta")
        if "partial_rotary_factor" in group:
            config[part] = group.pop("partial_rotary_factor")
        group["type"] = group.pop("rope_type")
        if group["type"] != "default":
            config["rope_scaling"] = group
    if config["model_type"] == "gpt2":
        config["n_ctx"] = config["n_positions"]
    return {
        name: value
        for name, value in config.items()
        if name not in row.fields or value != row.fields[name]
    }


def variants(kind: str) -> Iterator[dict]:
    """Fields to give other values, one after another."""
    row = ROWS[kind]
    yield {}
    for name, default in row.fields.items():
        if name in OTHER and OTHER[name] != default:
            yield {name: OTHER[name]}
        elif isinstance(default, bool) and name != "use_sliding_window":
            yield {name: not default}
    if "head_dim" in row.fields:
        yield {"head_dim": HEAD + 4}
    if "num_key_value_heads" in row.fields and kind != "gpt_neox":
        yield {"num_key_value_heads": 4}
        yield {"num_key_value_heads": 1}
    if "max_window_layers" in row.fields:
        yield {**window(kind), "max_window_layers": 0}
    if row.windows is not None:
        yield window(kind)
    if "layer_types" in row.fields:
        types = [verified.FULL, verified.SLIDING, verified.SLIDING]
        yield {**window(kind), "layer_types": types}
    field = row.activation[0]
    for name in ("gelu", "gelu_new", "relu", "silu", "quick_gelu", "relu2", "tanh"):
        yield {field: name}
    for name in SCALINGS if row.rotary is not None else ():
        if name in row.rotary.get("types", rotary.TYPES):
            yield scaling(kind, name)


def window(kind: str) -> dict:
    fields = {"sliding_window": WINDOW}
    if "use_sliding_window" in ROWS[kind].fields:
        fields |= {"use_sliding_window": True, "max_window_layers": 1}
    return fields


def scaling(kind: str, name: str) -> dict:
    """The rotary settings of one type, by transformers 5's names."""
    row = ROWS[kind]
    group = {"rope_theta": 5000.0, "rope_type": name, **SCALINGS[name]}
    part = 1.0
    if "partial" in row.rotary:
        part = group["partial_rotary_factor"] = 0.5
    fields = {"rope_parameters": group}
    if name == "longrope":
        half = int(HEAD * part) // 2
        group |= {"short_factor": [1 + 0.3 * i for i in range(half)]}
        group |= {"long_factor": [2.0] * half}
        where = fields if "original_max_position_embeddings" in row.fields else group
        where["original_max_position_embeddings"] = 100
    return fields


IDS = np.random.default_rng(0).integers(3, VOCABULARY, (3, LENGTH)).astype(np.int32)


def expected_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(IDS, dtype=torch.long)).logits.numpy()


def error(expected: np.ndarray, folder: Path) -> float:
    """The largest error of a loaded model's logits, relative to the largest logit: of
    one text in two pieces, and of a batch of which each row stands elsewhere."""
    loaded = causal_model.load(folder)
    session = CausalSession(loaded.model, VOCABULARY, positions=loaded.positions)
    session.start([IDS[0, :10].tolist()])
    worst = np.abs(np.array(session.extend(mx.array(IDS[:1, 9:]))) - expected[:1, 9:])
    errors = [worst.max()]
    for places in ([4, 11, 8], [36, 29, 33]):  # within a window, and far beyond
        session.start(
            [ids[: place + 1].tolist() for ids, place in zip(IDS, places, strict=True)]
        )
        spans = [slice(place, place + 8) for place in places]
        block = np.stack([ids[s] for ids, s in zip(IDS, spans, strict=True)])
        got = np.array(session.extend(mx.array(block)))
        errors += [
            np.abs(got[row] - expected[row, span]).max()
            for row, span in enumerate(spans)
        ]
    return float(max(errors) / np.abs(expected).max())


def generated(model, prompt: list[int], count: int) -> list[int]:
    """transformers' greedy text, without an end."""
    with torch.no_grad():
        text = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return text[0, len(prompt) :].tolist()


PROMPTS = [[10, 11, 12, 40], [*range(24, 42)], [31, 32], [7] * 9]
TOKENS = 24


def session(folder: Path) -> CausalSession:
    loaded = causal_model.load(folder)
    assert loaded.verified
    return CausalSession(loaded.model, VOCABULARY, positions=loaded.positions)


@dataclass
class Texts:
    """A pair, and what transformers writes with the target; windows are shorter."""

    target: CausalSession
    draft: CausalSession
    expected: list[list[int]]
    alpha: float = 0.0  # of the last ones that a model drafted

    @classmethod
    def make(cls, kind: str, folder: Path, older: bool = False) -> "Texts":
        fields = window(kind) if ROWS[kind].windows else {}
        models = [build(kind, noise=noise, **fields) for noise in (0, 0.02)]
        sessions = [
            session(save(model, folder / str(number), older))
            for number, model in enumerate(models)
        ]
        expected = [generated(models[0], prompt, TOKENS) for prompt in PROMPTS]
        return cls(*sessions, expected)

    def equal(self, rows: int) -> bool:
        """Whether so many prompts together have these texts: plain, drafted by the
        other model, by lookup."""
        good, lookup = ModelDrafter(self.draft), Lookup()
        same = []
        for drafter, num_draft in ((None, 0), (good, 1), (lookup, 4), (good, 4)):
            texts: list[list[int]] = [[] for _ in range(rows)]
            stats = {}
            for commit in generate(
                self.target,
                drafter,
                PROMPTS[:rows],
                eos_tokens=frozenset({-1}),
                max_tokens=TOKENS,
                num_draft=num_draft,
            ):
                texts[commit.id] += commit.tokens
                stats[commit.id] = commit.stats
            same.append(texts == self.expected[:rows])
        self.alpha = Stats.of_batch([*stats.values()]).alpha
        return all(same)


def measure(kind: str, folder: Path, say: Callable[[str], None]) -> str:
    """A line of the table."""
    base = expected_logits(build(kind))
    worst, tried, idle = 0.0, 0, []
    for number, fields in enumerate(variants(kind)):
        model = build(kind, **fields)
        expected = expected_logits(model)
        if fields and np.abs(expected - base).max() < 1e-3 * np.abs(base).max():
            idle.append(str(fields))
        for older in (False, True):
            found = error(expected, save(model, folder / f"{number}{older}", older))
            worst, tried = max(worst, found), tried + 1
            if found > 1e-4:
                say(f"{kind} {fields} older={older}: {found:.1e}")
    if idle:
        say(f"{kind}: these changed nothing in transformers either: {idle}")
    texts = [Texts.make(kind, folder / f"t{old}", old) for old in (False, True)]
    alone = all(each.equal(1) for each in texts)
    together = all(each.equal(rows) for each in texts for rows in (2, 3, 4))
    said = ["equal" if fine else "NOT EQUAL" for fine in (alone, together)]
    return f"| `{kind}` | {MODELS[kind]} | {tried} | {worst:.0e} | {' | '.join(said)} |"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for each in sys.argv[1:] or ROWS:
        with tempfile.TemporaryDirectory() as name:
            say = lambda line: print(line, file=sys.stderr)  # noqa: E731
            print(measure(each, Path(name), say), flush=True)
