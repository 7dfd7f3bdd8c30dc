"""sources.py and torch_file.py: PyTorch's files without PyTorch, and the hub."""

import fast_blas  # noqa: F401  (before mlx: see there)

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_torch

import convert
import sources
from checkpoint import WEIGHTS
from errors import InputError
from torch_file import read_torch

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(state, path, zipped) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    return path


def values(found) -> np.ndarray:
    if found.dtype == "BF16":
        return np.left_shift(found.bits.astype(np.uint32), 16).view(np.float32)
    return found.bits.astype(np.float32)


@FORMATS
def test_every_kind_of_tensor(tmp_path, zipped):
    """Dtypes, views at an offset, transposes, shared storages, empty ones, scalars."""
    base = torch.randn(6, 8)
    state = OrderedDict(
        float32=base,
        shared=base,
        rows=base[2:4],
        columns=base[:, 3:5],
        turned=base.T,
        strided=base[::2, 1::3],
        expanded=base[:1].expand(5, 8),
        half=base.half(),
        bfloat16=base.bfloat16(),
        parameter=torch.nn.Parameter(base * 2),
        scalar=torch.tensor(3.5),
        empty=torch.zeros(0, 4),
        integers=torch.arange(5),
    )
    state._metadata = {"": {"version": 1}}  # as Module.state_dict() leaves it
    found = read_torch(save(state, tmp_path / "x.bin", zipped))
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].bits.shape == tuple(tensor.shape)
        np.testing.assert_array_equal(values(found[name]), tensor.detach().float())
    assert found["half"].dtype == "F16"
    assert found["integers"].dtype == "I64"


@pytest.fixture
def twin(make, tmp_path):
    """A checkpoint folder without weights, and the state that belongs there."""
    folder = shutil.copytree(make()[1], tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    return folder, tiny_torch(8).state_dict()


@FORMATS
@pytest.mark.parametrize("sharded", [False, True])
def test_same_bytes_as_from_safetensors(make, twin, tmp_path, zipped, sharded):
    folder, state = twin
    # Views and shared storages, as real checkpoints have them.
    stacked = torch.stack([state["shared.weight"], state["shared.weight"]])
    state["shared.weight"] = stacked[1]
    state["lm_head.weight"] = stacked[1]
    wi = "encoder.block.0.layer.1.DenseReluDense.wi.weight"
    state[wi] = state[wi].T.contiguous().T
    if sharded:
        names = [*state]
        parts = {f"pytorch_model-{i}.bin": names[i::3] for i in range(3)}
        for file, part in parts.items():
            save({name: state[name] for name in part}, folder / file, zipped)
        index = {name: file for file, part in parts.items() for name in part}
        text = json.dumps({"weight_map": index})
        (folder / "pytorch_model.bin.index.json").write_text(text)
    else:
        save(state, folder / "pytorch_model.bin", zipped)
    convert.convert(folder, tmp_path / "mlx")
    expected = (make()[2] / WEIGHTS).read_bytes()
    assert (tmp_path / "mlx" / WEIGHTS).read_bytes() == expected


def test_safetensors_are_preferred(make, tmp_path):
    folder = shutil.copytree(make()[1], tmp_path / "hf")
    (folder / "pytorch_model.bin").write_bytes(b"nothing of use")
    convert.convert(folder, tmp_path / "mlx")


class Bomb:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@FORMATS
@pytest.mark.parametrize(
    "bomb, name",
    [
        (Bomb(os.system, "touch {}"), "system"),
        (Bomb(eval, "open('{}', 'w')"), "eval"),
        (Bomb(getattr, os, "path"), "getattr"),
    ],
    ids=["system", "eval", "getattr"],
)
def test_code_is_refused_by_name(tmp_path, zipped, bomb, name):
    """A pickle may call anything; nothing but tensors is let through."""
    mark = tmp_path / "ran"
    function, arguments = bomb.call
    if isinstance(arguments[0], str):
        bomb = Bomb(function, arguments[0].format(mark))
    else:
        bomb = Bomb(function, "path", "x")
    path = save({"x": torch.zeros(2), "y": bomb}, tmp_path / "x.bin", zipped)
    with pytest.raises(InputError, match=rf"asks for \w+.{name}, which"):
        read_torch(path)
    assert not mark.exists()


@FORMATS
def test_what_is_no_state_dict(tmp_path, zipped):
    for state in ([torch.zeros(2)], {"x": 3}, {"x": {"y": torch.zeros(2)}}, {1: 2}):
        with pytest.raises(InputError, match="holds a"):
            read_torch(save(state, tmp_path / "x.bin", zipped))
    with pytest.raises(InputError, match=r"torch\.nn"):
        read_torch(save(torch.nn.Linear(2, 2), tmp_path / "x.bin", zipped))


def test_files_of_another_kind(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(InputError, match=r"torch\.save"):
        read_torch(path)
    np.savez(path.with_suffix(".npz"), x=np.zeros(2))
    with pytest.raises(InputError, match=r"torch\.save"):
        read_torch(path.with_suffix(".npz"))
    path.write_bytes(b"")
    with pytest.raises(InputError, match="damaged"):
        read_torch(path)
    with pytest.raises(InputError, match="missing"):
        read_torch(tmp_path / "nowhere.bin")


@FORMATS
def test_damaged_files(tmp_path, zipped):
    """Cut or overwritten anywhere: an error or whole tensors, never a crash, never a
    read beyond the file."""
    state = {"a": torch.randn(4, 4), "b": torch.randn(3)}
    whole = save(state, tmp_path / "whole.bin", zipped).read_bytes()
    chance = random.Random(0)
    path = tmp_path / "x.bin"
    for _ in range(400):
        raw = bytearray(whole)
        if chance.random() < 0.3:
            raw = raw[: chance.randrange(len(raw))]
        else:
            for _ in range(chance.choice((1, 2, 6))):
                raw[chance.randrange(len(raw))] = chance.randrange(256)
        path.write_bytes(raw)
        try:
            found = read_torch(path)
        except InputError as error:
            assert str(path) in str(error)
        else:
            for tensor in found.values():
                tensor.bits.tobytes()  # reads every element


def test_views_beyond_their_storage(tmp_path):
    """A stride that leads out of the file would read other memory, or crash."""

    class Outside:
        def __reduce__(self):
            inside = torch.zeros(4)
            rebuild, arguments = inside.__reduce_ex__(2)
            return rebuild, (arguments[0], 0, (4,), (1 << 40,), *arguments[4:])

    path = save({"x": Outside()}, tmp_path / "x.bin", True)
    with pytest.raises(InputError, match="beyond its storage"):
        read_torch(path)


@pytest.mark.parametrize(
    "files, expected",
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (
            ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"],
            ["pytorch_model.bin"],
        ),
        (["onnx/model.onnx", "pytorch_model.bin"], ["pytorch_model.bin"]),
        (
            [
                "model.safetensors.index.json",
                "model-1-of-2.safetensors",
                "pytorch_model.bin",
            ],
            ["model.safetensors.index.json", "model-1-of-2.safetensors"],
        ),
        (
            [
                "pytorch_model.bin.index.json",
                "pytorch_model-1.bin",
                "model.h5",
                "x.bin",
            ],
            ["pytorch_model.bin.index.json", "pytorch_model-1.bin"],
        ),
    ],
)
def test_only_needed_files_are_fetched(files, expected):
    companions = ["config.json", "spiece.model"]
    assert sources.needed([*companions, *files, "README.md"]) == companions + expected


def test_model_without_usable_weights():
    with pytest.raises(InputError, match="neither"):
        sources.needed(["config.json", "tf_model.h5"])


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that a download needs, from a folder."""

    folder: Path
    asked: list

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        self.asked.append(self.path)
        commit = "0123456789abcdef0123456789abcdef01234567"
        if self.path in ("/api/models/tiny/t5", "/api/models/tiny/t5/revision/main"):
            names = [{"rfilename": path.name} for path in self.folder.iterdir()]
            answer = {"id": "tiny/t5", "sha": commit, "siblings": names}
            return self.reply(200, json.dumps(answer).encode(), body)
        if self.path.startswith("/api/models/tiny/t5/tree/"):
            files = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0"}
                for p in self.folder.iterdir()
            ]
            return self.reply(200, json.dumps(files).encode(), body)
        if self.path.startswith("/api/models/tiny/t5/revision/"):
            return self.reply(404, b"{}", body, error="RevisionNotFound")
        if self.path.startswith("/api/models/tiny/gated"):
            return self.reply(403, b"{}", body, error="GatedRepo")
        if self.path.startswith("/tiny/t5/resolve/"):
            file = self.folder / self.path.split("?")[0].rpartition("/")[2]
            if file.is_file():
                raw = file.read_bytes()
                return self.reply(200, raw, body, commit=commit, tag=f'"{len(raw)}"')
        return self.reply(404, b"{}", body, error="RepoNotFound")

    def reply(self, status, raw, body, error=None, commit=None, tag=None):
        self.send_response(status)
        headers = {"X-Error-Code": error, "X-Repo-Commit": commit, "ETag": tag}
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if body:
            self.wfile.write(raw)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(make, tmp_path):
    """Runs convert.py against a hub on this machine: call(*arguments) -> result."""
    served = shutil.copytree(make()[1], tmp_path / "served")
    (served / "tf_model.h5").write_bytes(b"x" * 1000)
    handler = type("Served", (Hub,), {"folder": served, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def call(*arguments, endpoint=f"http://127.0.0.1:{server.server_port}"):
        environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            environment.pop(name, None)
        output = ["--output", str(tmp_path / "mlx")]
        script = [sys.executable, str(Path(convert.__file__)), *arguments, *output]
        return subprocess.run(script, env=environment, capture_output=True, text=True)

    call.asked = handler.asked
    call.output = tmp_path / "mlx" / WEIGHTS
    yield call
    server.shutdown()
    server.server_close()


def test_from_the_hub(hub, make):
    """Downloaded, converted, and used again from the cache when the hub is away."""
    result = hub("--model", "tiny/t5")
    assert result.returncode == 0, result.stderr
    expected = (make()[2] / WEIGHTS).read_bytes()
    assert hub.output.read_bytes() == expected
    assert not any("tf_model" in path for path in hub.asked)
    again = hub("--model", "tiny/t5", endpoint="http://127.0.0.1:9")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "tiny/absent"], "neither a folder nor a model on the hub"),
        (["--model", "tiny/gated"], "gated"),
        (["--model", "tiny/t5", "--revision", "v9"], "no revision 'v9'"),
        (["--model", "not/a/name/"], "neither a folder nor a model on the hub"),
        (["--model", ".", "--revision", "v9"], "is a folder"),
    ],
)
def test_hub_errors(hub, arguments, message):
    result = hub(*arguments)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr


def test_no_network(hub):
    result = hub("--model", "tiny/t5", endpoint="http://127.0.0.1:9")
    assert result.returncode == 2
    assert "cannot fetch tiny/t5" in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
