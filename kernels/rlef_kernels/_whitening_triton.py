"""The two passes over the values that `whitening` makes, on a GPU: one for the moments, and one that writes.

Both compute in float64, as their reference does: it is a few steps per value, fewer than DRAM has time for on
the GPUs that have such units, and values far from 0 lose nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # values that a program takes


@triton.jit
def _chosen(mask_ptr, place, num_values):
    """Which places are inside the mask."""
    chosen = place < num_values
    if mask_ptr is not None:
        chosen &= tl.load(mask_ptr + place, mask=chosen, other=0) != 0
    return chosen


@triton.jit
def _load_double(values_ptr, place, chosen):
    """The values in float64, and 0 where none is chosen."""
    value = tl.load(values_ptr + place, mask=chosen, other=0.0)
    if values_ptr.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    return value.to(tl.float64)


@triton.jit
def parts_kernel(
    parts_ptr,  # [3, programs] counts, totals, and the squares of values less the mean of their part
    values_ptr,  # [values]
    mask_ptr,  # [values], or None: all True
    num_values,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    place = program * BLOCK + tl.arange(0, BLOCK)
    chosen = _chosen(mask_ptr, place, num_values)
    value = _load_double(values_ptr, place, chosen)
    count = tl.sum(chosen.to(tl.int32), 0)
    total = tl.sum(value, 0)
    centred = tl.where(chosen, value - total / count, 0.0)
    programs = tl.num_programs(0).to(tl.int64)
    parts_ptr += program
    tl.store(parts_ptr, count.to(tl.float64))
    tl.store(parts_ptr + programs, total)
    tl.store(parts_ptr + 2 * programs, tl.sum(centred * centred, 0))


@triton.jit
def whiten_kernel(
    whitened_ptr,  # [values]
    values_ptr,  # [values]
    mask_ptr,  # [values], or None: all True
    mean_ptr,  # []
    scale_ptr,  # []
    num_values,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    chosen = _chosen(mask_ptr, place, num_values)
    value = _load_double(values_ptr, place, chosen)
    whitened = tl.where(chosen, (value - tl.load(mean_ptr)) * tl.load(scale_ptr), 0.0)
    if whitened_ptr.dtype.element_ty != tl.float64:
        whitened = whitened.to(tl.float32)
    tl.store(whitened_ptr + place, whitened.to(whitened_ptr.dtype.element_ty), mask=place < num_values)


def parts_in_triton(
    values: Tensor,  # [values]
    mask: Tensor | None,  # [values]
    *,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, totals and squares of each program's part, `[parts]` float64."""
    num_values = values.shape[0]
    programs = triton.cdiv(num_values, block)
    parts = values.new_empty((3, programs), dtype=torch.float64)
    if programs:
        with torch.cuda.device_of(values):
            parts_kernel[(programs,)](parts, values.contiguous(), _bytes_of(mask), num_values, BLOCK=block)
    counts, totals, squares = parts.unbind()
    return counts, totals, squares


def whitened_in_triton(
    values: Tensor,  # [values]
    mask: Tensor | None,  # [values]
    mean: Tensor,  # [] float64
    scale: Tensor,  # [] float64
    *,
    block: int = BLOCK,
) -> Tensor:
    """(x - mean) scale inside the mask, and 0 outside, in the type of `values`."""
    num_values = values.shape[0]
    whitened = torch.empty_like(values, memory_format=torch.contiguous_format)
    if num_values:
        with torch.cuda.device_of(values):
            whiten_kernel[(triton.cdiv(num_values, block),)](
                whitened, values.contiguous(), _bytes_of(mask), mean, scale, num_values, BLOCK=block
            )
    return whitened


def _bytes_of(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)
