"""Of the kernels of the policy loss: from logits, of whole rows and of shards, and from log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.machine_code import Configuration
from rlef_kernels.policy_terms import PolicySettings, TokenData, reduced, token_terms
from tests.kernels.ptx.trial import Expected, Trial, dtype_of, generator, settings_of
from tests.kernels.ptx.trials_logprobs import LEADS, SMALL, TOLERANCE, _logits

INVERSE_TEMPERATURE, DIVISOR, NORMALISER = 0.8, 2.0, 4.0
NUMBERS = {"low": 0.25, "high": 0.5, "dual_clip": 3.0, "entropy_coef": 0.125, "kl_coef": 0.5}
SETTINGS = PolicySettings(behaviour_correction=True, kl_estimator="k3", **NUMBERS)
KINDS = 9  # of sums


def policy(configuration: Configuration) -> list[Trial]:
    makers: dict[str, Callable[[Configuration], list[Trial]]] = {
        "rows": lambda each: [_rows(each, trips) for trips in (2, 0)],
        "shard statistics": lambda each: [_statistics(each, trips) for trips in (2, 0)],
        "shard gradient": lambda each: [_gradient(each, trips) for trips in (2, 0)],
        "shard tokens": _shard_tokens,
        "tokens": _tokens,
        "total": _total,
        "scale": _scale,
    }
    what = configuration.name.removeprefix("policy ")
    (maker,) = [make for name, make in makers.items() if what.startswith(name)]
    return maker(configuration)


def _data(logprobs: Tensor, mask: Tensor, precise: torch.dtype) -> tuple[TokenData, dict[str, Tensor]]:
    """Numbers around the log-probabilities, in float64 and as the kernels get them: NaN outside the mask."""
    noise = torch.randn(5, len(mask), generator=generator(2), dtype=torch.float64)
    numbers = {
        "old_ptr": logprobs + 0.4 * noise[0],
        "behaviour_ptr": logprobs + 0.4 * noise[1],
        "advantages_ptr": noise[2],
        "weights_ptr": noise[3].abs(),
        "reference_ptr": logprobs + 0.4 * noise[4],
    }
    given = {name: torch.where(mask, each, torch.nan).to(precise) for name, each in numbers.items()}
    exact = [given[name].double() for name in numbers]
    data = TokenData(
        old_logprobs=exact[0],
        behaviour_logprobs=exact[1],
        advantages=exact[2],
        weights=exact[3],
        reference_logprobs=exact[4],
    )
    return data, {**given, "normaliser_ptr": torch.tensor(NORMALISER, dtype=precise)}


def _terms(
    logprobs: Tensor, entropy: Tensor | None, data: TokenData, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of each token, `[9, tokens]`, and the slopes, divided; of a token outside the mask, of none."""
    terms, slopes, for_entropy = token_terms(logprobs, entropy, data, SETTINGS)
    nothing = torch.zeros(KINDS, 1, dtype=torch.float64)
    nothing[8] = math.inf
    scale = 1 / DIVISOR / NORMALISER
    for_entropy = torch.zeros_like(slopes) if for_entropy is None else for_entropy
    return (
        torch.where(mask, terms, nothing),
        torch.where(mask, slopes, 0) * scale,
        torch.where(mask, for_entropy, 0) * scale,
    )


def _of_blocks(terms: Tensor, block: int) -> Tensor:
    """The sums of each program, `[9, programs]`."""
    parts = []
    for part in terms.split(block, dim=1):
        loss, metrics = reduced(part)
        parts.append(torch.cat([loss[None], metrics]))
    return torch.stack(parts, dim=1)


def _log_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all words, and the entropy."""
    every = (logits.double() * INVERSE_TEMPERATURE).log_softmax(1)
    return every, -(every.exp() * every.masked_fill(every == -math.inf, 0)).sum(1)


def _rows(configuration: Configuration, trips: int) -> Trial:
    """A row with a word that cannot come, one that nothing asked for, or whose token is masked."""
    logits = _logits(configuration, trips)[:2]
    vocab = logits.shape[1]
    precise = dtype_of(configuration.arguments["sums_ptr"])
    mask = torch.tensor([True, False])
    targets = torch.tensor([vocab - 1 - (vocab - 1) % 7, 0])
    every, entropy = _log_softmax(logits)
    logprobs = every.gather(1, targets[:, None])[:, 0]
    data, given = _data(logprobs, mask, precise)
    has_bonus = configuration.constants["HAS_BONUS"]
    sums, slopes, for_entropy = _terms(logprobs, entropy if has_bonus else None, data, mask)
    gradient = -slopes[:, None] * every.exp()
    gradient[torch.arange(2), targets] += slopes
    shifted = every.masked_fill(every == -math.inf, 0) + entropy[:, None]
    gradient -= for_entropy[:, None] * every.exp() * shifted
    gradient *= INVERSE_TEMPERATURE
    gradient[~mask] = 0
    arguments: dict[str, Any] = {
        **given,
        "gradient_ptr": torch.full(logits.shape, torch.nan, dtype=logits.dtype),
        "sums_ptr": torch.full(sums.shape, torch.nan, dtype=precise),
        "logits_ptr": logits,
        "targets_ptr": targets,
        "tokens_ptr": torch.tensor([0, -1]),
        "mask_ptr": mask.view(torch.uint8),
        "stride_gradient": vocab,
        "stride_row": logits.stride(0),
        "vocab": vocab,
        "divisor": DIVISOR,
        "inverse_temperature": INVERSE_TEMPERATURE,
        **NUMBERS,
    }
    unit = 1e-11 if precise == torch.float64 else 1e-5
    expected = {"sums_ptr": Expected(values=sums, relative=unit, absolute=unit)}
    stores = configuration.arguments["gradient_ptr"] is not None
    if stores:
        eps = max(torch.finfo(logits.dtype).eps, unit)
        expected["gradient_ptr"] = Expected(values=gradient, relative=eps, absolute=unit / 10)
    return Trial(
        grid=(2,),
        arguments=_asked_for(configuration, arguments),
        expected=expected,
        loaded=(1 + stores) * TOLERANCE * vocab * logits.element_size() + 2 * 512 * SMALL * 4,
        stored=2 * KINDS * precise.itemsize + stores * logits.numel() * logits.element_size(),
    )


def _asked_for(configuration: Configuration, arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in arguments.items() if configuration.arguments.get(name) is not None}


def _statistics(configuration: Configuration, trips: int) -> Trial:
    logits = _logits(configuration, trips)[:3]
    vocab = logits.shape[1]
    mask, tokens = torch.tensor([True, False]), torch.tensor([0, -1, 1])  # of each row
    targets = torch.tensor([2 * vocab - 1, 7])  # the second shard has the first
    scaled = logits[0].double() * INVERSE_TEMPERATURE
    y = scaled - scaled.max()
    terms = torch.where(y.isinf(), 0, y / math.log(2) * y.exp())
    own = torch.stack([logits[0].double().max(), y.exp().sum(), logits[0, -1].double(), terms.sum()])
    return Trial(
        grid=(3,),
        arguments={
            "statistics_ptr": torch.full((4, 2), torch.nan),
            "logits_ptr": logits,
            "targets_ptr": targets,
            "tokens_ptr": tokens,
            "mask_ptr": mask.view(torch.uint8),
            "stride_row": logits.stride(0),
            "num_tokens": 2,
            "vocab": vocab,
            "first_word": vocab,
            "inverse_temperature": INVERSE_TEMPERATURE,
        },
        expected={
            "statistics_ptr": Expected(
                values=torch.stack([own, torch.full((4,), torch.nan)], dim=1), relative=5e-6
            )
        },
        loaded=TOLERANCE * vocab * logits.element_size() + 3 * SMALL * LEADS,
        stored=16,
    )


def _gradient(configuration: Configuration, trips: int) -> Trial:
    logits = _logits(configuration, trips)[:3]
    vocab = logits.shape[1]
    mask, tokens = torch.tensor([True, False]), torch.tensor([0, -1, 1])
    targets = torch.tensor([vocab + 7, 7])
    maximum = logits[0].double().max()
    coefficients = torch.tensor([[float(maximum)], [0.5], [-2.0], [0.25]])
    z = (logits[0].double() - maximum) * INVERSE_TEMPERATURE / math.log(2)
    expected = torch.zeros(logits.shape, dtype=torch.float64)
    expected[0] = z.exp2() * (0.5 + 0.25 * z.clamp_min(-2048))
    expected[0, 7] += -2.0
    size = logits.element_size()
    return Trial(
        grid=(3,),
        arguments={
            "gradient_ptr": torch.full(logits.shape, torch.nan, dtype=logits.dtype),
            "logits_ptr": logits,
            "coefficients_ptr": torch.cat([coefficients, torch.full((4, 1), torch.nan)], dim=1),
            "targets_ptr": targets,
            "tokens_ptr": tokens,
            "mask_ptr": mask.view(torch.uint8),
            "stride_gradient": vocab,
            "stride_row": logits.stride(0),
            "num_tokens": 2,
            "vocab": vocab,
            "first_word": vocab,
            "inverse_temperature": INVERSE_TEMPERATURE,
        },
        expected={
            "gradient_ptr": Expected(
                values=expected, relative=max(torch.finfo(logits.dtype).eps, 1e-5), absolute=2e-6
            )
        },
        loaded=TOLERANCE * vocab * size + 3 * SMALL * LEADS,
        stored=logits.numel() * size,
    )


def _shard_tokens(configuration: Configuration) -> list[Trial]:
    """A block and a part of one, three shards of four words, one of them impossible."""
    block, ranks, vocab = settings_of(configuration)["BLOCK"], 3, 4
    count = block + 20
    logits = 3 * torch.randn(count, ranks, vocab, generator=generator(), dtype=torch.float64)
    logits[:, 1] = -torch.inf
    targets = torch.arange(count) % vocab + 2 * vocab * (torch.arange(count) % 2)
    mask = torch.rand(count, generator=generator(9)) < 0.7
    maximum = logits.amax(2).clamp_min(torch.finfo(torch.float32).min)  # [tokens, ranks]
    z = (logits - maximum[..., None]) * INVERSE_TEMPERATURE / math.log(2)
    owned = torch.where(targets[:, None] // vocab == torch.arange(ranks), 1, 0)
    chosen = logits.flatten(1).gather(1, targets[:, None]) * owned
    weighted = torch.where(z.isinf(), 0, z * z.exp2()).sum(2)
    statistics = torch.stack([maximum, z.exp2().sum(2), chosen, weighted])  # [4, tokens, ranks]
    statistics = statistics.permute(2, 0, 1).float().where(mask, torch.nan).contiguous()

    every, entropy = _log_softmax(logits.flatten(1))
    logprobs = every.gather(1, targets[:, None])[:, 0]
    data, given = _data(logprobs, mask, torch.float32)
    terms, slopes, for_entropy = _terms(logprobs, entropy, data, mask)
    highest = maximum.amax(1)
    y = (logits.flatten(1) - highest[:, None]) * INVERSE_TEMPERATURE
    total = y.exp().sum(1)
    mean = torch.where(y.isinf(), 0, y * y.exp()).sum(1) / total
    scale = INVERSE_TEMPERATURE / total
    coefficients = torch.stack(
        [
            highest,
            (for_entropy * mean - slopes) * scale,
            slopes * INVERSE_TEMPERATURE,
            -for_entropy * scale * math.log(2),
        ]
    ).where(mask, torch.nan)
    sums = _of_blocks(terms, block)
    trial = Trial(
        grid=(2,),
        arguments={
            **given,
            "sums_ptr": torch.full(sums.shape, torch.nan),
            "coefficients_ptr": torch.full((4, count), torch.nan),
            "statistics_ptr": statistics,
            "targets_ptr": targets,
            "mask_ptr": mask.view(torch.uint8),
            "num_tokens": count,
            "ranks": ranks,
            "vocab": vocab,
            "inverse_temperature": INVERSE_TEMPERATURE,
            "divisor": DIVISOR,
            **NUMBERS,
        },
        expected={
            "sums_ptr": Expected(values=sums, relative=2e-5, absolute=2e-4),
            "coefficients_ptr": Expected(values=coefficients, relative=1e-4, absolute=1e-6),
        },
    )
    return [trial]


def _tokens(configuration: Configuration) -> list[Trial]:
    """A block and a part of one."""
    block = settings_of(configuration)["BLOCK"]
    count = block + 20
    dtype = dtype_of(configuration.arguments["logprobs_ptr"])
    mask = torch.rand(count, generator=generator(9)) < 0.7
    found = -2 * torch.rand(2, count, generator=generator(), dtype=torch.float64)
    logprobs, entropy = torch.where(mask, found, torch.nan).to(dtype).unbind()
    data, given = _data(logprobs.double(), mask, torch.float32)
    terms, slopes, for_entropy = _terms(logprobs.double(), entropy.double(), data, mask)
    sums = _of_blocks(terms, block)
    trial = Trial(
        grid=(2,),
        arguments={
            **given,
            "sums_ptr": torch.full(sums.shape, torch.nan),
            "for_logprobs_ptr": torch.full((count,), torch.nan),
            "for_entropy_ptr": torch.full((count,), torch.nan),
            "logprobs_ptr": logprobs.clone(),
            "entropy_ptr": entropy.clone(),
            "mask_ptr": mask.view(torch.uint8),
            "num_tokens": count,
            "divisor": DIVISOR,
            **NUMBERS,
        },
        expected={
            "sums_ptr": Expected(values=sums, relative=2e-5, absolute=2e-4),
            "for_logprobs_ptr": Expected(values=slopes, relative=1e-4, absolute=1e-6),
            "for_entropy_ptr": Expected(values=for_entropy, relative=1e-5, absolute=1e-7),
        },
    )
    return [trial]


def _total(configuration: Configuration) -> list[Trial]:
    """Of programs for two trips and a part of one."""
    count = 2 * settings_of(configuration)["BLOCK"] + 20
    sums = torch.rand(KINDS, count, generator=generator())
    loss, metrics = reduced(sums.double())
    expected = torch.cat([loss[None] / DIVISOR / NORMALISER, metrics])
    trial = Trial(
        grid=(KINDS,),
        arguments={
            "totals_ptr": torch.full((KINDS,), torch.nan),
            "sums_ptr": sums,
            "normaliser_ptr": torch.tensor(NORMALISER),
            "num_programs": count,
            "divisor": DIVISOR,
        },
        expected={"totals_ptr": Expected(values=expected, relative=2e-6)},
        stored=4 * KINDS,
    )
    return [trial]


def _scale(configuration: Configuration) -> list[Trial]:
    """By 1, which moves nothing, and by 3."""
    dtype = dtype_of(configuration.arguments["gradient_ptr"])
    vocab = settings_of(configuration)["BLOCK"] + 160
    gradient = torch.randn(2, vocab, generator=generator()).to(dtype)
    return [
        Trial(
            grid=(2, 2),
            arguments={
                "gradient_ptr": gradient,
                "factor_ptr": torch.tensor(factor),
                "stride_row": vocab,
                "vocab": vocab,
            },
            expected={
                "gradient_ptr": Expected(values=factor * gradient.double(), relative=torch.finfo(dtype).eps)
            },
            stored=0 if factor == 1 else gradient.numel() * gradient.element_size(),
        )
        for factor in (1.0, 3.0)
    ]
