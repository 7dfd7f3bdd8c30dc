"""The T5 family, each member in its own hub layout, and every precision.

A layout is the files, the config fields and the tensor names that the published
checkpoints have; the weights are tiny and random. The oracle is transformers.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import sentencepiece
import torch
from conftest import NEW_FIELDS, relative_error, tiny_torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, ByT5Tokenizer, T5Tokenizer

import convert
import model
from architectures import t5
from architectures.t5_session import T5Session
from checkpoints import config
from checkpoints.config import MODES, Quantization, T5Config
from pair import Pair
from speculation.sampling import Sampling
from system.errors import InputError
from text.slow_tokenizer import SlowTokenizer
from text.tokenizer import TextStream, Tokenizer

LINE = "the cat sat on a mat and saw the dog run over red green hills"
PROMPT = "the cat saw the dog"


def sentencepiece_files(folder: Path, symbols: tuple[str, ...] = ()) -> int:
    """A T5 tokenizer as published: spiece.model and a config. Returns its size."""
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(LINE.split(), 6)) for _ in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "spiece"),
        vocab_size=60 + len(symbols),
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        user_defined_symbols=list(symbols),
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 4}
    settings |= {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings["additional_special_tokens"] = [f"<extra_id_{i}>" for i in range(4)]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(AutoTokenizer.from_pretrained(folder))


def madlad_files(folder: Path) -> int:
    return sentencepiece_files(folder, ("<2de>", "<2fr>"))


def byte_files(folder: Path) -> int:
    """ByT5 has no vocabulary file: a byte's id is three more."""
    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def roberta_files(folder: Path) -> int:
    """CodeT5's byte-level BPE: vocab.json and merges.txt, </s> is 2."""
    trainer = ByteLevelBPETokenizer()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    special += [f"<extra_id_{i}>" for i in range(4)]
    trainer.train_from_iterator(
        ["def the_cat(sat): return sat + 1"] * 20,
        vocab_size=300,
        special_tokens=special,
        show_progress=False,
    )
    trainer.save_model(str(folder))
    settings = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": False}
    settings |= {"bos_token": "<s>", "cls_token": "<s>", "mask_token": "<mask>"}
    settings |= {"eos_token": "</s>", "sep_token": "</s>"}
    settings |= {"unk_token": "<unk>", "pad_token": "<pad>"}
    settings["additional_special_tokens"] = special[5:]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(AutoTokenizer.from_pretrained(folder))


@dataclass
class Member:
    """A member of the family, as published.

    Attributes:
        kind: transformers' class of the oracle.
        fields: of its config that matter, beside the sizes.
        embedding: the tensor that holds the embedding.
        in_bin: whether the weights are PyTorch's own file.
    """

    kind: str = "t5"
    untied: bool = True
    fields: dict = field(default_factory=dict)
    tokenizer: callable = sentencepiece_files
    embedding: str = "shared.weight"
    in_bin: bool = False


GATED = {"feed_forward_proj": "gated-gelu"}
CODE = {"eos_token_id": 2, "bos_token_id": 1, "feed_forward_proj": "relu"}
FAMILY = {
    "t5": Member(untied=False, fields={"feed_forward_proj": "relu"}, in_bin=True),
    "t5-1.1": Member(fields=GATED),
    "flan-ul2": Member(fields={"feed_forward_proj": "gated-silu"}),
    "mt5": Member("mt5", fields=GATED, in_bin=True),
    "aya-101": Member("mt5", fields=GATED),
    "umt5": Member("umt5", fields=GATED, in_bin=True),
    "byt5": Member(fields=GATED, tokenizer=byte_files, in_bin=True),
    "madlad-400": Member(
        fields=GATED, tokenizer=madlad_files, embedding="decoder.embed_tokens.weight"
    ),
    "codet5": Member(untied=False, fields=CODE, tokenizer=roberta_files, in_bin=True),
    "codet5p-220m": Member(untied=False, fields=CODE, tokenizer=roberta_files),
}


def publish(member: Member, folder: Path, noise: float = 0.0, change=None):
    """Write a checkpoint as the hub has it; the oracle, with the same weights, to which
    ``change`` may do something first."""
    folder.mkdir(parents=True)
    size = member.tokenizer(folder)
    # Rows of padding beyond the tokenizer's ids, as published; transformers would emit
    # them, so the oracle is told not to.
    fields = member.fields | {"vocab_size": size + 5}
    oracle = tiny_torch(
        11, untied=member.untied, noise=noise, kind=member.kind, **fields
    )
    if change:
        with torch.no_grad():
            change(oracle)
    stored = {
        name: tensor.contiguous()
        for name, tensor in oracle.state_dict().items()
        if "embed_tokens" not in name and (member.untied or name != "lm_head.weight")
    }
    stored[member.embedding] = stored.pop("shared.weight")
    if member.in_bin:
        torch.save(stored, folder / "pytorch_model.bin")
    else:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    values = oracle.config.to_dict()
    for name in (*NEW_FIELDS, "dtype"):
        values.pop(name, None)
    values["tie_word_embeddings"] = not member.untied
    (folder / "config.json").write_text(json.dumps(values))
    return oracle, size


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A function: a member's (oracle, checkpoint, conversion, a draft's conversion)."""
    made = {}

    def build(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            oracle, size = publish(FAMILY[name], folder / "hf")
            publish(FAMILY[name], folder / "hf-draft", noise=0.05)
            convert.convert(folder / "hf", folder / "target")
            convert.convert(folder / "hf-draft", folder / "draft")
            made[name] = oracle, size, folder
        return made[name]

    return build


def reference(folder: Path):
    """transformers' tokenizer, which takes umT5's from a tokenizer.json alone."""
    bare = (folder / "spiece.model").is_file()
    return (T5Tokenizer if bare else AutoTokenizer).from_pretrained(folder)


def decoded(folder: Path, tokens: list[int]) -> str:
    """Text of ids, by SentencePiece itself where the checkpoint has its file."""
    if not (folder / "spiece.model").is_file():
        return SlowTokenizer(folder).decode(tokens, skip_special=True)
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "spiece.model")
    )
    known = set(range(pieces.get_piece_size())) - {pieces.unk_id()}
    return pieces.decode([token for token in tokens if token in known])


@pytest.mark.parametrize("name", FAMILY)
def test_member_against_transformers(published, name, confined_here):
    """Ids, logits and text, plain and speculative, from the hub's files on."""
    oracle, size, folder = published(name)
    theirs = reference(folder / "hf")
    pair = Pair.load(str(folder / "target"), str(folder / "draft"))
    prompts = [PROMPT, "a red mat <extra_id_0> over the hills", "é 漢 def cat(x):"]
    prompts += ["<2de> the dog"] if name == "madlad-400" else []
    for prompt in prompts:
        ids = theirs(prompt).input_ids
        assert pair.tokenizer.encode(prompt) == ids
        before = [[pair.target.model.config.start_token, 5, 7, 9, 3, 8, 20]]
        with torch.no_grad():
            logits = oracle(
                input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor(before)
            ).logits
            text = oracle.generate(
                torch.tensor([ids]),
                max_new_tokens=25,
                do_sample=False,
                suppress_tokens=list(range(size, size + 5)),
            )[0, 1:].tolist()
        session = T5Session(pair.target.model)
        session.start([ids])
        assert relative_error(session.extend(mx.array(before)), logits) < 1e-4
        answers = [
            pair.generate(prompt, max_tokens=25, num_draft=k).finish()
            for k in (0, 1, 4)
        ]
        for answer in answers:
            assert answer.tokens == text
            assert answer.text == decoded(folder / "hf", text)


def test_ends_of_codet5(published):
    """The end is 2 there; 1, which begins a sequence, is a token like others."""
    folder = published("codet5")[2]
    assert T5Config.read(folder / "target").eos_tokens == {2}


@pytest.mark.parametrize("name", ["madlad-400", "t5", "codet5"])
def test_special_tokens_can_be_shown(published, name):
    """Sentinels and language tags, but neither the end nor padding."""
    _, _, folder = published(name)
    pair = Pair.load(str(folder / "target"))
    forced = pair.tokenizer.ids["<extra_id_1>"]
    options = {"max_tokens": 4, "sampling": Sampling(forced_bos_token_id=forced)}
    plain = pair.generate(PROMPT, **options).finish().text
    shown = pair.generate(PROMPT, keep_special=True, **options).finish().text
    assert "<extra_id_1>" in shown and "<extra_id_1>" not in plain
    assert "</s>" not in shown and "<pad>" not in shown


@pytest.mark.parametrize(
    "kind", ["longt5", "bart", "codet5p", "t5gemma", "pegasus", "gpt2"]
)
def test_other_architectures_are_refused_by_name(published, tmp_path, kind):
    values = json.loads((published("t5")[2] / "hf" / "config.json").read_text())
    with pytest.raises(InputError, match=f"'{kind}' is another architecture"):
        T5Config.from_dict(values | {"model_type": kind}, {})


@pytest.mark.parametrize("name", config.ACTIVATIONS)
def test_activations(name):
    """Every one that has no parameters of its own."""
    from transformers.activations import ACT2FN

    x = np.linspace(-12, 12, 1001, dtype=np.float32)
    expected = ACT2FN[name](torch.tensor(x)).numpy()
    got = np.array(model.activation(name)(mx.array(x)))
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_activations_are_all_of_transformers():
    from transformers.activations import ACT2FN

    assert set(ACT2FN) - {"prelu", "xielu"} == set(config.ACTIVATIONS)


@pytest.mark.parametrize("gated", ["", "gated-"])
@pytest.mark.parametrize("name", ["gelu", "relu2", "quick_gelu"])
def test_activations_in_place(make, name, gated):
    oracle, _, folder = make(feed_forward_proj=f"{gated}{name}")
    session = T5Session(t5.load(folder))
    session.start([[5, 6, 1]])
    ids = torch.tensor([[0, 9, 8]])
    with torch.no_grad():
        expected = oracle(torch.tensor([[5, 6, 1]]), decoder_input_ids=ids).logits
    assert relative_error(session.extend(mx.array(ids.numpy())), expected) < 1e-4


WAYS = [
    Quantization(mode, bits, size)
    for mode, (widths, sizes) in MODES.items()
    for bits in widths
    for size in sizes
]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A checkpoint that is wide enough for every group size, and its draft."""
    folder = tmp_path_factory.mktemp("quantized")
    member = Member(untied=False, fields={"d_model": 128, "d_kv": 32, "d_ff": 128})
    publish(member, folder / "hf")
    publish(member, folder / "hf-draft", noise=0.05)
    convert.convert(folder / "hf-draft", folder / "draft")
    return folder


def on_a_gpu(monkeypatch):
    """Weights as they are stored: on a CPU they would become float32."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)


@pytest.mark.parametrize(
    "how, dtype",
    [
        *((how, "float32") for how in WAYS),
        *((Quantization.choose(mode), "bfloat16") for mode in MODES),
    ],
    ids=str,
)
def test_quantized(quantized, tmp_path, monkeypatch, how, dtype):
    """Packed products agree with the unpacked weights' in float32; and the text of the
    quantized target is its own, whatever is drafted for it."""
    convert.convert(quantized / "hf", tmp_path / "mlx", dtype, how)
    unpacked = Pair.load(str(tmp_path / "mlx"), str(quantized / "draft"))
    whole = t5.load(quantized / "draft")
    assert unpacked.target.model.dtype == mx.float32
    size = (tmp_path / "mlx" / "weights.npz").stat().st_size
    width = 4 if dtype == "float32" else 2
    assert size < (quantized / "draft" / "weights.npz").stat().st_size * width / 4

    ids = unpacked.tokenizer.encode(PROMPT)
    fed = mx.array([[0, 5, 7, 9, 3]])
    unpacked.target.start([ids])
    exact = np.array(unpacked.target.extend(fed))
    with monkeypatch.context() as patched:
        on_a_gpu(patched)
        packed = T5Session(t5.load(tmp_path / "mlx"), unpacked.target.vocabulary)
        packed.start([ids])
        logits = packed.extend(fed)
    scales = packed.model.embedding.scales
    assert scales.dtype in (mx.uint8, getattr(mx, dtype))
    got = np.array(logits.astype(mx.float32))
    # In float32 nothing but the order of sums differs, beside MLX unpacking the
    # floating-point modes into bfloat16; in bfloat16 activations are rounded as well.
    bound = 0.2 if dtype == "bfloat16" else 1e-4 if how.mode == "affine" else 0.02
    assert np.abs(got - exact).max() < bound * np.abs(exact).max()
    assert whole.embedding.weight.shape == unpacked.target.model.embedding.weight.shape

    plain = unpacked.generate(PROMPT, num_draft=0, max_tokens=20).finish()
    for num_draft in (1, 4):
        answer = unpacked.generate(PROMPT, num_draft=num_draft, max_tokens=20)
        assert answer.finish().tokens == plain.tokens


def test_quantized_error_is_that_of_the_weights(quantized, tmp_path):
    """More bits, nearer to the whole model."""
    errors = []
    convert.convert(quantized / "hf", tmp_path / "whole")
    for bits in (2, 4, 8):
        how = Quantization.choose(bits=bits)
        convert.convert(quantized / "hf", tmp_path / str(bits), "auto", how)
    logits = []
    for name in ("whole", "2", "4", "8"):
        session = T5Session(t5.load(tmp_path / name))
        session.start([[5, 6, 1]])
        logits.append(np.array(session.extend(mx.array([[0, 5, 7]]))))
    errors = [np.abs(each - logits[0]).max() for each in logits[1:]]
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] < 0.05 * np.abs(logits[0]).max()


def test_what_is_not_quantized(quantized, tmp_path):
    """Norms, position biases, and matrices whose rows are no whole groups."""
    convert.convert(
        quantized / "hf", tmp_path / "mlx", "auto", Quantization.choose(bits=4)
    )
    stored = mx.load(str(tmp_path / "mlx" / "weights.npz"))
    whole = [name for name in stored if f"{name[:-6]}scales" not in stored]
    assert all(
        "norm" in name or "position_bias" in name
        for name in whole
        if name.endswith("weight")
    )
    odd = tmp_path / "odd"
    publish(Member(untied=False, fields={"d_ff": 100}), odd / "hf")
    how = Quantization.choose(bits=4, group_size=32)
    convert.convert(odd / "hf", odd / "mlx", "auto", how)
    stored = mx.load(str(odd / "mlx" / "weights.npz"))
    assert "decoder.layers.0.feed_forward.wi.scales" in stored
    assert "decoder.layers.0.feed_forward.wo.scales" not in stored
    assert Pair.load(str(odd / "mlx")).generate(PROMPT, max_tokens=3).finish().tokens


@pytest.mark.parametrize(
    "mode, bits, size",
    [
        ("affine", 7, None),
        ("affine", 1, None),
        ("affine", 4, 16),
        ("mxfp4", 8, None),
        ("nvfp4", None, 32),
        ("int4", None, None),
    ],
)
def test_quantizations_that_do_not_exist(mode, bits, size):
    with pytest.raises(InputError, match="q-"):
        Quantization.choose(mode, bits, size)


def overflowing(folder: Path, where: str) -> Path:
    """A folder with a float16 and a float32 conversion of a model that leaves float16's
    range in one place."""

    def enlarge(oracle) -> None:
        for stack in (oracle.encoder, oracle.decoder):
            for block in stack.block:
                dense = block.layer[-1].DenseReluDense
                if where == "wo":
                    dense.wo.weight *= 3000
                else:
                    dense.wi_1.weight *= 8000

    publish(Member(fields=GATED), folder, change=enlarge)
    for dtype in ("float16", "float32"):
        convert.convert(folder, folder / dtype, dtype)
    return folder


def test_float16_beyond_its_range_in_wo(tmp_path, monkeypatch):
    """The stream and the last matrix are float32: the text is float32's."""
    folder = overflowing(tmp_path / "hf", "wo")
    exact = Pair.load(str(folder / "float32")).generate(PROMPT, max_tokens=20).finish()
    on_a_gpu(monkeypatch)
    half = Pair.load(str(folder / "float16"))
    assert half.target.model.dtype == mx.float16
    largest = []
    project = type(half.target.model.decoder.layers[0].feed_forward).__call__

    def watched(self, x, normed):
        result = project(self, x, normed)
        largest.append((result.dtype, mx.abs(result - x).max().item()))
        return result

    monkeypatch.setattr(model.FeedForward, "__call__", watched)
    answer = half.generate(PROMPT, max_tokens=20).finish()
    assert {dtype for dtype, _ in largest} == {mx.float32}
    assert max(value for _, value in largest) > 65504
    assert answer.tokens == exact.tokens


def test_float16_beyond_its_range_elsewhere(tmp_path, monkeypatch):
    """Named, not decoded into text."""
    folder = overflowing(tmp_path / "hf", "wi")
    with monkeypatch.context() as patched:
        on_a_gpu(patched)
        half = Pair.load(str(folder / "float16"))
        with pytest.raises(InputError, match=r"overflow in this.*--dtype bfloat16"):
            half.generate(PROMPT).finish()
    on_cpu = Pair.load(str(folder / "float16"))  # computed in float32
    assert on_cpu.generate(PROMPT, max_tokens=5).finish().tokens


def test_weights_beyond_float16(tmp_path):
    folder = tmp_path / "hf"

    def enlarge(oracle) -> None:
        oracle.lm_head.weight[3, 3] = 1e6

    publish(Member(), folder, change=enlarge)
    with pytest.raises(InputError, match=r"lm_head\.weight has numbers beyond float16"):
        convert.convert(folder, tmp_path / "mlx", "float16")
    assert not (tmp_path / "mlx").exists()


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byt5")
    byte_files(folder)
    return Tokenizer(folder)


@given(text=st.text(max_size=30), data=st.data())
def test_bytes_stream_in_whole_characters(byte_tokenizer, text, data):
    """ByT5's text, cut anywhere into rounds, is the decoded whole."""
    tokens = byte_tokenizer.encode(text)
    stream = TextStream(byte_tokenizer.decode)
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        assert "\ufffd" not in pieces[-1] or "\ufffd" in text
    pieces.append(stream.finish())
    assert "".join(pieces) == byte_tokenizer.decode(tokens) == text
