"""The sizes of a model that planning needs, from its `config.json` alone: parameters of a rank, operations
and bytes of a token.

Nothing here loads weights or imports torch, so that a plan can be made on a machine that could not run it.
The parameters of a rank follow the same cuts as `shards.stage_weights`; a test holds the two together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlef.config import ConfigError

Head = Literal["logits", "value"]

_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": _ROPE,
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
_LLAMA_3_2: dict[str, Any] = _LLAMA | {"rope_scaling": _ROPE | {"factor": 32.0}, "tie_word_embeddings": True}
_QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}
_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}
_TIED: dict[str, Any] = {"tie_word_embeddings": True}


def _shape(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


# What the publishers' config.json files say.
NAMED: Mapping[str, dict[str, Any]] = {
    "llama-3.2-1b": _LLAMA_3_2 | _shape(2048, 8192, 16, 32),
    "llama-3.2-3b": _LLAMA_3_2 | _shape(3072, 8192, 28, 24),
    "llama-3.1-8b": _LLAMA | _shape(4096, 14336, 32, 32),
    "llama-3.1-70b": _LLAMA | _shape(8192, 28672, 80, 64),
    "qwen2.5-0.5b": _QWEN2
    | _TIED
    | {"vocab_size": 151936, "num_key_value_heads": 2}
    | _shape(896, 4864, 24, 14),
    "qwen2.5-1.5b": _QWEN2
    | _TIED
    | {"vocab_size": 151936, "num_key_value_heads": 2}
    | _shape(1536, 8960, 28, 12),
    "qwen2.5-7b": _QWEN2 | {"num_key_value_heads": 4} | _shape(3584, 18944, 28, 28),
    "qwen2.5-32b": _QWEN2 | {"num_key_value_heads": 8} | _shape(5120, 27648, 64, 40),
    "qwen2.5-72b": _QWEN2 | {"num_key_value_heads": 8} | _shape(8192, 29568, 80, 64),
    "qwen3-8b": _QWEN3 | _shape(4096, 12288, 36, 32),
    "qwen3-32b": _QWEN3 | _shape(5120, 25600, 64, 64),
    "smollm2-135m": _LLAMA
    | _TIED
    | {
        "vocab_size": 49152,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rope_scaling": None,
    }
    | _shape(576, 1536, 30, 9),
}
_FAMILIES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """A dense decoder, under the names of its Hugging Face `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    query_key_value_bias: bool = False  # as in Qwen2
    query_key_norm: bool = False  # per head, as in Qwen3

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Of keys alone, which is that of values."""
        return self.num_key_value_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Of the language model, a tied output layer counted once."""
        output = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return stage_parameters(self, "value", stage=0, stages=1) - self.hidden_size + output

    def matrix_parameters(self, head: Head) -> int:
        """Weights that each token is multiplied with: layers and output layer, not the embedding's rows."""
        layer = (
            self.hidden_size * (2 * self.query_size + 2 * self.key_value_size)
            + 3 * self.hidden_size * self.intermediate_size
        )
        output = self.hidden_size * (self.vocab_size if head == "logits" else 1)
        return self.num_hidden_layers * layer + output

    def forward_operations(self, head: Head, sequence_tokens: float) -> float:
        """Floating-point operations of one token's forward pass, on average over a causal sequence.

        A multiplication and an addition each count; a query meets half of the sequence's keys and values.
        """
        attention = 4 * self.num_hidden_layers * self.query_size * sequence_tokens / 2
        return 2 * self.matrix_parameters(head) + attention

    def cache_elements(self) -> int:
        """Keys and values that one token leaves in the sampler's cache, over all layers."""
        return 2 * self.num_hidden_layers * self.key_value_size


def stage_parameters(size: ModelSize, head: Head, *, stage: int, stages: int, tensor: int = 1) -> int:
    """Parameters that one rank holds: pipeline stage `stage` of `stages`, cut over `tensor` ranks.

    Matrices, vocabulary and biases are divided; norms and a value head are on each rank whole. The last stage
    of a model with tied embeddings holds a copy of them.
    """
    hidden, layers = size.hidden_size, size.num_hidden_layers // stages
    projections = size.query_size + 2 * size.key_value_size
    divided = layers * (
        hidden * projections
        + (projections if size.query_key_value_bias else 0)
        + size.query_size * hidden
        + 3 * hidden * size.intermediate_size
    )
    whole = layers * (2 * hidden + (2 * size.head_dim if size.query_key_norm else 0))
    embedding = size.vocab_size * hidden
    if stage == 0:
        divided += embedding
    if stage == stages - 1:
        whole += hidden  # the norm after the last layer
        if head == "value":
            whole += hidden
        elif not (size.tie_word_embeddings and stages == 1):
            divided += embedding
    return divided // tensor + whole


def read_model(model: str) -> ModelSize:
    """The size that a name of `NAMED`, or the `config.json` of a Hugging Face folder, stands for.

    Raises:
        ConfigError: there is no such folder, or the model is of a kind that is not planned for.
    """
    if model in NAMED:
        return model_size(NAMED[model], where=model)
    file = Path(model) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(
            f"model {model!r} is neither a folder with a config.json nor one of {', '.join(NAMED)}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}); copy it again") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file} does not hold a JSON object; copy it again")
    return model_size(config, where=str(file))


def model_size(config: Mapping[str, Any], *, where: str) -> ModelSize:
    """The size in what a `config.json` holds.

    Raises:
        ConfigError: names `where`, the key and what is wrong with it.
    """
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise ConfigError(
            f"{where} has model_type = {family!r}; a plan can be made for {', '.join(_FAMILIES)}"
        )
    heads = _positive(config, "num_attention_heads", where)
    hidden = _positive(config, "hidden_size", where)
    return ModelSize(
        vocab_size=_positive(config, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=_positive(config, "intermediate_size", where),
        num_hidden_layers=_positive(config, "num_hidden_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=_positive(
            {"num_key_value_heads": heads} | dict(config), "num_key_value_heads", where
        ),
        head_dim=config.get("head_dim") or hidden // heads,
        max_position_embeddings=_positive(config, "max_position_embeddings", where),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        query_key_value_bias=bool(config.get("attention_bias", family == "qwen2")),
        query_key_norm=family == "qwen3",
    )


def _positive(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{where} has {key} = {value!r}; it must be a whole number of at least 1")
    return value
