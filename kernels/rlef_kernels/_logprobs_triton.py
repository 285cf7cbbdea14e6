"""What `logprobs` computes of one shard of the vocabulary, in Triton: the forward pass reads each logit once,
the backward pass reads it once and writes its gradient once.

A row belongs to one program, whose threads each keep the statistics of their own lane (every LANES-th column)
and meet once, at the end of the row. Exponents are base 2, and the running maximum starts at a finite number,
so that no difference is inf - inf. `logprobs` holds the torch reference, the merge over shards and autograd.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of a program. One load brings each thread 16 bytes; LOADS of them are under way at once, and share one
# rescaling.
THREADS = 256
LOADS = 4

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
VANISHED = tl.constexpr(-256.0)  # 2 to this power is 0 in single precision, and so is its product with it


@triton.jit
def _take_tile(tile, maximum, total, weighted, bits, WANT_ENTROPY: tl.constexpr):
    """Each lane's statistics, `[LANES]`, after it has taken in its column of `tile`, `[LOADS, LANES]`."""
    higher = tl.maximum(maximum, tl.max(tile, axis=0))
    rise = tl.maximum((maximum - higher) * bits, VANISHED)
    rescale = tl.exp2(rise)
    shifted = (tile - higher[None, :]) * bits
    exponentials = tl.exp2(shifted)
    if WANT_ENTROPY:
        # A logit of -inf must count 0 here, not 0 * -inf. A NaN comes through its exponential.
        terms = tl.maximum(shifted, VANISHED) * exponentials
        weighted = (weighted + rise * total) * rescale + tl.sum(terms, axis=0)
    total = total * rescale + tl.sum(exponentials, axis=0)
    return higher, total, weighted


@triton.jit
def statistics_kernel(
    statistics_ptr,  # [3 or 4, num_tokens]
    logits_ptr,  # [num_rows, vocab]
    columns_ptr,  # [num_tokens]
    rows_ptr,  # [num_tokens], or None: row i for token i
    stride_row,
    num_tokens,
    num_rows,
    vocab,
    bits,
    WANT_ENTROPY: tl.constexpr,
    LOADS: tl.constexpr,
    LANES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = token
    if rows_ptr is not None:
        row = tl.load(rows_ptr + token)
    is_known = (row >= 0) & (row < num_rows)
    row = tl.where(is_known, row, 0)
    row_ptr = logits_ptr + row * stride_row

    lanes = tl.arange(0, LOADS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    maximum = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    weighted = tl.zeros((LANES,), tl.float32)
    whole = vocab // (LOADS * LANES) * (LOADS * LANES)
    for begin in tl.range(0, whole, LOADS * LANES):
        tile = tl.load(row_ptr + begin + lanes).to(tl.float32)
        maximum, total, weighted = _take_tile(tile, maximum, total, weighted, bits, WANT_ENTROPY)
    if whole < vocab:
        columns = whole + lanes
        tile = tl.load(row_ptr + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
        maximum, total, weighted = _take_tile(tile, maximum, total, weighted, bits, WANT_ENTROPY)

    highest = tl.max(maximum, axis=0)
    rise = tl.maximum((maximum - highest) * bits, VANISHED)
    rescale = tl.exp2(rise)
    column = tl.load(columns_ptr + token)
    chosen = tl.load(row_ptr + column, mask=(column >= 0) & (column < vocab), other=0.0).to(tl.float32)
    statistics_ptr += token
    tl.store(statistics_ptr, tl.where(is_known, highest, float("nan")))
    statistics_ptr += num_tokens
    tl.store(statistics_ptr, tl.sum(total * rescale, axis=0))
    statistics_ptr += num_tokens
    tl.store(statistics_ptr, chosen)
    if WANT_ENTROPY:
        statistics_ptr += num_tokens
        tl.store(statistics_ptr, tl.sum((weighted + rise * total) * rescale, axis=0))


@triton.jit
def _gradient_of(tile, is_target, maximum, for_every, for_shifted, for_target, bits):
    shifted = (tile - maximum) * bits
    factor = for_every
    if for_shifted is not None:
        factor = tl.maximum(shifted, VANISHED) * for_shifted + for_every
    return tl.exp2(shifted) * factor + tl.where(is_target, for_target, 0.0)


@triton.jit
def _write_gradient(
    gradient_ptr,  # [vocab], of this row
    row_ptr,  # [vocab] logits of this row
    token,
    columns_ptr,
    maximum_ptr,
    for_every_ptr,
    for_shifted_ptr,
    for_target_ptr,
    vocab,
    bits,
    LOADS: tl.constexpr,
    LANES: tl.constexpr,
):
    column = tl.load(columns_ptr + token).to(tl.int32)
    maximum = tl.load(maximum_ptr + token)
    for_every = tl.load(for_every_ptr + token)
    for_shifted = None
    if for_shifted_ptr is not None:
        for_shifted = tl.load(for_shifted_ptr + token)
    for_target = tl.load(for_target_ptr + token)

    lanes = tl.arange(0, LOADS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    whole = vocab // (LOADS * LANES) * (LOADS * LANES)
    for begin in tl.range(0, whole, LOADS * LANES):
        tile = tl.load(row_ptr + begin + lanes, eviction_policy="evict_first").to(tl.float32)
        part = _gradient_of(tile, lanes == column - begin, maximum, for_every, for_shifted, for_target, bits)
        tl.store(gradient_ptr + begin + lanes, part.to(gradient_ptr.dtype.element_ty))
    if whole < vocab:
        columns = whole + lanes
        tile = tl.load(row_ptr + columns, mask=columns < vocab, other=0.0).to(tl.float32)
        part = _gradient_of(tile, columns == column, maximum, for_every, for_shifted, for_target, bits)
        tl.store(gradient_ptr + columns, part.to(gradient_ptr.dtype.element_ty), mask=columns < vocab)


@triton.jit
def _write_zeros(gradient_ptr, vocab, LOADS: tl.constexpr, LANES: tl.constexpr):
    lanes = tl.arange(0, LOADS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    zeros = tl.zeros((LOADS, LANES), gradient_ptr.dtype.element_ty)
    for begin in tl.range(0, vocab, LOADS * LANES):
        tl.store(gradient_ptr + begin + lanes, zeros, mask=begin + lanes < vocab)


@triton.jit
def gradient_kernel(
    gradient_ptr,  # [num_rows, vocab]
    logits_ptr,  # [num_rows, vocab]
    columns_ptr,  # [num_tokens]
    tokens_ptr,  # [num_rows] which token a row predicts, -1 for none; or None: token i for row i
    maximum_ptr,  # [num_tokens]
    for_every_ptr,  # [num_tokens]
    for_shifted_ptr,  # [num_tokens], or None
    for_target_ptr,  # [num_tokens]
    stride_row,
    vocab,
    bits,
    LOADS: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    gradient_ptr += row * vocab
    logits_ptr += row * stride_row
    token = row
    if tokens_ptr is not None:
        token = tl.load(tokens_ptr + row)
    if tokens_ptr is None or token >= 0:
        _write_gradient(
            gradient_ptr,
            logits_ptr,
            token,
            columns_ptr,
            maximum_ptr,
            for_every_ptr,
            for_shifted_ptr,
            for_target_ptr,
            vocab,
            bits,
            LOADS,
            LANES,
        )
    else:
        _write_zeros(gradient_ptr, vocab, LOADS, LANES)


def launch_settings(itemsize: int, threads_per_warp: int) -> dict[str, int]:
    """Of both kernels, for logits of so many bytes each."""
    return {"LOADS": LOADS, "LANES": THREADS * 16 // itemsize, "num_warps": THREADS // threads_per_warp}


def _settings_for(logits: Tensor) -> dict[str, int]:
    return launch_settings(logits.element_size(), 64 if torch.version.hip else 32)


def shard_statistics(
    logits: Tensor,  # [rows, vocab / ranks], words of a row adjacent
    columns: Tensor,  # [tokens] the target's column; outside 0 to vocab / ranks, that of another shard
    rows: Tensor | None,  # [tokens]
    bits: float,
    *,
    want_entropy: bool,
) -> Tensor:
    """Maximum, sum 2^z, the target's logit and sum z 2^z, z = (logit - maximum) bits: `[3 or 4, tokens]`.

    The target's logit is 0 where another shard holds it. A row that logits do not have has the maximum NaN.
    """
    num_tokens, vocab = columns.shape[0], logits.shape[1]
    statistics = logits.new_empty((4 if want_entropy else 3, num_tokens), dtype=torch.float32)
    if num_tokens == 0:
        return statistics
    with torch.cuda.device_of(logits):
        statistics_kernel[(num_tokens,)](
            statistics,
            logits,
            columns.contiguous(),
            None if rows is None else rows.contiguous(),
            logits.stride(0),
            num_tokens,
            logits.shape[0],
            vocab,
            bits,
            WANT_ENTROPY=want_entropy,
            **_settings_for(logits),
        )
    return statistics


def shard_gradient(
    logits: Tensor,  # [rows, vocab / ranks], words of a row adjacent
    columns: Tensor,  # [tokens] as for `shard_statistics`
    rows: Tensor | None,  # [tokens]
    bits: float,
    *,
    maximum: Tensor,  # [tokens]
    for_every: Tensor,  # [tokens] coefficient of 2^z
    for_shifted: Tensor | None,  # [tokens] coefficient of z 2^z
    for_target: Tensor,  # [tokens] added at the target
) -> Tensor:
    """d loss / d logits, `[rows, vocab]` in the type of the logits: 0 in rows that nothing asked for."""
    num_rows, vocab = logits.shape
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if num_rows == 0:
        return gradient
    tokens = None
    if rows is not None:
        tokens = rows.new_full((num_rows,), -1)
        tokens.scatter_(0, rows, torch.arange(rows.shape[0], device=rows.device))
    coefficients: list[Any] = [maximum, for_every, for_shifted, for_target]
    with torch.cuda.device_of(logits):
        gradient_kernel[(num_rows,)](
            gradient,
            logits,
            columns.contiguous(),
            tokens,
            *(None if each is None else each.contiguous() for each in coefficients),
            logits.stride(0),
            vocab,
            bits,
            **_settings_for(logits),
        )
    return gradient
