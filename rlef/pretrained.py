"""Hugging Face model folders: `config.json`, `model.safetensors`, and the tokenizer, which this file leaves
alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlef.config import ConfigError
from rlef.records import ModelShape

EMBEDDED = "embedded"
_ARCHITECTURE = "LlamaForCausalLM"


def model_folder(path: str) -> Path:
    """The folder that `model.path` means: a path, or the model that rlef ships."""
    if path == EMBEDDED:
        return Path(str(resources.files("rlef") / "data" / "model"))
    return Path(path)


def read_shape(folder: Path) -> ModelShape:
    """The shape in `config.json`; a `ConfigError` names the file and what is wrong with it."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"model.path: {folder} has no config.json; name a Hugging Face model folder"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"model.path: {file} is not JSON ({error})") from None
    if config.get("architectures") != [_ARCHITECTURE]:
        raise ConfigError(
            f"model.path: {file} says architectures = {config.get('architectures')}; "
            f"only {_ARCHITECTURE} is read"
        )
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    return ModelShape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        max_position_embeddings=config["max_position_embeddings"],
        rope_theta=float(config.get("rope_theta", rope.get("rope_theta", 10000.0))),
        rms_norm_eps=config["rms_norm_eps"],
        tie_word_embeddings=config.get("tie_word_embeddings", False),
    )


def read_pretrained(folder: Path) -> tuple[ModelShape, dict[str, Tensor]]:
    """The shape and the float32 weights of a model folder, under their Hugging Face names."""
    shape = read_shape(folder)
    file = folder / "model.safetensors"
    if not file.exists():
        raise ConfigError(f"model.path: {folder} has no model.safetensors; name a Hugging Face model folder")
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise ConfigError(f"model.path: {file} cannot be read ({error}); copy it again") from None
    return shape, {name: tensor.float() for name, tensor in weights.items()}


def write_pretrained(
    folder: Path,
    shape: ModelShape,
    weights: Mapping[str, Tensor],
    *,
    end_token_id: int,
    pad_token_id: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `config.json` and `model.safetensors`, each to a temporary name first and then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [_ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rms_norm_eps": shape.rms_norm_eps,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": end_token_id,
        "pad_token_id": pad_token_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    contiguous = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()}
    temporary = folder / "model.safetensors.partial"
    save_file(contiguous, temporary, metadata={"format": "pt"})
    _publish(temporary, folder / "model.safetensors")
    temporary = folder / "config.json.partial"
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    _publish(temporary, folder / "config.json")


def _publish(temporary: Path, final: Path) -> None:
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(final)


def read_token_ids(folder: Path) -> tuple[int, int]:
    """The end-of-turn and the padding token of `config.json`."""
    config = json.loads((folder / "config.json").read_text())
    return config["eos_token_id"], config["pad_token_id"]
