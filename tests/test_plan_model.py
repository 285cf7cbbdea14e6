"""The sizes that a plan is made of, against transformers' models and the table of the weights' cuts."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from rlef.config import ConfigError
from rlef.plan_model import NAMED, Head, ModelSize, model_size, read_model, stage_parameters
from rlef.records import ModelShape
from rlef.shards import Cut, StageWeight, stage_weights

EXAMPLE = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_model_has_as_many_parameters_as_transformers_builds(name: str) -> None:
    config = {key: value for key, value in NAMED[name].items() if key != "architectures"}
    family = config.pop("model_type")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))
    assert read_model(name).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-7b", "qwen3-8b"])
def test_two_operations_per_weight_of_a_matrix_and_token(name: str) -> None:
    """All matrices of transformers' model take part, but the embedding, of which a token reads one row."""
    config = {key: value for key, value in NAMED[name].items() if key != "architectures"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert read_model(name).forward_operations("logits", sequence_tokens=0) == 2 * matrices


def test_a_query_meets_half_of_its_sequence() -> None:
    size = model_size(EXAMPLE, where="example")
    added = size.forward_operations("logits", 10) - size.forward_operations("logits", 0)
    layers, channels, keys = 2, 4, 5
    assert added == layers * keys * (2 * channels + 2 * channels)  # with keys, then with values


shapes = st.builds(
    lambda groups, queries, head_dim, hidden, feed_forward, layers, vocabulary, tied: ModelShape(
        vocab_size=4 * vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * feed_forward,
        num_hidden_layers=4 * layers,
        num_attention_heads=4 * groups * queries,
        num_key_value_heads=4 * groups,
        head_dim=head_dim,
        max_position_embeddings=16,
        rope_theta=10_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    ),
    *(st.integers(1, 3) for _ in range(7)),
    st.booleans(),
)


def size_of(shape: ModelShape) -> ModelSize:
    known = ModelSize.__dataclass_fields__
    return ModelSize(**{name: value for name, value in asdict(shape).items() if name in known})


def elements_of_a_rank(weight: StageWeight, tensor: int) -> int:
    whole = sum(prod(shape) for shape in weight.shapes)
    return whole if weight.cut is Cut.REPLICATED else whole // tensor


@given(shapes, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sampled_from(["logits", "value"]))
def test_each_rank_holds_what_the_table_of_the_weights_says(
    shape: ModelShape, tensor: int, stages: int, head: Head
) -> None:
    for stage in range(stages):
        held = stage_weights(shape, head, stage=stage, stages=stages)
        assert stage_parameters(size_of(shape), head, stage=stage, stages=stages, tensor=tensor) == sum(
            elements_of_a_rank(weight, tensor) for weight in held
        )


def test_a_folder_is_read_like_a_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(NAMED["qwen3-8b"]))
    assert read_model(str(tmp_path)) == read_model("qwen3-8b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, r"example has model_type = 'mixtral'; a plan can be made for llama, "),
        ({"hidden_size": None}, r"example has hidden_size = None; it must be a whole number of at least 1"),
        ({"vocab_size": "many"}, r"example has vocab_size = 'many'; it must be a whole number"),
        ({"num_hidden_layers": 0}, r"example has num_hidden_layers = 0; it must be"),
    ],
)
def test_a_config_that_cannot_be_planned_for_names_the_key(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_size(EXAMPLE | change, where="example")


def test_an_unknown_model_names_those_that_are_known() -> None:
    with pytest.raises(
        ConfigError, match=r"'llama-9' is neither a folder with a config\.json nor one of llama-3\.2"
    ):
        read_model("llama-9")


def test_a_broken_config_names_its_file(tmp_path: Path) -> None:
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=r"config\.json .*; copy it again"):
            read_model(str(tmp_path))
