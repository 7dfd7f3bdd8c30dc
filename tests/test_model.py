"""model.py against transformers in float32."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from conftest import VOCABULARY, relative_error
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, EncoderDecoderCache
from transformers.models.t5.modeling_t5 import T5Attention

import model
from architectures import t5
from architectures.slim import is_slim, slim
from architectures.t5_session import T5Session
from checkpoints import config
from checkpoints.config import T5Config
from pair import Pair
from system import fast_blas, memory
from system.errors import InputError, TooLongError

TOLERANCE = 1e-4

#: The seeds are of models that write varied texts.
FAMILIES = {
    "t5 1.0": {"seed": 8},
    "t5 1.1": {"seed": 3, "untied": True, "feed_forward_proj": "gated-gelu"},
    "more decoder layers": {"seed": 9, "num_layers": 1, "num_decoder_layers": 3},
    "more encoder layers": {"seed": 12, "num_layers": 3, "num_decoder_layers": 1},
    "heads wider than the model": {"seed": 9, "num_heads": 6, "d_kv": 16},
    "another start token": {"seed": 9, "decoder_start_token_id": 7},
    "short position range": {
        "seed": 22,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
    },
}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = np.random.default_rng(seed)
    return [*generator.integers(3, VOCABULARY, length - 1).tolist(), 1]


@pytest.fixture(params=FAMILIES, ids=lambda name: name.replace(" ", "-"))
def family(request, make):
    oracle, _, folder = make(**FAMILIES[request.param])
    return oracle, t5.load(folder)


@pytest.fixture(params=["cpu", "gpu"])
def both_forms(request, monkeypatch, family):
    """A model with fewer operations, for a CPU, and as it is, with a GPU's kernels."""
    device = getattr(mx, request.param)
    monkeypatch.setattr(mx, "default_device", lambda: device)
    slim(family[1])
    assert is_slim(family[1]) == (device == mx.cpu)
    return family


def test_only_small_models_are_slimmed(make, monkeypatch):
    """Every norm and every matrix of the layers, and the head."""
    _, _, folder = make()
    small = Pair.load(str(folder)).target.model
    kinds = [type(module).__name__ for module in small.modules()]
    assert kinds.count("UnitNorm") == 2 * 2 + 2 * 3
    assert kinds.count("Product") == 2 * 4 + 2 * 7 + 1
    assert "Linear" not in kinds
    large = t5.load(folder)
    monkeypatch.setattr(fast_blas, "SMALL", 0)
    slim(large)
    assert not is_slim(large)


@pytest.mark.parametrize("length", [1, 2, 9, 300])
def test_encoder_output(both_forms, length):
    """The bias table, its direction and the norms; 300 is beyond max_distance."""
    oracle, ours = both_forms
    prompt = prompt_of(length)
    theirs = oracle.encoder(torch.tensor([prompt])).last_hidden_state
    assert relative_error(ours.encode(mx.array([prompt])), theirs) < TOLERANCE


@pytest.mark.parametrize("steps", [[1] * 6, [5, 1], [3, 40, 130]])
def test_decoder_logits(both_forms, steps):
    """Scale, head, gate, cross-attention, and blocks of several rows at an offset.

    The last one goes beyond max_distance, and makes the caches grow.
    """
    oracle, ours = both_forms
    prompt, tokens = prompt_of(11), prompt_of(sum(steps), seed=1)
    with torch.no_grad():
        theirs = oracle(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([tokens])
        ).logits
    session = T5Session(ours)
    session.start([prompt])
    logits, at = [], 0
    for step in steps:
        logits.append(session.extend(mx.array([tokens[at : at + step]])))
        at += step
    assert relative_error(mx.concatenate(logits, axis=1), theirs) < TOLERANCE


def test_greedy_equals_generate(family):
    """Token for token over a whole text, from each family's own start token."""
    oracle, ours = family
    prompt = prompt_of(9, seed=2)
    theirs = oracle.generate(
        torch.tensor([prompt]),
        max_new_tokens=40,
        eos_token_id=None,
        do_sample=False,
        # transformers sizes its own cache by the encoder's layers.
        cache=EncoderDecoderCache(DynamicCache(), DynamicCache()),
    )[0].tolist()
    session = T5Session(ours)
    (sequence,) = session.start([prompt])
    while len(sequence) < len(theirs):
        sequence.append(mx.argmax(session.extend(mx.array([sequence[-1:]]))).item())
    assert sequence == theirs
    assert len(set(sequence)) > 10  # a text that repeats itself would show little


def test_scale_is_taken_from_either_config():
    """transformers 5 writes tie_word_embeddings true whatever it was."""
    scales = config._scales_outputs
    assert scales({"model_type": "t5"})
    assert not scales({"model_type": "t5", "tie_word_embeddings": False})
    new = {"model_type": "t5", "tie_word_embeddings": True}
    assert not scales(new | {"scale_decoder_outputs": False})


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, furthest", [(32, 128), (8, 20), (64, 256), (32, 64)])
def test_position_buckets(bidirectional, buckets, furthest):
    """Every distance, those on a logarithmic bucket's edge above all."""
    distances = np.arange(-3000, 3001)
    theirs = T5Attention._relative_position_bucket(
        torch.tensor(distances), bidirectional, buckets, furthest
    )
    ours = model.position_buckets(distances, bidirectional, buckets, furthest)
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_ragged_batch_equals_its_rows(tiny):
    """Padding is unseen by the encoder and by cross-attention, at any row length."""
    _, ours = tiny
    prompts = [prompt_of(length, seed=length) for length in (3, 17, 9)]
    tokens = [prompt_of(6, seed=20 + row) for row in range(3)]
    batch = T5Session(ours)
    batch.start(prompts)
    together = batch.extend(mx.array(tokens))
    for row in range(3):
        alone = T5Session(ours)
        alone.start([prompts[row]])
        logits = alone.extend(mx.array([tokens[row]]))
        error = mx.abs(together[row] - logits[0]).max() / mx.abs(logits).max()
        assert error.item() < TOLERANCE


@given(st.data())
def test_rewinds_leave_no_trace(tiny, data):
    """Any order of extends and per-row rewinds equals a fresh pass over what stays."""
    _, ours = tiny
    rows = data.draw(st.integers(1, 3))
    prompts = [prompt_of(4 + row, seed=row) for row in range(rows)]
    session = T5Session(ours)
    kept = [[] for _ in session.start(prompts)]
    for _ in range(data.draw(st.integers(1, 5))):
        size = data.draw(st.sampled_from([1, 2, 5, 40]))
        block = [prompt_of(size, data.draw(st.integers(0, 99))) for _ in kept]
        logits = session.extend(mx.array(block))
        kept = [old + new for old, new in zip(kept, block, strict=True)]
        for row, tokens in enumerate(kept):
            fresh = T5Session(ours)
            fresh.start([prompts[row]])
            expected = fresh.extend(mx.array([tokens]))[0, -size:]
            error = mx.abs(logits[row] - expected).max() / mx.abs(expected).max()
            assert error.item() < TOLERANCE
        lengths = [data.draw(st.integers(0, len(tokens))) for tokens in kept]
        session.rewind(lengths)
        kept = [tokens[:n] for tokens, n in zip(kept, lengths, strict=True)]


def test_rewind_never_goes_forward(tiny):
    """A stale length must not bring rejected keys back."""
    session = T5Session(tiny[1])
    session.start([prompt_of(4)])
    session.extend(mx.array([[0, 5, 6]]))
    session.rewind([2])
    with pytest.raises(ValueError, match="rewind"):
        session.rewind([3])
    with pytest.raises(ValueError, match="rewind"):
        session.rewind([1, 1])


def test_start_resets_everything(tiny):
    """A second prompt sees nothing of the first, longer one."""
    session = T5Session(tiny[1])
    session.start([prompt_of(30)])
    session.extend(mx.array([prompt_of(90)]))
    session.start([prompt_of(5)])
    again = session.extend(mx.array([[0, 8]]))
    fresh = T5Session(tiny[1])
    fresh.start([prompt_of(5)])
    assert mx.array_equal(again, fresh.extend(mx.array([[0, 8]])))


def test_logits_are_cut_to_the_vocabulary(tiny):
    """Padding rows of the embedding stand for no token."""
    session = T5Session(tiny[1], vocabulary=50)
    session.start([prompt_of(5)])
    assert session.extend(mx.array([[0, 8]])).shape == (1, 2, 50)


def test_ids_that_stand_for_nothing_are_banned(tiny):
    session = T5Session(tiny[1], vocabulary=50, banned=[7, 9])
    session.start([prompt_of(5)])
    logits = np.array(session.extend(mx.array([[0, 8]])))
    assert np.isneginf(logits[..., [7, 9]]).all()
    assert np.isfinite(np.delete(logits, [7, 9], axis=-1)).all()


def test_bfloat16(make):
    """Masks, bias and caches follow the weights' dtype, in every kind of pass."""
    _, _, folder = make()
    reference, half = (t5.load(folder) for _ in range(2))
    half.set_dtype(mx.bfloat16)
    sessions = [T5Session(weights) for weights in (reference, half)]
    for session in sessions:
        session.start([prompt_of(9), prompt_of(4)])
        session.extend(mx.array([prompt_of(5), prompt_of(5, 1)]))
        session.rewind([4, 1])
    exact, rounded = (s.extend(mx.array([[8, 9], [3, 4]])) for s in sessions)
    assert rounded.dtype == mx.bfloat16
    error = mx.abs(exact - rounded).max() / mx.abs(exact).max()
    assert error.item() < 0.1


@pytest.mark.parametrize("prompt", [[], [VOCABULARY], [5, -1]])
def test_prompts_that_cannot_be_encoded(tiny, prompt):
    """An id without an embedding row would read beyond the matrix."""
    with pytest.raises(InputError):
        T5Session(tiny[1]).start([[3, 4, 1], prompt])


def test_equal_prompts_are_encoded_once(tiny, monkeypatch):
    """As many rows as prompts all the same, each with its own source."""
    prompts = [[3, 4, 1], [5, 6, 7, 8, 1], [3, 4, 1]]
    encoded = []
    encoding = model.T5.encoding

    def watched(self, tokens, padding):
        encoded.append(tokens.shape[0])
        return encoding(self, tokens, padding)

    monkeypatch.setattr(model.T5, "encoding", watched)
    session = T5Session(tiny[1])
    assert len(session.start(prompts)) == 3
    together = np.array(session.extend(mx.array([[0, 9]] * 3)))
    for row, prompt in enumerate(prompts):
        session.start([prompt])
        alone = np.array(session.extend(mx.array([[0, 9]])))
        np.testing.assert_allclose(together[row], alone[0], atol=1e-5)
    assert encoded == [2, 1, 1, 1]


def test_weights_that_do_not_fit(tmp_path):
    """Said before anything is read, with both sizes."""
    with pytest.raises(InputError, match=r"needs 1000000\.0 GB .* has \d+\.\d GB"):
        memory.prepare_memory(10**15, tmp_path)


def test_prompt_too_long_for_the_memory(make, monkeypatch):
    """Attention's squares are counted before they are made, in every layer of umT5."""
    monkeypatch.setattr(memory, "SMALL", 0)
    for fields in ({}, {"kind": "umt5", "num_layers": 3}):
        session = T5Session(t5.load(make(**fields)[2]))
        squares = session.model.config.num_heads * (3 if fields else 1) * 4
        with monkeypatch.context() as patch:
            patch.setattr(memory, "free", lambda n=6 * squares * 1000**2: n)
            session.start([[5] * 500])
            with pytest.raises(TooLongError, match="prompt has 2,001 tokens"):
                session.start([[5], [5] * 2001])


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("model_type", "bart", "bart"),
        ("feed_forward_proj", "gated-sparkle", "gated-sparkle"),
        ("d_model", "wide", "odd value"),
        ("num_heads", 0, "num_heads: expected `int` >= 1"),
        ("num_decoder_layers", -1, "num_decoder_layers: expected `int` >= 1"),
        ("relative_attention_num_buckets", 2, "position bias"),
        ("vocab_size", None, "odd value"),
    ],
)
def test_configs_that_are_refused(tiny, field, value, message):
    config = tiny[0].config.to_dict() | {field: value}
    with pytest.raises(InputError, match=message):
        T5Config.from_dict(config, {})


def test_names_that_transformers_takes_as_well(tiny):
    config = tiny[0].config.to_dict()
    other = {"hidden_size": "d_model", "head_dim": "d_kv"}
    other |= {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
    renamed = dict(config)
    for theirs, ours in other.items():
        renamed[theirs] = renamed.pop(ours)
    assert T5Config.from_dict(renamed, {}) == T5Config.from_dict(config, {})


def test_where_decoding_starts(tiny):
    """As generate has it: the start token, else the beginning of a sequence."""
    config = tiny[0].config.to_dict() | {"decoder_start_token_id": None}
    config |= {"bos_token_id": None, "pad_token_id": 3}
    assert T5Config.from_dict(config, {}).start_token == 3
    assert T5Config.from_dict(config | {"bos_token_id": 4}, {}).start_token == 4
    assert T5Config.from_dict(config, {"bos_token_id": 5}).start_token == 5
    said = {"decoder_start_token_id": 6, "bos_token_id": 5}
    assert T5Config.from_dict(config, said).start_token == 6


@pytest.mark.parametrize(
    "said, activation, gated",
    [
        ({"feed_forward_proj": "relu"}, "relu", False),
        ({"feed_forward_proj": "gated-gelu"}, "gelu_new", True),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, "gelu", True),
        ({"feed_forward_proj": "relu", "dense_act_fn": "gelu_new"}, "gelu_new", False),
        ({"feed_forward_proj": "gated-silu", "is_gated_act": False}, "silu", False),
    ],
)
def test_the_feed_forward_by_two_names(tiny, said, activation, gated):
    """FLAN-T5's configs of 2022 say "gelu" beside "gated-gelu", and mean it."""
    config = tiny[0].config.to_dict()
    for name in ("dense_act_fn", "is_gated_act"):
        config.pop(name, None)
    found = T5Config.from_dict(config | said, {})
    assert (found.activation, found.gated) == (activation, gated)
    with pytest.raises(InputError, match="dense_act_fn 'sparkle'"):
        T5Config.from_dict(config | {"dense_act_fn": "sparkle"}, {})


def test_config_without_a_size(tiny):
    config = tiny[0].config.to_dict()
    del config["d_ff"]
    with pytest.raises(InputError, match="no d_ff"):
        T5Config.from_dict(config, {})


def test_several_ends_of_sequence(tiny):
    """The generation config's ids win, and there may be several."""
    config = tiny[0].config.to_dict()
    assert T5Config.from_dict(config, {}).eos_tokens == {1}
    both = T5Config.from_dict(config, {"eos_token_id": [1, 5]})
    assert both.eos_tokens == {1, 5}
