"""Mean and whitening over a mask, on one process or over all the processes of a group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from rlef_kernels._checks import check_floating, check_like, check_mask, check_positive


def _sum_over(group: ProcessGroup | None, *parts: Tensor) -> Tensor:
    """The sum of each part over its elements and over the group, `[parts]` float64."""
    sums = torch.stack([part.sum(dtype=torch.float64) for part in parts])
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums


def masked_mean(
    values: Tensor,  # [n]
    mask: Tensor | None = None,  # [n]
    *,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The mean of the values inside the mask, over every process of `group`: a float64 scalar, no gradient.

    Nothing is read where the mask is False (None means all True), and the mean of nothing is 0. Collective
    when a group is given: processes may hold different numbers of values, or none.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    total, count = _sum_over(group, *_chosen_and_ones(values, mask)).unbind()
    return total / count.clamp(min=1)


def masked_variance(
    values: Tensor,  # [n]
    mask: Tensor | None = None,  # [n]
    *,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The population's variance (divided by the count) of what `masked_mean` takes the mean of: a float64
    scalar, no gradient, and 0 of nothing. Two all-reduces when a group is given.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    return _centred(values, mask, group)[1]


def masked_whiten(
    values: Tensor,  # [n]
    mask: Tensor | None = None,  # [n]
    *,
    group: ProcessGroup | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) inside the mask, and 0 outside.

    Mean and variance are those of the values inside the masks of every process of `group`. The variance is
    that of the population (divided by the count), so that a single value becomes 0. Sums are taken in float64
    and of the centred values, in two all-reduces: values far from 0 lose nothing, and how they are spread
    over processes makes no difference beyond rounding.

    Args:
        values: `[n]`, any floating type. No gradient flows.
        mask: `[n]` bool; nothing is read where it is False. None means all True.
        group: the processes whose values are whitened together; None means this one's alone. Collective:
            every process calls, even one without values.
        eps: added to the variance, so that equal values become 0 instead of NaN.

    Returns:
        `[n]` in the type of `values`.

    Raises:
        ValueError: shapes, types or devices that do not fit, or an `eps` that is not above 0.
    """
    check_positive("eps", eps)
    centred, variance = _centred(values, mask, group)
    whitened = (centred / (variance + eps).sqrt()).to(values.dtype)
    if mask is None:
        return whitened
    spread = torch.zeros_like(values)
    spread[mask] = whitened
    return spread


def _centred(values: Tensor, mask: Tensor | None, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """This process's values inside the mask less the mean of all, and the variance of all."""
    chosen, ones = _chosen_and_ones(values, mask)
    total, count = _sum_over(group, chosen, ones).unbind()
    count = count.clamp(min=1)
    centred = chosen - total / count
    (squares,) = _sum_over(group, centred.square()).unbind()
    return centred, squares / count


def _chosen_and_ones(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The values inside the mask in float64, and as many ones."""
    check_floating("values", values)
    check_like("values", values, "values", values)
    if mask is not None:
        check_mask("mask", mask)
        check_like("mask", mask, "values", values)
        values = values[mask]
    chosen = values.detach().to(torch.float64)
    return chosen, torch.ones_like(chosen)
