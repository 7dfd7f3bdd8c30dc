"""What strangers put into folders: refused in one line, soon, and nothing is run.

Each test is a kind of attack or damage; tests/fuzz.py makes many of each.
"""

import ast
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import save_tokenizer_confined, tiny_tokenizer
from safetensors.numpy import load_file, save_file

import benchmark
import convert
import main
import model
from architectures import t5
from checkpoints import converted, sources
from checkpoints.config import T5Config
from checkpoints.converted import WEIGHTS
from pair import Pair
from speculation.sampling import Sampling
from system import errors
from system.errors import InputError
from system.files import JSON_DEPTH, read_json
from text import confined, slow_tokenizer
from text.confined import Confined
from text.fast_tokenizer import FILE, is_plain
from text.tokenizer import Tokenizer
from training import train

PROJECT = Path(main.__file__).parent


@pytest.fixture
def hub(make, tmp_path):
    """A copy of a checkpoint."""
    return shutil.copytree(make()[1], tmp_path / "hub")


@pytest.fixture
def mlx(make, tmp_path):
    """A copy of its conversion."""
    return shutil.copytree(make()[2], tmp_path / "mlx")


def edit(path, **fields):
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


# JSON.


@pytest.mark.parametrize("depth", [JSON_DEPTH + 1, 1000, 10_000, 100_000])
@pytest.mark.parametrize("pair", ["[]", ("{" + '"a":', "}")], ids=["list", "dict"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_deep_json(hub, tmp_path, depth, pair, name):
    """Beyond Python's stack or not, nothing is nested like that."""
    deep = pair[0] * depth + ("1" if pair[0] != "[" else "") + pair[1] * depth
    text = (hub / name).read_text().rstrip().removesuffix("}")
    (hub / name).write_text(f'{text}, "x": {deep}}}')
    with pytest.raises(InputError, match="levels deep"):
        convert.convert(hub, tmp_path / "out")


def test_depth_that_is_fine(tmp_path):
    (tmp_path / "x.json").write_text('{"x":' + "[" * 62 + "]" * 62 + "}")
    assert read_json(tmp_path / "x.json")


def test_huge_json(tmp_path, monkeypatch):
    monkeypatch.setattr("system.files.JSON_BYTES", 1000)
    (tmp_path / "x.json").write_text(json.dumps({"x": "y" * 1000}))
    with pytest.raises(InputError, match="MB"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "fields", [{"d_ff": "\ud800"}, {"\ud800": 1}, {"tie_word_embeddings": "\ud800"}]
)
def test_half_a_character(hub, tmp_path, fields):
    """JSON can write what no text holds."""
    edit(hub / "config.json", **fields)
    with pytest.raises(InputError, match=r"no Unicode|d_ff"):
        convert.convert(hub, tmp_path / "out")
    sharded(hub, "x").joinpath("model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "b"}} | fields)
    )
    with pytest.raises(InputError):
        sources.open_checkpoint(hub)


WRONG = (None, True, "7", "1e400", [], {}, [7], 7.5, -1, 0, 1 << 31, 10**400)
SIZES = (
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
)


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", WRONG, ids=lambda value: str(value)[:10])
def test_sizes_of_the_wrong_kind(hub, field, value):
    """No size is a text, a truth, a list, half a number, or beyond all reason."""
    config = json.loads((hub / "config.json").read_text()) | {field: value}
    with pytest.raises(InputError, match=field):
        T5Config.from_dict(config, {})


@pytest.mark.parametrize(
    "value", ["1e400", "-1e400", "NaN", "0", "-1e-6", "2", "true", '"x"', "[]"]
)
def test_epsilon(hub, value):
    edit(hub / "config.json", layer_norm_epsilon="@")
    text = (hub / "config.json").read_text().replace('"@"', value)
    (hub / "config.json").write_text(text)
    with pytest.raises(InputError, match="layer_norm_epsilon"):
        T5Config.read(hub)


@pytest.mark.parametrize("config", ["config", "generation"])
@pytest.mark.parametrize("field", ["eos_token_id", "decoder_start_token_id"])
@pytest.mark.parametrize("value", ["1", 1.5, True, {}, [[1]], ["1"], 1 << 40, -7])
def test_ids_of_the_wrong_kind(hub, config, field, value):
    values = json.loads((hub / "config.json").read_text())
    given = {field: value}
    both = (values | given, {}) if config == "config" else (values, given)
    with pytest.raises(InputError, match=field):
        T5Config.from_dict(*both)


@pytest.mark.parametrize("kind", [None, 3, [], {}, ["t5"], True])
def test_a_model_type_that_is_no_name(hub, mlx, tmp_path, kind):
    for folder in (hub, mlx):
        edit(folder / "config.json", model_type=kind)
    with pytest.raises(InputError):
        convert.convert(hub, tmp_path / "out")
    with pytest.raises(InputError):
        Pair.load(str(mlx))


# Sizes that the weights do not have.


@pytest.mark.parametrize(
    "fields",
    [
        {"num_layers": 1000},
        {"num_decoder_layers": 1000},
        {"vocab_size": 1 << 24},
        {"d_model": 1 << 24},
        {"d_ff": 1 << 24},
        {"num_heads": 1 << 12, "d_kv": 1 << 12},
    ],
    ids=str,
)
def test_larger_than_the_weights(hub, mlx, tmp_path, fields, monkeypatch):
    """Said before a model of that size is built, whose layers alone take gigabytes."""
    for folder in (hub, mlx):
        edit(folder / "config.json", **fields)

    def built(*_):
        raise AssertionError

    monkeypatch.setattr(model.T5, "__init__", built)
    with pytest.raises(InputError, match="does not fit the weights"):
        convert.convert(hub, tmp_path / "out")
    with pytest.raises(InputError, match="does not fit the weights"):
        t5.load(mlx)


@pytest.mark.parametrize("fields", [{"num_layers": 1_000_000}, {"d_ff": 1 << 31}])
def test_beyond_all_reason(hub, fields):
    """Also where there are no weights: benchmark.py --target-config."""
    edit(hub / "config.json", **fields)
    with pytest.raises(InputError, match="odd value"):
        T5Config.read(hub)


def npz_with(path: Path, change) -> None:
    """Write an npz anew, its members' headers changed: ``change(name, header)``."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, raw in members.items():
            (size,) = struct.unpack_from("<H", raw, 8)
            header = change(name, raw[10 : 10 + size]).ljust(size - 1)[: size - 1]
            archive.writestr(name, raw[:10] + header + b"\n" + raw[10 + size :])


@pytest.mark.parametrize(
    "dtype", ["<u4", "|O", "<i4", ">f4", "<M8", "|S4", "<U1", "<f9", "|V4", "<c8"]
)
def test_numbers_by_another_name(mlx, dtype):
    """float32 called integers would load, and the text would be nonsense."""
    npz_with(mlx / WEIGHTS, lambda _, header: header.replace(b"<f4", dtype.encode()))
    with pytest.raises(InputError, match=r"dtype|holds uint32|npy header|size"):
        t5.load(mlx)


@pytest.mark.parametrize(
    "shape", ["()", "(-96, -32)", "(96, 32, 1)", "(3072,)", "(96L, 32)", "(9" * 3000]
)
def test_shapes_by_another_name(mlx, shape):
    def change(name, header):
        return header.replace(b"(96, 32)", shape.encode())

    npz_with(mlx / WEIGHTS, change)
    with pytest.raises(InputError):
        t5.load(mlx)


def test_a_header_that_is_a_program(mlx):
    """An npy header is a Python literal: nothing of it is evaluated here."""
    bomb = b"{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os'),)}"
    npz_with(mlx / WEIGHTS, lambda *_: bomb)
    with pytest.raises(InputError, match="npy header"):
        t5.load(mlx)


@pytest.fixture(scope="module")
def quantized(make, tmp_path_factory):
    from checkpoints.config import Quantization

    folder = tmp_path_factory.mktemp("quantized")
    convert.convert(
        make()[1], folder / "x", quantization=Quantization.choose(bits=4, group_size=32)
    )
    return folder / "x"


@pytest.mark.parametrize(
    "noted",
    [
        {"bits": 4, "group_size": 128},
        {"bits": 4, "group_size": 64},
        {"bits": 3, "group_size": 32},
        {"bits": 7, "group_size": 32},
        {"bits": "4", "group_size": 32},
        {"bits": 4, "group_size": 0},
        {"bits": 4, "group_size": -32},
        {"bits": 4, "group_size": 32, "mode": "mxfp4"},
        {"bits": 4, "group_size": 32, "mode": []},
        {"bits": 4},
        [4, 32],
        None,
    ],
    ids=str,
)
def test_quantized_in_another_way(quantized, tmp_path, noted):
    folder = shutil.copytree(quantized, tmp_path / "x")
    edit(folder / "config.json", quantization=noted)
    with pytest.raises(InputError):
        t5.load(folder)


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_quantized_numbers_by_another_name(quantized, tmp_path, part):
    """Packed integers called floats, scales called integers."""
    folder = shutil.copytree(quantized, tmp_path / "x")
    name = f"decoder.layers.0.attention.o.{part}.npy"
    swap = {b"<u4": b"<f4", b"<f4": b"<u4"}

    def change(member, header):
        found = re.search(b"<[uf]4", header)
        if member != name or not found:
            return header
        return header.replace(found[0], swap[found[0]])

    npz_with(folder / WEIGHTS, change)
    with pytest.raises(InputError, match=f"{name[:-4]} holds"):
        t5.load(folder)


# Checkpoints.


def header_with(folder: Path, change) -> None:
    """Change the header of model.safetensors, a dict, in place."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (size,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


ENTRY = "shared.weight"


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": []},
        {"shape": [96]},
        {"shape": [-96, -32]},
        {"shape": [1 << 62, 4]},
        {"shape": [96.0, 32]},
        {"shape": [1] * 17},
        {"shape": "96"},
        {"data_offsets": [0, 1 << 60]},
        {"data_offsets": [-4, 12284]},
        {"data_offsets": [0]},
        {"data_offsets": [5, 3]},
        {"data_offsets": None},
        {"dtype": "F128"},
        {"dtype": 3},
        {"dtype": "F16"},
        {"dtype": "F64"},
    ],
    ids=str,
)
def test_headers_of_safetensors(hub, tmp_path, fields):
    header_with(hub, lambda header: header[ENTRY].update(fields))
    with pytest.raises(InputError):
        convert.convert(hub, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_over_each_other(hub, tmp_path):
    """A small file that would make a large model of one run of bytes."""

    def change(header):
        places = {str(entry.get("shape")): entry for entry in header.values()}
        for entry in header.values():
            entry.update(places[str(entry.get("shape"))])

    header_with(hub, change)
    with pytest.raises(InputError, match="does not begin where"):
        convert.convert(hub, tmp_path / "out")


def test_numbers_where_matrices_belong(hub, tmp_path):
    tensors = load_file(hub / "model.safetensors")
    save_file(tensors | {ENTRY: np.array(3, np.float32)}, hub / "model.safetensors")
    with pytest.raises(InputError, match="does not fit"):
        convert.convert(hub, tmp_path / "out")


def sharded(folder: Path, shard: str) -> Path:
    (folder / "model.safetensors").unlink(missing_ok=True)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {ENTRY: shard}}))
    return folder


@pytest.mark.parametrize(
    "shard",
    [
        "../other/model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        "model.safetensors/",
        "a\0b",
        "..\\x",
    ],
    ids=repr,
)
def test_an_index_names_files_of_its_own_folder(hub, tmp_path, shard):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(hub / "model.safetensors", other)
    with pytest.raises(InputError, match="no file of its folder"):
        convert.convert(sharded(hub, shard), tmp_path / "out")


@pytest.mark.parametrize("value", [{"weight_map": {"a": 3}}, {"weight_map": []}, {}])
def test_an_index_of_something_else(hub, value):
    sharded(hub, "x").joinpath("model.safetensors.index.json").write_text(
        json.dumps(value)
    )
    with pytest.raises(InputError, match="weight_map"):
        sources.open_checkpoint(hub)


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "tokenizer.json", "spiece.model"),
        *("model.safetensors", "shard.safetensors", "special_tokens_map.json"),
    ],
)
def test_pipes_and_devices(hub, tmp_path, name):
    """A pipe waits for somebody to write, a device need not end: neither is opened."""
    if name == "shard.safetensors":
        sharded(hub, name)
    (hub / name).unlink(missing_ok=True)
    os.mkfifo(hub / name)
    with pytest.raises(InputError, match="pipe or a device"):
        convert.convert(hub, tmp_path / "out")
    (hub / name).unlink()
    (hub / name).symlink_to("/dev/zero")
    with pytest.raises(InputError, match="pipe or a device"):
        convert.convert(hub, tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", FILE])
def test_pipes_in_a_converted_folder(mlx, name):
    (mlx / name).unlink()
    os.mkfifo(mlx / name)
    with pytest.raises(InputError, match="pipe or a device"):
        Pair.load(str(mlx))


# Tokenizers.


def tokenizer_with(folder: Path, **parts) -> Path:
    tiny_tokenizer().save_pretrained(folder)
    edit(folder / FILE, **parts)
    return folder


REPLACE = {"type": "Replace", "pattern": {"String": "a"}}

ADDED = {"id": 96, "content": "x", "special": False, "normalized": False}
ADDED |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)


def replace(regex: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {"Regex": regex}, "content": content}


def table(raw: str) -> dict:
    return {"type": "Precompiled", "precompiled_charsmap": raw}


def several(*parts: dict) -> dict:
    return {"type": "Sequence", "normalizers": list(parts)}


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


def template(tokens: int, ids: int) -> dict:
    """Tokens around a text, each of which stands for several ids: they multiply."""
    token = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    special = {"</s>": {"id": "</s>", "ids": [1] * ids, "tokens": ["</s>"] * ids}}
    return {
        "type": "TemplateProcessing",
        "single": [text, *[token] * (tokens - 1)],
        "pair": [text],
        "special_tokens": special,
    }


TEXT = {"Sequence": {"id": "A", "type_id": 0}}
PROCESSORS = [template(2, 1), template(2, 1)]


@pytest.mark.parametrize(
    "parts, plain",
    [
        ({}, True),
        ({"normalizer": {"type": "NFKC"}}, True),
        ({"normalizer": REPLACE | {"content": "b"}}, True),
        ({"normalizer": REPLACE | {"content": "bb"}}, False),
        ({"normalizer": REPLACE | {"content": 3}}, False),
        ({"normalizer": REPLACE | {"pattern": {"String": ""}, "content": "b"}}, False),
        ({"normalizer": replace(" {2,}", " ")}, True),
        ({"normalizer": replace("(a+)+", "")}, False),
        ({"normalizer": {"type": "Prepend", "prepend": "▁"}}, True),
        ({"normalizer": {"type": "Prepend", "prepend": "▁" * 99}}, False),
        ({"normalizer": table("AAAAAA==")}, True),  # a trie of no bytes
        ({"normalizer": table("?")}, False),
        ({"normalizer": table("A" * 400)}, True),
        ({"normalizer": table("AAAAgA==")}, False),  # a trie of 2 GB, it says
        ({"normalizer": table("AAAAAE" + "F" * 98)}, False),
        ({"normalizer": several(*[{"type": "NFC"}] * 16)}, True),
        ({"normalizer": several(*[{"type": "NFC"}] * 17)}, False),
        ({"normalizer": several(table("AAAA"), table("AAAA"))}, False),
        ({"normalizer": several(several())}, False),
        ({"normalizer": {"type": "Unheard"}}, False),
        ({"normalizer": {"type": ["NFC"]}}, False),
        ({"normalizer": several({"type": {}})}, False),
        ({"normalizer": several({"type": "NFKC"}, {"type": "NFKD"})}, True),
        ({"normalizer": several(*[{"type": "ByteLevel"}] * 3)}, False),
        ({"decoder": {"type": "BPEDecoder", "suffix": ""}}, False),
        ({"decoder": {"type": "BPEDecoder", "suffix": "</w>"}}, True),
        ({"decoder": {"type": {}}}, False),
        ({"pre_tokenizer": {"type": []}}, False),
        ({"added_tokens": [ADDED | {"content": "x" * 2000}]}, False),
        ({"added_tokens": [{"content": 3}]}, None),
        ({"normalizer": [3]}, False),
        ({"pre_tokenizer": SPLIT | {"pattern": {"Regex": r"\s+"}}}, True),
        ({"pre_tokenizer": SPLIT | {"pattern": {"Regex": r"(\w+\s?)+$"}}}, False),
        ({"pre_tokenizer": SPLIT | {"pattern": {"String": "x"}}}, True),
        ({"post_processor": template(2, 64)}, True),
        ({"post_processor": template(65, 1)}, False),
        ({"post_processor": template(2, 65)}, False),
        ({"post_processor": template(2, 1) | {"pair": [TEXT, TEXT]}}, False),
        ({"post_processor": {"type": "Sequence", "processors": PROCESSORS}}, False),
        ({"post_processor": {"type": "Unheard"}}, False),
        ({"decoder": {"type": "CTC"}}, False),
        ({"decoder": REPLACE | {"content": "b" * 9}}, False),
    ],
    ids=lambda value: str(value)[:60],
)
def test_parts_that_are_known(tmp_path, parts, plain):
    """Only what takes time and memory in proportion to a text runs in this process."""
    folder = tokenizer_with(tmp_path, **parts)
    if plain is None:
        with pytest.raises(InputError, match="cannot read"):
            is_plain(folder)
    else:
        assert is_plain(folder) == plain


def test_published_tokenizers_are_plain(make):
    """No process is started for what everybody has."""
    assert is_plain(make()[2])
    assert is_plain(PROJECT / "demo" / "target")
    assert is_plain(PROJECT / "demo" / "draft")


def test_a_regular_expression_that_runs_long(tmp_path):
    """Cut off after some seconds of computing; short texts it splits, elsewhere."""
    slow = SPLIT | {"pattern": {"Regex": r"\w*\w*(?!.)(?<!a)"}}
    tokenizer = Tokenizer(tokenizer_with(tmp_path, pre_tokenizer=slow))
    assert tokenizer.encode("the cat")[-1] == 1
    assert tokenizer.decode(tokenizer.encode("cat")).strip() == "cat"
    with pytest.raises(InputError, match="longer than it may"):
        tokenizer.encode("a" * 2500)
    assert tokenizer.encode("the cat")[-1] == 1  # --interactive goes on


def test_replacements_that_grow(tmp_path):
    """One character becomes a terabyte: a limit of memory, not this machine's end."""
    if sys.platform != "linux":
        pytest.skip("macOS does not enforce the limit")
    grow = REPLACE | {"content": "a" * 10_000}
    bomb = several(grow, grow, grow)
    tokenizer = Tokenizer(tokenizer_with(tmp_path, normalizer=bomb))
    with pytest.raises(InputError, match="crashes or takes more"):
        tokenizer.encode("a")


def test_templates_that_multiply(tmp_path):
    """A file of a megabyte whose template adds four thousand million ids."""
    if sys.platform != "linux":
        pytest.skip("macOS does not enforce the limit")
    folder = tokenizer_with(tmp_path, post_processor=template(20_000, 200_000))
    with pytest.raises(InputError, match=r"crashes or takes|longer than it may"):
        Tokenizer(folder).encode("a")


def test_a_panic_is_one_line(tmp_path, capfd):
    """Rust prints a page to stderr, and what it raises is no Exception."""
    token = {"id": 96, "content": "\x00", "special": False, "normalized": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    bert = {"type": "BertNormalizer", "clean_text": True, "lowercase": False}
    bert |= {"handle_chinese_chars": False, "strip_accents": None}
    folder = tokenizer_with(tmp_path, normalizer=bert, added_tokens=[token | flags])
    assert is_plain(folder)
    with pytest.raises(InputError, match=r"cannot use .*tokenizer\.json"):
        Tokenizer(folder).encode("the £ cat")
    assert capfd.readouterr().err == ""
    print("still there", file=sys.stderr, flush=True)
    assert capfd.readouterr().err == "still there\n"


@pytest.mark.parametrize(
    "model, message",
    [
        ({"type": "WordLevel", "vocab": {}, "unk_token": "x"}, "without tokens"),
        (
            {"type": "WordLevel", "vocab": {"a": 1, "b": 1}, "unk_token": "a"},
            "two tokens",
        ),
        ({"type": "Unigram", "vocab": [], "unk_id": 5}, "cannot use|without tokens"),
        ({"type": "Unigram", "vocab": [["a", "x"]]}, "cannot read"),
        ({"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}, "cannot use"),
        ({"type": "Nothing"}, "cannot use"),
        ({}, "cannot use"),
    ],
    ids=str,
)
def test_vocabularies(tmp_path, model, message):
    folder = tokenizer_with(tmp_path, model=model, post_processor=None, added_tokens=[])
    with pytest.raises(InputError, match=message):
        Tokenizer(folder)


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"model": 3}', b'"\\ud800"']
)
def test_no_tokenizer_json(tmp_path, raw):
    (tmp_path / FILE).write_bytes(raw)
    with pytest.raises(InputError, match="cannot read"):
        Tokenizer(tmp_path)


def test_text_that_is_none_inside_a_part(tmp_path):
    """A part is taken apart later than the file: it is damaged all the same."""
    folder = tokenizer_with(tmp_path, normalizer={"type": "NFC", "z": "?"})
    raw = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(raw.replace(b'"?"', b'"\x80"'))
    with pytest.raises(InputError, match="cannot read"):
        Tokenizer(folder)


def test_an_id_beyond_the_embedding(mlx):
    """Tokens may have ids that the model lacks rows for: nothing gets that size."""
    vocabulary = json.loads((mlx / FILE).read_text())["model"]["vocab"]
    words = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    words["far"] = 4_000_000_000
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    edit(mlx / FILE, model=model, decoder=None)
    pair = Pair.load(str(mlx))
    assert pair.tokenizer.size == 4_000_000_001
    assert pair.generate("the cat", max_tokens=3).finish().tokens


@pytest.fixture
def chat(tmp_path):
    """A tokenizer whose chat template is ``text``."""

    def with_template(text: str) -> Tokenizer:
        tiny_tokenizer().save_pretrained(tmp_path)
        (tmp_path / "chat_template.jinja").write_text(text)
        return Tokenizer(tmp_path)

    return with_template


MESSAGES = [{"role": "user", "content": "the cat"}]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ messages[0]['content'] }}", None),
        (LOOPS, "longer than it may"),
        ("{{ 'a' * 10**11 }}", "fails|crashes"),
    ],
)
def test_chat_templates(chat, template, message, tmp_path, monkeypatch):
    """Programs: confined."""
    monkeypatch.chdir(tmp_path)
    tokenizer = chat(template)
    if message is None:
        assert tokenizer.encode_chat(MESSAGES)
    else:
        with pytest.raises(InputError, match=message):
            tokenizer.encode_chat(MESSAGES)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('touch ran') }}", "unsafe"),
        ("{% for", "fails"),
    ],
)
def test_what_jinjas_sandbox_forbids(chat, template, message, tmp_path, monkeypatch):
    """What happens in the process that a template is confined to."""
    monkeypatch.chdir(tmp_path)
    chat(template)
    with pytest.raises(InputError, match=message):
        slow_tokenizer.open_folder(tmp_path).encode_chat(MESSAGES)
    assert not (tmp_path / "ran").exists()


# What another program than this one opens, or makes.


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny decoder-only checkpoint."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "x")
    tiny_tokenizer().save_pretrained(folder / "x")
    return folder / "x"


def other_weights(folder):
    (folder / "model-evil.safetensors").write_bytes(struct.pack("<Q", 8) + b'{"a":[[[')


def other_quantization(folder):
    (folder / "hf_quant_config.json").write_text('{"a": ' + "[" * 999 + "]" * 999 + "}")


def many_layers(folder):
    edit(folder / "config.json", num_hidden_layers=30)


def layers_of_nothing(folder):
    tensors = load_file(folder / "model.safetensors")
    empty = {f"x.{i}": np.zeros(0, np.float32) for i in range(2000)}
    save_file(tensors | empty, folder / "model.safetensors")
    edit(folder / "config.json", num_hidden_layers=900)


def other_counts(folder):
    edit(folder / "config.json", num_kv_reuse_layers=1_000_000)


def endless_count(folder):
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(text + ', "num_experts": 1e400}')


def vocabulary_without_rows(folder):
    """The tokenizer's ids go as far as the config says, and the weights do not."""
    words = {f"w{i}": i for i in range(95)} | {"far": 4_000_000_000}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    edit(folder / FILE, model=model, added_tokens=[], post_processor=None)
    edit(folder / "config.json", model_type="mistral3", vocab_size=1 << 33)
    inner = json.loads((folder / "config.json").read_text())
    inner |= {"model_type": "llama", "vocab_size": 96}
    edit(folder / "config.json", text_config=inner)


def odd_positions(folder):
    edit(folder / "config.json", max_position_embeddings=True)


def odd_vocabulary(folder):
    edit(folder / "config.json", vocab_size="96")


@pytest.mark.parametrize(
    "change",
    [
        *(many_layers, layers_of_nothing, other_counts),
        *(endless_count, vocabulary_without_rows, odd_positions),
        odd_vocabulary,
    ],
)
def test_decoder_only_folders(llama, tmp_path, change):
    """mlx-lm makes what a config says, and opens what it finds: both are checked."""
    folder = shutil.copytree(llama, tmp_path / "x")
    change(folder)
    with pytest.raises(InputError):
        Pair.load(str(folder))


@pytest.mark.parametrize("change", [other_weights, other_quantization])
def test_files_that_mlx_lm_alone_would_open(llama, tmp_path, change):
    """They are no part of the checkpoint, and are left alone."""
    folder = shutil.copytree(llama, tmp_path / "x")
    change(folder)
    texts = [Pair.load(str(each)).generate("the cat") for each in (llama, folder)]
    assert texts[0].finish().tokens == texts[1].finish().tokens


def test_positions_beyond_a_number(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "x")
    edit(folder / "config.json", max_position_embeddings=10**12)
    pair = Pair.load(str(folder))
    warm = Sampling(temperature=1)
    for answer in pair.samples("the cat", 2, sampling=warm, max_tokens=3):
        assert answer.finish().tokens


def test_positions_that_have_no_embedding(tmp_path):
    """GPT-2's are looked up: the weights say how many there are, not the config."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=96, eos_token_id=1, **sizes))
    gpt2.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert Pair.load(str(tmp_path)).generate("cat", max_tokens=2).finish().tokens
    weights = load_file(tmp_path / "model.safetensors")
    assert any(value.shape[0] == 16 for name, value in weights.items() if "wpe" in name)
    with pytest.raises(InputError, match="positions for 16"):
        Pair.load(str(tmp_path)).generate("the cat " * 30).finish()
    # By its other name, which transformers goes by.
    edit(tmp_path / "config.json", max_position_embeddings=1_000_000, n_ctx=16)
    with pytest.raises(InputError, match="n_positions is 16"):
        Pair.load(str(tmp_path))


def test_long_tokens(tmp_path):
    """The library has a node of a hundred bytes for each byte of a token."""
    vocabulary = [["<unk>", 0.0], ["a" * 2000, -1.0]]
    model = {"type": "Unigram", "vocab": vocabulary, "unk_id": 0}
    assert not is_plain(tokenizer_with(tmp_path, model=model))
    vocabulary = [["<unk>", 0.0], *([f"{i:0900}", -1.0] for i in range(10_000))]
    model = {"type": "Unigram", "vocab": vocabulary, "unk_id": 0}
    assert not is_plain(tokenizer_with(tmp_path, model=model))


def test_large_parts(tmp_path):
    part = {"type": "NFC", "z": [[]] * 2_000_000}
    assert not is_plain(tokenizer_with(tmp_path, normalizer=part))


def test_files_that_lift_no_limit(chat, tmp_path):
    """A confined program's limits grow with its tokenizer, not with what lies by."""
    tokenizer = chat(LOOPS)
    with (tmp_path / "junk.json").open("wb") as junk:
        junk.truncate(10**10)
    with pytest.raises(InputError, match="longer than it may"):
        tokenizer.encode_chat([{"role": "user", "content": "the cat"}])


def test_many_names_of_one_file(hub):
    (hub / "model.safetensors").rename(hub / "real")
    shards = {f"t{i}": f"model-{i}.safetensors" for i in range(3)}
    for shard in shards.values():
        (hub / shard).symlink_to("real")
    index = hub / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(InputError, match="named before"):
        sources.open_checkpoint(hub)
    index.write_text(json.dumps({"weight_map": {str(i): str(i) for i in range(3000)}}))
    with pytest.raises(InputError, match="over 2000 files"):
        sources.open_checkpoint(hub)


def test_one_tensor_in_two_files(hub):
    for number in range(2):
        shutil.copy(hub / "model.safetensors", hub / f"model-{number}.safetensors")
    (hub / "model.safetensors").unlink()
    shards = {str(i): f"model-{i}.safetensors" for i in range(2)}
    index = hub / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(InputError, match="is in two files"):
        sources.open_checkpoint(hub)


def test_list_is_fit_for_a_terminal(mlx, tmp_path, monkeypatch, capsys):
    """Names in a folder of models/ forge no line, and are no size of memory."""
    models = tmp_path / "models"
    monkeypatch.setattr(converted, "MODELS", models)
    monkeypatch.setattr("sys.argv", ["convert.py", "--list"])
    shutil.copytree(mlx, models / "a")
    with zipfile.ZipFile(models / "a" / WEIGHTS, "w") as archive:
        archive.writestr("\x1b[2J\nb: 11000.0 M parameters", b"")
    shutil.copytree(mlx, models / "c")
    edit(models / "c" / "config.json", num_layers=1000, d_model=1 << 24)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    convert.main()
    sys.stdout.flush()
    lines = sys.stdout.buffer.getvalue().decode().splitlines()
    assert [line[:3] for line in lines] == ["a: ", "c: "]
    assert all(line.isprintable() for line in lines)
    assert "does not fit" in lines[1]


def test_a_name_that_is_not_utf8(hub, tmp_path):
    """Folders may be called anything: a good one works, of a bad one it is said why."""
    if sys.platform == "darwin":
        pytest.skip("macOS has no such names")
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/odd \xff\n"))
    hub.rename(folder)
    is_quiet(program("convert.py", "--model", folder, "--output", tmp_path / "out"))
    assert (tmp_path / "out" / WEIGHTS).is_file()
    (folder / FILE).write_text("{")
    bad = program("convert.py", "--model", folder, "--output", tmp_path / "out")
    assert bad.returncode == 2
    is_quiet(bad)
    assert "EOF while parsing" in bad.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(mlx, hub, tmp_path, closed):
    """As cron starts programs: no traceback, and nothing but answers on stdout."""
    start = f"main.py --model {mlx} --draft-model none --max-tokens 2"
    answers = {f"{start} --prompt the": 1, f"{start} --json": 1}
    # What they read is closed as well: there are no prompts, or one.
    lines = 0 if "<&-" in closed else 1
    answers |= {f"{start} --prompt -": lines, f"{start} --interactive": lines}
    turn = f"convert.py --model {hub} --output {tmp_path / 'out'}"
    helps, errors = ["main.py --help"], ["main.py --nothing"]
    if closed == "<&- >&- 2>&-":
        helps += ["convert.py --help", "benchmark.py --help"]
        errors += [
            f"main.py --model {tmp_path}",
            "convert.py --no",
            "benchmark.py --no",
        ]
    for command in (*answers, turn, "convert.py --list", *helps, *errors):
        result = subprocess.run(
            f"{sys.executable} {command} {closed}",
            shell=True,
            cwd=PROJECT,
            input="the cat\n",
            capture_output=True,
            text=True,
        )
        assert result.returncode == (2 if command in errors else 0), result.stderr
        assert "Traceback" not in result.stderr + result.stdout
        out = result.stdout.splitlines()
        if ">&- " in f"{closed} " and closed != "2>&-":
            assert not out
        elif command in answers:
            assert len(out) == answers[command]
        elif command in errors:
            assert not out
            assert len(result.stderr.splitlines()) == (closed != "2>&-")


# The process that is confined.


def test_a_crash_elsewhere_is_an_error_here(tmp_path, monkeypatch):
    """Killed, hung or out of memory: one line, and the process is gone."""
    (tmp_path / "misbehaving.py").write_text(MISBEHAVING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for method, message in (
        ("crash", "crashes"),
        ("compute", "longer than it may"),
        ("fill", "fails|crashes"),
        ("sleep", "does not end"),
        ("leave", "fails"),
        ("private", "fails"),
    ):
        with monkeypatch.context() as patch:
            process = Confined("misbehaving", tmp_path)
            assert process.call("add", 2, 3) == 5
            if method == "sleep":  # whoever computes may take any time to begin
                patch.setattr(confined, "PATIENCE", 0.5)
            with pytest.raises(InputError, match=message):
                process.call(method)
            if method in ("crash", "sleep", "compute"):
                assert process._process.poll() is not None


MISBEHAVING = """
import os, sys, time
class Program:
    def add(self, a, b):
        print("nobody reads this")
        return a + b
    def crash(self):
        os.abort()
    def compute(self):
        while True:
            pass
    def fill(self):
        return len(b"x" * (1 << 40))
    def sleep(self):
        time.sleep(100)
    def leave(self):
        input()
    def private(self):
        return object()
def open_folder(folder):
    return Program()
"""


def test_the_tokenizer_is_saved_from_a_process_of_its_own(hub, tmp_path):
    """As convert.py does it; the other tests do it in theirs, which is faster."""
    (tmp_path / "out").mkdir()
    save_tokenizer_confined(hub, tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out")
    assert tokenizer.same_ids(Tokenizer(hub))
    (hub / FILE).write_text("{")
    with pytest.raises(InputError, match=r"cannot use .*tokenizer\.json"):
        save_tokenizer_confined(hub, tmp_path / "out")


# Code that comes along.


def with_code(folder: Path) -> Path:
    """Add Python that leaves a mark when it is run, wherever a file can name it."""
    code = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
    for name in ("evil", "tokenization_evil", "modeling_evil", "configuration_evil"):
        (folder / f"{name}.py").write_text(code)
    edit(
        folder / "config.json",
        auto_map={
            "AutoConfig": "configuration_evil.Config",
            "AutoModelForSeq2SeqLM": "modeling_evil.Model",
            "AutoModelForCausalLM": "modeling_evil.Model",
        },
    )
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_evil.A", "tokenization_evil.B"]},
    )
    return folder


def program(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run one of ours, with somebody at the keyboard who says yes to everything."""
    return subprocess.run(
        [sys.executable, str(PROJECT / name), *map(str, arguments)],
        input="y\n" * 50,
        capture_output=True,
        text=True,
    )


def is_quiet(result: subprocess.CompletedProcess) -> None:
    assert result.returncode in (0, 2), result.stderr
    assert "Traceback" not in result.stderr
    assert "trust" not in result.stdout
    if result.returncode:
        assert len(result.stderr.splitlines()) == 1, result.stderr


def test_no_code_of_a_checkpoint_runs(hub, mlx, tmp_path, monkeypatch, capsys):
    """convert.py; main.py with and without a tokenizer.json; a baseline; training."""

    def inside(module, *arguments: object) -> None:
        """Likewise in this process, which is sooner ready."""
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 50))
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        assert errors.run(module.main, "program") in (0, 2)
        assert "trust" not in capsys.readouterr().out

    with_code(hub)
    with_code(mlx)
    inside(convert, "--model", hub, "--output", tmp_path / "out")
    ask = ("--model", mlx, "--prompt", "the", "--max-tokens", 2)
    inside(main, *ask, "--draft-model", "none")
    (tmp_path / "prompts").write_text("the cat\n")
    run = ("--model", mlx, "--draft-model", "none", "--num-draft", 0)
    run += ("--prompts", tmp_path / "prompts", "--baseline", "transformers")
    inside(benchmark, *run)
    (tmp_path / "texts").write_text("the cat\n" * 2000)
    run = ("--teacher", hub, tmp_path / "texts", "--output", tmp_path / "t")
    inside(train, *run, "--minutes", 0.01)
    (mlx / FILE).unlink()
    is_quiet(program("main.py", *ask))
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("way", ["model_file", "auto_map", "chat"])
def test_no_code_of_a_decoder_only_model_runs(hub, tmp_path, way):
    """mlx-lm runs a folder's model_file, transformers what auto_map names."""
    with_code(hub)
    flags = []
    if way == "model_file":
        edit(hub / "config.json", model_type="evil", model_file="evil.py", auto_map=...)
    elif way == "auto_map":
        edit(hub / "config.json", model_type="evil")
    else:
        edit(hub / "config.json", model_type="gpt2", auto_map=...)
        (hub / FILE).unlink()
        flags = ["--chat"]
    result = program("main.py", "--model", hub, "--prompt", "the", *flags)
    assert result.returncode == 2
    is_quiet(result)
    if not flags:
        assert "no code that comes with a model is run here" in result.stderr
        assert way in result.stderr
    assert not list(tmp_path.rglob("ran"))


def test_no_call_trusts_a_folder():
    """Whatever reads a folder through transformers says that its code is not run."""
    for path in [*PROJECT.glob("*.py"), *PROJECT.glob("demo/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(
                node.func, ast.Attribute
            ):
                continue
            if node.func.attr != "from_pretrained":
                continue
            if ast.unparse(node.func.value) == "GenerationConfig":
                continue  # it has no code to trust
            said = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert said.get("trust_remote_code") == "False", f"{path}:{node.lineno}"


# What is printed.


def test_messages_are_fit_for_a_terminal(hub, tmp_path, capsys):
    """A file's names may hold escape sequences, newlines, or megabytes."""
    name = "x\x1b]0;owned\x07\n\u202e" + "y" * 100_000

    def fail():
        raise InputError(f"the checkpoint has {name}")

    assert errors.run(fail, "convert.py") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said[:-1].isprintable()
    assert len(said) < 2 * errors.LENGTH
    assert "\\x1b" in said
