"""Of the kernels of `linear`: four tiles, of which only one is whole; and the gradient of two tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.machine_code import Configuration
from tests.kernels.ptx.trial import Expected, Trial, dtype_of, generator, settings_of

BITS = 1 / math.log(2)


def linear(configuration: Configuration) -> list[Trial]:
    return [(_gradient if configuration.name.split()[1] == "gradient" else _tiles)(configuration)]


def _matrix(rows: int, columns: int, *, gap: int, size: float, dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers; NaN between its rows."""
    held = torch.full((rows, columns + gap), torch.nan, dtype=torch.float64)
    held[:, :columns] = size * torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64)
    return held.to(dtype)[:, :columns]


def _tiles(configuration: Configuration) -> Trial:
    settings, constants = settings_of(configuration), configuration.constants
    segment, tokens, vocab = constants["SEGMENT"], settings["ROWS"] + 2, settings["COLUMNS"] + 80
    is_whole = "hidden_size" in configuration.divisible
    hidden_size = 4 * settings["DEPTH"] - (16 if is_whole else 21)
    vocab -= 0 if is_whole else 3
    dtype = dtype_of(configuration.arguments["hidden"])
    gap = 16 if is_whole else 2
    hidden = _matrix(tokens, hidden_size, gap=gap, size=3, dtype=dtype, seed=0)
    weight = _matrix(vocab, hidden_size, gap=gap, size=hidden_size**-0.5, dtype=dtype, seed=1)
    # Of every segment the kernel notes the logit at the target's place: here each segment has such a place.
    segments, column_tiles = -(-vocab // segment), -(-vocab // settings["COLUMNS"])
    columns = torch.randint(0, vocab % segment, (tokens,), generator=generator(2)).int()

    bits = torch.tensor(BITS, dtype=torch.float32).double()
    padded = torch.full((tokens, column_tiles * settings["COLUMNS"]), -torch.inf, dtype=torch.float64)
    padded[:, :vocab] = hidden.double() @ weight.double().T * bits
    of_segments = padded.view(tokens, -1, segment)
    reference = of_segments.amax(2) - constants["HEADROOM"]
    exponents = of_segments - reference[:, :, None]
    powers = exponents.exp2()
    weighted = torch.where(powers > 0, exponents * powers, 0).sum(2) * constants["WANT_ENTROPY"]
    chosen = exponents.gather(2, columns.long()[:, None, None].expand(-1, exponents.shape[1], 1))[:, :, 0]
    statistics = torch.stack([reference, powers.sum(2), weighted, chosen], dim=2)[:, :segments]

    arguments = {
        "hidden": hidden,
        "weight": weight,
        "exponentials": torch.full(padded.shape, torch.nan, dtype=dtype),
        "statistics_ptr": torch.full(statistics.shape, torch.nan),
        "columns_ptr": columns,
        "stride_hidden": hidden.stride(0),
        "stride_weight": weight.stride(0),
        "num_tokens": tokens,
        "vocab": vocab,
        "hidden_size": hidden_size,
        "bits": BITS,
    }
    return Trial(
        grid=(column_tiles * -(-tokens // settings["ROWS"]),),
        arguments=arguments,
        # Sums that tensor cores round towards zero shift an exponent by some units of 1e-6.
        expected={
            "exponentials": Expected(
                values=powers.view(padded.shape), relative=torch.finfo(dtype).eps, absolute=1e-6
            ),
            "statistics_ptr": Expected(values=statistics, relative=3e-5, absolute=3e-5),
        },
        stored=padded.numel() * dtype.itemsize + 4 * statistics.numel(),
    )


def _gradient(configuration: Configuration) -> Trial:
    segment, tokens = configuration.constants["SEGMENT"], 2
    segments = 2 * configuration.constants["SEGMENTS"] + 5
    dtype = dtype_of(configuration.arguments["exponentials_ptr"])
    exponents = -10 * torch.rand(tokens, segments * segment, generator=generator(), dtype=torch.float64)
    powers = exponents.exp2().to(dtype)
    powers[:, 3] = 0
    factors, slopes = torch.randn(2, tokens, segments, generator=generator(1))
    if configuration.arguments["slopes_ptr"] is None:
        slopes = torch.zeros_like(slopes)
    columns, for_target = torch.tensor([0, segments * segment - 1]).int(), torch.tensor([2.0, -3.0])

    known = powers.double().view(tokens, segments, segment)
    logarithms = torch.where(known > 0, known.log2(), 0)
    gradient = known * (factors[:, :, None].double() + slopes[:, :, None].double() * logarithms)
    gradient = gradient.view(powers.shape)
    gradient[torch.arange(tokens), columns.long()] += for_target.double()
    return Trial(
        grid=(tokens,),
        arguments={
            "exponentials_ptr": powers,
            "factors_ptr": factors.contiguous(),
            "slopes_ptr": slopes.contiguous(),
            "for_target_ptr": for_target,
            "columns_ptr": columns,
            "stride_row": powers.stride(0),
            "num_segments": segments,
        },
        # The kernel's logarithm is within 1e-4.
        expected={
            "exponentials_ptr": Expected(values=gradient, relative=torch.finfo(dtype).eps, absolute=3e-4)
        },
        stored=powers.numel() * dtype.itemsize,
    )
