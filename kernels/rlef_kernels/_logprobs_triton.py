"""What `logprobs` computes of one shard of the vocabulary, in Triton: the forward pass reads each logit once,
the backward pass reads it once and writes its gradient once.

A row belongs to one program, whose threads each keep the statistics of the words that they read, and meet
once, at the end of the row. Exponents are base 2, and the running maximum starts at a finite number, so that
no difference is inf - inf. `logprobs` holds the torch reference, the merge over shards and autograd.

A thread reads 16 bytes at a time, which it can where an address is a multiple of 16. Rows may begin
elsewhere, as those of an odd vocabulary do: then the few words before the first such address and after the
last, the *edges* of the row, are read one by one, and what lies between, its *body*, as in any other row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlef_kernels._checks import accumulation_dtype

# Of a program. One load brings each thread 16 bytes; so many of them are under way at once, and share one
# rescaling. The gradient has nothing to rescale.
THREADS = 256
LOADS_OF_STATISTICS = 4
LOADS_OF_GRADIENT = 2
WIDTH = 16  # bytes

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
LOWEST_OF_DOUBLES = tl.constexpr(torch.finfo(torch.float64).min)
VANISHED = tl.constexpr(
    -2048.0
)  # 2 to this power is 0 even in double precision, and so is its product with it


@triton.jit
def _take_tile(tile, maximum, total, weighted, bits, WANT_ENTROPY: tl.constexpr):
    """Each thread's statistics, `[THREADS]`, with its words of `tile`, `[LOADS, THREADS, WORDS]`, taken in.

    All words of a thread share one maximum. One for each of the WORDS would cost as many exponentials to
    rescale, and exponentials are what bounds this pass where memory is fast.
    """
    higher = tl.maximum(maximum, tl.max(tl.max(tile, axis=2), axis=0))
    rise = tl.maximum((maximum - higher) * bits, VANISHED)
    rescale = tl.exp2(rise)
    shifted = (tile - higher[None, :, None]) * bits
    exponentials = tl.exp2(shifted)
    if WANT_ENTROPY:
        # A logit of -inf must count 0 here, not 0 * -inf. A NaN comes through its exponential.
        terms = tl.maximum(shifted, VANISHED) * exponentials
        weighted = (weighted + rise * total) * rescale + tl.sum(tl.sum(terms, axis=2), axis=0)
    total = total * rescale + tl.sum(tl.sum(exponentials, axis=2), axis=0)
    return higher, total, weighted


@triton.jit
def _lanes(LOADS: tl.constexpr, THREADS: tl.constexpr, WORDS: tl.constexpr):
    """Where the words of a tile are, counted from its first: `[LOADS, THREADS, WORDS]`."""
    loads = tl.arange(0, LOADS)[:, None, None] * THREADS
    threads = tl.arange(0, THREADS)[None, :, None]
    return (loads + threads) * WORDS + tl.arange(0, WORDS)[None, None, :]


@triton.jit
def _body_of(row_ptr, vocab, ALIGNED: tl.constexpr, WORDS: tl.constexpr):
    """The column at which the body begins, and how many words it has."""
    head = 0
    if not ALIGNED:
        word = row_ptr.to(tl.int64) // (row_ptr.dtype.element_ty.primitive_bitwidth // 8)
        head = tl.minimum(-word & (WORDS - 1), vocab).to(tl.int32)
    return head, (vocab - head) // WORDS * WORDS


@triton.jit
def _edges(head, body, THREADS: tl.constexpr):
    """The columns outside of the body, `[1, THREADS, 1]`; threads without one get columns past the row."""
    edges = tl.arange(0, THREADS)[None, :, None]
    return tl.where(edges < head, edges, edges + body)


@triton.jit
def _statistics(
    row_ptr,  # [vocab]
    vocab,
    bits,
    WANT_ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    LOADS: tl.constexpr,
    THREADS: tl.constexpr,
    WORDS: tl.constexpr,
    EVICTION: tl.constexpr,  # of the cache, for a row that is read again
):
    """Maximum, sum 2^z and sum z 2^z of a row, with z = (logit - maximum) bits."""
    precise: tl.constexpr = bits.dtype
    lanes = _lanes(LOADS, THREADS, WORDS)
    maximum = tl.full((THREADS,), LOWEST if precise == tl.float32 else LOWEST_OF_DOUBLES, precise)
    total = tl.zeros((THREADS,), precise)
    weighted = tl.zeros((THREADS,), precise)
    head, body = _body_of(row_ptr, vocab, ALIGNED, WORDS)
    body_ptr = tl.multiple_of(row_ptr + head, 16)
    size: tl.constexpr = LOADS * THREADS * WORDS
    whole = body // size * size
    for begin in tl.range(0, whole, size):
        tile = tl.load(body_ptr + begin + lanes, eviction_policy=EVICTION).to(precise)
        maximum, total, weighted = _take_tile(tile, maximum, total, weighted, bits, WANT_ENTROPY)
    if whole < body:
        is_inside = lanes // WORDS < (body - whole) // WORDS
        tile = tl.load(
            body_ptr + whole + lanes, mask=is_inside, other=float("-inf"), eviction_policy=EVICTION
        ).to(precise)
        maximum, total, weighted = _take_tile(tile, maximum, total, weighted, bits, WANT_ENTROPY)
    if not ALIGNED:
        edges = _edges(head, body, THREADS)
        tile = tl.load(row_ptr + edges, mask=edges < vocab, other=float("-inf")).to(precise)
        maximum, total, weighted = _take_tile(tile, maximum, total, weighted, bits, WANT_ENTROPY)
    highest = tl.max(maximum, axis=0)
    rise = tl.maximum((maximum - highest) * bits, VANISHED)
    rescale = tl.exp2(rise)
    return highest, tl.sum(total * rescale, axis=0), tl.sum((weighted + rise * total) * rescale, axis=0)


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
    bits: tl.float64,
    WANT_ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    LOADS: tl.constexpr,
    THREADS: tl.constexpr,
    WORDS: tl.constexpr,
):
    precise: tl.constexpr = statistics_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    row = token
    if rows_ptr is not None:
        row = tl.load(rows_ptr + token)
    is_known = (row >= 0) & (row < num_rows)
    row = tl.where(is_known, row, 0)
    row_ptr = logits_ptr + row * stride_row

    bits = tl.full((), bits, precise)
    maximum, total, weighted = _statistics(
        row_ptr, vocab, bits, WANT_ENTROPY, ALIGNED, LOADS, THREADS, WORDS, ""
    )
    column = tl.load(columns_ptr + token)
    chosen = tl.load(row_ptr + column, mask=(column >= 0) & (column < vocab), other=0.0).to(precise)
    statistics_ptr += token
    tl.store(statistics_ptr, tl.where(is_known, maximum, float("nan")))
    statistics_ptr += num_tokens
    tl.store(statistics_ptr, total)
    statistics_ptr += num_tokens
    tl.store(statistics_ptr, chosen)
    if WANT_ENTROPY:
        statistics_ptr += num_tokens
        tl.store(statistics_ptr, weighted)


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
    column,
    maximum,
    for_every,
    for_shifted,
    for_target,
    vocab,
    bits,
    ALIGNED: tl.constexpr,
    TOGETHER: tl.constexpr,
    LOADS: tl.constexpr,
    THREADS: tl.constexpr,
    WORDS: tl.constexpr,
):
    precise: tl.constexpr = maximum.dtype
    rounded: tl.constexpr = gradient_ptr.dtype.element_ty
    lanes = _lanes(LOADS, THREADS, WORDS)
    head, body = _body_of(row_ptr, vocab, ALIGNED, WORDS)
    from_ptr, to_ptr = tl.multiple_of(row_ptr + head, 16), gradient_ptr + head
    if TOGETHER:
        to_ptr = tl.multiple_of(to_ptr, 16)
    target = column - head
    size: tl.constexpr = LOADS * THREADS * WORDS
    whole = body // size * size
    for begin in tl.range(0, whole, size):
        tile = tl.load(from_ptr + begin + lanes, eviction_policy="evict_first").to(precise)
        part = _gradient_of(tile, lanes == target - begin, maximum, for_every, for_shifted, for_target, bits)
        tl.store(to_ptr + begin + lanes, part.to(rounded))
    if whole < body:
        is_inside = lanes // WORDS < (body - whole) // WORDS
        tile = tl.load(from_ptr + whole + lanes, mask=is_inside, other=0.0).to(precise)
        part = _gradient_of(tile, lanes == target - whole, maximum, for_every, for_shifted, for_target, bits)
        tl.store(to_ptr + whole + lanes, part.to(rounded), mask=is_inside)
    if not ALIGNED:
        edges = _edges(head, body, THREADS)
        tile = tl.load(row_ptr + edges, mask=edges < vocab, other=0.0).to(precise)
        part = _gradient_of(tile, edges == column, maximum, for_every, for_shifted, for_target, bits)
        tl.store(gradient_ptr + edges, part.to(rounded), mask=edges < vocab)


@triton.jit
def _write_zeros(
    gradient_ptr,
    vocab,
    ALIGNED: tl.constexpr,
    LOADS: tl.constexpr,
    THREADS: tl.constexpr,
    WORDS: tl.constexpr,
):
    lanes = _lanes(LOADS, THREADS, WORDS)
    zeros = tl.zeros((LOADS, THREADS, WORDS), gradient_ptr.dtype.element_ty)
    head, body = _body_of(gradient_ptr, vocab, ALIGNED, WORDS)
    body_ptr = tl.multiple_of(gradient_ptr + head, 16)
    for begin in tl.range(0, body, LOADS * THREADS * WORDS):
        tl.store(body_ptr + begin + lanes, zeros, mask=lanes // WORDS < (body - begin) // WORDS)
    if not ALIGNED:
        edges = _edges(head, body, THREADS)
        tl.store(gradient_ptr + edges, tl.zeros((1, THREADS, 1), zeros.dtype), mask=edges < vocab)


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
    bits: tl.float64,
    ALIGNED: tl.constexpr,
    TOGETHER: tl.constexpr,
    LOADS: tl.constexpr,
    THREADS: tl.constexpr,
    WORDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    gradient_ptr += row * vocab
    logits_ptr += row * stride_row
    token = row
    if tokens_ptr is not None:
        token = tl.load(tokens_ptr + row)
    if tokens_ptr is None or token >= 0:
        for_shifted = None
        if for_shifted_ptr is not None:
            for_shifted = tl.load(for_shifted_ptr + token)
        _write_gradient(
            gradient_ptr,
            logits_ptr,
            tl.load(columns_ptr + token).to(tl.int32),
            tl.load(maximum_ptr + token),
            tl.load(for_every_ptr + token),
            for_shifted,
            tl.load(for_target_ptr + token),
            vocab,
            tl.full((), bits, maximum_ptr.dtype.element_ty),
            ALIGNED,
            TOGETHER,
            LOADS,
            THREADS,
            WORDS,
        )
    else:
        _write_zeros(gradient_ptr, vocab, ALIGNED, LOADS, THREADS, WORDS)


def launch_settings(itemsize: int, loads: int, threads_per_warp: int) -> dict[str, int]:
    """For logits of so many bytes each."""
    return {
        "LOADS": loads,
        "THREADS": THREADS,
        "WORDS": WIDTH // itemsize,
        "num_warps": THREADS // threads_per_warp,
    }


def settings_for(logits: Tensor, loads: int) -> dict[str, int]:
    return launch_settings(logits.element_size(), loads, 64 if torch.version.hip else 32)


def are_aligned(logits: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes and ends at one."""
    numbers = (logits.stride(0), logits.shape[1])
    return logits.data_ptr() % WIDTH == 0 and all(n * logits.element_size() % WIDTH == 0 for n in numbers)


def _lie_alike(logits: Tensor, gradient: Tensor) -> bool:
    """Whether each row of both is as far from a multiple of 16 bytes."""
    further = (logits.stride(0) - gradient.stride(0)) * logits.element_size()
    return (logits.data_ptr() - gradient.data_ptr()) % WIDTH == 0 and further % WIDTH == 0


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
    statistics = logits.new_empty((4 if want_entropy else 3, num_tokens), dtype=accumulation_dtype(logits))
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
            ALIGNED=are_aligned(logits),
            **settings_for(logits, LOADS_OF_STATISTICS),
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
            ALIGNED=are_aligned(logits),
            TOGETHER=_lie_alike(logits, gradient),
            **settings_for(logits, LOADS_OF_GRADIENT),
        )
    return gradient
