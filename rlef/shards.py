"""Which part of a model a rank holds, for every tensor- and pipeline-parallel layout.

Everything follows from one table, `stage_weights`: which parameters a pipeline stage holds, from which
Hugging Face tensors each is made, and how it is cut over tensor parallel ranks. It needs no communication, so
every process knows what the others hold.

Megatron keeps query, key and value in one matrix, group by group (the query heads of a group, its key head,
its value head), and gate and up in another. Both are cut so that a rank holds whole groups and matching rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch
from torch import Tensor

from rlef.config import ConfigError, ParallelConfig
from rlef.pieces import Block, Box
from rlef.pretrained import Sliceable, StoredWeights, Weights
from rlef.records import ModelShape

Head = Literal["logits", "value"]

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
VALUE_HEAD = "value_head.weight"


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
    layers = shape.num_hidden_layers // parallel.pipeline
    if layers % parallel.virtual_pipeline:
        fitting = [n for n in range(1, parallel.virtual_pipeline) if layers % n == 0]
        raise ConfigError(
            f"parallel.virtual_pipeline is {parallel.virtual_pipeline}, which does not divide the {layers} "
            f"layers of a pipeline rank; use {_either(fitting)}"
        )
    if world_size % parallel.replica:
        raise ConfigError(
            f"parallel.processes is {world_size}, which parallel.tensor x pipeline x context = "
            f"{parallel.tensor} x {parallel.pipeline} x {parallel.context} = {parallel.replica} does not "
            "divide; take a multiple of it"
        )


def _either(numbers: Sequence[int]) -> str:
    return " or ".join(str(number) for number in numbers)


def stage_weights(shape: ModelShape, head: Head, *, stage: int, stages: int) -> list[StageWeight]:
    """The parameters of pipeline stage `stage` of `stages`, layers counted from the start of the stage.

    Of an interleaved pipeline each chunk of layers is a stage of its own.
    """
    hidden = shape.hidden_size
    embedding = (shape.vocab_size, hidden)
    layers = shape.num_hidden_layers // stages
    weights = []
    if stage == 0:
        weights.append(_weight("embedding.word_embeddings.weight", Cut.ROWS, {_EMBEDDING: embedding}))
    for index in range(layers):
        weights += _layer_weights(shape, f"decoder.layers.{index}", f"model.layers.{stage * layers + index}")
    if stage == stages - 1:
        weights.append(
            _weight("decoder.final_layernorm.weight", Cut.REPLICATED, {"model.norm.weight": (hidden,)})
        )
        if head == "value":
            weights.append(
                _weight("output_layer.value_head.weight", Cut.REPLICATED, {VALUE_HEAD: (1, hidden)})
            )
        elif not shape.tie_word_embeddings:
            weights.append(_weight("output_layer.weight", Cut.ROWS, {_HEAD: embedding}))
        elif stages > 1:  # tied, and the stage with the embedding is another one
            weights.append(_weight("output_layer.weight", Cut.ROWS, {_EMBEDDING: embedding}, duplicate=True))
    return weights


def _layer_weights(shape: ModelShape, here: str, there: str) -> list[StageWeight]:
    """Of one layer: megatron's name of it, and Hugging Face's."""
    hidden, head_dim = shape.hidden_size, shape.head_dim
    queries, groups = shape.num_attention_heads * head_dim, shape.num_key_value_heads * head_dim
    attention = f"{there}.self_attn"
    projections = {"q": queries, "k": groups, "v": groups}  # rows
    query_key_value = {
        f"{attention}.{name}_proj.weight": (rows, hidden) for name, rows in projections.items()
    }
    biases = {f"{attention}.{name}_proj.bias": (rows,) for name, rows in projections.items()}
    gate_up = {
        f"{there}.mlp.gate_proj.weight": (shape.intermediate_size, hidden),
        f"{there}.mlp.up_proj.weight": (shape.intermediate_size, hidden),
    }
    output = {f"{attention}.o_proj.weight": (hidden, queries)}
    down = {f"{there}.mlp.down_proj.weight": (hidden, shape.intermediate_size)}
    first_norm = {f"{there}.input_layernorm.weight": (hidden,)}
    second_norm = {f"{there}.post_attention_layernorm.weight": (hidden,)}
    weights = [
        _weight(f"{here}.input_layernorm.weight", Cut.REPLICATED, first_norm),
        _weight(f"{here}.self_attention.linear_qkv.weight", Cut.QUERY_KEY_VALUE, query_key_value),
        _weight(f"{here}.self_attention.linear_proj.weight", Cut.COLUMNS, output),
        _weight(f"{here}.pre_mlp_layernorm.weight", Cut.REPLICATED, second_norm),
        _weight(f"{here}.mlp.linear_fc1.weight", Cut.GATE_UP, gate_up),
        _weight(f"{here}.mlp.linear_fc2.weight", Cut.COLUMNS, down),
    ]
    if shape.query_key_value_bias:
        weights.append(_weight(f"{here}.self_attention.linear_qkv.bias", Cut.QUERY_KEY_VALUE, biases))
    if shape.query_key_norm:
        weights += [
            _weight(
                f"{here}.self_attention.{name}_layernorm.weight",
                Cut.REPLICATED,
                {f"{attention}.{name}_norm.weight": (head_dim,)},
            )
            for name in "qk"
        ]
    return weights


def _weight(
    parameter: str, cut: Cut, named: Mapping[str, tuple[int, ...]], *, duplicate: bool = False
) -> StageWeight:
    return StageWeight(
        parameter=parameter, names=tuple(named), shapes=tuple(named.values()), cut=cut, duplicate=duplicate
    )


def cut_shard(tensors: Sequence[Sliceable], cut: Cut, shape: ModelShape, *, rank: int, size: int) -> Tensor:
    """The part of a parameter that tensor parallel rank `rank` of `size` holds, from its whole tensors.

    Of tensors in files no more is read.
    """
    match cut:
        case Cut.REPLICATED:
            return tensors[0][:]
        case Cut.ROWS:
            return _rows(tensors[0], rank, size)
        case Cut.COLUMNS:
            width = tensors[0].shape[1] // size
            return tensors[0][:, rank * width : (rank + 1) * width]
        case Cut.GATE_UP:
            return torch.cat([_rows(tensor, rank, size) for tensor in tensors])
        case Cut.QUERY_KEY_VALUE:
            groups = shape.num_key_value_heads // size
            parts = [_by_group(_rows(tensor, rank, size), groups) for tensor in tensors]
            return torch.cat(parts, dim=1).flatten(0, 1)


def _rows(tensor: Sliceable, rank: int, size: int) -> Tensor:
    height = tensor.shape[0] // size
    return tensor[rank * height : (rank + 1) * height]


def parameter_blocks(weight: StageWeight, shape: ModelShape, *, rank: int, size: int) -> list[Block]:
    """What `cut_shard` gives that rank, as boxes of the whole tensors in the order of its elements."""
    if weight.cut is Cut.COLUMNS:
        ((name, (rows, columns)),) = zip(weight.names, weight.shapes, strict=True)
        width = columns // size
        return [Block(name=name, box=Box(offsets=(0, rank * width), sizes=(rows, width)), start=0)]
    if weight.cut is Cut.REPLICATED:
        rank, size = 0, 1
    groups = shape.num_key_value_heads // size if weight.cut is Cut.QUERY_KEY_VALUE else 1
    blocks: list[Block] = []
    start = 0
    for group in range(groups):
        for name, whole in zip(weight.names, weight.shapes, strict=True):
            height = whole[0] // (size * groups)
            first = (rank * groups + group) * height
            box = Box(offsets=(first, *(0 for _ in whole[1:])), sizes=(height, *whole[1:]))
            blocks.append(Block(name=name, box=box, start=start))
            start += box.elements
    return blocks


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
            whole = _by_group(torch.cat(list(shards)), shape.num_key_value_heads)
            groups = torch.split(whole, sizes, dim=1)
            return [part.flatten(0, 1) for part in groups]


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """`[rows, ...]` -> `[groups, rows of a group, ...]`."""
    return tensor.reshape(groups, -1, *tensor.shape[1:])


def check_weights(named: StoredWeights, shape: ModelShape) -> None:
    """Refuse, before anything is built, files that do not hold exactly the language model of this shape.

    Raises:
        ConfigError: names a tensor that is missing, of another shape, of a type that is not read, or unknown.
    """
    expected = {
        name: size
        for weight in stage_weights(shape, "logits", stage=0, stages=1)
        for name, size in zip(weight.names, weight.shapes, strict=True)
    }
    for name, size in expected.items():
        checked(named, name, size)
        assert named[name].dtype.is_floating_point
    # A head beside tied embeddings is not used, and some tools write it.
    unknown = named.keys() - expected.keys() - {_HEAD}
    if unknown:
        raise ConfigError(
            f"model.path: the weights hold {min(unknown)}, which no {shape.model_type} of config.json has; "
            "name a model without additions"
        )


def checked(named: Weights, name: str, shape: tuple[int, ...]) -> Sliceable:
    """The tensor of that name; a `ConfigError` if there is none, or if it has another shape."""
    if name not in named:
        raise ConfigError(
            f"model.path: the weights lack {name}; name a whole model of the shape in config.json"
        )
    if named[name].shape != shape:
        raise ConfigError(
            f"model.path: {name} has shape {list(named[name].shape)}, "
            f"but config.json makes it {list(shape)}; copy both again"
        )
    return named[name]
