"""What is read out of a config.json, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlef.config import ConfigError
from rlef.families import config_of, read_shape, with_dtype
from rlef.records import ModelShape, ModelType, RopeScaling
from rlef.torch_model import rotary_frequencies

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 8}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(folder: Path, config: object) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return read_shape(folder)


def test_what_a_file_of_llama_may_lack_is_what_transformers_takes(tmp_path: Path) -> None:
    import transformers

    shape = read(tmp_path, LLAMA)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (shape.num_key_value_heads, shape.head_dim, shape.rope_theta) == (4, 4, 10_000.0)
    assert shape.num_key_value_heads == theirs.num_key_value_heads
    assert shape.head_dim == theirs.head_dim
    assert shape.rope_theta == theirs.rope_parameters["rope_theta"]
    assert shape.tie_word_embeddings is theirs.tie_word_embeddings is False


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}},
        {"rope_theta": 500_000, "rope_scaling": {"type": "llama3", **LLAMA3_ROPE}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_ROPE}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_ROPE}, "rope_scaling": None},
    ],
    ids=["transformers 4", "an early transformers 4", "transformers 5", "both keys"],
)
def test_each_way_to_write_the_scaling_of_llama_3_is_read(tmp_path: Path, rope: dict[str, Any]) -> None:
    shape = read(tmp_path, LLAMA | rope)
    assert shape.rope_theta == 5e5
    assert shape.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )


@given(
    head_dim=st.sampled_from([2, 6, 64, 128]),
    rope_theta=st.sampled_from([100.0, 1e4, 5e5]),
    factor=st.floats(1, 64),
    low=st.floats(0.25, 4),
    above=st.floats(0.5, 8),
    original=st.integers(16, 16384),
)
def test_scaled_frequencies_are_those_of_transformers(
    head_dim: int, rope_theta: float, factor: float, low: float, above: float, original: int
) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low + above,
        "original_max_position_embeddings": original,
    }
    rope = {"rope_type": "llama3", "rope_theta": rope_theta, **scaling}
    theirs = LlamaConfig(head_dim=head_dim, rope_parameters=rope, max_position_embeddings=32768)
    expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    assert attention_factor == 1.0
    shape = shape_of(head_dim=head_dim, rope_theta=rope_theta, rope_scaling=RopeScaling(**scaling))
    torch.testing.assert_close(rotary_frequencies(shape), expected, rtol=1e-5, atol=0)


def shape_of(**changes: Any) -> ModelShape:
    settings: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return ModelShape(**settings | changes)


scalings = st.builds(
    RopeScaling,
    factor=st.floats(1, 64),
    low_freq_factor=st.floats(0.25, 2),
    high_freq_factor=st.floats(2.5, 8),
    original_max_position_embeddings=st.integers(1, 8192),
)


@given(
    model_type=st.sampled_from(["llama", "qwen2", "qwen3"]),
    sizes=st.lists(st.integers(1, 1000), min_size=5, max_size=5),
    groups=st.integers(1, 8),
    head_dim=st.integers(1, 64).map(lambda half: 2 * half),
    rope_scaling=st.none() | scalings,
    tied=st.booleans(),
)
def test_a_shape_that_was_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory,
    model_type: ModelType,
    sizes: list[int],
    groups: int,
    head_dim: int,
    rope_scaling: RopeScaling | None,
    tied: bool,
) -> None:
    vocab_size, hidden_size, intermediate_size, layers, positions = sizes
    shape = shape_of(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=2 * groups,
        num_key_value_heads=groups,
        head_dim=head_dim,
        max_position_embeddings=positions,
        rope_scaling=rope_scaling,
        tie_word_embeddings=tied,
    )
    folder = tmp_path_factory.getbasetemp()
    assert read(folder, config_of(shape, end_token_id=3, pad_token_id=0)) == shape


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_what_is_written(tmp_path: Path, model_type: ModelType) -> None:
    import transformers

    scaling = RopeScaling(
        factor=4.0, low_freq_factor=1.0, high_freq_factor=2.0, original_max_position_embeddings=16
    )
    shape = shape_of(model_type=model_type, rope_scaling=scaling, tie_word_embeddings=True)
    read(tmp_path, config_of(shape, end_token_id=3, pad_token_id=0, dtype=torch.bfloat16))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == model_type
    assert theirs.rope_parameters["factor"] == 4.0
    assert (theirs.head_dim, theirs.eos_token_id, theirs.pad_token_id) == (8, 3, 0)
    assert theirs.tie_word_embeddings
    assert theirs.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA | {"architectures": ["Qwen3MoeForCausalLM"]}, r"says architectures = \['Qwen3MoeF"),
        (LLAMA | {"architectures": None}, r"says architectures = None; only LlamaForCausalLM, "),
        (LLAMA | {"model_type": "mistral"}, r"has model_type = 'mistral' with architectures = \['Llama"),
        (LLAMA | {"hidden_act": "gelu"}, r"has hidden_act = 'gelu'; only 'silu' is implemented"),
        (LLAMA | {"attention_bias": True}, r"has attention_bias = True; only False is implemented"),
        (QWEN3 | {"attention_bias": True}, r"has attention_bias = True; only False is implemented"),
        (LLAMA | {"mlp_bias": True}, r"has mlp_bias = True; only False is implemented"),
        (
            LLAMA | {"quantization_config": {"quant_method": "fp8"}},
            r"has a quantization_config; name the model whose weights are not quantised",
        ),
        (
            QWEN2 | {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            r"has rope_type = 'yarn'; only 'default' and 'llama3' are implemented",
        ),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"lacks 'low_freq_factor'; copy"),
        (
            LLAMA | {"rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE, "high_freq_factor": 1.0}},
            r"has high_freq_factor = 1.0, which must be above low_freq_factor = 1.0",
        ),
        (LLAMA | {"rope_parameters": "llama3"}, r"has rope_parameters = 'llama3', which is no JSON object"),
        (
            LLAMA | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            r"has partial_rotary_factor = 0.5; only 1.0 is implemented",
        ),
        (
            QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            r"has use_sliding_window = True with max_window_layers = 1 of 2 layers; only full attention",
        ),
        (
            QWEN3 | {"layer_types": ["full_attention", "sliding_attention"]},
            r"has layer_types with 'sliding_attention'; only full attention is implemented",
        ),
        (QWEN2 | {"num_key_value_heads": None}, r"lacks 'num_key_value_heads'; copy it again"),
        (QWEN3 | {"head_dim": None}, r"lacks 'head_dim'; copy it again"),
        (LLAMA | {"vocab_size": "32"}, r"has vocab_size = '32': Input should be a valid integer; copy"),
        (LLAMA | {"num_hidden_layers": 0}, r"has num_hidden_layers = 0: Input should be greater than"),
        (LLAMA | {"num_key_value_heads": 3}, r"has num_attention_heads = 4, which is no multiple of num"),
        (LLAMA | {"hidden_size": 12}, r"makes head_dim 3; rotary embedding needs an even one"),
        ([LLAMA], r"does not hold a JSON object; copy it again"),
    ],
)  # fmt: skip
def test_what_would_be_computed_wrong_is_refused_by_name(
    tmp_path: Path, config: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=r"^model\.path: .*config\.json " + message):
        read(tmp_path, config)


@pytest.mark.parametrize(
    "unused",
    [
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"] * 2},
    ],
    ids=["switched off", "after the last layer", "without a width", "in no layer"],
)
def test_a_sliding_window_that_no_layer_has_is_no_reason_to_refuse(
    tmp_path: Path, unused: dict[str, Any]
) -> None:
    assert read(tmp_path, QWEN2 | unused) == read(tmp_path, QWEN2)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32", "vocab_size": 32}, {"dtype": "bfloat16", "vocab_size": 32}),
        ({}, {"dtype": "bfloat16"}),
    ],
)
def test_another_type_of_the_weights_takes_the_place_of_the_old(
    config: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert with_dtype(config, "bfloat16") == expected
