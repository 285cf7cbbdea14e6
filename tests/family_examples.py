"""Tiny random models of each family, made and saved by transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MAX_FILE_BYTES = 6_000
"""Of the examples' folders: each has several files and an index."""


@dataclass(frozen=True, kw_only=True)
class Family:
    architecture: str
    dtype: torch.dtype = torch.float32
    settings: dict[str, Any] = field(default_factory=dict)


DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 100.0}
# Of the four wavelengths, 6 is kept, 63 changes in part, and 628 and 6283 are divided by the factor.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}

# Two ranks can divide each. Some have heads wider than their share of the hidden size, and some are stored in
# bfloat16.
FAMILIES = {
    "llama3": Family(
        architecture="LlamaForCausalLM",
        settings={"head_dim": 8, "rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 256},
    ),
    "llama3-tied": Family(
        architecture="LlamaForCausalLM",
        settings={
            "rope_parameters": LLAMA3_ROPE,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        dtype=torch.bfloat16,
        settings={"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen2-tied": Family(architecture="Qwen2ForCausalLM", settings={"tie_word_embeddings": True}),
    "qwen3": Family(architecture="Qwen3ForCausalLM", settings={"head_dim": 6}),
    "qwen3-tied": Family(
        architecture="Qwen3ForCausalLM",
        dtype=torch.bfloat16,
        settings={"head_dim": 6, "tie_word_embeddings": True},
    ),
}


def save_random(name: str, folder: Path) -> None:
    """One of `FAMILIES`, with biases away from 0 and norms away from 1, in files of `MAX_FILE_BYTES`."""
    import transformers

    family = FAMILIES[name]
    model_class = getattr(transformers, family.architecture)
    common = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_parameters": DEFAULT_ROPE,
        "rms_norm_eps": 1e-5,
        "eos_token_id": [3, 4],
    }
    model = model_class(model_class.config_class(**common | family.settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name_, parameter in model.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name_ else noise)
    model.to(family.dtype).save_pretrained(folder, max_shard_size=MAX_FILE_BYTES)


def transformers_logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """What transformers computes in float32 for one sequence, `[tokens, vocab]`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits
