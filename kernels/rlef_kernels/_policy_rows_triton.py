"""The policy loss from logits, in Triton. `policy_logits` holds the torch reference.

A row belongs to one program, which reads it from DRAM for its statistics, works out what the loss makes of
them, and reads it again, from the L2 cache, to write its gradient. With the vocabulary in shards the three
steps are kernels of their own, in `_policy_shards_triton`, and what the shards know of each token is gathered
between the first two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from rlef_kernels._checks import accumulation_dtype
from rlef_kernels._logprobs_triton import (
    WIDTH,
    _lie_alike,
    _statistics,
    _write_gradient,
    _write_zeros,
    are_aligned,
)
from rlef_kernels._policy_triton import SUMS, _scale, _store_sums, _terms, numbers, of_tokens, total
from rlef_kernels.policy_terms import PolicySettings, TokenData

# Of a program that reads logits. Of a wide row few should be under way at once, or they do not stay in L2.
THREADS = 512
LOADS = 2
SCALE_BLOCK = 8192

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _coefficients(slope, for_entropy, total, mean, inverse_temperature):
    """Of 2^z, of z 2^z, and of the target, in d loss / d logits: `logits_gradient` of `logprobs`."""
    scale = inverse_temperature / total
    for_every = (for_entropy * mean * LN_2 - slope) * scale
    return for_every, -(for_entropy * scale * LN_2), slope * inverse_temperature


@triton.jit
def rows_kernel(
    gradient_ptr,  # [num_rows, vocab], which may be the logits; or None
    sums_ptr,  # [SUMS, num_rows]
    logits_ptr,  # [num_rows, vocab]
    targets_ptr,  # [num_tokens]
    tokens_ptr,  # [num_rows] which token a row predicts, -1 for none; or None: token i for row i
    mask_ptr,  # [num_tokens], as all below
    old_ptr,
    behaviour_ptr,
    advantages_ptr,
    weights_ptr,
    reference_ptr,
    normaliser_ptr,
    stride_gradient,
    stride_row,
    vocab,
    divisor: tl.float64,
    inverse_temperature: tl.float64,
    low: tl.float64,
    high: tl.float64,
    dual_clip: tl.float64,
    entropy_coef: tl.float64,
    kl_coef: tl.float64,
    KL: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    HAS_BONUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    TOGETHER: tl.constexpr,
    LOADS: tl.constexpr,
    THREADS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The loss from logits that have the whole vocabulary, and its gradient."""
    precise: tl.constexpr = sums_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    token = row
    if tokens_ptr is not None:
        token = tl.load(tokens_ptr + row)
    inside = tl.load(mask_ptr + token, mask=token >= 0, other=0) != 0
    if inside:
        row_ptr = logits_ptr + row * stride_row
        target = tl.load(targets_ptr + token)
        # Before the threads meet at the end of the row: one of them may then write its gradient here.
        is_known = (target >= 0) & (target < vocab)
        chosen = tl.load(row_ptr + target, mask=is_known, other=float("nan")).to(precise)
        inverse = tl.full((), inverse_temperature, precise)
        bits = tl.full((), inverse_temperature * LOG2_E, precise)
        maximum, total, weighted = _statistics(
            row_ptr, vocab, bits, WANT_ENTROPY, ALIGNED, LOADS, THREADS, WORDS, "evict_last"
        )
        logprob = (chosen - maximum) * inverse - tl.log(total)
        mean = weighted / total
        entropy = None
        if WANT_ENTROPY:
            entropy = tl.log(total) - mean * LN_2
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
        _store_sums(
            sums_ptr + row,
            tl.num_programs(0),
            loss,
            1.0,
            clipped,
            approximate_kl,
            behaviour_weight,
            0.0 if entropy is None else entropy,
            reference_kl,
            ratio,
            ratio,
        )
        if gradient_ptr is not None:
            scale = _scale(normaliser_ptr, divisor, precise)
            for_every, for_shifted, for_target = _coefficients(
                slope * scale, for_entropy * scale, total, mean, inverse
            )
            _write_gradient(
                gradient_ptr + row * stride_gradient,
                row_ptr,
                target.to(tl.int32),
                maximum,
                for_every,
                for_shifted if HAS_BONUS else None,
                for_target,
                vocab,
                bits,
                ALIGNED,
                TOGETHER,
                LOADS,
                THREADS,
                WORDS,
            )
    else:
        _store_sums(sums_ptr + row, tl.num_programs(0), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, float("inf"))
        if gradient_ptr is not None:
            _write_zeros(gradient_ptr + row * stride_gradient, vocab, ALIGNED and TOGETHER, 1, THREADS, WORDS)


@triton.jit
def scale_kernel(
    gradient_ptr,  # [num_rows, vocab]
    factor_ptr,  # []
    stride_row,
    vocab,
    BLOCK: tl.constexpr,
):
    """A factor of 1 costs one number read by each program."""
    factor = tl.load(factor_ptr)
    if factor != 1:
        column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        places = gradient_ptr + tl.program_id(0).to(tl.int64) * stride_row + column
        found = tl.load(places, mask=column < vocab).to(factor.dtype)
        tl.store(places, (found * factor).to(gradient_ptr.dtype.element_ty), mask=column < vocab)


def launch_settings(itemsize: int, threads_per_warp: int) -> dict[str, int]:
    """Of a kernel that reads logits of so many bytes each."""
    return {
        "LOADS": LOADS,
        "THREADS": THREADS,
        "WORDS": WIDTH // itemsize,
        "num_warps": THREADS // threads_per_warp,
    }


def settings_for(logits: Tensor) -> dict[str, int]:
    return launch_settings(logits.element_size(), 64 if torch.version.hip else 32)


def loss_of_rows(
    logits: Tensor,  # [rows, vocab], words of a row adjacent
    gradient: Tensor | None,  # [rows, vocab] to be written; it may be the logits
    targets: Tensor,  # [tokens]
    rows: Tensor | None,  # [tokens]
    mask: Tensor,  # [tokens]
    data: TokenData,
    settings: PolicySettings,
    normaliser: Tensor | None,  # []
    divisor: float,
    inverse_temperature: float,
    *,
    want_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Loss and metrics `[8]`."""
    num_rows, vocab = logits.shape
    sums = logits.new_empty((int(SUMS), num_rows), dtype=accumulation_dtype(logits))
    with torch.cuda.device_of(logits):
        if num_rows:
            rows_kernel[(num_rows,)](
                gradient,
                sums,
                logits,
                targets.contiguous(),
                tokens_of(rows, num_rows),
                *of_tokens(mask, data, settings, normaliser),
                logits.stride(0) if gradient is None else gradient.stride(0),
                logits.stride(0),
                vocab,
                divisor,
                inverse_temperature,
                *numbers(settings),
                KL=settings.kl_estimator,
                WANT_ENTROPY=want_entropy,
                HAS_BONUS=settings.entropy_coef > 0,
                ALIGNED=are_aligned(logits),
                TOGETHER=gradient is None or _lie_alike(logits, gradient),
                **settings_for(logits),
            )
        return total(sums, normaliser, divisor)


def tokens_of(rows: Tensor | None, num_rows: int) -> Tensor | None:
    """Which token each row predicts, `[rows]`, -1 for none."""
    if rows is None:
        return None
    tokens = rows.new_full((num_rows,), -1)
    return tokens.scatter_(0, rows, torch.arange(rows.shape[0], device=rows.device))


def scale_in_triton(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply `[rows, vocab]` in place by a number that is on the device, and need not come from it."""
    num_rows, vocab = gradient.shape
    if num_rows:
        with torch.cuda.device_of(gradient):
            grid = (num_rows, triton.cdiv(vocab, SCALE_BLOCK))
            scale_kernel[grid](gradient, factor, gradient.stride(0), vocab, BLOCK=SCALE_BLOCK, num_warps=8)
    increment_version(gradient)
    return gradient
