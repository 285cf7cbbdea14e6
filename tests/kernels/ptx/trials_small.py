"""Of the kernels over tokens: sums of segments, the value loss, whitening."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from bench.machine_code import Configuration
from tests.kernels.ptx.trial import Expected, Trial, dtype_of, generator, settings_of


def _masked(count: int, kind: str | None, mask: Tensor, seed: int) -> Tensor:
    """Random numbers where the mask is True, and NaN elsewhere."""
    numbers = torch.randn(count, generator=generator(seed), dtype=torch.float64)
    return torch.where(mask, numbers, torch.nan).to(dtype_of(kind))


def _mask(count: int) -> Tensor:
    return torch.rand(count, generator=generator(9)) < 0.7


def segment(configuration: Configuration) -> list[Trial]:
    """Three blocks of one segment, an empty one, a single token, a part of a block, one that is not there."""
    block = settings_of(configuration)["BLOCK"]
    borders = torch.tensor([0, 2 * block + 70, 2 * block + 70, 2 * block + 71, 2 * block + 371, 9 * block])
    tokens, segments = int(borders[-2]) + 20, len(borders) - 1
    mask = _mask(tokens)
    what = configuration.name.split()[1]
    arguments = {"cu_seqlens_ptr": borders.int(), "mask_ptr": mask.view(torch.uint8), "tokens": tokens}
    make = {"sum": _sum, "count": _count, "expand": _expand, "running": _running_sums}[what]
    more, name, expected = make(configuration, mask, borders.tolist())
    found = more[name]
    known = int(borders[-2])
    trial = Trial(
        grid=(segments,),
        arguments={
            name: each for name, each in {**arguments, **more}.items() if name in configuration.arguments
        },
        expected={name: expected},
        stored=(known if len(found) == tokens else segments) * found.element_size(),
    )
    return [trial]


Made = tuple[dict[str, Tensor], str, Expected]


def _sum(configuration: Configuration, mask: Tensor, borders: list[int]) -> Made:
    values = _masked(len(mask), configuration.arguments["values_ptr"], mask, 0)
    chosen = torch.where(mask, values.double(), 0)
    sums = [chosen[begin:end].sum() for begin, end in pairwise(borders[:-1])]
    expected = torch.tensor([*sums, torch.nan], dtype=torch.float64)
    found = torch.zeros(len(expected), dtype=dtype_of(configuration.arguments["sums_ptr"]))
    return {"values_ptr": values, "sums_ptr": found}, "sums_ptr", Expected(values=expected, absolute=2e-5)


def _count(configuration: Configuration, mask: Tensor, borders: list[int]) -> Made:
    counts = [int(mask[begin:end].sum()) for begin, end in pairwise(borders[:-1])]
    expected = torch.tensor([*counts, -1])
    found = torch.zeros(len(expected), dtype=dtype_of(configuration.arguments["sums_ptr"]))
    return {"sums_ptr": found}, "sums_ptr", Expected(values=expected)


def _expand(configuration: Configuration, mask: Tensor, borders: list[int]) -> Made:
    dtype = dtype_of(configuration.arguments["expanded_ptr"])
    numbers = torch.randn(len(borders) - 1, generator=generator()).to(dtype)
    found = torch.full((len(mask),), torch.nan, dtype=dtype)
    expected = found.double()
    for number, (begin, end) in zip(numbers.double(), pairwise(borders[:-1]), strict=False):
        expected[begin:end] = torch.where(mask[begin:end], number, 0)
    return {"numbers_ptr": numbers, "expanded_ptr": found}, "expanded_ptr", Expected(values=expected)


def _running_sums(configuration: Configuration, mask: Tensor, borders: list[int]) -> Made:
    everywhere = torch.ones_like(mask)
    values = _masked(len(mask), configuration.arguments["values_ptr"], everywhere, 0)
    found = torch.full_like(values, torch.nan)
    expected = found.double()
    for begin, end in pairwise(borders[:-1]):
        part = values[begin:end].double()
        if configuration.constants["FROM_END"]:
            expected[begin:end] = part.flip(0).cumsum(0).flip(0)
        else:
            expected[begin:end] = part.cumsum(0)
    return {"values_ptr": values, "sums_ptr": found}, "sums_ptr", Expected(values=expected, absolute=5e-5)


def value(configuration: Configuration) -> list[Trial]:
    """The loss of values: a whole block, and a part of one."""
    of, block = configuration.arguments, settings_of(configuration)["BLOCK"]
    num_values, programs = block + 300, 2
    mask = _mask(num_values)
    values = _masked(num_values, of["values_ptr"], mask, 0)
    old_values = _masked(num_values, of["old_values_ptr"], mask, 1)
    returns = _masked(num_values, of["returns_ptr"], mask, 2)
    normaliser = torch.tensor(7.0, dtype=dtype_of(of["normaliser_ptr"]))
    clip = configuration.constants["VALUE_CLIP"]

    now, old, target = (torch.where(mask, each.double(), 0) for each in (values, old_values, returns))
    error = (now - target).square()
    near_error = (torch.clamp(now, old - clip, old + clip) - target).square()
    is_clipped = near_error > error
    gradient = torch.where(is_clipped, 0, now - target) / 7
    rows = [torch.maximum(error, near_error), mask.double(), is_clipped.double(), error]
    sums = torch.stack([torch.stack([part.sum() for part in row.split(block)]) for row in rows])
    total = dtype_of(of["gradient_ptr"])
    relative = 1e-13 if total == torch.float64 else 2e-6
    trial = Trial(
        grid=(programs,),
        arguments={
            "sums_ptr": torch.full((4, programs), torch.nan, dtype=total),
            "gradient_ptr": torch.full((num_values,), torch.nan, dtype=total),
            "values_ptr": values,
            "old_values_ptr": old_values,
            "returns_ptr": returns,
            "mask_ptr": mask.view(torch.uint8),
            "normaliser_ptr": normaliser,
            "num_values": num_values,
        },
        expected={
            "sums_ptr": Expected(values=sums, relative=relative),
            "gradient_ptr": Expected(values=gradient, relative=relative, absolute=relative / 10),
        },
        stored=(num_values + 4 * programs) * torch.empty(0, dtype=total).element_size(),
    )
    return [trial]


def whitening(configuration: Configuration) -> list[Trial]:
    """Of values far from 0: a whole block, and a part of one."""
    of, block = configuration.arguments, settings_of(configuration)["BLOCK"]
    num_values, programs = block + 300, 2
    mask = _mask(num_values)
    values = (_masked(num_values, "*fp64", mask, 0) + 100).to(dtype_of(of["values_ptr"]))
    arguments = {"values_ptr": values, "mask_ptr": mask.view(torch.uint8), "num_values": num_values}
    doubles = values.double()
    if "parts_ptr" in of:
        parts = [doubles[begin:end][mask[begin:end]] for begin, end in ((0, block), (block, num_values))]
        rows = [(len(part), part.sum(), (part - part.mean()).square().sum()) for part in parts]
        expected = torch.tensor(rows, dtype=torch.float64).T.contiguous()
        found = torch.full((3, programs), torch.nan, dtype=torch.float64)
        more, name, of_values = {"parts_ptr": found}, "parts_ptr", Expected(values=expected, relative=1e-11)
    else:
        mean, scale = (torch.tensor(each, dtype=torch.float64) for each in (99.9, 1.7))
        expected = torch.where(mask, (doubles - mean) * scale, 0)
        found = torch.full_like(values, torch.nan)
        more, name = {"whitened_ptr": found, "mean_ptr": mean, "scale_ptr": scale}, "whitened_ptr"
        of_values = Expected(values=expected, relative=torch.finfo(values.dtype).eps)
    trial = Trial(
        grid=(programs,),
        arguments={**arguments, **more},
        expected={name: of_values},
        stored=found.numel() * found.element_size(),
    )
    return [trial]
