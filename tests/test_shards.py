"""Shards <-> Hugging Face names, without any process but this one."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlef.config import ConfigError, ParallelConfig
from rlef.records import ModelShape, ModelType
from rlef.shards import Cut, Head, check_layout, cut_shard, join_shards, stage_weights
from rlef.torch_model import LlamaModel

SHAPE = ModelShape(
    vocab_size=12,
    hidden_size=4,
    intermediate_size=6,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=1,
    max_position_embeddings=8,
    rope_theta=10_000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)


MODEL_TYPES: tuple[ModelType, ...] = get_args(ModelType)


def rows(*numbers: int) -> torch.Tensor:
    """One row, of one column, for each number."""
    return torch.tensor(numbers)[:, None]


def test_query_key_and_value_interleave_by_group() -> None:
    """Four query heads in two groups, one channel each: a rank gets whole groups."""
    query, key, value = rows(1, 2, 3, 4), rows(10, 20), rows(100, 200)
    first = cut_shard([query, key, value], Cut.QUERY_KEY_VALUE, SHAPE, rank=0, size=2)
    second = cut_shard([query, key, value], Cut.QUERY_KEY_VALUE, SHAPE, rank=1, size=2)
    assert first.flatten().tolist() == [1, 2, 10, 100]
    assert second.flatten().tolist() == [3, 4, 20, 200]


def test_query_key_and_value_biases_interleave_as_their_rows_do() -> None:
    biases = [torch.tensor([1, 2, 3, 4]), torch.tensor([10, 20]), torch.tensor([100, 200])]
    assert cut_shard(biases, Cut.QUERY_KEY_VALUE, SHAPE, rank=1, size=2).tolist() == [3, 4, 20, 200]


def test_gate_and_up_rows_of_a_rank_match() -> None:
    gate, up = rows(1, 2, 3, 4), rows(10, 20, 30, 40)
    assert cut_shard([gate, up], Cut.GATE_UP, SHAPE, rank=1, size=2).flatten().tolist() == [3, 4, 30, 40]


@given(
    size=st.sampled_from([1, 2, 4]),
    groups=st.sampled_from([4, 8]),
    queries=st.integers(1, 3),
    head_dim=st.integers(1, 3),
    head=st.sampled_from(["logits", "value"]),
    model_type=st.sampled_from(MODEL_TYPES),
)
def test_joining_the_shards_gives_the_whole_back(
    size: int, groups: int, queries: int, head_dim: int, head: Head, model_type: ModelType
) -> None:
    shape = replace(
        SHAPE,
        model_type=model_type,
        num_key_value_heads=groups,
        num_attention_heads=groups * queries,
        head_dim=head_dim,
        intermediate_size=8,
    )
    for weight in stage_weights(shape, head, stage=0, stages=1):
        whole = [torch.randn(size_) for size_ in weight.shapes]
        shards = [cut_shard(whole, weight.cut, shape, rank=rank, size=size) for rank in range(size)]
        joined = join_shards(shards, weight.cut, shape)
        assert all(torch.equal(found, tensor) for found, tensor in zip(joined, whole, strict=True)), (
            weight.parameter
        )


class Read:
    """A tensor that counts what was read of it, as one in a file would be."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.shape = tensor.shape
        self.elements = 0

    def __getitem__(self, index: object) -> torch.Tensor:
        part = self.tensor[index]  # type: ignore[index]
        self.elements += part.numel()
        return part


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_part_of_each_tensor_and_no_more(model_type: ModelType, rank: int) -> None:
    for weight in stage_weights(replace(SHAPE, model_type=model_type), "logits", stage=0, stages=1):
        whole = [Read(torch.randn(size)) for size in weight.shapes]
        part = cut_shard(whole, weight.cut, SHAPE, rank=rank, size=2)
        assert sum(tensor.elements for tensor in whole) == part.numel(), weight.parameter
        assert part.numel() == weight.elements // (1 if weight.cut is Cut.REPLICATED else 2)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", ["logits", "value"])
def test_the_stages_together_hold_each_weight_of_the_model_once(
    stages: int, model_type: ModelType, tied: bool, head: Head
) -> None:
    shape = replace(SHAPE, model_type=model_type, tie_word_embeddings=tied)
    held = [
        (name, size)
        for stage in range(stages)
        for weight in stage_weights(shape, head, stage=stage, stages=stages)
        if not weight.duplicate
        for name, size in zip(weight.names, weight.shapes, strict=True)
    ]
    model = {name: tuple(tensor.shape) for name, tensor in LlamaModel(shape, head=head).state_dict().items()}
    assert len(held) == len(model)
    assert dict(held) == model


def test_tied_embeddings_are_held_by_first_and_last_stage() -> None:
    shape = replace(SHAPE, tie_word_embeddings=True)
    first, last = (stage_weights(shape, "logits", stage=stage, stages=2) for stage in (0, 1))
    assert first[0].names == last[-1].names == ("model.embed_tokens.weight",)
    assert (first[0].duplicate, last[-1].duplicate) == (False, True)


@pytest.mark.parametrize(
    ("parallel", "world_size", "message"),
    [
        (
            ParallelConfig(tensor=3),
            3,
            r"parallel\.tensor is 3, which does not divide the model's 4 attention heads; use 1 or 2",
        ),
        (ParallelConfig(tensor=4), 4, r"parallel\.tensor is 4, .* 2 key-value heads; use 1 or 2"),
        (
            ParallelConfig(pipeline=3),
            3,
            r"parallel\.pipeline is 3, which does not divide the model's 4 layers; use 1 or 2",
        ),
        (
            ParallelConfig(pipeline=2, virtual_pipeline=4),
            2,
            r"parallel\.virtual_pipeline is 4, which does not divide the 2 layers of a pipeline rank; use 1",
        ),
        (
            ParallelConfig(tensor=2, pipeline=2),
            6,
            r"parallel\.processes is 6, .* 2 x 2 x 1 = 4 does not divide",
        ),
    ],
)
def test_an_impossible_layout_names_the_setting_and_what_would_do(
    parallel: ParallelConfig, world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layout(SHAPE, parallel, world_size)


@pytest.mark.parametrize(
    ("change", "what"),
    [({"vocab_size": 11}, "11 vocabulary entries"), ({"intermediate_size": 5}, "5 feed-forward channels")],
)
def test_the_vocabulary_and_the_feed_forward_must_divide_too(change: dict[str, int], what: str) -> None:
    with pytest.raises(ConfigError, match=what + "; use 1"):
        check_layout(replace(SHAPE, **change), ParallelConfig(tensor=2), 2)


def test_layouts_that_fit_pass() -> None:
    for tensor in (1, 2):
        for pipeline in (1, 2, 4):
            check_layout(SHAPE, ParallelConfig(tensor=tensor, pipeline=pipeline), 2 * tensor * pipeline)
