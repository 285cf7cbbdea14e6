"""Sums and means over packed segments: the turns of dialogs, or whole sequences.

Segment i is the tokens from `cu_seqlens[i]` up to `cu_seqlens[i + 1]`. On CUDA the kernels of
`_segments_triton` give each segment a program, whose order depends on nothing but the segment's length;
elsewhere, and without Triton, torch computes. A segment gets the same bits alone as among others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlef_kernels._checks import (
    accumulation_dtype,
    check_border_order,
    check_borders,
    check_floating,
    check_like,
    check_mask,
    check_turn_order,
)
from rlef_kernels._triton import has_triton


def segment_sum(
    values: Tensor,  # [tokens]
    cu_seqlens: Tensor,  # [segments + 1]
    mask: Tensor | None = None,  # [tokens]
) -> Tensor:
    """The sum of each segment's values inside the mask: what a turn earned, or its KL to the reference.

    Args:
        values: `[tokens]`, any floating type. Differentiable; the gradient outside the mask is 0.
        cu_seqlens: `[segments + 1]` int32 or int64, where each segment begins, and the number of tokens.
        mask: `[tokens]` bool. Nothing is read where it is False. None means all True.

    Returns:
        `[segments]` in float32 (float64 when `values` is); 0 for a segment without tokens. On a GPU, where
        nobody reads `cu_seqlens` first, NaN for a segment that the tokens do not have.

    Raises:
        ValueError: shapes, types or devices that do not fit, or (on a CPU) `cu_seqlens` that do not ascend
            from 0 to the number of tokens.
    """
    check_floating("values", values)
    check_like("values", values, "values", values)
    if mask is not None:
        check_mask("mask", mask)
        check_like("mask", mask, "values", values)
    check_borders("cu_seqlens", cu_seqlens, "values", values)
    sums: Tensor = torch.ops.rlef_kernels.segment_sum(values, cu_seqlens, mask)
    return sums


def segment_count(
    cu_seqlens: Tensor,  # [segments + 1]
    mask: Tensor,  # [tokens]
) -> Tensor:
    """How many tokens of each segment are inside the mask, `[segments]` int64; -1 where `segment_sum` is NaN
    for want of tokens. Arguments and errors are those of `segment_sum`."""
    check_mask("mask", mask)
    check_like("mask", mask, "mask", mask)
    check_borders("cu_seqlens", cu_seqlens, "mask", mask)
    counts: Tensor = torch.ops.rlef_kernels.segment_count(cu_seqlens, mask)
    return counts


def segment_mean(
    values: Tensor,  # [tokens]
    cu_seqlens: Tensor,  # [segments + 1]
    mask: Tensor | None = None,  # [tokens]
) -> Tensor:
    """The mean of each segment's values inside the mask: a turn's mean log-ratio. The mean of nothing is 0.

    Arguments, type, gradient and errors are those of `segment_sum`.
    """
    sums = segment_sum(values, cu_seqlens, mask)
    counts = cu_seqlens.diff() if mask is None else segment_count(cu_seqlens, mask)
    return sums / counts.clamp(min=1)


def segment_expand(
    numbers: Tensor,  # [segments]
    cu_seqlens: Tensor,  # [segments + 1]
    mask: Tensor,  # [tokens]
) -> Tensor:
    """Each segment's number at its tokens inside the mask, and 0 outside: a turn's advantage for its tokens.

    It is the gradient of `segment_sum`, which is its own.

    Args:
        numbers: `[segments]`, any floating type. Differentiable. That of a segment without tokens inside the
            mask reaches nothing.
        cu_seqlens: `[segments + 1]` int32 or int64, where each segment begins, and the number of tokens.
        mask: `[tokens]` bool.

    Returns:
        `[tokens]` in the type of `numbers`. On a GPU, where nobody reads `cu_seqlens` first, NaN at tokens of
        no segment.

    Raises:
        ValueError: shapes, types or devices that do not fit, or (on a CPU) `cu_seqlens` that do not ascend
            from 0 to the number of tokens.
    """
    check_floating("numbers", numbers)
    check_mask("mask", mask)
    check_like("mask", mask, "mask", mask)
    check_borders("cu_seqlens", cu_seqlens, "numbers", numbers)
    if numbers.shape != (cu_seqlens.shape[0] - 1,):
        raise ValueError(
            f"numbers has shape {list(numbers.shape)} but cu_seqlens has {list(cu_seqlens.shape)}; give one"
            " number per segment"
        )
    if mask.device != numbers.device:
        raise ValueError(f"mask is on {mask.device} but numbers on {numbers.device}; move one of them")
    expanded: Tensor = torch.ops.rlef_kernels.segment_expand(numbers, cu_seqlens, mask, mask.shape[0])
    return expanded


def mean_weights(
    cu_seqlens: Tensor,  # [segments + 1]
    mask: Tensor,  # [tokens]
) -> Tensor:
    """Weights `[tokens]` float32 with which a sum over the mask becomes a sum of means, one for each segment.

    A token's weight is 1 / (how many tokens of its segment are inside the mask), and 0 outside. Segments are
    sequences, or turns, packed one after the other: segment i is the tokens from `cu_seqlens[i]` up to
    `cu_seqlens[i + 1]`.

    Raises:
        ValueError: types or devices that do not fit, or (on a CPU) limits that do not ascend from 0 to the
            number of tokens.
    """
    counts = segment_count(cu_seqlens, mask)
    return segment_expand(1 / counts.to(torch.float32), cu_seqlens, mask)


def turn_borders(
    turn_sequences: Tensor,  # [turns]
) -> Tensor:
    """`cu_seqlens` of as many segments as there are turns, `[turns + 1]` int64: the sequence that begins with
    turn i is segment i, and where none does the segment is empty. So the shape asks for no number that only
    the device knows."""
    borders: Tensor = torch.ops.rlef_kernels.turn_borders(turn_sequences)
    return borders


def discounted_sums(
    terms: Tensor,  # [steps]
    left: Tensor,  # [steps]
    decay: float,
) -> Tensor:
    """The sum over i < left of decay^i terms[t + i], for each t.

    After round k the first 2^k terms are in. Which terms meet in which round depends only on how far the end
    of the sequence is, so a sequence gets the same bits alone as among others.
    """
    sums, reach = terms.clone(), 1
    longest = int(left.max()) if left.numel() else 0
    while reach < longest:
        later = torch.where(left[:-reach] > reach, sums[reach:], 0)
        sums[:-reach].add_(later, alpha=decay**reach)
        reach *= 2
    return sums


def _segment_of_tokens(
    cu_seqlens: Tensor,  # [segments + 1]
    tokens: int,
) -> Tensor:
    """`[tokens]` which segment each is in."""
    check_border_order("cu_seqlens", cu_seqlens, tokens)
    return torch.repeat_interleave(cu_seqlens.diff().long(), output_size=tokens)


def _sum_in_torch(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None) -> Tensor:
    segments = _segment_of_tokens(cu_seqlens, values.shape[0])  # [tokens]
    if mask is not None:
        values, segments = values[mask], segments[mask]
    sums = values.new_zeros(cu_seqlens.shape[0] - 1, dtype=torch.float64)  # one by one: float32 would drift
    return sums.index_add_(0, segments, values.to(torch.float64)).to(accumulation_dtype(values))


def _count_in_torch(cu_seqlens: Tensor, mask: Tensor) -> Tensor:
    segments = _segment_of_tokens(cu_seqlens, mask.shape[0])  # [tokens]
    counts = segments.new_zeros(cu_seqlens.shape[0] - 1)
    return counts.index_add_(0, segments, mask.to(counts.dtype))


def _expand_in_torch(numbers: Tensor, cu_seqlens: Tensor, mask: Tensor | None, tokens: int) -> Tensor:
    expanded = numbers[_segment_of_tokens(cu_seqlens, tokens)]
    return expanded if mask is None else torch.where(mask, expanded, 0)


def _turn_borders_in_torch(turn_sequences: Tensor) -> Tensor:
    check_turn_order("turn_sequences", turn_sequences)
    turns = torch.arange(turn_sequences.shape[0], device=turn_sequences.device)
    goes_on = turn_sequences[1:] == turn_sequences[:-1]  # [turns - 1]
    next_begin = torch.searchsorted(turn_sequences, turn_sequences, right=True)  # [turns]
    borders = torch.where(pad(goes_on, (1, 0)), next_begin, turns)
    # On a GPU nobody has read the order. Should it be wrong, every segment is empty and every answer NaN.
    ascend = (turn_sequences[1:] >= turn_sequences[:-1]).all()
    return pad(borders, (0, 1), value=turns.shape[0]) * ascend


def _sum_on_cuda(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None) -> Tensor:
    if not has_triton():
        return _sum_in_torch(values, cu_seqlens, mask)
    from rlef_kernels._segments_triton import sum_in_triton

    return sum_in_triton(values, cu_seqlens, mask)


def _count_on_cuda(cu_seqlens: Tensor, mask: Tensor) -> Tensor:
    if not has_triton():
        return _count_in_torch(cu_seqlens, mask)
    from rlef_kernels._segments_triton import count_in_triton

    return count_in_triton(cu_seqlens, mask)


def _expand_on_cuda(numbers: Tensor, cu_seqlens: Tensor, mask: Tensor | None, tokens: int) -> Tensor:
    if not has_triton():
        return _expand_in_torch(numbers, cu_seqlens, mask, tokens)
    from rlef_kernels._segments_triton import expand_in_triton

    return expand_in_triton(numbers, cu_seqlens, mask, tokens)


def _remember_for_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    values, cu_seqlens, mask = inputs
    ctx.save_for_backward(cu_seqlens, mask)
    ctx.tokens, ctx.dtype = values.shape[0], values.dtype


def _gradient_of_sum(ctx: Any, for_sums: Tensor) -> tuple[Tensor, None, None]:
    cu_seqlens, mask = ctx.saved_tensors
    expanded = torch.ops.rlef_kernels.segment_expand(for_sums, cu_seqlens, mask, ctx.tokens)
    return expanded.to(ctx.dtype), None, None


def _remember_for_expand(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    numbers, cu_seqlens, mask, _ = inputs
    ctx.save_for_backward(cu_seqlens, mask)
    ctx.dtype = numbers.dtype


def _gradient_of_expand(ctx: Any, for_tokens: Tensor) -> tuple[Tensor, None, None, None]:
    cu_seqlens, mask = ctx.saved_tensors
    sums = torch.ops.rlef_kernels.segment_sum(for_tokens, cu_seqlens, mask)
    return sums.to(ctx.dtype), None, None, None


# Operators, so that torch.compile steps over them: on a CPU they read the borders.
torch.library.define(
    "rlef_kernels::segment_sum", "(Tensor values, Tensor cu_seqlens, Tensor? mask) -> Tensor"
)
torch.library.impl("rlef_kernels::segment_sum", "default", _sum_in_torch)
torch.library.impl("rlef_kernels::segment_sum", "cuda", _sum_on_cuda)
torch.library.register_fake(
    "rlef_kernels::segment_sum",
    lambda values, cu_seqlens, _: values.new_empty(cu_seqlens.shape[0] - 1, dtype=accumulation_dtype(values)),
)
torch.library.register_autograd(
    "rlef_kernels::segment_sum", _gradient_of_sum, setup_context=_remember_for_sum
)

torch.library.define("rlef_kernels::segment_count", "(Tensor cu_seqlens, Tensor mask) -> Tensor")
torch.library.impl("rlef_kernels::segment_count", "default", _count_in_torch)
torch.library.impl("rlef_kernels::segment_count", "cuda", _count_on_cuda)
torch.library.register_fake(
    "rlef_kernels::segment_count",
    lambda cu_seqlens, _: cu_seqlens.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.int64),
)

torch.library.define(
    "rlef_kernels::segment_expand",
    "(Tensor numbers, Tensor cu_seqlens, Tensor? mask, SymInt tokens) -> Tensor",
)
torch.library.impl("rlef_kernels::segment_expand", "default", _expand_in_torch)
torch.library.impl("rlef_kernels::segment_expand", "cuda", _expand_on_cuda)
torch.library.register_fake(
    "rlef_kernels::segment_expand", lambda numbers, _cu_seqlens, _mask, tokens: numbers.new_empty(tokens)
)
torch.library.register_autograd(
    "rlef_kernels::segment_expand", _gradient_of_expand, setup_context=_remember_for_expand
)

torch.library.define("rlef_kernels::turn_borders", "(Tensor turn_sequences) -> Tensor")
torch.library.impl("rlef_kernels::turn_borders", "default", _turn_borders_in_torch)
torch.library.register_fake(
    "rlef_kernels::turn_borders",
    lambda turn_sequences: turn_sequences.new_empty(turn_sequences.shape[0] + 1),
)
