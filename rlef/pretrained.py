"""Hugging Face model folders: `config.json`, `model.safetensors`, and the tokenizer, which this file leaves
alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlef.config import ConfigError
from rlef.files import replacing, write_text
from rlef.records import ModelShape

EMBEDDED = "embedded"
_ARCHITECTURE = "LlamaForCausalLM"
# Variants of the architecture that the model would silently compute as something else.
_ONLY = {"rope_type": "default", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def model_folder(path: str) -> Path:
    """The folder that `model.path` means: a path, or the model that rlef ships."""
    if path == EMBEDDED:
        return Path(str(resources.files("rlef") / "data" / "model"))
    return Path(path)


def read_shape(folder: Path) -> ModelShape:
    """The shape in `config.json`; a `ConfigError` names the file and what is wrong with it."""
    file = folder / "config.json"
    config = _read_config(file)
    try:
        heads = config["num_attention_heads"]
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        shape = ModelShape(
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
    except KeyError as error:
        raise ConfigError(f"model.path: {file} lacks {error}; copy it again") from None
    found = {
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "hidden_act": config.get("hidden_act", "silu"),
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
    }
    for name, value in found.items():
        if value != _ONLY[name]:
            raise ConfigError(
                f"model.path: {file} has {name} = {value!r}; only {_ONLY[name]!r} is implemented"
            )
    return shape


def read_pretrained(folder: Path) -> tuple[ModelShape, dict[str, Tensor]]:
    """The shape and the float32 weights of a model folder, under their Hugging Face names."""
    shape = read_shape(folder)
    with _open_weights(folder) as weights:
        return shape, {name: weights.get_tensor(name).float() for name in weights.keys()}  # noqa: SIM118


def check_weights(folder: Path) -> None:
    """Refuse a missing or truncated weights file without reading the weights."""
    with _open_weights(folder):
        pass


def _open_weights(folder: Path) -> safe_open:
    file = folder / "model.safetensors"
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise ConfigError(
            f"model.path: {folder} has no model.safetensors; name a Hugging Face model folder"
        ) from None
    except SafetensorError as error:
        raise ConfigError(f"model.path: {file} cannot be read ({error}); copy it again") from None


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"model.path: {file.parent} has no config.json; name a Hugging Face model folder"
        ) from None
    except ValueError as error:
        raise ConfigError(f"model.path: {file} is not JSON ({error}); copy it again") from None
    if not isinstance(config, dict):
        raise ConfigError(f"model.path: {file} does not hold a JSON object; copy it again")
    if config.get("architectures") != [_ARCHITECTURE]:
        raise ConfigError(
            f"model.path: {file} says architectures = {config.get('architectures')}; "
            f"only {_ARCHITECTURE} is read"
        )
    return config


def write_pretrained(
    folder: Path,
    shape: ModelShape,
    weights: Mapping[str, Tensor],
    *,
    end_token_id: int,
    pad_token_id: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `config.json` and `model.safetensors`; each is whole or not there."""
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
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    with replacing(folder / "model.safetensors") as writing:
        save_file(contiguous, writing, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", writing)  # safetensors closes it to everyone else


def read_token_ids(folder: Path) -> tuple[int, int]:
    """The end-of-text and the padding token of `config.json`; without a padding token, the former serves."""
    config = json.loads((folder / "config.json").read_text())
    end = config["eos_token_id"]
    end = end[0] if isinstance(end, list) else end
    pad = config.get("pad_token_id")
    return end, end if pad is None else pad
