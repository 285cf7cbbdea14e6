"""The value loss on a GPU, its gradient and its metrics in one pass. Its reference is in `value`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlef_kernels._checks import accumulation_dtype

BLOCK = 1024  # values that a program takes


@triton.jit
def value_loss_kernel(
    sums_ptr,  # [4, programs] of the larger squared error, of ones, of clipped values, of the squared error
    gradient_ptr,  # [values]
    values_ptr,  # [values]
    old_values_ptr,  # [values]
    returns_ptr,  # [values]
    mask_ptr,  # [values], or None: all True
    normaliser_ptr,  # []
    num_values,
    VALUE_CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype = gradient_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    place = program * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_values
    chosen = inside
    if mask_ptr is not None:
        chosen &= tl.load(mask_ptr + place, mask=inside, other=0) != 0
    value = tl.load(values_ptr + place, mask=chosen, other=0.0).to(dtype)
    old = tl.load(old_values_ptr + place, mask=chosen, other=0.0).to(dtype)
    target = tl.load(returns_ptr + place, mask=chosen, other=0.0).to(dtype)
    normaliser = tl.load(normaliser_ptr)

    # Written with comparisons, which a NaN fails: minima and maxima of a GPU drop it.
    low, high = old - VALUE_CLIP, old + VALUE_CLIP
    near = tl.where(value < low, low, tl.where(value > high, high, value))
    near = tl.where(old == old, near, old)
    squared_error = (value - target) * (value - target)
    near_squared_error = (near - target) * (near - target)
    larger = tl.where(near_squared_error <= squared_error, squared_error, near_squared_error)
    is_clipped = near_squared_error > squared_error
    slope = tl.where(is_clipped, 0.0, value - target)
    slope = tl.where(old == old, slope, old)
    tl.store(gradient_ptr + place, slope / normaliser, mask=inside)

    programs = tl.num_programs(0).to(tl.int64)
    sums_ptr += program
    tl.store(sums_ptr, tl.sum(larger, 0))
    tl.store(sums_ptr + programs, tl.sum(chosen.to(dtype), 0))
    tl.store(sums_ptr + 2 * programs, tl.sum(is_clipped.to(dtype), 0))
    tl.store(sums_ptr + 3 * programs, tl.sum(squared_error, 0))


def value_loss_in_triton(
    values: Tensor,  # [values]
    old_values: Tensor,  # [values]
    returns: Tensor,  # [values]
    mask: Tensor | None,  # [values]
    normaliser: Tensor,  # []
    value_clip: float,
    *,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its gradient `[values]` in `values`, and the metrics `[3]`."""
    dtype = accumulation_dtype(values)
    num_values = values.shape[0]
    programs = triton.cdiv(num_values, block)
    gradient = values.new_empty((num_values,), dtype=dtype)
    sums = values.new_empty((4, programs), dtype=dtype)
    if num_values:
        with torch.cuda.device_of(values):
            value_loss_kernel[(programs,)](
                sums,
                gradient,
                values.contiguous(),
                old_values.contiguous(),
                returns.contiguous(),
                None if mask is None else mask.contiguous().view(torch.uint8),
                normaliser,
                num_values,
                VALUE_CLIP=value_clip,
                BLOCK=block,
            )
    whole = sums.sum(1, dtype=torch.float64)  # [4] counts past 2^24 too
    return (whole[0] / 2 / normaliser).to(dtype), gradient, whole[1:].to(dtype, copy=True)
