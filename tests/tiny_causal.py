"""Tiny random decoder-only models, for transformers and for this program."""

import torch
from conftest import VOCABULARY
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

POSITIONS = 300
ENDS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
COMMON = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
COMMON |= {"max_position_embeddings": POSITIONS, "tie_word_embeddings": False}


def rotary(config_class):
    """A config of a model with rotary embeddings: (layers, size, positions) -> it."""
    return lambda layers, size, positions: config_class(
        vocab_size=size,
        num_hidden_layers=layers,
        num_key_value_heads=2,
        **COMMON,
        **ENDS,
    )


ARCHITECTURES = {
    "gpt2": (
        GPT2LMHeadModel,
        lambda layers, size, positions: GPT2Config(
            vocab_size=size,
            n_embd=32,
            n_head=4,
            n_layer=layers,
            n_positions=positions,
            n_ctx=positions,
            **ENDS,
        ),
    ),
    "llama": (LlamaForCausalLM, rotary(LlamaConfig)),
    "qwen2": (Qwen2ForCausalLM, rotary(Qwen2Config)),
}


def tiny_causal(
    kind, seed=1, noise=0.0, layers=2, size=VOCABULARY, positions=POSITIONS
):
    """A random model for transformers, whose texts vary."""
    model_class, config = ARCHITECTURES[kind]
    torch.manual_seed(seed)
    oracle = model_class(config(layers, size, positions)).eval()
    with torch.no_grad():
        for name, weight in oracle.named_parameters():
            if weight.ndim == 2:
                scale = 1.0 if "wte" in name or "wpe" in name else 2.0
                weight.normal_(0, scale * min(weight.shape) ** -0.5)
        for weight in oracle.parameters():
            weight += noise * weight.std().nan_to_num() * torch.randn_like(weight)
    return oracle
