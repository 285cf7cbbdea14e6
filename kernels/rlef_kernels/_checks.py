"""What every public function asks of its arguments before it computes anything."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` is half, bfloat16, single or double precision."""
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{name} is {tensor.dtype}; convert it to a floating type")


def check_integer(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` is int64."""
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name} is {tensor.dtype}; convert it to torch.int64")


def check_mask(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` is bool."""
    if tensor.dtype != torch.bool:
        raise ValueError(f"{name} is {tensor.dtype}; convert it to torch.bool")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless `tensor` has the shape `[n]` of `other` and lies on its device."""
    if other.dim() != 1:
        raise ValueError(f"{other_name} has shape {list(other.shape)}; it must be one-dimensional")
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)} but {other_name} has {list(other.shape)}; make them equal"
        )
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} but {other_name} on {other.device}; move one of them")


def check_positive(name: str, number: float) -> None:
    """Raise ValueError unless `number` is a finite number above 0."""
    if not 0 < number < float("inf"):
        raise ValueError(f"{name} is {number}; it must be a finite number above 0")


def check_not_negative(name: str, number: float) -> None:
    """Raise ValueError unless `number` is a finite number of at least 0."""
    if not 0 <= number < float("inf"):
        raise ValueError(f"{name} is {number}; it must be a finite number of at least 0")


def check_fraction(name: str, number: float) -> None:
    """Raise ValueError unless `number` is between 0 and 1, both included."""
    if not 0 <= number <= 1:
        raise ValueError(f"{name} is {number}; it must be between 0 and 1")


def check_borders(name: str, borders: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless `borders` is `[sequences + 1]` int32 or int64 on the device of `other`."""
    if borders.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {borders.dtype}; convert it to torch.int32 or torch.int64")
    if borders.dim() != 1 or borders.shape[0] == 0:
        raise ValueError(f"{name} has shape {list(borders.shape)}; it must be [sequences + 1]")
    if borders.device != other.device:
        raise ValueError(
            f"{name} is on {borders.device} but {other_name} on {other.device}; move one of them"
        )


def check_border_order(name: str, borders: Tensor, tokens: int) -> None:
    """Raise ValueError unless the borders ascend from 0 to `tokens`; on a CPU only."""
    if borders.device.type != "cpu":
        return
    first, last = int(borders[0]), int(borders[-1])
    if first != 0:
        raise ValueError(f"{name} begins with {first}; the first sequence begins at token 0")
    if last != tokens:
        raise ValueError(f"{name} ends with {last} but there are {tokens} tokens; end with their number")
    descents = (borders.diff() < 0).nonzero()
    if descents.numel():
        before, after = borders[int(descents[0]) :][:2].tolist()
        raise ValueError(f"{name} descends from {before} to {after}; sequences cannot end before they begin")


def check_turn_sequences(name: str, numbers: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless `numbers` is int64 and like `other`."""
    check_integer(name, numbers)
    check_like(name, numbers, other_name, other)


def check_turn_order(name: str, numbers: Tensor) -> None:
    """Raise ValueError unless the numbers ascend; on a CPU only."""
    if numbers.device.type == "cpu" and bool((numbers[1:] < numbers[:-1]).any()):
        raise ValueError(f"{name} do not ascend; sort the turns by sequence")


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Double precision stays double (for gradient checks); everything else is summed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_normaliser(normaliser: float | Tensor) -> None:
    """Raise ValueError unless `normaliser` is a number, or a tensor of one number, above 0."""
    if isinstance(normaliser, Tensor):
        if normaliser.numel() != 1:
            raise ValueError(f"normaliser has shape {list(normaliser.shape)}; it must be one number")
        if normaliser.device.type != "cpu":  # reading it would wait for the device
            return
    check_positive("normaliser", float(normaliser))
