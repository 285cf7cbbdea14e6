"""The policy loss from logits that have a shard of the vocabulary, in Triton, in three steps.

Statistics of each row; after they are gathered, what the loss makes of each token; the gradient of each row.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import ProcessGroup

from rlef_kernels._checks import accumulation_dtype
from rlef_kernels._logprobs_triton import (
    LOADS_OF_GRADIENT,
    LOADS_OF_STATISTICS,
    LOWEST,
    LOWEST_OF_DOUBLES,
    VANISHED,
    _lie_alike,
    _statistics,
    _write_gradient,
    _write_zeros,
    are_aligned,
    settings_for,
)
from rlef_kernels._policy_rows_triton import LN_2, LOG2_E, _coefficients, tokens_of
from rlef_kernels._policy_triton import (
    BLOCK,
    SUMS,
    _scale,
    _store_sums_of_block,
    _terms,
    numbers,
    of_tokens,
    total,
)
from rlef_kernels.logprobs import _all_gather
from rlef_kernels.policy_terms import PolicySettings, TokenData


@triton.jit
def shard_statistics_kernel(
    statistics_ptr,  # [3 or 4, num_tokens]
    logits_ptr,  # [num_rows, vocab]
    targets_ptr,  # [num_tokens]
    tokens_ptr,  # [num_rows] or None, as for `rows_kernel`
    mask_ptr,  # [num_tokens]
    stride_row,
    num_tokens,
    vocab,
    first_word,
    inverse_temperature: tl.float64,
    WANT_ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    LOADS: tl.constexpr,
    THREADS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """What `whole_vocabulary` gathers: maximum, sum 2^z, the target's logit and sum z 2^z."""
    precise: tl.constexpr = statistics_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    token = row
    if tokens_ptr is not None:
        token = tl.load(tokens_ptr + row)
    inside = tl.load(mask_ptr + token, mask=token >= 0, other=0) != 0
    if inside:
        row_ptr = logits_ptr + row * stride_row
        column = tl.load(targets_ptr + token) - first_word
        chosen = tl.load(row_ptr + column, mask=(column >= 0) & (column < vocab), other=0.0).to(precise)
        bits = tl.full((), inverse_temperature * LOG2_E, precise)
        maximum, total, weighted = _statistics(
            row_ptr, vocab, bits, WANT_ENTROPY, ALIGNED, LOADS, THREADS, WORDS, "evict_first"
        )
        statistics_ptr += token
        stride = num_tokens.to(tl.int64)
        tl.store(statistics_ptr, maximum)
        tl.store(statistics_ptr + stride, total)
        tl.store(statistics_ptr + 2 * stride, chosen)
        if WANT_ENTROPY:
            tl.store(statistics_ptr + 3 * stride, weighted)


@triton.jit
def shard_tokens_kernel(
    sums_ptr,  # [SUMS, programs]
    coefficients_ptr,  # [4, num_tokens] maximum, for_every, for_target, for_shifted
    statistics_ptr,  # [ranks, 3 or 4, num_tokens]
    targets_ptr,  # [num_tokens]
    mask_ptr,  # [num_tokens], as all below
    old_ptr,
    behaviour_ptr,
    advantages_ptr,
    weights_ptr,
    reference_ptr,
    normaliser_ptr,
    num_tokens,
    ranks,
    vocab,  # of each shard
    divisor: tl.float64,
    inverse_temperature: tl.float64,
    low: tl.float64,
    high: tl.float64,
    dual_clip: tl.float64,
    entropy_coef: tl.float64,
    kl_coef: tl.float64,
    KL: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From what all shards know of the tokens: `whole_vocabulary`, the loss, and what its gradient needs."""
    precise: tl.constexpr = sums_ptr.dtype.element_ty
    inverse = tl.full((), inverse_temperature, precise)
    bits = tl.full((), inverse_temperature * LOG2_E, precise)
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = token < num_tokens
    inside = tl.load(mask_ptr + token, mask=exists, other=0) != 0
    stride = num_tokens.to(tl.int64)
    stride_rank = (4 if WANT_ENTROPY else 3) * stride
    statistics_ptr += token
    maximum = tl.full((BLOCK,), LOWEST if precise == tl.float32 else LOWEST_OF_DOUBLES, precise)
    for rank in tl.range(0, ranks):
        maximum = tl.maximum(maximum, tl.load(statistics_ptr + rank * stride_rank, mask=inside, other=0.0))
    total = tl.zeros((BLOCK,), precise)
    weighted = tl.zeros((BLOCK,), precise)
    for rank in tl.range(0, ranks):
        of_rank = statistics_ptr + rank * stride_rank
        fall = (tl.load(of_rank, mask=inside, other=0.0) - maximum) * bits
        fall = tl.maximum(fall, VANISHED)
        part = tl.load(of_rank + stride, mask=inside, other=1.0)
        total += part * tl.exp2(fall)
        if WANT_ENTROPY:
            part = tl.load(of_rank + 3 * stride, mask=inside, other=0.0) + fall * part
            weighted += part * tl.exp2(fall)
    target = tl.load(targets_ptr + token, mask=inside, other=0)
    owner = target // vocab
    is_known = inside & (target >= 0) & (owner < ranks)
    chosen = tl.load(statistics_ptr + owner * stride_rank + 2 * stride, mask=is_known, other=float("nan"))
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
    scale = _scale(normaliser_ptr, divisor, precise)
    for_every, for_shifted, for_target = _coefficients(
        slope * scale, for_entropy * scale, total, mean, inverse
    )
    coefficients_ptr += token
    tl.store(coefficients_ptr, maximum, mask=inside)
    tl.store(coefficients_ptr + stride, for_every, mask=inside)
    tl.store(coefficients_ptr + 2 * stride, for_target, mask=inside)
    tl.store(coefficients_ptr + 3 * stride, for_shifted, mask=inside)


@triton.jit
def shard_gradient_kernel(
    gradient_ptr,  # [num_rows, vocab], which may be the logits
    logits_ptr,  # [num_rows, vocab]
    coefficients_ptr,  # [4, num_tokens]
    targets_ptr,  # [num_tokens]
    tokens_ptr,  # [num_rows] or None, as for `rows_kernel`
    mask_ptr,  # [num_tokens]
    stride_gradient,
    stride_row,
    num_tokens,
    vocab,
    first_word,
    inverse_temperature: tl.float64,
    HAS_BONUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    TOGETHER: tl.constexpr,
    LOADS: tl.constexpr,
    THREADS: tl.constexpr,
    WORDS: tl.constexpr,
):
    precise: tl.constexpr = coefficients_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    token = row
    if tokens_ptr is not None:
        token = tl.load(tokens_ptr + row)
    inside = tl.load(mask_ptr + token, mask=token >= 0, other=0) != 0
    gradient_ptr += row * stride_gradient
    if inside:
        coefficients_ptr += token
        stride = num_tokens.to(tl.int64)
        for_shifted = None
        if HAS_BONUS:
            for_shifted = tl.load(coefficients_ptr + 3 * stride)
        column = tl.load(targets_ptr + token) - first_word
        _write_gradient(
            gradient_ptr,
            logits_ptr + row * stride_row,
            tl.where((column >= 0) & (column < vocab), column, -1).to(tl.int32),
            tl.load(coefficients_ptr),
            tl.load(coefficients_ptr + stride),
            for_shifted,
            tl.load(coefficients_ptr + 2 * stride),
            vocab,
            tl.full((), inverse_temperature * LOG2_E, precise),
            ALIGNED,
            TOGETHER,
            LOADS,
            THREADS,
            WORDS,
        )
    else:
        _write_zeros(gradient_ptr, vocab, ALIGNED and TOGETHER, 1, THREADS, WORDS)


def loss_of_shard(
    logits: Tensor,  # [rows, vocab / ranks], words of a row adjacent
    gradient: Tensor | None,  # [rows, vocab / ranks] to be written; it may be the logits
    targets: Tensor,  # [tokens]
    rows: Tensor | None,  # [tokens]
    mask: Tensor,  # [tokens]
    data: TokenData,
    settings: PolicySettings,
    normaliser: Tensor | None,  # []
    divisor: float,
    inverse_temperature: float,
    *,
    group: ProcessGroup,
    want_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Loss and metrics `[8]`, the same on all processes."""
    vocab, rank = logits.shape[1], dist.get_rank(group)
    tokens = tokens_of(rows, logits.shape[0])
    targets, of_mask = targets.contiguous(), mask.contiguous().view(torch.uint8)
    with torch.cuda.device_of(logits):
        own = shard_statistics(
            logits, targets, tokens, of_mask, rank * vocab, inverse_temperature, want_entropy=want_entropy
        )
        sums, coefficients = shard_tokens(
            _all_gather(own, group),
            targets,
            of_tokens(mask, data, settings, normaliser),
            settings,
            divisor,
            inverse_temperature,
            vocab,
        )
        if gradient is not None:
            shard_gradient(
                logits,
                gradient,
                coefficients,
                targets,
                tokens,
                of_mask,
                rank * vocab,
                inverse_temperature,
                has_bonus=settings.entropy_coef > 0,
            )
        return total(sums, normaliser, divisor)


def shard_statistics(
    logits: Tensor,  # [rows, vocab / ranks]
    targets: Tensor,  # [tokens]
    tokens: Tensor | None,  # [rows]
    of_mask: Tensor,  # [tokens] uint8
    first_word: int,
    inverse_temperature: float,
    *,
    want_entropy: bool,
) -> Tensor:
    """Maximum, sum 2^z, the target's logit (0 where it is another shard's) and sum z 2^z, `[3 or 4, tokens]`.

    NaN for tokens outside of the mask.
    """
    num_rows, vocab = logits.shape
    num_tokens = targets.shape[0]
    statistics = logits.new_full(
        (4 if want_entropy else 3, num_tokens), torch.nan, dtype=accumulation_dtype(logits)
    )
    if num_rows:
        shard_statistics_kernel[(num_rows,)](
            statistics,
            logits,
            targets,
            tokens,
            of_mask,
            logits.stride(0),
            num_tokens,
            vocab,
            first_word,
            inverse_temperature,
            WANT_ENTROPY=want_entropy,
            ALIGNED=are_aligned(logits),
            **settings_for(logits, LOADS_OF_STATISTICS),
        )
    return statistics


def shard_tokens(
    statistics: Tensor,  # [ranks, 3 or 4, tokens]
    targets: Tensor,  # [tokens]
    data: list[Tensor | None],  # `of_tokens`
    settings: PolicySettings,
    divisor: float,
    inverse_temperature: float,
    vocab: int,
) -> tuple[Tensor, Tensor]:
    """The sums of each program, `[9, programs]`, and `[4, tokens]` for `shard_gradient`."""
    ranks, kinds, num_tokens = statistics.shape
    programs = triton.cdiv(num_tokens, BLOCK)
    sums = statistics.new_empty((int(SUMS), programs))
    coefficients = statistics.new_empty((4, num_tokens))
    if num_tokens:
        shard_tokens_kernel[(programs,)](
            sums,
            coefficients,
            statistics.contiguous(),
            targets,
            *data,
            num_tokens,
            ranks,
            vocab,
            divisor,
            inverse_temperature,
            *numbers(settings),
            KL=settings.kl_estimator,
            WANT_ENTROPY=kinds == 4,
            BLOCK=BLOCK,
        )
    return sums, coefficients


def shard_gradient(
    logits: Tensor,  # [rows, vocab / ranks]
    gradient: Tensor,  # [rows, vocab / ranks]
    coefficients: Tensor,  # [4, tokens]
    targets: Tensor,  # [tokens]
    tokens: Tensor | None,  # [rows]
    of_mask: Tensor,  # [tokens] uint8
    first_word: int,
    inverse_temperature: float,
    *,
    has_bonus: bool,
) -> None:
    """Write d loss / d logits: 0 in rows that nothing asked for."""
    num_rows, vocab = logits.shape
    if num_rows:
        shard_gradient_kernel[(num_rows,)](
            gradient,
            logits,
            coefficients,
            targets,
            tokens,
            of_mask,
            gradient.stride(0),
            logits.stride(0),
            targets.shape[0],
            vocab,
            first_word,
            inverse_temperature,
            HAS_BONUS=has_bonus,
            ALIGNED=are_aligned(logits),
            TOGETHER=_lie_alike(logits, gradient),
            **settings_for(logits, LOADS_OF_GRADIENT),
        )
