"""The clipped value loss of PPO."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlef_kernels._checks import (
    accumulation_dtype,
    check_floating,
    check_like,
    check_mask,
    check_normaliser,
    check_positive,
)


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
    check_positive("value_clip", value_clip)
    check_normaliser(normaliser)
    if mask is not None:
        check_mask("mask", mask)
        check_like("mask", mask, "values", values)
        values, old_values, returns = values[mask], old_values[mask], returns[mask]
    dtype = accumulation_dtype(values)
    values, old_values, returns = values.to(dtype), old_values.to(dtype), returns.to(dtype)
    near = torch.clamp(values, old_values - value_clip, old_values + value_clip)
    squared_error, near_squared_error = (values - returns) ** 2, (near - returns) ** 2
    loss = torch.maximum(squared_error, near_squared_error).sum() / 2
    metrics = ValueMetrics(
        values=values.new_full((), values.shape[0]),
        clipped=(near_squared_error > squared_error).sum().to(dtype),
        squared_error=squared_error.detach().sum(),
    )
    return loss / normaliser, metrics
