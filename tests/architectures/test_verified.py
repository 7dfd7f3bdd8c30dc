"""Every architecture of the table gives transformers' text, or refuses a field by its
name; what is not in the table is not run by itself."""

import dataclasses
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
from causal_table import (
    LENGTH,
    MODELS,
    POSITIONS,
    VOCABULARY,
    Texts,
    as_before,
    build,
    error,
    expected_logits,
    save,
    scaling,
    session,
    sizes,
    variants,
)
from conftest import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from architectures import causal_model, verified
from architectures.causal_session import CausalSession
from architectures.rotary import read_rotary
from architectures.verified import NEEDED, ROWS
from system.errors import InputError

#: What transformers' code asks a config for that is not the text's.
OTHERS = {"_attn_implementation", "rope_parameters", "partial_rotary_factor"}


@pytest.mark.parametrize("kind", ROWS)
def test_logits(kind, tmp_path):
    """Every field that is honoured, with another value; every other one of them as
    older checkpoints have it."""
    for number, fields in enumerate(variants(kind)):
        model = build(kind, **fields)
        folder = save(model, tmp_path / str(number), older=bool(number % 2))
        assert error(expected_logits(model), folder) < 1e-4, fields


@pytest.mark.parametrize("kind", ROWS)
def test_text(kind, tmp_path):
    """Plain and speculative, alone and together, beyond a window."""
    number = [*ROWS].index(kind)
    texts = Texts.make(kind, tmp_path, older=bool(number % 2))
    assert len({token for text in texts.expected for token in text}) > 12
    assert texts.equal(1)
    assert texts.equal(2 + number % 3)
    assert 0 < texts.alpha < 1


@pytest.mark.parametrize("kind", ROWS)
def test_every_field_is_judged(kind):
    """Whatever transformers' code of the architecture reads of a config, the row knows;
    and where a config lacks it, both take the same."""
    row = ROWS[kind]
    module = f"transformers.models.{kind}.modeling_{kind}"
    code = inspect.getsource(importlib.import_module(module))
    read = set(re.findall(r"\bconfig\.(\w+)", code))
    read |= set(re.findall(r'getattr\(\s*(?:self\.)?config,\s*"(\w+)"', code))
    known = {
        *row.fields,
        *row.only,
        *row.follow,
        *row.idle,
        *row.aliases,
        row.activation[0],
    }
    assert read <= known | verified.WITHOUT_EFFECT | OTHERS
    config = CONFIG_MAPPING[kind]
    assert row.aliases == {
        name: own for name, own in config.attribute_map.items() if name in read
    }
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for name, default in row.fields.items():
        if default is not NEEDED and name != "num_key_value_heads":
            assert defaults[name] == default, name
    for name, values in row.only.items():
        assert defaults[name] == values[0], name
    assert defaults[row.activation[0]] == row.activation[1]


@pytest.mark.parametrize("kind", ROWS)
def test_what_is_not_honoured_is_refused_by_its_name(kind, tmp_path):
    """Before weights are looked at."""
    config = json.loads(CONFIG_MAPPING[kind](**sizes(kind)).to_json_string())
    row = ROWS[kind]
    assert verified.read(config).arguments["model_type"] == kind

    def refused(name, value, match=None):
        changed = {**config, name: value}
        if value is NEEDED:
            del changed[name]
        with pytest.raises(InputError, match=match or name):
            verified.read(changed)

    for name, values in row.only.items():
        refused(name, not values[0])
        refused(name, 7)
    for name in row.follow:
        refused(name, 12345)
    for name, default in row.fields.items():
        if default is NEEDED:
            refused(name, NEEDED, f"no {name}")
            for odd in (0, -1, 1.5, "8", True, None, 1 << 70):
                refused(name, odd)
        elif isinstance(default, bool):
            refused(name, "yes")
        elif isinstance(default, float):
            refused(name, float("inf"))
            refused(name, None)
    refused(row.activation[0], "sparkle")
    for name in verified.OF_ALL:
        refused(name, False if name == "is_causal" else {"x": 12})
    for name, own in row.aliases.items():
        refused(name, config[own] + 1, own)
    if row.windows is not None:
        refused("sliding_window", 0)
        refused("sliding_window", 1)
    elif not row.idle:  # generate's cache would have a window, if not the model
        refused("sliding_window", 12)
    if kind != "gpt2":
        refused("layer_types", [verified.SLIDING, verified.FULL, "chunked"])
    if "layer_types" in row.fields:
        refused("layer_types", ["full_attention"])
        odd = ["full_attention"] * (sizes(kind)["num_hidden_layers"] - 1) + ["chunked"]
        refused("layer_types", odd)


#: Rotary settings that are refused, and what is said of them.
ODD_ROTARY = [
    ({"rope_type": "mrope", "rope_theta": 1e4}, "'mrope'"),
    ({"rope_type": "linear", "rope_theta": 1e4}, "no factor"),
    ({"rope_type": "llama3", "factor": 8.0}, "no low_freq_factor"),
    ({"rope_type": "longrope", "short_factor": [1.0]}, "short_factor of 4"),
    ({"rope_type": "default", "rope_theta": "big"}, "rope_theta"),
    ({"rope_type": "linear", "factor": 0.0}, "factor"),
    ({"full_attention": {"rope_theta": 1e4}}, "no single group"),
    ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ([1], "odd value in rope_parameters"),
]


@pytest.mark.parametrize("group, match", ODD_ROTARY)
def test_odd_rotary_settings(group, match):
    config = json.loads(CONFIG_MAPPING["llama"](**sizes("llama")).to_json_string())
    with pytest.raises(InputError, match=match):
        verified.read({**config, "rope_parameters": group})


@given(st.sampled_from(["linear", "dynamic", "llama3", "yarn"]), st.data())
def test_rotary_settings_of_any_size(name, data):
    """Frequencies and factor equal transformers', by either generation's names."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # transformers divides by the size less two where it is dynamic.
    size = 2 * data.draw(st.integers(2 if name == "dynamic" else 1, 64))
    group = scaling("llama", name)["rope_parameters"]
    group["rope_theta"] = data.draw(st.floats(100, 1e7))
    if "factor" in group:
        group["factor"] = data.draw(st.floats(1, 64))
    if name == "yarn":
        optional = {
            "beta_fast": st.floats(8, 64),
            "beta_slow": st.floats(0.5, 4),
            "mscale": st.floats(0.1, 2),
            "mscale_all_dim": st.floats(0.1, 2),
            "attention_factor": st.floats(0.5, 2),
            "truncate": st.booleans(),
        }
        for key in data.draw(st.sets(st.sampled_from([*optional]))):
            group[key] = data.draw(optional[key])
    fields = sizes("llama") | {"head_dim": size, "rope_parameters": group}
    config = CONFIG_MAPPING["llama"](**fields)
    expected, factor = ROPE_INIT_FUNCTIONS[name](config, "cpu")
    form = json.loads(config.to_json_string())
    for each in (form, as_before(json.loads(json.dumps(form)))):
        got = read_rotary(each, size, POSITIONS)
        assert got.frequencies == pytest.approx(expected.numpy(), rel=1e-5)
        assert got.factor == pytest.approx(factor)


def test_longrope_ends_where_its_other_factors_begin(tmp_path):
    fields = scaling("phi3", "longrope")
    folder = save(build("phi3", **fields), tmp_path)
    assert causal_model.load(folder).positions == 100
    with pytest.raises(InputError, match="120 tokens, but the model has positions"):
        session(folder).start([[5] * 120])


def test_gemmas_first_configs(tmp_path):
    """Their "gelu" means the other one, and transformers 5 knows that."""
    model = build("gemma")
    folder = save(model, tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))
    assert AutoConfig.from_pretrained(folder).hidden_act == "gelu_pytorch_tanh"
    assert error(expected_logits(model), folder) < 1e-4


@pytest.mark.parametrize("kind", [kind for kind in ROWS if kind != "gpt_neox"])
def test_what_older_checkpoints_store_besides(kind, tmp_path):
    """Frequencies that are computed, and a tied head once more; another head than the
    embedding is not passed over."""
    from safetensors.torch import load_file, save_file

    model = build(kind)
    folder = save(model, tmp_path)
    path = folder / "model.safetensors"
    weights = load_file(path)
    if ROWS[kind].rotary is not None:
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        weights[name] = next(iter(weights.values())).new_ones(4)
    tied = model.config.tie_word_embeddings
    if tied:
        weights["lm_head.weight"] = model.get_input_embeddings().weight.clone()
    save_file(weights, path, {"format": "pt"})
    assert error(expected_logits(model), folder) < 1e-4
    if tied:
        weights["lm_head.weight"] = weights["lm_head.weight"] * 2
        save_file(weights, path, {"format": "pt"})
        with pytest.raises(InputError, match="is another matrix than"):
            causal_model.load(folder)


def test_untied_gpt2_in_every_form_of_names(tmp_path):
    """As the hub's first checkpoints, without the prefix, and with buffers."""
    from safetensors.torch import load_file, save_file

    model = build("gpt2", tie_word_embeddings=False)
    folder = save(model, tmp_path)
    path = folder / "model.safetensors"
    weights = load_file(path)
    assert "lm_head.weight" in weights
    renamed = {name.removeprefix("transformer."): w for name, w in weights.items()}
    renamed["h.0.attn.bias"] = weights["lm_head.weight"].new_ones(1, 1, 300, 300)
    renamed["h.0.attn.masked_bias"] = weights["lm_head.weight"].new_ones(1)
    save_file(renamed, path, {"format": "pt"})
    assert error(expected_logits(model), folder) < 1e-4


def test_weights_in_pytorchs_files(tmp_path):
    """By the reader that T5's go through."""
    import torch

    model = build("llama")
    folder = save(model, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert error(expected_logits(model), folder) < 1e-4


def test_weights_of_mlx_lm(tmp_path):
    """Quantized by mlx-lm itself, single layers otherwise; its own loader as oracle."""
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.utils import dequantize_model, load_model

    model = build("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    folder = save(model, tmp_path / "hf")
    tiny_tokenizer(VOCABULARY).save_pretrained(folder)

    def mixed(path, module):
        return {"group_size": 32, "bits": 8} if "layers.1" in path else True

    for predicate in (None, mixed):
        quantized = tmp_path / f"q{predicate is None}"
        mlx_lm.convert(
            str(folder),
            str(quantized),
            quantize=True,
            q_group_size=32,
            q_bits=4,
            quant_predicate=predicate,
        )
        ids = mx.array([[5, 9, 30, 4]])
        theirs = dequantize_model(load_model(quantized)[0])
        expected = theirs(ids).astype(mx.float32)
        got = causal_model.load(quantized).model(ids)
        assert (mx.abs(got - expected).max() / mx.abs(expected).max()).item() < 2e-2
        config = json.loads((quantized / "config.json").read_text())
        assert "quantization" in config


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_weights_that_others_quantized(tmp_path, method):
    folder = save(build("llama"), tmp_path)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"] = {"quant_method": method, "bits": 4}
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"quantized by another program \\({method}"):
        causal_model.load(folder)


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory):
    """An architecture that mlx-lm has and nobody here has verified."""
    from transformers import NemotronConfig, NemotronForCausalLM

    folder = tmp_path_factory.mktemp("nemotron")
    config = {n: v for n, v in sizes("llama").items() if n != "head_dim"}
    model = NemotronForCausalLM(NemotronConfig(**config)).eval()
    model.save_pretrained(folder)
    tiny_tokenizer(VOCABULARY).save_pretrained(folder)
    return model, folder


def test_unverified(call, nemotron):
    """Refused by its name; run where the user asks for it, which is said once; several
    answers one after another."""
    folder = nemotron[1]
    flags = ("--model", folder, "--prompt", "the cat", "--max-tokens", 8)
    status, out, err = call(*flags)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert "'nemotron', and nobody has compared" in err and "gpt2, gpt_neox" in err
    flags += ("--unverified", "--draft-model", "none")
    status, out, err = call(*flags)
    assert status == 0 and err.count("not verified") == 1
    samples = ("--temperature", 1, "--seed", 3, "--json", "--num-samples")
    status, three, err = call(*flags, *samples, 3)
    assert status == 0 and err.count("not verified") == 1
    texts = [json.loads(line)["text"] for line in three.splitlines()]
    first = json.loads(call(*flags, *samples, 1)[1])["text"]
    assert len(set(texts)) > 1 and texts[0] == first


def test_a_row_is_not_unverified(call, tmp_path):
    """What is known to be wrong stays refused, whatever the user says."""
    folder = save(build("llama"), tmp_path)
    tiny_tokenizer(VOCABULARY).save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"hidden_act": "sparkle"}))
    status, _, err = call("--model", folder, "--unverified", "--prompt", "a")
    assert status == 2 and "hidden_act is sparkle" in err and err.count("\n") == 1


def test_a_module_that_ends_the_program(tmp_path):
    """mlx-lm's OLMo prints advice and calls sys.exit where a package is missing."""
    folder = save(build("llama"), tmp_path)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"model_type": "olmo"}))
    with pytest.raises(InputError, match="To run olmo install"):
        causal_model.load(folder, unverified=True)


def test_models_that_cannot_be_rewound(tmp_path):
    """State-space models, and caches that forget: refused, unverified or not."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4
    )
    folder = tmp_path
    MambaForCausalLM(config).save_pretrained(folder)
    loaded = causal_model.load(folder, unverified=True)
    with pytest.raises(InputError, match="cannot be rewound"):
        CausalSession(loaded.model, VOCABULARY)


def test_the_table_of_the_documentation():
    """docs/architectures.md has a line for every row, with the model's name."""
    page = Path(causal_model.__file__).parents[1] / "docs" / "architectures.md"
    lines = page.read_text(encoding="utf-8").splitlines()
    listed = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert listed == [*ROWS]
    for kind, line in zip(
        listed, (x for x in lines if x.startswith("| `")), strict=True
    ):
        assert MODELS[kind] in line
    assert LENGTH < POSITIONS
