"""The clipped value loss of PPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlef_kernels._checks import (
    accumulation_dtype,
    check_floating,
    check_like,
    check_mask,
    check_positive,
)
from rlef_kernels._triton import has_triton


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueMetrics:
    """Sums over the values inside the mask, to be added up over batches and processes. No gradient."""

    values: Tensor  # how many
    clipped: Tensor  # values whose gradient the clip stopped
    squared_error: Tensor  # (V - G)^2


def value_loss(
    values: Tensor,  # [values]
    old_values: Tensor,  # [values]
    returns: Tensor,  # [values]
    mask: Tensor | None = None,  # [values]
    *,
    value_clip: float,
    normaliser: float | Tensor,
) -> tuple[Tensor, ValueMetrics]:
    """Sum of 1/2 max((V - G)^2, (clip(V, V_old - alpha, V_old + alpha) - G)^2), divided by `normaliser`.

    This is the value loss of RLEF, section 2. The maximum is pessimistic: a value that has moved by more than
    alpha *towards* its return gets no further gradient in this update; one that moved away from it is pulled
    back in full.

    Loss, gradient and metrics come of one pass: on CUDA the Triton kernel of `_value_triton`, elsewhere (and
    without Triton) torch. The gradient has no gradient of its own.

    Args:
        values: `[values]` V, the only argument that gets a gradient.
        old_values: `[values]` V_old, at the start of the update.
        returns: `[values]` G.
        mask: `[values]` bool; nothing is read where it is False. None means all True.
        value_clip: alpha.
        normaliser: one number above 0, no gradient: usually how many values the whole update trains on.

    Returns:
        The scalar loss and the metrics, in float32 (float64 when `values` is).

    Raises:
        ValueError: shapes, types or devices that differ, or a setting out of range.
    """
    check_floating("values", values)
    for name, tensor in (("old_values", old_values), ("returns", returns)):
        check_floating(name, tensor)
        check_like(name, tensor, "values", values)
    check_like("values", values, "values", values)
    check_positive("value_clip", value_clip)
    if mask is not None:
        check_mask("mask", mask)
        check_like("mask", mask, "values", values)
    loss, _, sums = torch.ops.rlef_kernels.value_loss(
        values,
        old_values.detach(),
        returns.detach(),
        mask,
        _scalar("normaliser", normaliser, values),
        float(value_clip),
    )
    count, clipped, squared_error = sums.detach().unbind()
    return loss, ValueMetrics(values=count, clipped=clipped, squared_error=squared_error)


def _scalar(name: str, number: float | Tensor, like: Tensor) -> Tensor:
    """`number` as a tensor of no dimension, in the type that `like` is summed in, on its device."""
    dtype = accumulation_dtype(like)
    if not isinstance(number, Tensor):
        check_positive(name, number)
        return torch.full((), number, dtype=dtype, device=like.device)
    if number.numel() != 1:
        raise ValueError(f"{name} has shape {list(number.shape)}; it must be one number")
    return number.detach().reshape(()).to(like.device, dtype)


def _value_loss_in_torch(
    values: Tensor,  # [values]
    old_values: Tensor,  # [values]
    returns: Tensor,  # [values]
    mask: Tensor | None,  # [values]
    normaliser: Tensor,  # []
    value_clip: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its gradient `[values]` in `values`, and the metrics `[3]`."""
    if normaliser.device.type == "cpu":
        check_positive("normaliser", float(normaliser))
    dtype = accumulation_dtype(values)
    gradient = torch.zeros(values.shape, dtype=dtype, device=values.device)
    chosen = slice(None) if mask is None else mask
    values, old_values, returns = (each[chosen].to(dtype) for each in (values, old_values, returns))
    near = torch.clamp(values, old_values - value_clip, old_values + value_clip)
    squared_error, near_squared_error = (values - returns) ** 2, (near - returns) ** 2
    is_clipped = near_squared_error > squared_error
    loss = torch.maximum(squared_error, near_squared_error).sum() / 2 / normaliser
    # A NaN in an old value leaves no trace in V - G, but must in the gradient.
    gradient[chosen] = torch.where(is_clipped, 0, values - returns + 0 * old_values) / normaliser
    count = torch.full((), values.shape[0], dtype=dtype, device=values.device)
    return loss, gradient, torch.stack([count, is_clipped.sum().to(dtype), squared_error.sum()])


def _value_loss_on_cuda(
    values: Tensor,  # [values]
    old_values: Tensor,  # [values]
    returns: Tensor,  # [values]
    mask: Tensor | None,  # [values]
    normaliser: Tensor,  # []
    value_clip: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if not has_triton():
        return _value_loss_in_torch(values, old_values, returns, mask, normaliser, value_clip)
    from rlef_kernels._value_triton import value_loss_in_triton

    return value_loss_in_triton(values, old_values, returns, mask, normaliser, value_clip)


def _shapes(
    values: Tensor,  # [values]
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """What torch.compile needs to know of the outputs."""
    dtype = accumulation_dtype(values)
    return (
        values.new_empty((), dtype=dtype),
        values.new_empty(values.shape, dtype=dtype),
        values.new_empty((3,), dtype=dtype),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


@once_differentiable
def _gradient(ctx: Any, for_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (gradient * for_loss).to(ctx.dtype), None, None, None, None, None


# An operator, so that torch.compile steps over it: on a CPU the normaliser is read and checked.
torch.library.define(
    "rlef_kernels::value_loss",
    "(Tensor values, Tensor old_values, Tensor returns, Tensor? mask, Tensor normaliser, float value_clip)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("rlef_kernels::value_loss", "default", _value_loss_in_torch)
torch.library.impl("rlef_kernels::value_loss", "cuda", _value_loss_on_cuda)
torch.library.register_fake("rlef_kernels::value_loss", _shapes)
torch.library.register_autograd("rlef_kernels::value_loss", _gradient, setup_context=_remember)
