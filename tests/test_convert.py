"""convert.py and converted.py: what is written, what is refused, what remains."""

import json
import shutil
import zipfile

import mlx.core as mx
import numpy as np
import pytest
import torch
from conftest import save_checkpoint, tiny_torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import convert
from architectures import t5
from checkpoints import converted, reading, storing
from checkpoints.converted import WEIGHTS, MappedWeights, WeightsWriter
from system.errors import InputError
from system.files import read_json


@pytest.fixture
def source(make, tmp_path):
    """A copy of a tiny Hugging Face checkpoint, to be damaged."""
    return shutil.copytree(make()[1], tmp_path / "hf")


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def rewrite(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_mlx_opens_it_too(make):
    """The npz is an ordinary one: mx.load and our mapping give the same tensors."""
    _, _, folder = make()
    theirs = mx.load(str(folder / WEIGHTS))
    stored = MappedWeights(folder / WEIGHTS)
    ours = stored.load(theirs)
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.uint32])
def test_tensors_come_back(tmp_path, dtype):
    """Bits intact, in both readers, and every member's data aligned to 64 bytes."""
    tensors = {
        "a": mx.arange(6).astype(dtype).reshape(2, 3),
        "a.much.longer.name": mx.array(3).astype(dtype),
        "empty": mx.zeros((0, 4), dtype),
        "turned": mx.arange(20).reshape(4, 5).T.astype(dtype),
    }
    path = tmp_path / WEIGHTS
    with WeightsWriter(path) as writer:
        for name, tensor in tensors.items():
            blocks = [tensor[:1], tensor[1:]] if tensor.ndim else [tensor]
            writer.write(name, tensor.shape, dtype, blocks)
    for read in (MappedWeights(path).load(tensors), mx.load(str(path))):
        for name, tensor in tensors.items():
            assert read[name].dtype == dtype
            assert mx.array_equal(read[name], tensor)
    assert all(s.offset % 64 == 0 for s in MappedWeights(path)._stored.values())


@pytest.mark.parametrize(
    "blocks",
    [
        [],
        [mx.zeros(2)],
        [mx.zeros(4)],
        [mx.zeros(3, mx.int32)],
        [mx.zeros(3), mx.zeros(1)],
    ],
)
def test_blocks_that_do_not_make_up_the_tensor(tmp_path, blocks):
    with (
        WeightsWriter(tmp_path / WEIGHTS) as writer,
        pytest.raises(ValueError, match="was not written"),
    ):
        writer.write("x", (3,), mx.float32, blocks)


@pytest.mark.parametrize("writer", [mx, np], ids=["mlx", "numpy"])
def test_other_npz_files_load(tmp_path, writer):
    """MLX saves transposed arrays in Fortran order, and at odd offsets."""
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    path = tmp_path / WEIGHTS
    turned = writer.array(array.T.copy()).T
    writer.savez(str(path), x=writer.array(array), turned=turned)
    read = MappedWeights(path).load({"x": mx.zeros((3, 4)), "turned": mx.zeros((3, 4))})
    assert np.array_equal(read["x"], array)
    assert np.array_equal(read["turned"], array)


def test_same_bytes_from_shards(make, tmp_path):
    """Sharded or not, the conversion is the same to the byte."""
    oracle, _, whole = make()
    save_checkpoint(oracle, tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    convert.convert(tmp_path / "hf", tmp_path / "mlx")
    assert (tmp_path / "mlx" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
def test_dtypes(tmp_path, stored, dtype):
    """Each stays as it is unless another is wished for; rounded once. With float16 the
    matrix whose products exceed it is float32."""
    oracle = tiny_torch(0).to(stored)
    save_checkpoint(oracle, tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "mlx", dtype)
    expected = dtype if dtype != "auto" else str(stored).removeprefix("torch.")
    weights = mx.load(str(tmp_path / "mlx" / WEIGHTS))
    value = weights["embedding.weight"]
    assert str(value.dtype) == f"mlx.core.{expected}"
    exact = oracle.shared.weight.detach().float().numpy()
    rounded = mx.array(exact).astype(value.dtype)
    assert mx.array_equal(value, rounded).item()
    wide = weights["decoder.layers.1.feed_forward.wo.weight"].dtype
    assert wide == (mx.float32 if expected == "float16" else value.dtype)


def test_a_billion_parameters_become_bfloat16(monkeypatch, source, tmp_path, capsys):
    monkeypatch.setattr(storing, "BILLION", 100)
    convert.convert(source, tmp_path / "mlx")
    value = mx.load(str(tmp_path / "mlx" / WEIGHTS))["embedding.weight"]
    assert value.dtype == mx.bfloat16
    assert "bfloat16" in capsys.readouterr().err


def test_list(make, monkeypatch, capsys, tmp_path):
    """Each model's size and dtype; a damaged one is named, not a reason to stop."""
    monkeypatch.setattr(converted, "MODELS", tmp_path)
    monkeypatch.setattr("sys.argv", ["convert.py", "--list"])
    convert.main()
    assert "nothing is converted" in capsys.readouterr().out
    shutil.copytree(make()[2], tmp_path / "good")
    shutil.copytree(make()[2], tmp_path / "worse")
    (tmp_path / "worse" / WEIGHTS).write_bytes(b"PK")
    convert.main()
    good, worse = capsys.readouterr().out.splitlines()
    assert good == "good: 0.0 M parameters, 0.00 GB, float32"
    assert worse.startswith("worse: ")
    assert "damaged" in worse


def test_reading_is_checked(make, tmp_path, monkeypatch):
    """A file that shrinks while it is read, or a disk that fails: said, no crash."""
    _, _, folder = make()
    stored = MappedWeights(folder / WEIGHTS)
    monkeypatch.setattr(reading.os, "preadv", lambda *_: 0)
    with pytest.raises(InputError, match="become shorter"):
        stored.load(mx.load(str(folder / WEIGHTS)))


def test_large_reads_are_shared(make, tmp_path, monkeypatch):
    """Pieces of a tensor that different threads read come together right."""
    _, _, folder = make()
    whole = mx.load(str(folder / WEIGHTS))
    monkeypatch.setattr(reading, "_PIECE", 100)
    read = MappedWeights(folder / WEIGHTS).load(whole)
    assert all(mx.array_equal(read[name], whole[name]) for name in whole)


def test_old_checkpoints_with_copies_of_the_embedding(make, source, tmp_path):
    """t5-small's has four equal copies, and a bias that nothing reads."""
    tensors = tensors_of(source)
    for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = tensors["shared.weight"].clone()
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[unused] = torch.zeros(8, 4)
    rewrite(source, tensors)
    convert.convert(source, tmp_path / "mlx")
    again = (tmp_path / "mlx" / WEIGHTS).read_bytes()
    assert again == (make()[2] / WEIGHTS).read_bytes()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{")


def config_is_a_list(folder):
    (folder / "config.json").write_text("[]")


def no_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def not_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def empty_file(folder):
    (folder / "model.safetensors").write_bytes(b"")


def missing_shard(folder):
    no_weights(folder)
    index = {"weight_map": {"shared.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of_something_else(folder):
    no_weights(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


def broken_tokenizer(folder):
    (folder / "tokenizer_config.json").write_text("[]")


def start_token_beyond_the_embedding(folder):
    edit(folder / "generation_config.json", decoder_start_token_id=1_000_000)


def no_logarithm(folder):
    edit(folder / "config.json", relative_attention_max_distance=16)


def absurd_size(folder):
    edit(folder / "config.json", vocab_size=3 << 40)


def another_size(folder):
    edit(folder / "config.json", d_ff=49)


def fewer_layers(folder):
    edit(folder / "config.json", num_decoder_layers=1)


def more_layers(folder):
    edit(folder / "config.json", num_decoder_layers=3)


def another_architecture(folder):
    edit(folder / "config.json", model_type="bart")


def integers(folder):
    rewrite(folder, tensors_of(folder) | {"shared.weight": torch.zeros(96, 32).int()})


@pytest.mark.parametrize(
    "damage, message",
    [
        (no_weights, "holds no weights"),
        (no_config, "has no config.json"),
        (broken_config, "cannot read"),
        (config_is_a_list, "JSON object"),
        (no_tokenizer, "no tokenizer"),
        (truncated, "damaged"),
        (not_safetensors, "damaged"),
        (empty_file, "damaged"),
        (missing_shard, "is missing"),
        (index_of_something_else, "weight_map"),
        (broken_tokenizer, "tokenizer_config.json does not hold"),
        (start_token_beyond_the_embedding, "token 1000000"),
        (no_logarithm, "position bias"),
        (absurd_size, "vocab_size: expected `int` <= 16777216"),
        (another_size, "does not fit"),
        (fewer_layers, "no place for"),
        (more_layers, "has no decoder.block.2"),
        (another_architecture, "bart"),
        (integers, "no weight does"),
    ],
)
def test_bad_sources(source, tmp_path, damage, message):
    """Each is named, and nothing is left half-made."""
    damage(source)
    with pytest.raises(InputError, match=message):
        convert.convert(source, tmp_path / "models" / "mlx")
    assert not list(tmp_path.glob("models/*")) + list(tmp_path.glob("models/.*"))


def without(tensors, *parts):
    return {k: v for k, v in tensors.items() if not k.startswith(parts)}


#: What transformers loads, each tensor of the T5 in its place: the same conversion.
HARMLESS = {
    "value head": lambda t: t | {"v_head.summary.weight": torch.ones(1, 32)},
    "biases of zero": lambda t: (
        t
        | {
            k.replace("weight", "bias"): torch.zeros_like(v)
            for k, v in t.items()
            if "layer_norm" in k
        }
    ),
    "integer buffer": lambda t: t | {"position_ids": torch.arange(4)},
    "transformer.": lambda t: {f"transformer.{k}": v for k, v in t.items()},
    "module.": lambda t: {f"module.{k}": v for k, v in t.items()},
    "compiled": lambda t: {f"model._orig_mod.{k}": v for k, v in t.items()},
    "float64": lambda t: {k: v.double() for k, v in t.items()},
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_what_changes_nothing(make, source, tmp_path, change, capsys):
    """Converted to the same bytes; what is left out is named."""
    tensors = tensors_of(source)
    rewrite(source, change(tensors))
    convert.convert(source, tmp_path / "mlx")
    again = (tmp_path / "mlx" / WEIGHTS).read_bytes()
    assert again == (make()[2] / WEIGHTS).read_bytes()
    extra = [name for name in change(tensors) if name not in tensors]
    said = capsys.readouterr().err
    assert ("not used" in said) == (len(change(tensors)) > len(tensors))
    assert "not used" not in said or extra[0] in said


INSIDE = {
    "Lightning": lambda t: {
        "epoch": 3,
        "state_dict": {f"model.{k}": v for k, v in t.items()},
    },
    "a habit": lambda t: {"model_state_dict": t, "optimizer": {}},
}


@pytest.mark.parametrize("change", INSIDE.values(), ids=INSIDE)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_state_dict_one_level_down(make, source, tmp_path, change, zipped):
    tensors = tensors_of(source)
    no_weights(source)
    path = source / "pytorch_model.bin"
    torch.save(change(tensors), path, _use_new_zipfile_serialization=zipped)
    convert.convert(source, tmp_path / "mlx")
    again = (tmp_path / "mlx" / WEIGHTS).read_bytes()
    assert again == (make()[2] / WEIGHTS).read_bytes()


def lora(folder):
    no_weights(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def lora_tensors(folder):
    name = "base_model.model.decoder.block.0.layer.0.SelfAttention.q.lora_A.weight"
    rewrite(folder, {name: torch.zeros(4, 32)})


def pointer(folder):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 792000\n"
    (folder / "model.safetensors").write_text(text)


def training_state(folder):
    no_weights(folder)
    torch.save({"epoch": 3, "loss": 0.5}, folder / "pytorch_model.bin")


def no_model_type(folder):
    values = json.loads((folder / "config.json").read_text())
    del values["model_type"]
    (folder / "config.json").write_text(json.dumps(values))


NAMED = {
    "encoder": (lambda t: without(t, "decoder"), "encoder alone"),
    "classifier": (
        lambda t: (
            {f"transformer.{k}": v for k, v in t.items()}
            | {"classification_head.dense.weight": torch.zeros(2, 32)}
        ),
        "classification head",
    ),
    "int8": (
        lambda t: {k: v.to(torch.int8) if v.ndim == 2 else v for k, v in t.items()},
        "I8: no weight does, but those of quantized",
    ),
    "fp8": (
        lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()},
        "F8_E4M3: no weight does, but those of quantized",
    ),
    "another embedding": (
        lambda t: t | {"encoder.embed_tokens.weight": torch.ones(96, 32)},
        r"encoder\.embed_tokens\.weight is another",
    ),
    "a bias": (
        lambda t: t | {"encoder.final_layer_norm.bias": torch.ones(32)},
        "no place for",
    ),
    "an adapter's layer": (
        lambda t: t | {"decoder.block.0.adapter.weight": torch.zeros(4, 32)},
        "no place for",
    ),
}


@pytest.mark.parametrize("change, message", NAMED.values(), ids=NAMED)
def test_what_is_no_t5_is_named(source, tmp_path, change, message):
    rewrite(source, {k: v.contiguous() for k, v in change(tensors_of(source)).items()})
    with pytest.raises(InputError, match=message):
        convert.convert(source, tmp_path / "mlx")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lora, "adapter"),
        (lora_tensors, "adapter"),
        (pointer, "git-lfs"),
        (training_state, "holds an int under 'epoch'"),
        (no_model_type, "no model_type"),
    ],
)
def test_folders_of_something_else_are_named(source, tmp_path, damage, message):
    damage(source)
    with pytest.raises(InputError, match=message):
        convert.convert(source, tmp_path / "mlx")


def test_the_tokenizer_of_another_folder(make, source, tmp_path):
    """Fine-tunes are often saved without one."""
    no_tokenizer(source)
    with pytest.raises(InputError, match="no tokenizer"):
        convert.convert(source, tmp_path / "mlx")
    convert.convert(source, tmp_path / "mlx", tokenizer=make()[1])
    made = (tmp_path / "mlx" / "tokenizer.json").read_bytes()
    assert made == (make()[2] / "tokenizer.json").read_bytes()
    parsed = convert.parse_arguments(["--model", "x", "--tokenizer", "y"])
    assert str(parsed.tokenizer) == "y"


def test_a_missing_head_is_said(source, tmp_path, capsys):
    """T5 1.1 has one; saved from a T5Model it is not there."""
    edit(source / "config.json", tie_word_embeddings=False)
    convert.convert(source, tmp_path / "mlx")
    assert "no output head" in capsys.readouterr().err
    edit(source / "config.json", tie_word_embeddings=True)
    convert.convert(source, tmp_path / "mlx")
    assert "no output head" not in capsys.readouterr().err


def test_no_such_folder(tmp_path):
    with pytest.raises(InputError, match="no checkpoint folder"):
        convert.convert(tmp_path / "nowhere", tmp_path / "mlx")


def test_a_failure_keeps_the_earlier_conversion(source, tmp_path):
    out = tmp_path / "mlx"
    convert.convert(source, out)
    before = (out / WEIGHTS).read_bytes()
    no_tokenizer(source)
    with pytest.raises(InputError):
        convert.convert(source, out)
    assert (out / WEIGHTS).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mlx"]


def test_a_second_conversion_replaces_the_first(source, tmp_path):
    out = tmp_path / "mlx"
    convert.convert(source, out, "float32")
    convert.convert(source, out, "bfloat16")
    assert mx.load(str(out / WEIGHTS))["embedding.weight"].dtype == mx.bfloat16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mlx"]


def test_interrupted_between_the_renames(source, tmp_path, monkeypatch):
    """The earlier conversion is put back, at once or by the next one that runs."""
    out = tmp_path / "mlx"
    convert.convert(source, out)
    before = (out / WEIGHTS).read_bytes()
    rename = convert.Path.rename

    def fail(path, to):
        if ".partial-" in path.name:
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(convert.Path, "rename", fail)
        with pytest.raises(KeyboardInterrupt):
            convert.convert(source, out)
    assert (out / WEIGHTS).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mlx"]
    # Killed there instead, and the next run fails as well.
    rename(out, tmp_path / ".mlx.replaced")
    (tmp_path / ".mlx.partial-99999999").mkdir()
    no_tokenizer(source)
    with pytest.raises(InputError, match="no tokenizer"):
        convert.convert(source, out)
    assert (out / WEIGHTS).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mlx"]


def test_a_source_inside_the_output_is_not_replaced(make, tmp_path):
    out = shutil.copytree(make()[2], tmp_path / "mlx")
    source = shutil.copytree(make()[1], out / "hf")
    with pytest.raises(InputError, match="replace the source"):
        convert.convert(source, out)
    assert (source / "model.safetensors").exists()


def test_a_folder_of_something_else_is_never_replaced(source, tmp_path):
    """--output with a typo must not delete a home folder."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    for target in (tmp_path / "precious", source):
        with pytest.raises(InputError, match="stays as it is"):
            convert.convert(source, target)
    assert (tmp_path / "precious" / "file").exists()


def test_disk_without_room(monkeypatch, source, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="the disk of"):
        convert.convert(source, tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_npz_files(make, tmp_path, data):
    """Cut anywhere or with headers overwritten: an error that says so, no crash."""
    _, _, folder = make()
    config = read_json(folder / "config.json")
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged, dirs_exist_ok=True)
    raw = bytearray((folder / WEIGHTS).read_bytes())
    with zipfile.ZipFile(folder / WEIGHTS) as archive:
        headers = [member.header_offset for member in archive.infolist()]
        directory = archive.start_dir
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        start = data.draw(st.sampled_from([*headers, directory, len(raw) - 80]))
        where = start + data.draw(st.integers(0, 79))
        raw[where : where + 4] = data.draw(st.binary(min_size=4, max_size=4))
    (damaged / WEIGHTS).write_bytes(raw)
    try:
        loaded = t5.load(damaged)
    except InputError as error:
        assert str(damaged / WEIGHTS) in str(error)
    else:  # bytes that nothing depends on, or that were what they had been
        assert loaded.embedding.weight.shape == (config["vocab_size"], 32)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("d_ff", 49, "shape"),
        ("num_layers", 3, "does not fit"),
        ("num_layers", 1, "no use"),
    ],
)
def test_weights_of_another_config(make, tmp_path, field, value, message):
    folder = shutil.copytree(make()[2], tmp_path / "mlx")
    edit(folder / "config.json", **{field: value})
    with pytest.raises(InputError, match=message):
        t5.load(folder)
