"""What `segments` and `returns` compute, on a GPU: one program per segment, in an order that depends on its
length alone. A segment that the tokens do not have is answered with NaN, or -1 for a count."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlef_kernels._checks import accumulation_dtype

BLOCK = 1024  # tokens that a program takes at once


@triton.jit
def _limits(cu_seqlens_ptr, tokens):
    """Where this program's segment begins and ends, and whether the tokens have it; if not it is empty."""
    segment = tl.program_id(0).to(tl.int64)
    begin = tl.load(cu_seqlens_ptr + segment).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + segment + 1).to(tl.int64)
    is_known = (begin >= 0) & (begin <= end) & (end <= tokens)
    return tl.where(is_known, begin, 0), tl.where(is_known, end, 0), is_known


@triton.jit
def _inside(left, BLOCK: tl.constexpr):
    """Which lanes are among the tokens that are left: 32 bits each, for 64 cost twice the instructions."""
    return tl.arange(0, BLOCK) < tl.minimum(left, BLOCK).to(tl.int32)


@triton.jit
def _chosen(mask_ptr, first, inside, BLOCK: tl.constexpr):
    """Which of the tokens inside the segment are inside the mask too."""
    if mask_ptr is not None:
        inside &= tl.load(mask_ptr + first + tl.arange(0, BLOCK), mask=inside, other=0) != 0
    return inside


@triton.jit
def sum_kernel(
    sums_ptr,  # [segments]
    values_ptr,  # [tokens], or None: every value is 1
    cu_seqlens_ptr,  # [segments + 1]
    mask_ptr,  # [tokens], or None: all True
    tokens,
    BLOCK: tl.constexpr,
):
    dtype = sums_ptr.dtype.element_ty
    begin, end, is_known = _limits(cu_seqlens_ptr, tokens)
    lanes = tl.arange(0, BLOCK)
    totals = tl.zeros((BLOCK,), tl.int32 if values_ptr is None else dtype)
    first = begin
    for _ in tl.range(0, tl.cdiv(end - begin, BLOCK)):
        chosen = _chosen(mask_ptr, first, _inside(end - first, BLOCK), BLOCK)
        if values_ptr is None:
            totals += chosen.to(tl.int32)
        else:
            totals += tl.load(values_ptr + first + lanes, mask=chosen, other=0.0).to(dtype)
        first += BLOCK
    unknown = tl.full((), -1 if values_ptr is None else float("nan"), dtype)
    tl.store(
        sums_ptr + tl.program_id(0).to(tl.int64), tl.where(is_known, tl.sum(totals.to(dtype), 0), unknown)
    )


@triton.jit
def expand_kernel(
    expanded_ptr,  # [tokens]
    numbers_ptr,  # [segments]
    cu_seqlens_ptr,  # [segments + 1]
    mask_ptr,  # [tokens], or None: all True
    tokens,
    BLOCK: tl.constexpr,
):
    begin, end, _ = _limits(cu_seqlens_ptr, tokens)
    number = tl.load(numbers_ptr + tl.program_id(0).to(tl.int64))
    zero = tl.full((), 0.0, expanded_ptr.dtype.element_ty)
    lanes = tl.arange(0, BLOCK)
    first = begin
    for _ in tl.range(0, tl.cdiv(end - begin, BLOCK)):
        inside = _inside(end - first, BLOCK)
        chosen = _chosen(mask_ptr, first, inside, BLOCK)
        tl.store(expanded_ptr + first + lanes, tl.where(chosen, number, zero), mask=inside)
        first += BLOCK


@triton.jit
def running_sums_kernel(
    sums_ptr,  # [tokens]
    values_ptr,  # [tokens]
    cu_seqlens_ptr,  # [segments + 1]
    tokens,
    FROM_END: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin, end, _ = _limits(cu_seqlens_ptr, tokens)
    lanes = tl.arange(0, BLOCK)
    carried = tl.full((), 0.0, ACCUMULATE)
    first = end - 1 if FROM_END else begin  # lane 0 is where the sum begins
    left = end - begin
    for _ in tl.range(0, tl.cdiv(end - begin, BLOCK)):
        inside = _inside(left, BLOCK)
        steps = -lanes if FROM_END else lanes
        value = tl.load(values_ptr + first + steps, mask=inside, other=0.0).to(ACCUMULATE)
        sums = tl.cumsum(value, 0) + carried
        carried = tl.sum(tl.where(lanes == BLOCK - 1, sums, 0.0), 0)
        tl.store(sums_ptr + first + steps, sums.to(sums_ptr.dtype.element_ty), mask=inside)
        first += -BLOCK if FROM_END else BLOCK
        left -= BLOCK


def sum_in_triton(
    values: Tensor,  # [tokens]
    cu_seqlens: Tensor,  # [segments + 1]
    mask: Tensor | None,  # [tokens]
    *,
    block: int = BLOCK,
) -> Tensor:
    sums = values.new_empty(cu_seqlens.shape[0] - 1, dtype=accumulation_dtype(values))
    _launch_sum(sums, values.contiguous(), cu_seqlens, mask, values.shape[0], block)
    return sums


def count_in_triton(
    cu_seqlens: Tensor,  # [segments + 1]
    mask: Tensor,  # [tokens]
    *,
    block: int = BLOCK,
) -> Tensor:
    counts = cu_seqlens.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.int64)
    _launch_sum(counts, None, cu_seqlens, mask, mask.shape[0], block)
    return counts


def _launch_sum(
    sums: Tensor,
    values: Tensor | None,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    tokens: int,
    block: int,
) -> None:
    if sums.shape[0]:
        with torch.cuda.device_of(sums):
            sum_kernel[(sums.shape[0],)](
                sums, values, cu_seqlens.contiguous(), _bytes_of(mask), tokens, BLOCK=block
            )


def expand_in_triton(
    numbers: Tensor,  # [segments]
    cu_seqlens: Tensor,  # [segments + 1]
    mask: Tensor | None,  # [tokens]
    tokens: int,
    *,
    block: int = BLOCK,
) -> Tensor:
    expanded = numbers.new_full((tokens,), torch.nan)
    if numbers.shape[0]:
        with torch.cuda.device_of(numbers):
            expand_kernel[(numbers.shape[0],)](
                expanded, numbers.contiguous(), cu_seqlens.contiguous(), _bytes_of(mask), tokens, BLOCK=block
            )
    return expanded


def running_sums_in_triton(
    values: Tensor,  # [tokens]
    cu_seqlens: Tensor,  # [segments + 1]
    from_end: bool,
    *,
    block: int = BLOCK,
) -> Tensor:
    """In the type of `values`; NaN at tokens of no segment."""
    sums = torch.full_like(values, torch.nan, memory_format=torch.contiguous_format)
    if values.shape[0]:
        double = accumulation_dtype(values) == torch.float64
        with torch.cuda.device_of(values):
            running_sums_kernel[(cu_seqlens.shape[0] - 1,)](
                sums,
                values.contiguous(),
                cu_seqlens.contiguous(),
                values.shape[0],
                FROM_END=from_end,
                ACCUMULATE=tl.float64 if double else tl.float32,
                BLOCK=block,
            )
    return sums


def _bytes_of(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)
