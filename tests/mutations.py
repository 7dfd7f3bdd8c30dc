"""Damaged and hostile files: real ones with their bytes or their meaning changed.

Every ``make_*`` changes one kind of file in a folder that is a copy of a real one, by a
random generator alone: the same generator makes the same bytes. fuzz.py has them read.
"""

import base64
import json
import math
import os
import pickle
import pickletools
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ("the cat sat on a mat é漢😀", "", " \0\t", "a" * 40 + "b", "</s><extra_id_0>▁")
#: What lies beside the input and is none of the reader's business.
SECRET = "secret"
#: A make() returns this where reading the input must not succeed.
REFUSE = "refuse"


# The seeds.


def seeds() -> Path:
    """The folder that the readers' files are in."""
    return Path(os.environ["FUZZ_SEEDS"])


def make_seeds(folder: Path) -> None:
    """Make them, in a process that is none of the fuzzer's: this computes."""
    import sentencepiece
    import torch
    from conftest import VOCABULARY, save_checkpoint, tiny_torch

    import convert
    from checkpoints.config import Quantization

    hf = save_checkpoint(tiny_torch(8), folder / "hf")
    sharded = folder / "hf-sharded"
    save_checkpoint(tiny_torch(8), sharded, max_shard_size="40KB")
    for name in ("spm", "hf-zip", "hf-legacy", "hf-bin-sharded"):
        shutil.copytree(hf, folder / name)
        if name != "spm":
            (folder / name / "model.safetensors").unlink()
    state = {
        name: torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape)
        for name, shape, data in _weights(hf)
    }
    torch.save(state, folder / "hf-zip" / "pytorch_model.bin")
    old = legacy(pickled(_weights(hf)), _weights(hf))
    (folder / "hf-legacy" / "pytorch_model.bin").write_bytes(old)
    files = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
    for file in set(files.values()):
        part = {name: value for name, value in state.items() if files[name] == file}
        torch.save(part, folder / "hf-bin-sharded" / file)
    index = folder / "hf-bin-sharded" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))

    spm = folder / "spm"
    (spm / "tokenizer.json").unlink()
    rng = Random(0)
    words = [*TEXTS[0].split()[:6], "and", "saw", "dogs", "run", "over", "red", "hills"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(rng.choices(words, k=7)) for _ in range(400)),
        model_prefix=str(spm / "spiece"),
        vocab_size=90,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    (spm / "spiece.vocab").unlink()
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 10} | special
    (spm / "tokenizer_config.json").write_text(json.dumps(config))
    assert VOCABULARY >= 90

    (folder / "pickle").mkdir()
    four = Quantization.choose(bits=4, group_size=32)
    for name, dtype, how in (
        ("mlx-f32", "float32", None),
        ("mlx-bf16", "bfloat16", None),
        ("mlx-q", "float32", four),
    ):
        convert.convert(hf, folder / name, dtype, how)
        (folder / name / "conversion.json").unlink()


# Bytes.

_LENGTHS = [struct.pack("<Q", n) for n in (0, 1 << 31, 1 << 63, (1 << 64) - 1)]


def damage(rng: Random, path: Path) -> None:
    """Change some of a file's bytes, or splice it with its like of another seed."""
    others = sorted(seeds().glob(f"*/{path.name}"))
    out = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        # What is not numbers lies at the ends of most formats.
        size, near = len(out), min(len(out), rng.choice((len(out), 300, 4000)))
        at = rng.randrange(near + 1)
        at = at if rng.random() < 0.6 else size - at
        to = min(size, at + rng.choice((1, 2, 4, 8, 64, 1000)))
        edit = rng.randrange(9)
        if edit == 0:
            del out[at:]
        elif edit == 1:
            out[at:to] = rng.randbytes(to - at)
        elif edit == 2:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
        elif edit == 3:
            del out[at:to]
        elif edit == 4:
            out[at:at] = out[at:to]
        elif edit == 5:  # two blocks change places
            there = slice(other := rng.randrange(size + 1), other + to - at)
            out[at:to], out[there] = out[there], out[at:to]
        elif edit == 6 and at < size:
            out[at] ^= 1 << rng.randrange(8)
        elif edit == 7:
            width = rng.choice((1, 2, 4, 8))
            out[at : at + width] = rng.choice(_LENGTHS)[-width:]
        elif edit == 8 and others:
            other = rng.choice(others).read_bytes()
            out[at:] = other[rng.choice((at, rng.randrange(len(other) + 1))) :]
    path.write_bytes(out)


# JSON.


class Raw(str):
    """Stands in a JSON file as it is."""


_ODD = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 1 << 24, (1 << 24) + 1, 1 << 31, 1 << 63),
    *(10**6, 10**18, 10**400, 0.5, -0.5, 1e-300, 1e308, "", "1e400", "\0", "x"),
    *([], {}, [[]], [0], [None], [-1, 1 << 40], {"": ""}, {"a": {"b": None}}),
    *map(Raw, ("1e400", "-1e400", "NaN", "Infinity", "-0.0", "1" * 5000)),
    *map(Raw, ('"\\ud800"', '"\\u0000\\u001b[31m\\n\\r\\u2028"', '"../secret"')),
)


def odd(rng: Random) -> Any:
    """A value that belongs nowhere."""
    if rng.random() < 0.9:
        return deepcopy(rng.choice(_ODD))  # it may be changed in its turn
    if rng.random() < 0.5:
        return "x" * rng.choice((1000, 1_000_000))
    depth = rng.choice((10, 62, 64, 66, 1000, 100_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    return Raw(opening * depth + "0" + closing * depth)


def dump(value: Any) -> bytes:
    """JSON, with what is Raw as it is."""
    raws: list[str] = []

    def mark(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(value)
            return f"\1{len(raws) - 1}\1"
        if isinstance(value, dict):
            return {key: mark(inside) for key, inside in value.items()}
        return [mark(each) for each in value] if isinstance(value, list) else value

    text = json.dumps(mark(value))
    return re.sub(r'"\\u0001(\d+)\\u0001"', lambda m: raws[int(m[1])], text).encode()


def _keys(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in _keys(value):
        yield value, key
        yield from _places(value[key])


def edit_json(rng: Random, value: Any) -> None:
    """Change a value somewhere, as often near the root as anywhere, or its key."""
    where = list(_places(value))
    if not where:
        return
    near = [(value, key) for key in _keys(value)]
    into, key = rng.choice(rng.choice((near, where)))
    edit = rng.randrange(8)
    if edit == 0:
        del into[key]
    elif edit == 1 and isinstance(into, dict):
        into[rng.choice(("", f"{key}x", "\0", "type"))] = into.pop(key)
    elif edit == 1:
        into += into[key : key + 3]
    elif edit == 2:
        other, its = rng.choice(where)
        into[key] = deepcopy(other[its])
    else:
        into[key] = odd(rng)


def write_json(rng: Random, path: Path, value: Any) -> None:
    """Write it, sometimes with a key twice, and with one that is no text."""
    text = dump(value)
    if rng.random() < 0.1 and isinstance(value, dict) and value:
        again = dump({rng.choice(list(value)): odd(rng), "\ud800": 0})
        text = text[:-1] + b", " + again[1:]
    path.write_bytes(text)


def edit_file(rng: Random, path: Path, *edits: Callable[[Random, Any], None]) -> None:
    """Damage a JSON file's bytes, or change its meaning by some of the edits."""
    if rng.random() < 0.2:
        return damage(rng, path)
    value = json.loads(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice((edit_json, *edits))(rng, value)
    return write_json(rng, path, value)


# Configs.

_SIZES = (*range(-1, 6), 16, 31, 32, 33, 64, 96, 10_000, 10**6, 1 << 24, (1 << 24) - 1)
_FIELDS = {
    **dict.fromkeys(("vocab_size", "d_model", "d_kv", "d_ff", "num_heads"), _SIZES),
    **dict.fromkeys(("num_layers", "num_decoder_layers"), _SIZES),
    "relative_attention_num_buckets": (*_SIZES, 1 << 16),
    "relative_attention_max_distance": (*_SIZES, 1 << 30, 1 << 31),
    "layer_norm_epsilon": (0, -1, 1, 1e-300, 1e-45, 1e30, Raw("1e400"), Raw("NaN")),
    "feed_forward_proj": ("gated-gelu", "gated-silu", "x", "-", "relu-", "a-b-c", ""),
    "model_type": ("mt5", "umt5", "t5", "T5", "llama", "gpt2", "../secret", "\0"),
    "tie_word_embeddings": (True, False, None),
    "scale_decoder_outputs": (True, False, None, 1),
    "quantization": (
        None,
        *({"bits": b, "group_size": g} for b in (0, 2, 4, 8) for g in (0, 32, 64)),
        *({"bits": 4, "group_size": g, "mode": m} for g in (16, 32) for m in _SIZES),
        {"bits": 4, "group_size": 32, "mode": "mxfp4"},
        {"bits": 8, "group_size": 32, "mode": "mxfp8"},
        {"bits": 4, "group_size": 16, "mode": "nvfp4"},
    ),
}
_IDS = {
    "decoder_start_token_id": (-1, 0, 95, 96, 1 << 30, (1 << 31) - 1, None),
    "pad_token_id": (-1, 0, 95, 96, 1 << 31),
    "eos_token_id": (-1, 96, [], [-1], [1, 2], [1] * 100_000, (1 << 31) - 1),
}


def edit_config(rng: Random, value: Any) -> None:
    """Give a field that is known a value that it might have."""
    known = rng.choice((_FIELDS, _FIELDS, _IDS))
    name = rng.choice(list(known))
    if isinstance(value, dict):
        value[name] = rng.choice(known[name])


def make_config(rng: Random, folder: Path) -> None:
    edit_file(rng, folder / "config.json", *[edit_config] * 3)


def make_generation(rng: Random, folder: Path) -> None:
    if rng.random() < 0.5:  # a converted model, as run_generation sees by its weights
        for name in ("weights.npz", "config.json"):
            shutil.copyfile(seeds() / "mlx-f32" / name, folder / name)
    values = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    if rng.random() < 0.7:
        values |= {
            "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 3,
            "encoder_no_repeat_ngram_size": 4,
            "bad_words_ids": [[5, 6], [7]],
            "suppress_tokens": [9],
            "forced_bos_token_id": 11,
            "min_length": 2,
            "max_length": 9,
            "num_beams": 2,
        }
    if rng.random() < 0.3:
        values |= {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(values))
    edit_file(rng, folder / "generation_config.json", *[edit_config] * 3)


# Tokenizers.

_REGEXES = ("(a+)+$", r"\w*\w*\w*!", "(a|a)*b", "", "[", "(?<=a{1,9})b", " {2,}", ".*")
_NAMES = (
    *("BertNormalizer", "ByteLevel", "Lowercase", "Nmt", "Strip", "StripAccents"),
    *("NFC", "NFKD", "BertPreTokenizer", "CharDelimiterSplit", "Digits", "Metaspace"),
    *("Punctuation", "UnicodeScripts", "Whitespace", "WhitespaceSplit", "BPEDecoder"),
    *("ByteFallback", "Fuse", "WordPiece", "CTC", "FixedLength", "Nothing"),
    *("RobertaProcessing", "BertProcessing"),
)


def _part(rng: Random, depth: int = 0) -> Any:
    """A normalizer, pre-tokenizer, decoder or post-processor, or a chain of them."""
    pattern = rng.choice(
        ({"String": rng.choice(("", "a", " "))}, {"Regex": rng.choice(_REGEXES)})
    )
    kind = rng.randrange(8)
    # A chain in a chain multiplies what is in it.
    long = "a" * (100_000 if depth < 2 else 100)
    if kind == 0 and depth < 3:
        length = rng.choice((1, 3, 16, 30) if depth == 0 else (1, 3))
        parts = [_part(rng, depth + 1) for _ in range(length)]
        if rng.random() < 0.5:
            parts = parts[:1] * length
        names = ("normalizers", "pretokenizers", "decoders", "processors")
        return {"type": "Sequence"} | dict.fromkeys(names, parts)
    if kind == 1:
        content = rng.choice(("", "aa", long))
        return {"type": "Replace", "pattern": pattern, "content": content}
    if kind == 2:
        return {"type": "Prepend", "prepend": rng.choice(("", "▁", long))}
    if kind == 3:
        behavior = rng.choice(("Removed", "Isolated", "MergedWithPrevious", "x"))
        return {"type": "Split", "pattern": pattern, "behavior": behavior} | {
            "invert": rng.choice((True, False))
        }
    if kind == 4:
        trie = struct.pack("<I", rng.choice((0, 4, 8, 16, 1024, 1 << 31)))
        table = trie + rng.randbytes(rng.choice((0, 1, 8, 1024, 2000)))
        coded = base64.b64encode(table).decode()
        return {"type": "Precompiled", "precompiled_charsmap": coded}
    if kind == 5:
        ids = [rng.choice((0, 1, 96, 1 << 31, (1 << 32) - 1))] * rng.choice((0, 1, 9))
        special = {"SpecialToken": {"id": rng.choice(("</s>", "?")), "type_id": 0}}
        text = {"Sequence": {"id": rng.choice("AB"), "type_id": 0}}
        template = rng.choice(([text, special], [special] * 3, [text] * 20, []))
        token = {"id": "</s>", "ids": ids, "tokens": ["</s>"] * len(ids)}
        return {"type": "TemplateProcessing", "single": template, "pair": template} | {
            "special_tokens": {"</s>": token}
        }
    # Every field that any of these has: those that it does not know it passes over.
    return {
        "type": rng.choice(_NAMES),
        "replacement": rng.choice(("▁", "", "aa")),
        "prepend_scheme": rng.choice(("always", "first", "never", "x")),
        **dict.fromkeys(("add_prefix_space", "trim_offsets", "cleanup"), True),
        **dict.fromkeys(("clean_text", "lowercase", "split", "use_regex"), True),
        "handle_chinese_chars": True,
        "strip_accents": None,
        "delimiter": "a",
        "individual_digits": True,
        "behavior": "Isolated",
        "content": "a",
        **dict.fromkeys(("start", "stop"), rng.choice((0, 1, 1 << 62))),
        "prefix": "##",
        "suffix": "",
        "pad_token": "<pad>",
        "length": 0,
        "word_delimiter_token": "|",
        "strip_left": True,
        "strip_right": True,
        "sep": ["</s>", 1],
        "cls": ["</s>", rng.choice((1, 1 << 31))],
    }


def edit_part(rng: Random, value: Any) -> None:
    part = ("normalizer", "pre_tokenizer", "decoder", "post_processor")
    value[rng.choice(part)] = _part(rng)


def edit_added(rng: Random, value: Any) -> None:
    texts = ("", " ", "\0", "\x1b[2J", "\u0301", "a", "the", "x" * 100_000, "</s>")
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    token = {
        "id": rng.choice((0, 1, 2, 95, 96, 200, 1 << 20, (1 << 32) - 1)),
        "content": rng.choice(texts),
        **{flag: rng.choice((True, False)) for flag in flags},
    }
    added = value.get("added_tokens")
    value["added_tokens"] = [*(added if isinstance(added, list) else ()), token]


def edit_vocabulary(rng: Random, value: Any) -> None:
    words = ["</s>", "a", "b", "ab", "##b", "▁the", "<unk>"]
    ids = {word: rng.choice((place, 0, 1 << 31)) for place, word in enumerate(words)}
    longest = rng.choice((100, 1000, 1 << 62, -1))
    value["model"] = rng.choice(
        (
            {"type": "Unigram", "unk_id": rng.choice((None, 0, 9)), "vocab": []},
            {"type": "Unigram", "unk_id": 0, "vocab": [["a", Raw("1e400")]] * 3},
            {"type": "Unigram", "unk_id": 0, "vocab": [["", -1.0], ["a", 1e308]]},
            {"type": "BPE", "vocab": ids, "merges": [rng.sample(words, 2)]},
            {"type": "BPE", "vocab": ids, "merges": ["a b"], "byte_fallback": True},
            {"type": "WordPiece", "vocab": ids, "unk_token": "<unk>"}
            | {"continuing_subword_prefix": "##", "max_input_chars_per_word": longest},
            {"type": "WordLevel", "vocab": ids, "unk_token": rng.choice(("a", "?"))},
            {"type": "WordLevel", "vocab": {}, "unk_token": ""},
            {"vocab": ids},
        )
    )


def edit_settings(rng: Random, value: Any) -> None:
    """Truncation and padding."""
    size = rng.choice((0, 1, 1 << 31, 1 << 62))
    value["truncation"] = {"max_length": size, "stride": rng.choice((0, size))} | {
        "strategy": "LongestFirst",
        "direction": "Right",
    }
    value["padding"] = {"strategy": {"Fixed": size}, "direction": "Left"} | {
        "pad_to_multiple_of": 0,
        "pad_id": size & 0xFFFFFFFF,
        "pad_type_id": 0,
        "pad_token": "",
    }


def make_tokenizer(rng: Random, folder: Path) -> None:
    edits = (*[edit_part] * 3, edit_added, edit_vocabulary, edit_settings)
    edit_file(rng, folder / "tokenizer.json", *edits)


def edit_tokenizer_config(rng: Random, value: Any) -> None:
    token = {"__type": "AddedToken", "content": rng.choice(("", "a", "\0", "</s>"))}
    choices = {
        "extra_ids": (-1, 0, 1, 10**4, 10**9, 1 << 63, "1"),
        "additional_special_tokens": ([], [""], ["a", "a"], [None], ["<extra_id_0>"]),
        "added_tokens_decoder": ({"0": token}, {"-1": token}, {"x": token}, {"9": {}}),
        "tokenizer_class": ("PreTrainedTokenizerFast", "ByT5Tokenizer", "../secret"),
        "auto_map": ({"AutoTokenizer": ["evil.T", "evil.T"]}, {"AutoTokenizer": "x"}),
        "chat_template": (
            "{% for i in range(10 ** 12) %}{% endfor %}",
            "{{ 'x' * 10 ** 11 }}",
            "{{ ''.__class__.__mro__ }}",
            "{% include '../secret' %}",
            "{{ messages }}{% if",
        ),
        "model_max_length": (0, -1, 10**400, "x"),
        "vocab_file": ("../secret", "/etc/hostname"),
        "name_or_path": ("../secret", "\0"),
        "fix_mistral_regex": (True,),
    }
    name = rng.choice(list(choices))
    value[name] = rng.choice(choices[name])


def make_tokenizer_config(rng: Random, folder: Path) -> None:
    if rng.random() < 0.5:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(seeds() / "hf" / name, folder / name)
    if rng.random() < 0.2:
        for name in ("special_tokens_map.json", "added_tokens.json"):
            value = {"eos_token": "</s>", "unk_token": {"content": "<unk>"}, "x": 3}
            edit_json(rng, value)
            write_json(rng, folder / name, value)
    edits = [edit_tokenizer_config] * 3
    edit_file(rng, folder / "tokenizer_config.json", *edits)


def make_spiece(rng: Random, folder: Path) -> None:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    path = folder / "spiece.model"
    if rng.random() < 0.4:
        return damage(rng, path)
    model = ModelProto.FromString(path.read_bytes())
    for _ in range(rng.choice((1, 1, 3))):
        piece = rng.choice(model.pieces or [model.pieces.add()])
        edit = rng.randrange(8)
        if edit == 0:
            piece.type = rng.randrange(1, 7)
        elif edit == 1:
            piece.score = rng.choice((math.nan, math.inf, -math.inf, 0, 1e38, -1e-45))
        elif edit == 2:
            other = rng.choice(model.pieces).piece
            piece.piece = rng.choice(("", "\0", " ", other, "<0x41>", "x" * 100_000))
        elif edit == 3:
            name = rng.choice(("unk_id", "eos_id", "pad_id", "bos_id", "vocab_size"))
            number = rng.choice((-1, 0, 1, 5, 10**6, (1 << 31) - 1))
            setattr(model.trainer_spec, name, number)
        elif edit == 4:
            table = rng.randbytes(rng.choice((0, 3, 4, 100, 5000)))
            size = rng.choice((b"", b"\4\0\0\0", b"\0\4\0\0", b"\xff\xff\xff\xff"))
            model.normalizer_spec.precompiled_charsmap = size + table
        elif edit == 5:
            model.trainer_spec.model_type = rng.randrange(1, 5)
            model.trainer_spec.byte_fallback = rng.choice((True, False))
        elif edit == 6:
            del model.pieces[rng.choice((0, 3, len(model.pieces) - 1)) :]
        else:
            for _ in range(rng.choice((1, 5000))):
                model.pieces.add().CopyFrom(piece)
    path.write_bytes(model.SerializeToString())
    return None


# Zip archives, with lies in them.


@dataclass
class Member:
    """A member: what it is, and what the directory says that it is."""

    name: str
    data: bytes
    size: int | None = None
    packed: int | None = None
    place: int | None = None
    method: int = 0
    zip64: int = 0  # bytes of a zip64 field


def write_zip(rng: Random, members: list[Member], odd_end: bool) -> bytes:
    out, directory = bytearray(), bytearray()
    for member in members:
        name, data = member.name.encode(), member.data
        crc, whole = zlib.crc32(data), len(data)
        if member.method == zipfile.ZIP_DEFLATED:
            data = zlib.compress(data, 1)[2:-4]
        said = (member.size, member.packed, member.place)
        true = (whole, len(data), len(out))
        size, packed, place = (
            t if s is None else s for s, t in zip(said, true, strict=True)
        )
        local = (crc, len(data), whole, len(name), 0)
        out += struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, member.method, 0, 33, *local)
        out += name + data
        extra = struct.pack("<HH3Q", 1, member.zip64, size, packed, place)
        extra = extra[: 4 + member.zip64] if member.zip64 else b""
        small = (packed, size, place)
        packed, size, place = (-1 if extra else n for n in small)
        mask = 0xFFFFFFFF
        directory += struct.pack(
            *("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, member.method, 0, 33, crc),
            *(packed & mask, size & mask, len(name), len(extra), 0, 0, 0, 0),
            place & mask,
        )
        directory += name + extra
    number, size, place = len(members), len(directory), len(out)
    out += directory
    if odd_end:
        lie = rng.choice((0, 1, size * 2, 1 << 31, (1 << 63) - 1, (1 << 64) - 1))
        size, place = rng.choice(((size, lie), (lie, place)))
        end = len(out)
        form = "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0
        out += struct.pack(*form, number, number, size, place)
        out += struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
        size = place = 0xFFFFFFFF
    return bytes(out) + struct.pack(
        "<4s4H2LH", b"PK\5\6", 0, 0, number & 65535, number & 65535, size, place, 0
    )


def edit_members(rng: Random, members: list[Member]) -> None:
    """Lie about a member, or rename, double, drop or compress it."""
    member = rng.choice(members)
    edit = rng.randrange(9)
    if edit == 0:
        names = ("", "../secret", "/etc/x.npy", "\0", "x" * 60_000, "a/data.pkl")
        member.name = rng.choice((*names, rng.choice(members).name, f"x{member.name}"))
    elif edit == 1:
        members.append(member)
    elif edit == 2:
        members.remove(member)
    elif edit == 3:
        member.method = rng.choice((8, 8, 12, 99))
    elif edit == 4:
        member.place = rng.choice((0, 1, 1 << 31, 0xFFFFFFFE))
    elif edit == 5:
        member.size = rng.choice((0, 1, len(member.data) + 1, 1 << 31, 0xFFFFFFFE))
    elif edit == 6:
        member.zip64 = rng.choice((1, 8, 16, 24, 24))
        member.size = rng.choice((None, 1 << 62, (1 << 64) - 1))
        member.place = rng.choice((None, None, 1 << 62, (1 << 64) - 1))
    elif edit == 7:
        member.data = member.data[: rng.choice((0, 10, 100))]
    else:
        rng.shuffle(members)


def edit_npy(rng: Random, member: Member) -> None:
    """Change an npy header: dtype, shape, order or length."""
    data = member.data
    (length,) = struct.unpack_from("<H", data, 8)
    header, body = data[10 : 10 + length], data[10 + length :]
    dtype = rng.choice((b"<u4", b"|O", b"<i4", b">f4", b"<V2", b"<f8", b"<U9", b"|u1"))
    shapes = ("()", "(-1,)", "(0,)", f"({1 << 62},)", "(4294967296, 4294967296)", "(1,")
    numbers = [str(n) for n in (96, 32, 1, 0, 1 << 32, 10**17)] * 3
    some = f"({', '.join(rng.sample(numbers, rng.choice((2, 3, 12))))})"
    shape = rng.choice((*shapes, some, "(96, 32)", "(96, 32,)", "(" + "1, " * 70 + ")"))
    edit = rng.randrange(5)
    if edit == 0:
        header = re.sub(rb"[<|]\w\d", dtype, header)
    elif edit == 1:
        header = re.sub(rb"\([^)]*\)", shape.encode(), header)
    elif edit == 2:
        header = header.replace(b"False", b"True")
    elif edit == 3:
        length = rng.choice((0, 1, length + 1, 65535))
        body = rng.choice((body, body[:-1], body + b"\0" * 9))
    else:  # numbers that are none, or beyond all
        body = rng.choice((b"\xff", b"\x7f\x80\0\0", b"\xff\xff\x7f\x7f")) * len(body)
        body = body[: len(data) - 10 - length]
    length = len(header) if edit != 3 else length
    member.data = data[:8] + struct.pack("<H", length & 65535) + header + body


def make_npz(rng: Random, folder: Path) -> None:
    path = folder / "weights.npz"
    if rng.random() < 0.3:
        return damage(rng, path)
    with zipfile.ZipFile(path) as archive:
        members = [Member(name, archive.read(name)) for name in archive.namelist()]
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.4:
            edit_members(rng, members)
        else:
            with suppress(struct.error):  # one that is cut already
                edit_npy(rng, rng.choice(members))
    path.write_bytes(write_zip(rng, members, odd_end=rng.random() < 0.1))
    return None


# Safetensors.


def _split(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def edit_entry(rng: Random, header: Any) -> None:
    entry = header.get(rng.choice(list(header)), None)
    if not isinstance(entry, dict) or "data_offsets" not in entry:
        return
    offsets = entry["data_offsets"]
    shapes = ([], [0], [1] * 20, [1 << 31] * 4, [-1, -1], [1 << 62, 4], [1.0], [32, 96])
    dtypes = ("F64", "F16", "BF16", "I8", "BOOL", "U64", "F8_E4M3", "F4", "", "\0")
    edit = rng.randrange(4)
    if edit == 0:
        entry["dtype"] = rng.choice(dtypes)
    elif edit == 1:
        entry["shape"] = rng.choice((*shapes, odd(rng)))
    elif edit == 2 and isinstance(offsets, list) and offsets:
        offsets[rng.randrange(len(offsets))] = rng.choice((*_SIZES, 1 << 62, odd(rng)))
    else:  # numbers of half the width, so that all but the shape fits
        shape = entry["shape"] if isinstance(entry["shape"], list) else []
        entry |= {"dtype": "F16", "shape": [*shape, 2]}


def edit_notes(rng: Random, header: Any) -> None:
    """What says nothing of any tensor."""
    header["__metadata__"] = rng.choice(({}, {"format": "x"}, {"a": "b" * 10_000}))


def make_safetensors(rng: Random, folder: Path) -> None:
    path = folder / "model.safetensors"
    if rng.random() < 0.3:
        return damage(rng, path)
    header, data = _split(path)
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice((edit_json, edit_notes, edit_entry, edit_entry))(rng, header)
    text = dump(header)
    text += b" " * (-len(text) % 8)
    sizes = (*[len(text)] * 9, 0, len(text) - 1, len(text) + 1, 1 << 31, (1 << 64) - 1)
    data = rng.choice((*[data] * 9, data[:-4], data + b"\0" * 4, b"\x7f" * len(data)))
    path.write_bytes(struct.pack("<Q", rng.choice(sizes)) + text + data)
    return None


# Pickles: a list of instructions and values, any of which may be another.

_NAME = "bert.weight"


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _int(number: int) -> bytes:
    if 0 <= number < 256:
        return b"K" + bytes([number])
    size = (number.bit_length() + 8) // 8
    return b"\x8a" + bytes([size & 255]) + number.to_bytes(size, "little", signed=True)


def _tuple(numbers: Any) -> bytes:
    return b"(" + b"".join(map(_int, numbers)) + b"t"


_ORDERED = b"ccollections\nOrderedDict\n"
_STORAGE = b"ctorch\nFloatStorage\n"
_REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def pickled(tensors: list[tuple[str, list[int], bytes]]) -> list[bytes]:
    """The instructions of a state dict's pickle; tensor i has the storage i."""
    parts = [b"\x80\2", _ORDERED, b")", b"R", b"q\0", b"("]
    for number, (name, shape, data) in enumerate(tensors):
        strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
        parts += [_text(name), _REBUILD, b"(", b"(", _text("storage"), _STORAGE]
        parts += [_text(str(number)), _text("cpu"), _int(len(data) // 4), b"t", b"Q"]
        parts += [_int(0), _tuple(shape), _tuple(strides), b"\x89"]
        parts += [_ORDERED, b")", b"R", b"t", b"R"]
    return [*parts, b"u", b"."]


def _instruction(rng: Random) -> bytes:
    """Any byte, mostly with the argument that it takes."""
    code = bytes([rng.randrange(256)])
    known = pickletools.code2op.get(code.decode("latin1"))
    if known is None or known.arg is None or rng.random() < 0.1:
        return code
    width = known.arg.n
    if width >= 0:
        return code + rng.choice((rng.randbytes(width), bytes(width), b"\1" * width))
    if width == pickletools.UP_TO_NEWLINE:
        lines = (b"os\nsystem\n", b"1\n", b"'a'\n", b"\n\n", b"9" * 9000)
        return code + rng.choice(lines)
    width = int(re.sub(r"\D", "", known.arg.name) or 4)  # of the length before it
    size = rng.choice((0, 3, 255, 1 << 31, (1 << 64) - 1)) & ((1 << 8 * width) - 1)
    return code + size.to_bytes(8, "little")[: min(8, width)] + b"abc"


_GLOBALS = (
    *(b"os\nsystem\n", b"builtins\neval\n", b"torch\nLongStorage\n", b"\n\n"),
    *(b"torch._utils\n_rebuild_parameter\n", b"torch.storage\nBoolStorage\n"),
    *(b"a" * 5000 + b"\nb\n", b"\xff\n\xff\n", b"torch\nFloatStorage\n"),
)


def _value(rng: Random) -> bytes:
    """A value where another one belongs."""
    pick = rng.randrange(10)
    if pick == 0:  # tuples in tuples, each twice in the next: 2 ** n in all
        start, depth = rng.choice((b"K\1", b"X\1\0\0\0a")), rng.choice((5, 40, 200))
        return start + b"".join(b"q%ch%c\x86" % (n, n) for n in range(9, 9 + depth))
    if pick == 1:
        depth = rng.choice((10, 1000, 100_000))
        return rng.choice((b"(" * depth + b"t" * depth, b")" + b"\x85" * depth))
    if pick == 2:
        return b"c" + rng.choice(_GLOBALS)
    if pick < 6:
        numbers = (0, 1, -1, 5, 1 << 31, 1 << 47, 1 << 48, 1 << 62, 1 << 63, 1 << 100)
        return _int(rng.choice((*numbers, -(1 << 63), 1 << 2000)))
    if pick == 6:
        sizes = [rng.choice((0, 1, 2, 32, 96, 1 << 31, 1 << 48)) for _ in range(9)]
        return _tuple(sizes[: rng.choice((0, 1, 2, 3, 9))])
    if pick == 7:
        return b"G" + struct.pack(">d", rng.choice((math.nan, math.inf, 1.5)))
    if pick == 8:
        index = rng.choice((0, 9, 255, (1 << 32) - 1))
        return rng.choice((b"j", b"r")) + struct.pack("<I", index)
    return rng.choice((b"N", b"\x88", b"}", b"]", b")", _text(""), _text("x" * 5000)))


def edit_pickle(rng: Random, parts: list[bytes]) -> None:
    for _ in range(rng.choice((1, 1, 2, 5))):
        # The first tensor as often as any other.
        at = rng.randrange(min(len(parts), rng.choice((30, len(parts)))))
        new = rng.choice((_value, _value, _instruction))(rng)
        edit = rng.randrange(6)
        if edit == 0:
            parts[at:at] = [new]
        elif edit == 1:
            del parts[at]
        elif edit == 2:
            parts[at:at] = parts[at : at + rng.choice((1, 3, 20))]
        else:
            parts[at : at + 1] = [new]


def legacy(parts: list[bytes], tensors: list[tuple[str, list[int], bytes]]) -> bytes:
    """The file that torch.save wrote before version 1.6."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    heads = (0x1950A86A20F9469CFC6C, 1001, system)
    keys = [str(number) for number in range(len(tensors))]
    data = [struct.pack("<q", len(data) // 4) + data for *_, data in tensors]
    before = b"".join(pickle.dumps(head, 2) for head in heads)
    return before + b"".join(parts) + pickle.dumps(keys, 2) + b"".join(data)


@lru_cache(1)
def weights() -> list[tuple[str, list[int], bytes]]:
    """The tiny checkpoint's tensors."""
    return _weights(seeds() / "hf")


def _weights(folder: Path) -> list[tuple[str, list[int], bytes]]:
    header, data = _split(folder / "model.safetensors")
    header.pop("__metadata__", None)
    return [
        (name, entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    ]


def _zipped(rng: Random, parts: list[bytes], tensors: Any) -> bytes:
    members = [Member("a/data.pkl", b"".join(parts)), Member("a/byteorder", b"little")]
    members += [Member(f"a/data/{n}", each[2]) for n, each in enumerate(tensors)]
    if rng.random() < 0.3:
        edit_members(rng, members)
    return write_zip(rng, members, odd_end=rng.random() < 0.05)


def _make_torch(rng: Random, folder: Path, zipped: bool) -> None:
    path = folder / "pytorch_model.bin"
    if rng.random() < 0.3:
        return damage(rng, path)
    parts = pickled(weights())
    edit_pickle(rng, parts)
    whole = _zipped(rng, parts, weights()) if zipped else legacy(parts, weights())
    path.write_bytes(whole)
    return None


def make_torch_zip(rng: Random, folder: Path) -> None:
    _make_torch(rng, folder, zipped=True)


def make_torch_legacy(rng: Random, folder: Path) -> None:
    _make_torch(rng, folder, zipped=False)


def make_pickle(rng: Random, folder: Path) -> None:
    tensors = [(_NAME, [2, 3], bytes(24)), ("b", [4], bytes(16)), ("c", [], bytes(4))]
    parts = pickled(tensors)
    edit_pickle(rng, parts)
    (folder / "pickle").write_bytes(b"".join(parts))
    for name, data in (
        ("zip", _zipped(rng, parts, tensors)),
        ("legacy", legacy(parts, tensors)),
    ):
        (folder / name).write_bytes(data)
        if rng.random() < 0.2:
            damage(rng, folder / name)


# Indexes.


def make_index(rng: Random, folder: Path) -> str | None:
    """Change an index, or what lies under the names that it has."""
    (path,) = folder.glob("*.index.json")
    index = json.loads(path.read_bytes())
    names = index["weight_map"]
    shard = folder / rng.choice(sorted(set(names.values())))
    # A shard that would do, were it not outside.
    shutil.copyfile(shard, folder.parent / SECRET)
    pick = rng.randrange(10)
    if pick < 4:
        edit_file(rng, path, edit_json)
    elif pick < 6:
        absolute = f"/proc/self/cwd/{SECRET}"
        ways = ("../secret", "./../secret", absolute, f"x/../../{SECRET}", "..\\secret")
        odd_names = ("\0", "..", ".", "", "x\ny", "x" * 300, "\udc80", "\x1b[2J", "~")
        new = rng.choice((*ways, *odd_names))
        for name, file in names.items():
            names[name] = new if file == shard.name else file
        path.write_bytes(dump(index))
        return REFUSE
    else:
        shard.unlink()
        put = rng.randrange(6)
        if put == 0:
            os.mkfifo(shard)
        elif put == 1:
            shard.mkdir()
        else:
            to = ("/dev/zero", "/dev/stdin", shard.name, "..", "/proc/self/mem")
            shard.symlink_to(rng.choice(to)) if put < 5 else None
        return REFUSE
    return None
