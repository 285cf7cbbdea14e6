"""Weights on their way into Megatron's modules and out of them, as `shards` says who holds what.

They come in slice by slice, and go out whole, as plain tensors in bounded buckets.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rlef.pretrained import Weights
from rlef.records import ModelShape
from rlef.shards import VALUE_HEAD, Head, StageWeight, checked, cut_shard, join_shards, stage_weights

BUCKET_ELEMENTS = 64 * 1024 * 1024  # of whole weights in flight at once, 256 MB in float32


def stages_of(chunks: Sequence[nn.Module], pipeline_group: ProcessGroup) -> dict[int, nn.Module]:
    """Number of each stage that this rank holds -> its module.

    It is one, or with an interleaved pipeline one of each round over the ranks.
    """
    rank, size = pipeline_group.rank(), pipeline_group.size()
    return {number * size + rank: chunk for number, chunk in enumerate(chunks)}


def load_huggingface(
    chunks: Sequence[nn.Module],
    named: Weights,
    shape: ModelShape,
    head: Head,
    *,
    tensor_group: ProcessGroup,
    pipeline_group: ProcessGroup,
) -> None:
    """Copy this rank's part of the whole weights `named` into the Megatron modules of its stages.

    Reads one parameter at a time, and of it this rank's part alone. A value network ignores `lm_head.weight`.
    Its head starts at zero, unless `named` has `value_head.weight`.

    Raises:
        ConfigError: a tensor is missing, or has another shape than the model.
    """
    if head == "value":
        named = ChainMap(dict(named), {VALUE_HEAD: torch.zeros(1, shape.hidden_size)})
    rank, size = tensor_group.rank(), tensor_group.size()
    stages = pipeline_group.size() * len(chunks)
    for stage, chunk in stages_of(chunks, pipeline_group).items():
        parameters = dict(chunk.named_parameters())
        weights = stage_weights(shape, head, stage=stage, stages=stages)
        assert parameters.keys() == {weight.parameter for weight in weights}, "table and module disagree"
        for weight in weights:
            tensors = [checked(named, *whole) for whole in zip(weight.names, weight.shapes, strict=True)]
            shard = cut_shard(tensors, weight.cut, shape, rank=rank, size=size)
            with torch.no_grad():
                parameters[weight.parameter].copy_(shard)


def gather_huggingface(
    chunks: Sequence[nn.Module],
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
    own = stages_of(chunks, pipeline_group)
    gathered = gather_stages(
        chunks,
        shape,
        head,
        tensor_group=tensor_group,
        pipeline_group=pipeline_group,
        bucket_elements=bucket_elements,
    )
    example = next(chunks[0].parameters())
    ranks, stages = pipeline_group.size(), pipeline_group.size() * len(chunks)
    for stage in range(stages):
        for bucket in stage_buckets(shape, head, stage=stage, stages=stages, elements=bucket_elements):
            flat = next(gathered) if stage in own else example.new_empty(bucket_size(bucket))
            if ranks > 1:
                source = torch.distributed.get_global_rank(pipeline_group, stage % ranks)
                torch.distributed.broadcast(flat, source, group=pipeline_group)
            yield from unpack(flat, bucket)


def gather_stages(
    chunks: Sequence[nn.Module],
    shape: ModelShape,
    head: Head,
    *,
    tensor_group: ProcessGroup,
    pipeline_group: ProcessGroup,
    bucket_elements: int = BUCKET_ELEMENTS,
) -> Iterator[Tensor]:
    """The `stage_buckets` of this rank's stages, one after the other, flat and whole, on each of its tensor
    parallel ranks. Collective over those."""
    stages = pipeline_group.size() * len(chunks)
    for stage, chunk in stages_of(chunks, pipeline_group).items():
        parameters = dict(chunk.named_parameters())
        for bucket in stage_buckets(shape, head, stage=stage, stages=stages, elements=bucket_elements):
            yield _gather_bucket(bucket, parameters, shape, tensor_group)


def stage_buckets(
    shape: ModelShape, head: Head, *, stage: int, stages: int, elements: int = BUCKET_ELEMENTS
) -> Iterator[list[StageWeight]]:
    """What a stage holds and no earlier one does. Every process can tell the buckets of every stage."""
    weights = stage_weights(shape, head, stage=stage, stages=stages)
    return _buckets((weight for weight in weights if not weight.duplicate), elements)


def _buckets(weights: Iterable[StageWeight], elements: int) -> Iterator[list[StageWeight]]:
    """Consecutive weights of at most `elements` together; a larger one travels alone."""
    bucket: list[StageWeight] = []
    for weight in weights:
        if bucket and bucket_size(bucket) + weight.elements > elements:
            yield bucket
            bucket = []
        bucket.append(weight)
    if bucket:
        yield bucket


def bucket_size(bucket: Sequence[StageWeight]) -> int:
    return sum(weight.elements for weight in bucket)


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


def unpack(flat: Tensor, bucket: Sequence[StageWeight]) -> Iterator[tuple[str, Tensor]]:
    """The whole tensors of a bucket, as views of it."""
    names = [name for weight in bucket for name in weight.names]
    shapes = [shape for weight in bucket for shape in weight.shapes]
    parts = torch.split(flat, [torch.Size(shape).numel() for shape in shapes])
    for name, shape, part in zip(names, shapes, parts, strict=True):
        yield name, part.view(shape)
