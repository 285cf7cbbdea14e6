"""The undiscounted return of each turn of a dialog."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlef_kernels._checks import (
    accumulation_dtype,
    check_border_order,
    check_floating,
    check_turn_sequences,
)
from rlef_kernels._triton import has_triton
from rlef_kernels.segments import discounted_sums, turn_borders


def turn_returns(
    turn_rewards: Tensor,  # [turns]
    turn_sequences: Tensor,  # [turns]
) -> Tensor:
    """Each turn's reward plus those of all later turns of its sequence: the Monte-Carlo return with gamma 1.

    A sequence is summed from its last turn back, by itself: what it gets does not depend, bit for bit, on the
    sequences around it, and a NaN stays in the sequence that has it.

    On CUDA the Triton kernel of `_segments_triton` computes it, elsewhere (and without Triton) torch.

    Args:
        turn_rewards: `[turns]`, any floating type. Differentiable.
        turn_sequences: `[turns]` int64, ascending: turns with the same number are one sequence, in order of
            time. Where they do not ascend on a GPU, every return is NaN.

    Returns:
        `[turns]` in the type of `turn_rewards`; sums are taken in float32, or float64.

    Raises:
        ValueError: shapes, types or devices that do not fit, or (on a CPU) sequences that do not ascend.
    """
    check_floating("turn_rewards", turn_rewards)
    check_turn_sequences("turn_sequences", turn_sequences, "turn_rewards", turn_rewards)
    returns: Tensor = torch.ops.rlef_kernels.running_sums(turn_rewards, turn_borders(turn_sequences), True)
    return returns


def _running_sums_in_torch(
    values: Tensor,  # [tokens]
    cu_seqlens: Tensor,  # [segments + 1]
    from_end: bool,
) -> Tensor:
    """Of each token, the sum of the values of its segment from the end, or from the beginning, to itself."""
    check_border_order("cu_seqlens", cu_seqlens, values.shape[0])
    if not from_end:
        reversed_borders = values.shape[0] - cu_seqlens.flip(0)
        return _running_sums_in_torch(values.flip(0), reversed_borders, True).flip(0)
    ends = torch.repeat_interleave(cu_seqlens[1:], cu_seqlens.diff())  # [tokens]
    left = ends - torch.arange(ends.shape[0], device=ends.device)  # [tokens] of its segment, its own too
    return discounted_sums(values.to(accumulation_dtype(values)), left, 1.0).to(values.dtype)


def _running_sums_on_cuda(
    values: Tensor,  # [tokens]
    cu_seqlens: Tensor,  # [segments + 1]
    from_end: bool,
) -> Tensor:
    if not has_triton():
        return _running_sums_in_torch(values, cu_seqlens, from_end)
    from rlef_kernels._segments_triton import running_sums_in_triton

    return running_sums_in_triton(values, cu_seqlens, from_end)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, cu_seqlens, ctx.from_end = inputs
    ctx.save_for_backward(cu_seqlens)


def _gradient(ctx: Any, for_sums: Tensor) -> tuple[Tensor, None, None]:
    (cu_seqlens,) = ctx.saved_tensors
    return torch.ops.rlef_kernels.running_sums(for_sums, cu_seqlens, not ctx.from_end), None, None


# An operator, so that torch.compile steps over it: its torch form asks how long the longest sequence is.
torch.library.define(
    "rlef_kernels::running_sums", "(Tensor values, Tensor cu_seqlens, bool from_end) -> Tensor"
)
torch.library.impl("rlef_kernels::running_sums", "default", _running_sums_in_torch)
torch.library.impl("rlef_kernels::running_sums", "cuda", _running_sums_on_cuda)
torch.library.register_fake(
    "rlef_kernels::running_sums", lambda values, _cu_seqlens, _from_end: values.new_empty(values.shape)
)
torch.library.register_autograd("rlef_kernels::running_sums", _gradient, setup_context=_remember)
