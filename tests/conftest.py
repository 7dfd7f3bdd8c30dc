"""Tiny random checkpoints, saved by transformers and converted by convert.py.

Left as transformers initialises them they would write one token over and over: with a
tied head and small layers the next token is always the last one. The weights here make
layers and position bias outweigh the embedding, so that texts vary.
"""

import os
import tempfile

# Before the libraries that read them: a process of the tests has a core for itself,
# none goes to the network, and none reads or writes the user's cache.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-of-tests-")

import system.fast_blas  # noqa: F401  (before mlx: see there)

import atexit
import ctypes
import importlib
import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from running import Running
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

import convert
import main
from architectures import t5
from system import errors
from text import confined, fast_tokenizer, saving, slow_tokenizer, spiece_tokenizer
from text.tokenizer import reader_of

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# A shell's background has it ignored, by whatever is started from there as well.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("suite")
torch.set_num_threads(1)


def _save_tokenizer(source: Path, folder: Path) -> None:
    modules = (fast_tokenizer, slow_tokenizer, spiece_tokenizer)
    (module,) = (each for each in modules if each.__name__ == reader_of(source))
    module.open_folder(source).save(str(folder))


#: As convert.py has it: in a process of its own, which takes seconds to begin.
save_tokenizer_confined = saving.save_tokenizer
saving.save_tokenizer = _save_tokenizer

#: Seconds after which a process is taken to hang, however busy the machine is.
HANG = 900

#: Ids 0 to 2 are pad, end-of-sequence and unknown.
VOCABULARY = 96

TINY = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}

#: Fields of config.json that only transformers 5 writes: the hub's files lack them.
NEW_FIELDS = ("scale_decoder_outputs", "dense_act_fn", "is_gated_act")


def tiny_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A unigram tokenizer with T5's spaces and bytes for what it has no piece for."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    words = ["▁", "▁the", "▁cat", "▁sat", "s", "a", "b", "c", "e", "t", "▁on"]
    pieces += [(word, -2.0 - i / 10) for i, word in enumerate(words)]
    raw = "é漢😀".encode()
    pieces += [(f"<0x{byte:02X}>", -8.0) for byte in sorted(set(raw))]
    pieces += [(f"▁w{i}", -6.0) for i in range(size - len(pieces))]
    pieces = pieces[:size]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


KINDS = {
    "t5": (T5Config, T5ForConditionalGeneration),
    "mt5": (MT5Config, MT5ForConditionalGeneration),
    "umt5": (UMT5Config, UMT5ForConditionalGeneration),
}


def tiny_torch(
    seed: int, untied: bool = False, noise: float = 0.0, kind: str = "t5", **fields
) -> T5ForConditionalGeneration:
    """A random T5 for transformers, the oracle.

    With some ``noise`` in its weights it is a draft for the same seed without.
    """
    torch.manual_seed(seed)
    config, model_class = KINDS[kind]
    oracle = model_class(config(**TINY | fields)).eval()
    with torch.no_grad():
        for name, weight in oracle.named_parameters():
            if "layer_norm" in name:
                weight.uniform_(0.5, 1.5)
            elif "relative_attention_bias" in name:
                weight.normal_(0, 5.0)
            elif "shared" in name:
                weight.normal_(0, 0.1)
            elif name.endswith(("Attention.q.weight", "Attention.k.weight")):
                weight.normal_(0, weight.shape[1] ** -0.5)  # T5 does not scale q @ k
            else:
                weight.normal_(0, 3 * weight.shape[1] ** -0.5)
        if untied:
            oracle.config.tie_word_embeddings = False
            oracle.config.scale_decoder_outputs = False
            head = torch.randn_like(oracle.lm_head.weight)
            oracle.lm_head.weight = torch.nn.Parameter(head)
        for weight in oracle.parameters():
            weight += noise * weight.std() * torch.randn_like(weight)
    return oracle


def save_checkpoint(
    oracle: T5ForConditionalGeneration, folder: Path, untied: bool = False, **save
) -> Path:
    """Save as on the hub: the config as transformers 4 wrote it, and a tokenizer."""
    oracle.save_pretrained(folder, **save)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for field in NEW_FIELDS:
        config.pop(field, None)
    config["tie_word_embeddings"] = not untied
    path.write_text(json.dumps(config))
    tiny_tokenizer(oracle.config.vocab_size).save_pretrained(folder)
    return folder


class Here:
    """What :class:`text.confined.Confined` is, in this process: it takes no seconds to
    begin, and nothing is confined."""

    def __init__(self, module: str, folder: Path):
        self._folder = folder
        self._held = importlib.import_module(module).open_folder(folder)

    def call(self, method: str, *arguments):
        answer = confined._answer(
            self._folder,
            getattr(self._held, method),
            *json.loads(json.dumps(arguments)),
        )
        answer = json.loads(answer)
        if "error" in answer:
            raise errors.InputError(answer["error"])
        return answer["value"]


@pytest.fixture
def confined_here(monkeypatch):
    """For tests that confinement is no matter of."""
    monkeypatch.setattr(confined, "Confined", Here)


@pytest.fixture(autouse=True)
def ordinary_floats():
    """What g++ makes of compiled passes has the thread take the smallest numbers for 0,
    which hypothesis does not put up with."""
    yield
    if sys.platform == "linux":
        default = ctypes.c_void_p(-1)  # FE_DFL_ENV
        ctypes.CDLL("libm.so.6").fesetenv(default)


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a program's main in this process: (status, stdout, stderr)."""

    def run(*arguments, program=main):
        name = f"{program.__name__}.py"
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()  # what fixtures had to say
        return errors.run(program.main, name), *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def make(tmp_path_factory):
    """A function that makes a tiny model: (oracle, its checkpoint, its conversion)."""
    made = {}

    def build(seed: int = 8, untied: bool = False, **fields):
        key = (seed, untied, *sorted(fields.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            oracle = tiny_torch(seed, untied, **fields)
            save_checkpoint(oracle, folder / "hf", untied)
            convert.convert(folder / "hf", folder / "mlx")
            made[key] = oracle, folder / "hf", folder / "mlx"
        return made[key]

    return build


@pytest.fixture(scope="session")
def tiny(make):
    """The default tiny model, loaded: (the oracle, the MLX model)."""
    oracle, _, folder = make()
    return oracle, t5.load(folder)


@pytest.fixture(scope="session")
def server():
    """A running server with the bundled pair."""
    running = Running("--max-batch", "8", "--max-queue", "64")
    yield running
    assert running.end() == (0, "")
    assert not any("Traceback" in line for line in running.said), running.said


def relative_error(ours, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value of the reference."""
    reference = theirs.detach().numpy()
    return float(np.abs(np.array(ours) - reference).max() / np.abs(reference).max())
