"""What the `config.json` of a Hugging Face model says: the family and the shape of its decoder.

Features that rlef would silently compute as something else are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from rlef.config import ConfigError, PositiveFloat, PositiveInt
from rlef.records import ModelShape, ModelType, RopeScaling

ARCHITECTURES: dict[str, ModelType] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_ROPE_TYPES = ("default", "llama3")
_DEFAULT_ROPE_THETA = 10_000.0  # what transformers takes where a file names none

# Of these features one value is implemented, which is also what a file without the key means.
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,  # it would be of the output projection, too; the biases of Qwen2 are no setting
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}
# Transformers takes numbers of its own for what a file of the family lacks. No published file lacks them.
_NEEDED: dict[ModelType, tuple[str, ...]] = {
    "llama": (),
    "qwen2": ("num_key_value_heads",),
    "qwen3": ("num_key_value_heads", "head_dim"),
}

_Checked = TypeVar("_Checked", bound=BaseModel)


class _Decoder(BaseModel):
    """What is read of a `config.json`. A key that holds null counts as missing."""

    model_config = ConfigDict(strict=True)

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    max_position_embeddings: PositiveInt
    rope_theta: PositiveFloat = _DEFAULT_ROPE_THETA
    rms_norm_eps: PositiveFloat
    tie_word_embeddings: bool = False
    use_sliding_window: bool = False
    sliding_window: PositiveInt | None = None
    max_window_layers: int = 28
    layer_types: list[str] = []


class _RopeScaling(BaseModel):
    """What `rope_parameters`, or before transformers 5 `rope_scaling`, says with the type "llama3"."""

    model_config = ConfigDict(strict=True)

    factor: PositiveFloat
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveInt


class _Refusal(Exception):  # noqa: N818 (it never leaves this file)
    """What is wrong with a `config.json`, in words that go on after its name."""


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json`; a `ConfigError` if there is none that can be read."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"model.path: {folder} has no config.json; name a Hugging Face model folder"
        ) from None
    except ValueError as error:
        raise ConfigError(f"model.path: {file} is not JSON ({error}); copy it again") from None
    if not isinstance(config, dict):
        raise ConfigError(f"model.path: {file} does not hold a JSON object; copy it again")
    return config


def read_shape(folder: Path) -> ModelShape:
    """The shape in `config.json`, by the rules of transformers.

    Raises:
        ConfigError: the file, and which of its keys is missing, wrong, or asks for what is not implemented.
    """
    config = read_config(folder)
    try:
        return _shape(config)
    except _Refusal as refusal:
        raise ConfigError(f"model.path: {folder / 'config.json'} {refusal}") from None


def _shape(config: Mapping[str, Any]) -> ModelShape:
    model_type = _model_type(config)
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise _Refusal(f"has rope_parameters = {rope!r}, which is no JSON object; copy it again")
    _refuse_other_features(config, rope)
    for name in _NEEDED[model_type]:
        if config.get(name) is None:
            raise _Refusal(f"lacks {name!r}; copy it again")
    decoder = _checked(_Decoder, {**config, "rope_theta": rope.get("rope_theta", config.get("rope_theta"))})
    _refuse_sliding_window(decoder)
    heads = decoder.num_attention_heads
    groups = decoder.num_key_value_heads or heads
    if heads % groups:
        raise _Refusal(
            f"has num_attention_heads = {heads}, which is no multiple of num_key_value_heads = {groups}; "
            "copy it again"
        )
    head_dim = decoder.head_dim or decoder.hidden_size // heads
    if head_dim < 2 or head_dim % 2:
        raise _Refusal(f"makes head_dim {head_dim}; rotary embedding needs an even one: copy it again")
    return ModelShape(
        model_type=model_type,
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        num_hidden_layers=decoder.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        max_position_embeddings=decoder.max_position_embeddings,
        rope_theta=decoder.rope_theta,
        rope_scaling=_rope_scaling(rope),
        rms_norm_eps=decoder.rms_norm_eps,
        tie_word_embeddings=decoder.tie_word_embeddings,
    )


def _model_type(config: Mapping[str, Any]) -> ModelType:
    architectures = config.get("architectures")
    if architectures not in [[name] for name in ARCHITECTURES]:
        raise _Refusal(f"says architectures = {architectures}; only {_listed(ARCHITECTURES)} are read")
    model_type = ARCHITECTURES[architectures[0]]
    if config.get("model_type", model_type) != model_type:
        raise _Refusal(
            f"has model_type = {config['model_type']!r} with architectures = {architectures}, "
            f"which is of {model_type!r}; copy it again"
        )
    return model_type


def _refuse_other_features(config: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in _ROPE_TYPES:
        raise _Refusal(
            f"has rope_type = {rope_type!r}; only {_listed(map(repr, _ROPE_TYPES))} are implemented"
        )
    for name, only in _ONLY.items():
        value = rope.get(name, config.get(name))
        if value is not None and value != only:
            raise _Refusal(f"has {name} = {value!r}; only {only!r} is implemented")
    if config.get("quantization_config") is not None:
        raise _Refusal("has a quantization_config; name the model whose weights are not quantised")


def _refuse_sliding_window(decoder: _Decoder) -> None:
    other = set(decoder.layer_types) - {"full_attention"}
    if other:
        raise _Refusal(
            f"has layer_types with {_listed(map(repr, sorted(other)))}; only full attention is implemented"
        )
    has_window = decoder.use_sliding_window and decoder.sliding_window is not None
    if has_window and not decoder.layer_types and decoder.max_window_layers < decoder.num_hidden_layers:
        raise _Refusal(
            f"has use_sliding_window = True with max_window_layers = {decoder.max_window_layers} of "
            f"{decoder.num_hidden_layers} layers; only full attention is implemented"
        )


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return None
    scaling = _checked(_RopeScaling, rope)
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise _Refusal(
            f"has high_freq_factor = {scaling.high_freq_factor}, which must be above "
            f"low_freq_factor = {scaling.low_freq_factor}; copy it again"
        )
    return RopeScaling(**scaling.model_dump())


def _checked(model: type[_Checked], values: Mapping[str, Any]) -> _Checked:
    try:
        return model.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = first["loc"][0]
        if first["type"] == "missing":
            raise _Refusal(f"lacks {name!r}; copy it again") from None
        raise _Refusal(f"has {name} = {first['input']!r}: {first['msg']}; copy it again") from None


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def config_of(
    shape: ModelShape, *, end_token_id: int, pad_token_id: int, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The content of a `config.json` that `read_shape` and transformers read as `shape`."""
    (architecture,) = (name for name, model_type in ARCHITECTURES.items() if model_type == shape.model_type)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_theta}
    if shape.rope_scaling is not None:
        scaling = {name: getattr(shape.rope_scaling, name) for name in RopeScaling.__slots__}
        rope = {"rope_type": "llama3", "rope_theta": shape.rope_theta, **scaling}
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": shape.model_type,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_parameters": rope,
        "rms_norm_eps": shape.rms_norm_eps,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "hidden_act": "silu",
    }
    # Qwen2 has no such settings: its biases are what they are.
    biases = {"llama": {"attention_bias": False, "mlp_bias": False}, "qwen3": {"attention_bias": False}}
    return {
        **config,
        **biases.get(shape.model_type, {}),
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": end_token_id,
        "pad_token_id": pad_token_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The content of a `config.json` whose weights are stored in another type, such as "bfloat16"."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"  # before transformers 5, and since
    return {**config, key: dtype}
