"""What the policy loss makes of tokens, in Triton: `policy_terms`, its reference, and `ppo_policy_loss`.

Every program leaves the sums of its tokens, and one more kernel adds them up in a fixed order: no atomics, so
that the same input gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlef_kernels._checks import accumulation_dtype
from rlef_kernels.policy_terms import PolicySettings, TokenData

BLOCK = 256  # tokens of a program
TOTAL_BLOCK = 1024  # programs whose sums are added at once

SUMS = tl.constexpr(9)  # the loss, then the fields of `PolicyMetrics`


@triton.jit
def _exponential_rest(x):
    """e^x - 1 - x, precise also where that is far smaller than 1."""
    # Both branches in the precision of x: the first term left out of the sum is below 1e-15 of it.
    series = x / 12 + 1
    series = series * x / 11 + 1
    series = series * x / 10 + 1
    series = series * x / 9 + 1
    series = series * x / 8 + 1
    series = series * x / 7 + 1
    series = series * x / 6 + 1
    series = series * x / 5 + 1
    series = series * x / 4 + 1
    series = series * x / 3 + 1
    return tl.where(tl.abs(x) < 0.25, series * x * x / 2, tl.exp(x) - 1 - x)


@triton.jit
def _load_optional(pointer, offsets, mask, default, like):
    """Of the type of `like`; `default` where there is no tensor."""
    found = tl.zeros_like(like) + default
    if pointer is not None:
        found = tl.load(pointer + offsets, mask=mask, other=0.0).to(like.dtype)
    return found


@triton.jit
def _terms(
    logprob,
    entropy,
    token,
    inside,
    old_ptr,  # [num_tokens], as all below
    behaviour_ptr,  # or None: no correction
    advantages_ptr,
    weights_ptr,  # or None
    reference_ptr,  # or None
    low,
    high,
    dual_clip,  # or None
    entropy_coef,
    kl_coef,
    KL: tl.constexpr,
):
    """`token_terms` of one token or a block of them: loss, slopes in log-probability and entropy, metrics."""
    old = tl.load(old_ptr + token, mask=inside, other=0.0).to(logprob.dtype)
    advantage = tl.load(advantages_ptr + token, mask=inside, other=0.0).to(logprob.dtype)
    weight = _load_optional(weights_ptr, token, inside, 1.0, logprob)
    log_ratio = logprob - old
    ratio = tl.exp(log_ratio)
    behaviour_weight = tl.zeros_like(ratio) + 1.0
    if behaviour_ptr is not None:
        change = logprob - tl.load(behaviour_ptr + token, mask=inside, other=0.0).to(logprob.dtype)
        behaviour_weight = tl.exp(tl.where(change > 0, 0.0, change))  # a minimum would lose a NaN
    corrected = ratio * behaviour_weight
    is_high = (corrected > 1 + high) & (advantage > 0)
    is_low = (corrected < 1 - low) & (advantage < 0)
    is_clipped = is_high | is_low
    bounded = tl.where(is_high, 1 + high, tl.where(is_low, 1 - low, corrected))
    if dual_clip is not None:
        is_dual = (corrected > dual_clip) & (advantage < 0)
        is_clipped = is_clipped | is_dual
        bounded = tl.where(is_dual, dual_clip, bounded)
    loss = -bounded * advantage
    slope = tl.where(is_clipped, 0.0, -corrected * advantage)
    reference_kl = tl.zeros_like(ratio)
    if reference_ptr is not None:
        difference = logprob - tl.load(reference_ptr + token, mask=inside, other=0.0).to(logprob.dtype)
        kl_slope = tl.zeros_like(ratio) + 1.0
        if KL == "k1":
            reference_kl = difference
        elif KL == "k2":
            reference_kl = difference * difference / 2
            kl_slope = difference
        else:
            reference_kl = _exponential_rest(-difference)
            # Not from e^-d - 1 + d, which is NaN where both e^-d and d are infinite
            kl_slope = tl.where(tl.abs(difference) < 0.25, difference - reference_kl, 1 - tl.exp(-difference))
        loss += kl_coef * reference_kl
        slope += kl_coef * kl_slope
    for_entropy = tl.zeros_like(ratio)
    if entropy is not None:
        loss -= tl.where(entropy_coef > 0, entropy_coef * entropy, 0.0)
        for_entropy = -entropy_coef * weight
    approximate_kl = _exponential_rest(log_ratio)
    return (
        loss * weight,
        slope * weight,
        for_entropy,
        is_clipped.to(logprob.dtype),
        approximate_kl,
        behaviour_weight,
        reference_kl,
        ratio,
    )


@triton.jit
def _scale(normaliser_ptr, divisor, precise: tl.constexpr):
    """1 / the number that divides the loss."""
    scale = 1 / tl.full((), divisor, precise)
    if normaliser_ptr is not None:
        scale = scale / tl.load(normaliser_ptr)
    return scale


@triton.jit
def _store_sums(
    sums_ptr,  # [SUMS, num_programs], at this program
    num_programs,
    loss,
    tokens,
    clipped,
    approximate_kl,
    behaviour_weight,
    entropy,
    reference_kl,
    largest,
    smallest,
):
    stride = num_programs.to(tl.int64)
    tl.store(sums_ptr, loss)
    tl.store(sums_ptr + stride, tokens)
    tl.store(sums_ptr + 2 * stride, clipped)
    tl.store(sums_ptr + 3 * stride, approximate_kl)
    tl.store(sums_ptr + 4 * stride, behaviour_weight)
    tl.store(sums_ptr + 5 * stride, entropy)
    tl.store(sums_ptr + 6 * stride, reference_kl)
    tl.store(sums_ptr + 7 * stride, largest)
    tl.store(sums_ptr + 8 * stride, smallest)


@triton.jit
def _sum_inside(numbers, inside):
    return tl.sum(tl.where(inside, numbers, 0.0), axis=0)


@triton.jit
def _store_sums_of_block(
    sums_ptr,  # [SUMS, num_programs], at this program
    num_programs,
    inside,
    loss,
    clipped,
    approximate_kl,
    behaviour_weight,
    entropy,
    reference_kl,
    ratio,
):
    largest = tl.max(tl.where(inside, ratio, 0.0), axis=0)
    smallest = tl.min(tl.where(inside, ratio, float("inf")), axis=0)
    nan = _sum_inside(tl.where(ratio == ratio, 0.0, ratio), inside)  # which a maximum would lose
    _store_sums(
        sums_ptr,
        num_programs,
        _sum_inside(loss, inside),
        tl.sum(inside.to(loss.dtype), axis=0),
        _sum_inside(clipped, inside),
        _sum_inside(approximate_kl, inside),
        _sum_inside(behaviour_weight, inside),
        _sum_inside(entropy, inside),
        _sum_inside(reference_kl, inside),
        largest + nan,
        smallest + nan,
    )


@triton.jit
def total_kernel(
    totals_ptr,  # [SUMS]
    sums_ptr,  # [SUMS, num_programs]
    normaliser_ptr,  # [], or None
    num_programs,
    divisor: tl.float64,
    BLOCK: tl.constexpr,
):
    """One program for each sum."""
    precise: tl.constexpr = totals_ptr.dtype.element_ty
    field = tl.program_id(0)
    sums_ptr += field.to(tl.int64) * num_programs
    total = tl.zeros((BLOCK,), precise)
    largest = tl.zeros((BLOCK,), precise)
    smallest = tl.full((BLOCK,), float("inf"), precise)
    lanes = tl.arange(0, BLOCK)
    for begin in tl.range(0, num_programs, BLOCK):
        inside = begin + lanes < num_programs
        found = tl.load(sums_ptr + begin + lanes, mask=inside, other=0.0)
        total += found
        largest = tl.maximum(largest, found)
        smallest = tl.minimum(smallest, tl.where(inside, found, float("inf")))
    answer = tl.sum(total, axis=0)
    if field >= SUMS - 2:  # of ratios, which are above 0: their sum is NaN if and only if one of them is
        extreme = tl.where(field == SUMS - 1, tl.min(smallest, axis=0), tl.max(largest, axis=0))
        answer = tl.where(answer == answer, extreme, answer)
    if field == 0:
        answer = answer * _scale(normaliser_ptr, divisor, precise)
    tl.store(totals_ptr + field, answer)


@triton.jit
def tokens_kernel(
    sums_ptr,  # [SUMS, programs]
    for_logprobs_ptr,  # [num_tokens]
    for_entropy_ptr,  # [num_tokens], or None as entropy_ptr
    logprobs_ptr,  # [num_tokens], as all below
    entropy_ptr,  # or None
    mask_ptr,
    old_ptr,
    behaviour_ptr,
    advantages_ptr,
    weights_ptr,
    reference_ptr,
    normaliser_ptr,
    num_tokens,
    divisor: tl.float64,
    low: tl.float64,
    high: tl.float64,
    dual_clip: tl.float64,
    entropy_coef: tl.float64,
    kl_coef: tl.float64,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss from log-probabilities."""
    precise: tl.constexpr = sums_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = token < num_tokens
    inside = tl.load(mask_ptr + token, mask=exists, other=0) != 0
    logprob = tl.load(logprobs_ptr + token, mask=inside, other=0.0).to(precise)
    entropy = None
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + token, mask=inside, other=0.0).to(precise)
    loss, slope, for_entropy, clipped, approximate_kl, behaviour_weight, reference_kl, ratio = _terms(
        logprob,
        entropy,
        token,
        inside,
        old_ptr,
        behaviour_ptr,
        advantages_ptr,
        weights_ptr,
        reference_ptr,
        tl.full((), low, precise),
        tl.full((), high, precise),
        None if dual_clip is None else tl.full((), dual_clip, precise),
        tl.full((), entropy_coef, precise),
        tl.full((), kl_coef, precise),
        KL,
    )
    scale = _scale(normaliser_ptr, divisor, precise)
    tl.store(for_logprobs_ptr + token, tl.where(inside, slope * scale, 0.0), mask=exists)
    if entropy_ptr is not None:
        tl.store(for_entropy_ptr + token, tl.where(inside, for_entropy * scale, 0.0), mask=exists)
    _store_sums_of_block(
        sums_ptr + tl.program_id(0),
        tl.num_programs(0),
        inside,
        loss,
        clipped,
        approximate_kl,
        behaviour_weight,
        tl.zeros_like(loss) if entropy is None else entropy,
        reference_kl,
        ratio,
    )


def loss_in_triton(
    logprobs: Tensor,  # [tokens]
    entropy: Tensor | None,  # [tokens]
    old_logprobs: Tensor,  # [tokens]
    behaviour_logprobs: Tensor,  # [tokens]
    advantages: Tensor,  # [tokens]
    mask: Tensor,  # [tokens]
    weights: Tensor | None,  # [tokens]
    reference_logprobs: Tensor | None,  # [tokens]
    normaliser: Tensor | None,  # []
    divisor: float,
    *of_operator: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics `[8]`, and d loss / d logprobs and d loss / d entropy, `[tokens]` (or none, `[0]`)."""
    settings = PolicySettings.of_operator(*of_operator)
    data = TokenData(
        old_logprobs=old_logprobs,
        behaviour_logprobs=behaviour_logprobs,
        advantages=advantages,
        weights=weights,
        reference_logprobs=reference_logprobs,
    )
    num_tokens = logprobs.shape[0]
    gradient = logprobs.new_empty(num_tokens, dtype=accumulation_dtype(logprobs))
    of_entropy = gradient.new_empty(0 if entropy is None else num_tokens)
    programs = triton.cdiv(num_tokens, BLOCK)
    sums = gradient.new_empty((int(SUMS), programs))
    with torch.cuda.device_of(logprobs):
        if num_tokens:
            tokens_kernel[(programs,)](
                sums,
                gradient,
                None if entropy is None else of_entropy,
                logprobs.contiguous(),
                None if entropy is None else entropy.contiguous(),
                *of_tokens(mask, data, settings, normaliser),
                num_tokens,
                divisor,
                *numbers(settings),
                KL=settings.kl_estimator,
                BLOCK=BLOCK,
            )
        loss, metrics = total(sums, normaliser, divisor)
    return loss, metrics, gradient, of_entropy


def of_tokens(
    mask: Tensor, data: TokenData, settings: PolicySettings, normaliser: Tensor | None
) -> list[Tensor | None]:
    """What is known of each token, in the kernels' order; None for what the settings do not ask for."""
    behaviour = data.behaviour_logprobs if settings.behaviour_correction else None
    found = [data.old_logprobs, behaviour, data.advantages, data.weights, data.reference_logprobs]
    return [
        mask.contiguous().view(torch.uint8),
        *(None if each is None else each.contiguous() for each in found),
        normaliser,
    ]


def numbers(settings: PolicySettings) -> tuple[float | None, ...]:
    return settings.low, settings.high, settings.dual_clip, settings.entropy_coef, settings.kl_coef


def total(sums: Tensor, normaliser: Tensor | None, divisor: float) -> tuple[Tensor, Tensor]:
    """Loss and metrics `[8]`, of `[9, programs]`."""
    totals = sums.new_empty(int(SUMS))
    total_kernel[(int(SUMS),)](totals, sums, normaliser, sums.shape[1], divisor, BLOCK=TOTAL_BLOCK)
    return totals[0].clone(), totals[1:]
