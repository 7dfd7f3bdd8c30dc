"""sources.py and torch_file.py: PyTorch's files without PyTorch, and the hub."""

import importlib.util
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from causal_table import sizes
from conftest import tiny_torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

import convert
from architectures import causal, registry
from checkpoints import hub as on_hub
from checkpoints.converted import WEIGHTS
from checkpoints.torch_file import read_torch
from system.errors import InputError

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
    assert on_hub.needed([*companions, *files, "README.md"]) == companions + expected


def test_model_without_usable_weights():
    with pytest.raises(InputError, match="neither"):
        on_hub.needed(["config.json", "tf_model.h5"])


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


class FakeHub:
    """The hub's models: of each its files, the config's text, or an error instead.

    What is fetched is noted; weights are none.
    """

    def __init__(self, folder: Path):
        self.models: dict = {}
        self.cached: set[str] = set()
        self.fetched: list[str] = []
        self._folder = folder

    def model_info(self, name):
        found = self.models.get(name) or self.error(RepositoryNotFoundError)
        if isinstance(found, Exception):
            raise found
        files = [SimpleNamespace(rfilename=file) for file in found]
        return SimpleNamespace(siblings=files)

    def hf_hub_download(self, name, file, local_files_only=False, revision=None):
        found = self.models[name]
        if local_files_only and name not in self.cached:
            raise FileNotFoundError(name)
        if isinstance(found, Exception):
            found = {"config.json": {"model_type": "gpt2", **sizes("gpt2")}}
        if isinstance(found[file], Exception):
            raise found[file]
        path = self._folder / name.replace("/", "--") / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found[file]))
        return str(path)

    def snapshot_download(self, name, **options):
        self.fetched.append(name)
        if isinstance(self.models[name], Exception):
            raise self.models[name]
        return str(self._folder / name.replace("/", "--"))

    @staticmethod
    def error(kind):
        return kind.__new__(kind, "refused")  # what else it takes varies by version


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    hub = FakeHub(tmp_path)
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", getattr(hub, name))
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info",
        lambda _, name, revision=None: hub.model_info(name),
    )
    return hub


def model_with(**config) -> dict:
    return {"config.json": config, "model.safetensors": None}


@pytest.mark.parametrize(
    "model, message",
    [
        (None, "'some/model' is neither a folder nor a model on the hub, or a private"),
        (FakeHub.error(GatedRepoError), "some/model is gated: accept its conditions"),
        (
            {"config.json": FakeHub.error(GatedRepoError)},
            "some/model is gated: accept its conditions",
        ),
        (OSError("no route"), "no model 'some/model'.* cannot be reached .no route."),
        ({"x.gguf": None}, "some/model has no config.json"),
        ({"adapter_config.json": None}, "some/model holds an adapter"),
        (
            model_with(model_type="t5gemma", is_encoder_decoder=True),
            "some/model is an encoder-decoder .t5gemma.: of those only the T5 family",
        ),
        (model_with(model_type="vit"), "model_type 'vit', which is neither"),
        (model_with(model_type="../../x"), "no model_type that is a name"),
        (model_with(model_type="os.path"), "no model_type that is a name"),
        (model_with(), "no model_type that is a name"),
    ],
)
def test_what_the_hub_has_nothing_of(fake_hub, model, message):
    """Said as it is, never with advice to convert it, and no weights are fetched."""
    fake_hub.models["some/model"] = model
    with pytest.raises(InputError, match=message) as caught:
        registry.find("some/model")
    assert "convert" not in str(caught.value)
    assert fake_hub.fetched == []


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_what_mlx_lm_has_is_fetched(fake_hub, kind):
    """By its own name, or by one that it has for another's."""
    fake_hub.models["some/model"] = model_with(model_type=kind, **sizes(kind))
    assert registry.find("some/model").name == "some--model"
    assert fake_hub.fetched == ["some/model"]


def test_what_is_not_verified_is_not_fetched(fake_hub):
    """Neither another architecture nor a field that would give another text."""
    odd = {**sizes("llama"), "hidden_act": "sparkle"}
    fake_hub.models["some/model"] = model_with(model_type="llama", **odd)
    with pytest.raises(InputError, match="hidden_act is sparkle"):
        registry.find("some/model", unverified=True)
    fake_hub.models["some/model"] = model_with(model_type="nemotron")
    with pytest.raises(InputError, match="--unverified runs it"):
        registry.find("some/model")
    assert fake_hub.fetched == []
    assert registry.find("some/model", unverified=True).name == "some--model"


def test_a_t5_on_the_hub_is_to_be_converted(fake_hub):
    fake_hub.models["some/model"] = model_with(model_type="mt5")
    with pytest.raises(InputError, match=r"convert.py --model some/model"):
        registry.find("some/model")
    assert fake_hub.fetched == []


def test_a_download_that_was_interrupted(fake_hub):
    """Its config is there, its weights are not, and the hub is away."""
    fake_hub.models["some/model"] = OSError("no route")
    fake_hub.cached.add("some/model")
    with pytest.raises(InputError, match=r"cannot fetch some/model .* resumes"):
        registry.find("some/model")


def test_without_mlx_lm(fake_hub, monkeypatch):
    """Said before gigabytes are fetched for it."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name == "mlx_lm" else find_spec(name, *more),
    )
    fake_hub.models["some/model"] = model_with(model_type="gpt2")
    with pytest.raises(InputError, match=re.escape(causal.HINT)):
        registry.find("some/model")
    assert fake_hub.fetched == []


def test_an_encoder_decoder_in_a_folder(tmp_path):
    config = {"model_type": "bart", "is_encoder_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"is an encoder-decoder .bart."):
        registry.find(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot read"):
        registry.find(str(tmp_path))


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_hub_that_refuses_is_reached(monkeypatch, status):
    """A mirror, say, that answers nothing but a number."""
    error = OSError("no")
    error.response = SimpleNamespace(status_code=status)

    def files(name, revision):
        raise error

    monkeypatch.setattr(on_hub, "_files", files)
    with pytest.raises(InputError, match=r"the hub refuses it .no."):
        on_hub.fetch_config("some/model")
    with pytest.raises(InputError, match=r"cannot fetch .*: log in .*, or try later"):
        on_hub.fetch("some/model")


@pytest.mark.parametrize("kind", ["llama", "bart", "t5"])
def test_what_is_no_t5_is_not_fetched_to_be_converted(fake_hub, kind):
    """Its config alone is looked at; of decoder-only models it is said what to do."""
    fake_hub.models["some/model"] = model_with(model_type=kind)
    if kind == "t5":
        assert on_hub.fetch("some/model", check=registry.require_convertible)
        return
    with pytest.raises(InputError, match=r"another architecture.* run as they are"):
        on_hub.fetch("some/model", check=registry.require_convertible)
    assert fake_hub.fetched == []
