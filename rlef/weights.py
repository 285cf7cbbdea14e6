"""Megatron shards <-> Hugging Face names, for every tensor- and pipeline-parallel layout.

Everything follows from one table, `stage_weights`: which parameters a pipeline stage holds, from which
Hugging Face tensors each is made, and how it is cut over tensor parallel ranks. It needs no communication, so
every process knows what the others hold, and whole weights travel as plain tensors in bounded buckets.

Megatron keeps query, key and value in one matrix, group by group (the query heads of a group, its key head,
its value head), and gate and up in another. Both are cut so that a rank holds whole groups and matching rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rlef.config import ConfigError, ParallelConfig
from rlef.records import ModelShape

Head = Literal["logits", "value"]
BUCKET_ELEMENTS = 64 * 1024 * 1024  # of whole weights in flight at once, 256 MB in float32

_EMBEDDING = "model.embed_tokens.weight"
_VALUE_HEAD = "value_head.weight"


class Cut(Enum):
    """How a parameter is divided over the tensor parallel ranks."""

    REPLICATED = "replicated"
    ROWS = "rows"
    COLUMNS = "columns"
    QUERY_KEY_VALUE = "query_key_value"  # by rows, after interleaving by group
    GATE_UP = "gate_up"  # gate rows of the rank, then its up rows

    @property
    def dimension(self) -> int | None:
        """The dimension of the parameter that is divided; None when every rank holds all of it."""
        return {Cut.REPLICATED: None, Cut.COLUMNS: 1}.get(self, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWeight:
    """One parameter of a pipeline stage."""

    parameter: str  # its name in the Megatron module of the stage
    names: tuple[str, ...]  # the Hugging Face tensors that it is made of, in order
    shapes: tuple[tuple[int, ...], ...]  # of those tensors, whole
    cut: Cut
    duplicate: bool = False  # another stage holds the same weights under the same name

    @property
    def elements(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def check_layout(shape: ModelShape, parallel: ParallelConfig, world_size: int) -> None:
    """Refuse, before anything is built, a layout into which the model or the processes do not divide.

    Raises:
        ConfigError: names the setting, its value, what it does not divide, and what would do.
    """
    divided = {
        "attention heads": shape.num_attention_heads,
        "key-value heads": shape.num_key_value_heads,
        "vocabulary entries": shape.vocab_size,
        "feed-forward channels": shape.intermediate_size,
    }
    for what, size in divided.items():
        if size % parallel.tensor:
            fitting = [
                n for n in range(1, parallel.tensor) if all(size % n == 0 for size in divided.values())
            ]
            raise ConfigError(
                f"parallel.tensor is {parallel.tensor}, which does not divide the model's {size} {what}; "
                f"use {_either(fitting)}"
            )
    if shape.num_hidden_layers % parallel.pipeline:
        fitting = [n for n in range(1, parallel.pipeline) if shape.num_hidden_layers % n == 0]
        raise ConfigError(
            f"parallel.pipeline is {parallel.pipeline}, which does not divide the model's "
            f"{shape.num_hidden_layers} layers; use {_either(fitting)}"
        )
    replica = parallel.tensor * parallel.pipeline
    if world_size % replica:
        raise ConfigError(
            f"parallel.processes is {world_size}, which parallel.tensor x parallel.pipeline = "
            f"{parallel.tensor} x {parallel.pipeline} = {replica} does not divide; take a multiple of it"
        )


def _either(numbers: Sequence[int]) -> str:
    return " or ".join(str(number) for number in numbers)


def stage_weights(shape: ModelShape, head: Head, *, stage: int, stages: int) -> list[StageWeight]:
    """The parameters of pipeline stage `stage` of `stages`, layers counted from the start of the stage."""
    hidden, head_dim = shape.hidden_size, shape.head_dim
    queries, groups = shape.num_attention_heads * head_dim, shape.num_key_value_heads * head_dim
    embedding = (shape.vocab_size, hidden)
    layers = shape.num_hidden_layers // stages
    weights = []
    if stage == 0:
        weights.append(_weight("embedding.word_embeddings.weight", Cut.ROWS, {_EMBEDDING: embedding}))
    for index in range(layers):
        here, there = f"decoder.layers.{index}", f"model.layers.{stage * layers + index}"
        query_key_value = {
            f"{there}.self_attn.q_proj.weight": (queries, hidden),
            f"{there}.self_attn.k_proj.weight": (groups, hidden),
            f"{there}.self_attn.v_proj.weight": (groups, hidden),
        }
        gate_up = {
            f"{there}.mlp.gate_proj.weight": (shape.intermediate_size, hidden),
            f"{there}.mlp.up_proj.weight": (shape.intermediate_size, hidden),
        }
        output = {f"{there}.self_attn.o_proj.weight": (hidden, queries)}
        down = {f"{there}.mlp.down_proj.weight": (hidden, shape.intermediate_size)}
        first_norm = {f"{there}.input_layernorm.weight": (hidden,)}
        second_norm = {f"{there}.post_attention_layernorm.weight": (hidden,)}
        weights += [
            _weight(f"{here}.input_layernorm.weight", Cut.REPLICATED, first_norm),
            _weight(f"{here}.self_attention.linear_qkv.weight", Cut.QUERY_KEY_VALUE, query_key_value),
            _weight(f"{here}.self_attention.linear_proj.weight", Cut.COLUMNS, output),
            _weight(f"{here}.pre_mlp_layernorm.weight", Cut.REPLICATED, second_norm),
            _weight(f"{here}.mlp.linear_fc1.weight", Cut.GATE_UP, gate_up),
            _weight(f"{here}.mlp.linear_fc2.weight", Cut.COLUMNS, down),
        ]
    if stage == stages - 1:
        weights.append(
            _weight("decoder.final_layernorm.weight", Cut.REPLICATED, {"model.norm.weight": (hidden,)})
        )
        if head == "value":
            weights.append(
                _weight("output_layer.value_head.weight", Cut.REPLICATED, {_VALUE_HEAD: (1, hidden)})
            )
        elif not shape.tie_word_embeddings:
            weights.append(_weight("output_layer.weight", Cut.ROWS, {"lm_head.weight": embedding}))
        elif stages > 1:  # tied, and the stage with the embedding is another one
            weights.append(_weight("output_layer.weight", Cut.ROWS, {_EMBEDDING: embedding}, duplicate=True))
    return weights


def _weight(
    parameter: str, cut: Cut, named: Mapping[str, tuple[int, ...]], *, duplicate: bool = False
) -> StageWeight:
    return StageWeight(
        parameter=parameter, names=tuple(named), shapes=tuple(named.values()), cut=cut, duplicate=duplicate
    )


def cut_shard(tensors: Sequence[Tensor], cut: Cut, shape: ModelShape, *, rank: int, size: int) -> Tensor:
    """The part of a parameter that tensor parallel rank `rank` of `size` holds, from its whole tensors."""
    match cut:
        case Cut.REPLICATED:
            return tensors[0]
        case Cut.ROWS:
            return tensors[0].chunk(size, dim=0)[rank]
        case Cut.COLUMNS:
            return tensors[0].chunk(size, dim=1)[rank]
        case Cut.GATE_UP:
            return torch.cat([tensor.chunk(size, dim=0)[rank] for tensor in tensors])
        case Cut.QUERY_KEY_VALUE:
            groups = [_by_group(tensor, shape) for tensor in tensors]
            return torch.cat(groups, dim=1).flatten(0, 1).chunk(size, dim=0)[rank]


def join_shards(shards: Sequence[Tensor], cut: Cut, shape: ModelShape) -> list[Tensor]:
    """The whole tensors of a parameter, from the parts of all tensor parallel ranks: undoes `cut_shard`."""
    match cut:
        case Cut.REPLICATED:
            return [shards[0]]
        case Cut.ROWS:
            return [torch.cat(list(shards), dim=0)]
        case Cut.COLUMNS:
            return [torch.cat(list(shards), dim=1)]
        case Cut.GATE_UP:
            gates, ups = zip(*(shard.chunk(2, dim=0) for shard in shards), strict=True)
            return [torch.cat(gates), torch.cat(ups)]
        case Cut.QUERY_KEY_VALUE:
            queries = shape.num_attention_heads // shape.num_key_value_heads * shape.head_dim
            sizes = [queries, shape.head_dim, shape.head_dim]
            groups = torch.split(_by_group(torch.cat(list(shards)), shape), sizes, dim=1)
            return [part.flatten(0, 1) for part in groups]


def _by_group(tensor: Tensor, shape: ModelShape) -> Tensor:
    """`[rows, columns]` -> `[groups, rows of a group, columns]`."""
    return tensor.reshape(shape.num_key_value_heads, -1, tensor.shape[1])


def load_huggingface(
    module: nn.Module,
    named: Mapping[str, Tensor],
    shape: ModelShape,
    head: Head,
    *,
    tensor_group: ProcessGroup,
    pipeline_group: ProcessGroup,
) -> None:
    """Copy this rank's part of the whole weights `named` into the Megatron module of its stage.

    A value network ignores `lm_head.weight`. Its head starts at zero, unless `named` has `value_head.weight`.

    Raises:
        ValueError: a tensor is missing, or has another shape than the model.
    """
    if head == "value":
        named = {_VALUE_HEAD: torch.zeros(1, shape.hidden_size), **named}
    parameters = dict(module.named_parameters())
    rank, size = tensor_group.rank(), tensor_group.size()
    weights = stage_weights(shape, head, stage=pipeline_group.rank(), stages=pipeline_group.size())
    assert parameters.keys() == {weight.parameter for weight in weights}, "the table and the module disagree"
    for weight in weights:
        tensors = [
            _checked(named, name, size) for name, size in zip(weight.names, weight.shapes, strict=True)
        ]
        with torch.no_grad():
            parameters[weight.parameter].copy_(cut_shard(tensors, weight.cut, shape, rank=rank, size=size))


def _checked(named: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in named:
        raise ValueError(f"the weights lack {name}; load a whole Llama checkpoint of this shape")
    if named[name].shape != shape:
        raise ValueError(
            f"{name} has shape {list(named[name].shape)}, but config.json makes it {list(shape)}"
        )
    return named[name]


def gather_huggingface(
    module: nn.Module,
    shape: ModelShape,
    head: Head,
    *,
    tensor_group: ProcessGroup,
    pipeline_group: ProcessGroup,
    bucket_elements: int = BUCKET_ELEMENTS,
) -> Iterator[tuple[str, Tensor]]:
    """The whole weights under Hugging Face names, on every rank. Collective: all must read it to its end.

    Each bucket of at most `bucket_elements` is gathered over the tensor parallel ranks of the stage that
    holds it, and then broadcast to the other stages. What is yielded are copies.
    """
    parameters = dict(module.named_parameters())
    example = next(iter(parameters.values()))
    own_stage, stages = pipeline_group.rank(), pipeline_group.size()
    for stage in range(stages):
        weights = [
            weight
            for weight in stage_weights(shape, head, stage=stage, stages=stages)
            if not weight.duplicate
        ]
        for bucket in _buckets(weights, bucket_elements):
            if stage == own_stage:
                flat = _gather_bucket(bucket, parameters, shape, tensor_group)
            else:
                flat = example.new_empty(sum(weight.elements for weight in bucket))
            if stages > 1:
                source = torch.distributed.get_global_rank(pipeline_group, stage)
                torch.distributed.broadcast(flat, source, group=pipeline_group)
            yield from _unpack(flat, bucket)


def _buckets(weights: Iterable[StageWeight], elements: int) -> Iterator[list[StageWeight]]:
    """Consecutive weights of at most `elements` together; a larger one travels alone."""
    bucket: list[StageWeight] = []
    for weight in weights:
        if bucket and sum(other.elements for other in bucket) + weight.elements > elements:
            yield bucket
            bucket = []
        bucket.append(weight)
    if bucket:
        yield bucket


def _gather_bucket(
    bucket: Sequence[StageWeight],
    parameters: Mapping[str, Tensor],
    shape: ModelShape,
    tensor_group: ProcessGroup,
) -> Tensor:
    """The whole tensors of a bucket, flat, from the shards of all tensor parallel ranks of this stage."""
    shards = [parameters[weight.parameter].detach() for weight in bucket]
    flat = torch.cat([shard.flatten() for shard in shards])
    ranks = [flat]
    if tensor_group.size() > 1:
        ranks = [torch.empty_like(flat) for _ in range(tensor_group.size())]
        torch.distributed.all_gather(ranks, flat, group=tensor_group)
    sizes = [shard.numel() for shard in shards]
    split = [torch.split(rank, sizes) for rank in ranks]  # [tensor ranks][parameters]
    whole: list[Tensor] = []
    for index, (weight, shard) in enumerate(zip(bucket, shards, strict=True)):
        whole += join_shards([rank[index].view(shard.shape) for rank in split], weight.cut, shape)
    return torch.cat([tensor.flatten() for tensor in whole])


def _unpack(flat: Tensor, bucket: Sequence[StageWeight]) -> Iterator[tuple[str, Tensor]]:
    names = [name for weight in bucket for name in weight.names]
    shapes = [shape for weight in bucket for shape in weight.shapes]
    parts = torch.split(flat, [torch.Size(shape).numel() for shape in shapes])
    for name, shape, part in zip(names, shapes, parts, strict=True):
        yield name, part.view(shape)
