"""Mean and whitening over a mask, on one process or over all the processes of a group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from rlef_kernels._checks import check_floating, check_like, check_mask, check_positive
from rlef_kernels._triton import has_triton


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
    _check(values, mask)
    mean: Tensor = torch.ops.rlef_kernels.masked_mean(values.detach(), mask, _name_of(group))
    return mean


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
    _check(values, mask)
    moments: Tensor = torch.ops.rlef_kernels.masked_moments(values.detach(), mask, _name_of(group))
    return moments[1]


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
    _check(values, mask)
    whitened: Tensor = torch.ops.rlef_kernels.masked_whiten(
        values.detach(), mask, float(eps), _name_of(group)
    )
    return whitened


def _check(values: Tensor, mask: Tensor | None) -> None:
    check_floating("values", values)
    check_like("values", values, "values", values)
    if mask is not None:
        check_mask("mask", mask)
        check_like("mask", mask, "values", values)


def _name_of(group: ProcessGroup | None) -> str:
    """An operator takes no object of ours, but the name under which torch keeps it."""
    return "" if group is None else group.group_name


def _summed_over(group_name: str, sums: Tensor) -> Tensor:
    if group_name:
        dist.all_reduce(sums, group=_resolve_process_group(group_name))  # type: ignore[arg-type]
    return sums


def merged_mean(
    counts: Tensor,  # [parts]
    totals: Tensor,  # [parts]
    group_name: str,
) -> Tensor:
    """The mean of all parts of all processes, and their count: `[2]` float64."""
    total, count = _summed_over(group_name, torch.stack([totals.sum(), counts.sum()])).unbind()
    return torch.stack([total / count.clamp(min=1), count])


def merged_moments(
    counts: Tensor,  # [parts]
    totals: Tensor,  # [parts]
    squares: Tensor,  # [parts] summed, of what lies between a value and the mean of its part
    group_name: str,
) -> Tensor:
    """Mean and variance of all parts of all processes, `[2]` float64.

    What a part's mean lacks to the common one is added to the squares for each of its values (Chan, Golub and
    LeVeque 1983), so that no part is read a second time.
    """
    mean, count = merged_mean(counts, totals, group_name).unbind()
    away = totals / counts.clamp(min=1) - mean  # [parts]
    deviation = (squares + counts * away.square()).sum()
    return torch.stack([mean, _summed_over(group_name, deviation) / count.clamp(min=1)])


def _chosen(values: Tensor, mask: Tensor | None) -> Tensor:
    return (values if mask is None else values[mask]).to(torch.float64)


def _one_part(chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Their count, total and squares, `[1]` float64 each."""
    count = torch.full((1,), chosen.shape[0], dtype=torch.float64, device=chosen.device)
    total = chosen.sum().reshape(1)
    return count, total, (chosen - total / count.clamp(min=1)).square().sum().reshape(1)


def _mean_in_torch(values: Tensor, mask: Tensor | None, group_name: str) -> Tensor:
    count, total, _ = _one_part(_chosen(values, mask))
    return merged_mean(count, total, group_name)[0].clone()


def _moments_in_torch(values: Tensor, mask: Tensor | None, group_name: str) -> Tensor:
    return merged_moments(*_one_part(_chosen(values, mask)), group_name)


def _whiten_in_torch(values: Tensor, mask: Tensor | None, eps: float, group_name: str) -> Tensor:
    chosen = _chosen(values, mask)
    mean, scale = _mean_and_scale(merged_moments(*_one_part(chosen), group_name), eps)
    whitened = ((chosen - mean) * scale).to(values.dtype)
    if mask is None:
        return whitened
    spread = torch.zeros_like(values, memory_format=torch.contiguous_format)
    spread[mask] = whitened
    return spread


def _mean_and_scale(moments: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean, variance = moments.unbind()
    return mean, (variance + eps).rsqrt()


def _mean_on_cuda(values: Tensor, mask: Tensor | None, group_name: str) -> Tensor:
    if not has_triton():
        return _mean_in_torch(values, mask, group_name)
    from rlef_kernels._whitening_triton import parts_in_triton

    counts, totals, _ = parts_in_triton(values, mask)
    return merged_mean(counts, totals, group_name)[0].clone()


def _moments_on_cuda(values: Tensor, mask: Tensor | None, group_name: str) -> Tensor:
    if not has_triton():
        return _moments_in_torch(values, mask, group_name)
    from rlef_kernels._whitening_triton import parts_in_triton

    return merged_moments(*parts_in_triton(values, mask), group_name)


def _whiten_on_cuda(values: Tensor, mask: Tensor | None, eps: float, group_name: str) -> Tensor:
    if not has_triton():
        return _whiten_in_torch(values, mask, eps, group_name)
    from rlef_kernels._whitening_triton import whitened_in_triton

    mean, scale = _mean_and_scale(_moments_on_cuda(values, mask, group_name), eps)
    return whitened_in_triton(values, mask, mean, scale)


# Operators, so that torch.compile steps over them: how many values a mask leaves only the device knows.
torch.library.define("rlef_kernels::masked_mean", "(Tensor values, Tensor? mask, str group_name) -> Tensor")
torch.library.impl("rlef_kernels::masked_mean", "default", _mean_in_torch)
torch.library.impl("rlef_kernels::masked_mean", "cuda", _mean_on_cuda)
torch.library.register_fake(
    "rlef_kernels::masked_mean", lambda values, _mask, _group_name: values.new_empty((), dtype=torch.float64)
)

torch.library.define(
    "rlef_kernels::masked_moments", "(Tensor values, Tensor? mask, str group_name) -> Tensor"
)
torch.library.impl("rlef_kernels::masked_moments", "default", _moments_in_torch)
torch.library.impl("rlef_kernels::masked_moments", "cuda", _moments_on_cuda)
torch.library.register_fake(
    "rlef_kernels::masked_moments", lambda values, _mask, _name: values.new_empty((2,), dtype=torch.float64)
)

torch.library.define(
    "rlef_kernels::masked_whiten", "(Tensor values, Tensor? mask, float eps, str group_name) -> Tensor"
)
torch.library.impl("rlef_kernels::masked_whiten", "default", _whiten_in_torch)
torch.library.impl("rlef_kernels::masked_whiten", "cuda", _whiten_on_cuda)
torch.library.register_fake(
    "rlef_kernels::masked_whiten", lambda values, _mask, _eps, _name: values.new_empty(values.shape)
)
