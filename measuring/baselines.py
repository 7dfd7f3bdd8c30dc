"""Other programs on the same weights, for benchmark.py to time beside this one."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from architectures.parameters import dequantize
from architectures.slim import is_slim
from architectures.t5 import load
from model import T5
from pair import Pair
from speculation.beams import Beams
from speculation.drafting import ModelDrafter, up_to_end
from system.device import on_gpu
from system.errors import InputError


@dataclass(frozen=True)
class Baseline:
    """A program that decodes, greedily where ``temperature`` is 0, or with beams.

    Attributes:
        generate: a prompt's ids -> the new tokens, end-of-sequence included, and the
            passes of the target where they can be counted.
        threads: whose threads compute.
        generate_batch: the same of several prompts at once; None where it cannot.
    """

    name: str
    generate: Callable[[list[int]], tuple[list[int], int | None]]
    temperature: float = 0.0
    threads: str = "mlx"
    generate_batch: Callable[[list[list[int]]], list[list[int]]] | None = None


def searched(beams: Beams | None) -> str:
    """What the name of a row says of a beam search, if there is one."""
    return f", beams {beams.num_beams}" if beams else ""


def transformers_generate(
    pair: Pair, max_tokens: int, beams: Beams | None = None
) -> Baseline:
    """transformers' ``generate``, greedy or with beams, in float32.

    On a GPU where PyTorch knows the one that MLX uses.

    Raises:
        InputError: PyTorch is not installed.
    """
    return _transformers(pair, max_tokens, beams=beams)


def transformers_assisted(pair: Pair, max_tokens: int) -> Baseline:
    """The same with the draft as its assistant model, which proposes as many tokens
    as transformers' own schedule has it.

    Raises:
        InputError: PyTorch is not installed, or there is no draft.
    """
    return _transformers(pair, max_tokens, assisted=True)


def to_transformers(model: T5, folder: Path) -> Any:
    """The model that was loaded from ``folder`` as transformers' T5, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    from architectures.t5_checkpoint import recipe

    if is_slim(model):
        model = load(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tied = "head" not in model
    config.scale_decoder_outputs = model.config.scale_outputs
    reference = AutoModelForSeq2SeqLM.from_config(config)
    if not tied:
        # transformers 5 ties every T5 that it makes.
        reference.lm_head.weight = torch.nn.Parameter(reference.lm_head.weight.clone())
    state = {}
    parameters = dict(tree_flatten(model.parameters()))
    for name in [name for name in parameters if name.endswith(".scales")]:
        path = name.removesuffix(".scales")
        whole = dequantize(parameters, path, model.config.quantization)
        parameters[f"{path}.weight"] = whole
    for name, theirs in recipe(model.config, tied).items():
        parts = np.array(parameters[name].astype(mx.float32))
        for part, their_name in zip(np.split(parts, len(theirs)), theirs, strict=True):
            state[their_name] = torch.from_numpy(part)
    copies, unknown = reference.load_state_dict(state, strict=False)
    assert not unknown
    assert all("embed_tokens" in name or name == "lm_head.weight" for name in copies)
    return reference.eval()


def greedy_transformers(pair: Pair) -> tuple[Any, dict[str, Any]]:
    """The target as transformers' T5, in float32, and what its ``generate`` has to be
    told besides ``max_new_tokens`` to write what the target writes greedily.

    On a GPU where PyTorch knows the one that MLX uses.

    Raises:
        InputError: PyTorch is not installed, or it is no T5.
    """
    try:
        import torch
        from transformers.utils import logging
    except ImportError:
        raise InputError(
            "--baseline transformers needs torch: pip install torch"
        ) from None
    logging.set_verbosity_error()

    target = _t5(pair)
    device = torch.device("cpu")
    if on_gpu():
        if torch.cuda.is_available():
            device = torch.device("cuda")
        elif torch.backends.mps.is_available():
            device = torch.device("mps")
    reference = _generating(target, pair.folder).to(device)
    # transformers would emit rows that no token stands for.
    size = pair.target.vocabulary
    banned = [*pair.tokenizer.gaps(size), *range(size, reference.config.vocab_size)]
    options = {
        "do_sample": False,
        "num_beams": 1,
        "suppress_tokens": banned or None,
        "eos_token_id": sorted(target.config.eos_tokens),
        "decoder_start_token_id": target.config.start_token,
    }
    return reference, options


def _transformers(
    pair: Pair, max_tokens: int, assisted: bool = False, beams: Beams | None = None
) -> Baseline:
    draft = _draft(pair) if assisted else None
    reference, options = greedy_transformers(pair)
    import torch

    device = reference.device
    options["max_new_tokens"] = max_tokens
    if beams and beams.num_beams > 1:
        options |= asdict(beams)  # which has their names
    name = f"transformers, {device.type}{searched(beams)}"
    if assisted:
        assistant = _generating(draft, pair.draft_folder).to(device)
        options["assistant_model"] = assistant
        name = f"transformers assisted, {device.type}"

    ends, padding = pair.eos_tokens, reference.config.pad_token_id or 0

    def generate_batch(prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        rows = [prompt + [padding] * (longest - len(prompt)) for prompt in prompts]
        mask = [[int(i < len(prompt)) for i in range(longest)] for prompt in prompts]
        with torch.inference_mode():
            out = reference.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                **options,
            )
        # What follows a row's end is padding.
        return [up_to_end(row, ends) for row in out[:, 1:].tolist()]

    def generate(prompt: list[int]) -> tuple[list[int], None]:
        return generate_batch([prompt])[0], None

    several = None if assisted else generate_batch  # it drafts for one at a time
    return Baseline(name, generate, threads="torch", generate_batch=several)


def _generating(model: T5, folder: Path) -> Any:
    reference = to_transformers(model, folder)
    # generate() makes as many caches as this says, and means the decoder's layers.
    reference.config.num_layers = reference.config.num_decoder_layers
    return reference


def ctranslate2(
    pair: Pair, max_tokens: int, beams: Beams | None = None, int8: bool = False
) -> Baseline:
    """CTranslate2's search, greedy or with beams, on a CPU, in float32 or with int8
    weights. When a search stops is a rule of its own.

    Raises:
        InputError: CTranslate2 or PyTorch, which its converter needs, is missing.
    """
    try:
        import ctranslate2 as library
        from ctranslate2.converters import TransformersConverter

        reference = to_transformers(_t5(pair), pair.folder)
        gaps = set(pair.tokenizer.gaps(pair.target.vocabulary))
        _keep_rows(
            reference, [t for t in range(pair.target.vocabulary) if t not in gaps]
        )
    except ImportError as error:
        raise InputError(
            f"--baseline ctranslate2 needs ctranslate2 and torch: {error}"
        ) from None
    kind = "int8" if int8 else "float32"
    with tempfile.TemporaryDirectory() as folder:
        theirs, converted = Path(folder) / "hf", str(Path(folder) / "ct2")
        reference.save_pretrained(theirs)
        for file in pair.folder.iterdir():
            if file.name.startswith(("tokenizer", "special_tokens", "spiece")):
                shutil.copy(file, theirs)
        TransformersConverter(str(theirs)).convert(converted, quantization=kind)
        translator = library.Translator(
            converted,
            device="cpu",
            compute_type=kind,
            inter_threads=1,
            intra_threads=os.cpu_count(),
        )
    names = {token: name for name, token in pair.tokenizer.ids.items()}
    ends = pair.eos_tokens
    search = beams or Beams(1)

    def generate_batch(prompts: list[list[int]]) -> list[list[int]]:
        results = translator.translate_batch(
            [[names[token] for token in prompt] for prompt in prompts],
            beam_size=search.num_beams,
            length_penalty=search.length_penalty,
            max_decoding_length=max_tokens,
            end_token=[names[token] for token in ends],
            return_end_token=True,
        )
        return [
            [pair.tokenizer.ids[name] for name in result.hypotheses[0]]
            for result in results
        ]

    def generate(prompt: list[int]) -> tuple[list[int], None]:
        return generate_batch([prompt])[0], None

    name = f"CTranslate2, {kind}{searched(beams)}"
    return Baseline(
        name, generate, threads="ctranslate2", generate_batch=generate_batch
    )


def _keep_rows(reference: Any, ids: list[int]) -> None:
    """Leave out the rows that no token stands for.

    CTranslate2's converter numbers tokens by their order, and gives rows that are left
    over names of its own making, some of which the tokenizer has for others.
    """
    import torch

    kept: dict[int, Any] = {}  # tied ones stay tied
    stacks = (reference.encoder, reference.decoder)
    embeddings = [reference.shared, *(stack.embed_tokens for stack in stacks)]
    for module in (*embeddings, reference.lm_head):
        whole = module.weight
        if id(whole) not in kept:
            kept[id(whole)] = torch.nn.Parameter(whole.detach()[ids])
        module.weight = kept[id(whole)]
    reference.config.vocab_size = len(ids)


def ctranslate2_int8(
    pair: Pair, max_tokens: int, beams: Beams | None = None
) -> Baseline:
    """See :func:`ctranslate2`."""
    return ctranslate2(pair, max_tokens, beams, int8=True)


def mlx_lm(pair: Pair, max_tokens: int, num_draft: int, temperature: float) -> Baseline:
    """mlx-lm's own generation with the same models, alone or with its ``draft_model``.

    Raises:
        InputError: it is no decoder-only pair.
    """
    if pair.target.has_encoder:
        raise InputError("--baseline mlx-lm is for decoder-only models: T5 is none")
    if num_draft and not isinstance(pair.drafter, ModelDrafter):
        raise InputError("--baseline mlx-lm drafts with a model: give a --draft-model")
    from mlx_lm.generate import generate_step, speculative_generate_step
    from mlx_lm.sample_utils import make_sampler

    from architectures.causal_session import PREFILL

    target = _Counted(pair.target.model)
    options = {
        "max_tokens": max_tokens,
        "sampler": make_sampler(temp=temperature),
        "prefill_step_size": PREFILL,
    }

    def generate(prompt: list[int]) -> tuple[list[int], int]:
        ids, tokens = mx.array(prompt), []
        target.calls = 0
        prefill = -(-(len(prompt) - 1) // PREFILL)  # passes
        if num_draft:
            draft = pair.drafter.session.model
            steps = speculative_generate_step(
                ids, target, draft, num_draft_tokens=num_draft, **options
            )
        else:
            steps = generate_step(ids, target, **options)
        for token, *_ in steps:
            tokens.append(int(token))
            if tokens[-1] in pair.eos_tokens:
                break
        steps.close()
        # Alone it has one more pass queued when it is stopped.
        return tokens, target.calls - prefill if num_draft else len(tokens)

    name = f"mlx-lm, num-draft {num_draft}"
    if temperature:
        name += f", temperature {temperature:g}"
    return Baseline(name, generate, temperature)


class _Counted:
    """A model that counts its passes."""

    def __init__(self, model: Any):
        self._model = model
        self.calls = 0

    def __call__(self, *args: Any, **options: Any) -> mx.array:
        self.calls += 1
        return self._model(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _t5(pair: Pair) -> T5:
    if not pair.target.has_encoder:
        raise InputError("of the baselines only mlx-lm is for decoder-only models")
    return pair.target.model


def _draft(pair: Pair) -> T5:
    if not isinstance(pair.drafter, ModelDrafter):
        raise InputError("--baseline transformers-assisted needs a draft model")
    return pair.drafter.session.model


#: Of the programs the one that drafts and samples as well.
MLX_LM = "mlx-lm"
#: By the names that --baseline takes; mlx-lm's are made cell by cell.
MAKE: dict[str, Callable[..., Baseline]] = {
    "transformers": transformers_generate,
    "transformers-assisted": transformers_assisted,
    "ctranslate2": ctranslate2,
    "ctranslate2-int8": ctranslate2_int8,
}
#: Of those the ones that take beams as well.
SEARCHING = {"transformers", "ctranslate2", "ctranslate2-int8"}


def named(name: str, pair: Pair, max_tokens: int, beams: Beams | None) -> Baseline:
    """The program of that name in :data:`MAKE`; with ``beams`` one that takes them."""
    options = {"beams": beams} if beams else {}
    return MAKE[name](pair, max_tokens, **options)
