"""Of the kernels of `logprobs`: two trips of the loop over the vocabulary and most of a third, and none."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.machine_code import TOLERANCE, Configuration
from tests.kernels.ptx.trial import Expected, Trial, dtype_of, generator, settings_of

BITS = 0.8 / math.log(2)  # a temperature, and base 2
SMALL = 64  # bytes of a token that are no logits: its column, its row, its coefficients
LEADS = 256  # threads may each read what the program needs once


def _logits(configuration: Configuration, trips: int) -> Tensor:
    """`[4, vocab]`, not contiguous; words that cannot come, and a row far from zero.

    Rows of an odd vocabulary begin at any word, each as far from a multiple of 16 bytes as its gradient.
    """
    settings = settings_of(configuration)
    is_whole = "vocab" in configuration.divisible
    load = settings["THREADS"] * settings["WORDS"]
    vocab = (trips + 1) * settings["LOADS"] * load - load // 2 - (0 if is_whole else 3)
    held = torch.full((4, vocab + 48), torch.nan, dtype=torch.float64)
    logits = held[:, :vocab]
    logits[:] = 3 * torch.randn(logits.shape, generator=generator(), dtype=torch.float64)
    logits[0, 5::7] = -torch.inf
    logits[1] -= 1e4
    dtype = dtype_of(configuration.arguments["logits_ptr"])
    return held.to(dtype)[:, :vocab]


def _shifted(row: Tensor, precise: torch.dtype) -> tuple[Tensor, Tensor]:
    """The maximum, and the exponents of base 2 below it."""
    maximum = row.double().max()
    return maximum, (row.double() - maximum) * torch.tensor(BITS, dtype=precise).double()


def _rounding(precise: torch.dtype) -> float:
    """Relative: what sums, and the exponents' own rounding, may cost."""
    return 1e-13 if precise == torch.float64 else 2e-6


def statistics(configuration: Configuration) -> list[Trial]:
    return [_statistics(configuration, trips) for trips in (2, 0)]


def gradient(configuration: Configuration) -> list[Trial]:
    return [_gradient(configuration, trips) for trips in (2, 0)]


def _statistics(configuration: Configuration, trips: int) -> Trial:
    logits = _logits(configuration, trips)
    num_rows, vocab = logits.shape
    with_rows = configuration.arguments["rows_ptr"] is not None
    rows = torch.tensor([3, num_rows, 1, -1, 0]) if with_rows else torch.arange(2)
    columns = torch.tensor([vocab - 1, 0, 7, -1, 1])[: len(rows)]
    entropy = configuration.constants["WANT_ENTROPY"]
    sums = dtype_of(configuration.arguments["statistics_ptr"])
    expected = torch.empty(3 + entropy, len(rows), dtype=torch.float64)
    for token, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        is_known = 0 <= row < num_rows
        maximum, shifted = _shifted(logits[row if is_known else 0], sums)
        terms = torch.where(shifted.isinf(), 0, shifted * shifted.exp2())
        chosen = logits[row if is_known else 0, column] if column >= 0 else 0
        found = [maximum if is_known else torch.nan, shifted.exp2().sum(), chosen, terms.sum()]
        expected[:, token] = torch.tensor(
            [float(each) for each in found[: 3 + entropy]], dtype=expected.dtype
        )
    arguments = {
        "statistics_ptr": torch.full(expected.shape, torch.nan, dtype=sums),
        "logits_ptr": logits,
        "columns_ptr": columns,
        "stride_row": logits.stride(0),
        "num_tokens": len(rows),
        "num_rows": num_rows,
        "vocab": vocab,
        "bits": BITS,
    }
    return Trial(
        grid=(len(rows),),
        arguments=arguments | ({"rows_ptr": rows} if with_rows else {}),
        expected={"statistics_ptr": Expected(values=expected, relative=_rounding(sums))},
        loaded=len(rows) * (TOLERANCE * vocab * logits.element_size() + SMALL * LEADS),
        stored=expected.numel() * sums.itemsize,
    )


def _gradient(configuration: Configuration, trips: int) -> Trial:
    logits = _logits(configuration, trips)
    num_rows, vocab = logits.shape
    columns = torch.tensor([vocab - 1, -1, 5, 0])
    with_rows = configuration.arguments["tokens_ptr"] is not None
    tokens = torch.tensor([2, -1, 0, 1]) if with_rows else torch.arange(num_rows)
    entropy = configuration.arguments["for_shifted_ptr"] is not None
    precise = dtype_of(configuration.arguments["maximum_ptr"])
    coefficients = torch.randn(3, num_rows, generator=generator(1), dtype=precise)
    if not entropy:
        coefficients[1] = 0
    maximum = torch.zeros(num_rows, dtype=precise)
    expected = torch.zeros(logits.shape, dtype=torch.float64)
    for row, token in enumerate(tokens.tolist()):
        if token >= 0:
            highest, shifted = _shifted(logits[row], precise)
            maximum[token] = float(highest)
            factor = coefficients[0, token] + coefficients[1, token] * shifted.clamp_min(-2048)
            expected[row] = shifted.exp2() * factor
            if columns[token] >= 0:
                expected[row, columns[token]] += coefficients[2, token]
    dtype = dtype_of(configuration.arguments["gradient_ptr"])
    arguments = {
        "gradient_ptr": torch.full(logits.shape, torch.nan, dtype=dtype),
        "logits_ptr": logits,
        "columns_ptr": columns,
        "maximum_ptr": maximum,
        "for_every_ptr": coefficients[0].contiguous(),
        "for_target_ptr": coefficients[2].contiguous(),
        "stride_row": logits.stride(0),
        "vocab": vocab,
        "bits": BITS,
    }
    given = {"tokens_ptr": tokens if with_rows else None}
    given["for_shifted_ptr"] = coefficients[1].contiguous() if entropy else None
    return Trial(
        grid=(num_rows,),
        arguments=arguments | {name: each for name, each in given.items() if each is not None},
        # A unit in the last place of half precision; what the exponent's rounding costs in single precision.
        expected={
            "gradient_ptr": Expected(
                values=expected,
                relative=max(torch.finfo(dtype).eps, 2 * _rounding(precise)),
                absolute=_rounding(precise) / 2,
            )
        },
        loaded=num_rows * (TOLERANCE * vocab * logits.element_size() + SMALL * LEADS),
        stored=expected.numel() * logits.element_size(),
    )
