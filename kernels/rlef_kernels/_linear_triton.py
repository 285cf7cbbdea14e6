"""What `linear` computes of one chunk of tokens, in Triton: a matrix product that leaves exponentials behind.

`tile_kernel` makes a tile of logits, hidden @ weight.T, in float32 accumulators. Before the tile is given up,
each segment of a row (SEGMENT columns) is reduced to its statistics, and 2^z of every logit is written in the
type of the inputs: z = logit bits - reference, where the reference is the segment's largest logit bits. That
costs no more than writing the logits, since the sum needs 2^z anyway, and it is worth more: rounding leaves a
probability right to half a unit in its last place, where a rounded logit of 20 would put it off by 4 % in
bfloat16. `gradient_kernel` then turns the exponentials into the gradient in the logits, in their own memory,
with one multiplication each.

`linear` holds the torch reference and what comes between the two kernels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rlef_kernels._checks import accumulation_dtype

SEGMENT = 128  # columns that share a reference
GROUP = 8  # row tiles that pass over the weight together, so that all but one read it from L2
HEADROOM = {torch.float16: 15.0}  # of exponents: the powers of half precision begin at 2^15, else at 1
# Of the gradient.
THREADS = 256
SEGMENTS = 64  # of one trip: 32 powers for each thread

LOWEST = tl.constexpr(-1e38)  # a reference where every logit is -inf; two of them may be subtracted
VANISHED = tl.constexpr(-256.0)  # 2 to this power is 0 in single precision
LEAST = tl.constexpr(torch.finfo(torch.float32).tiny)  # above 0, so that its logarithm is finite


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How `tile_kernel` is launched on a kind of device."""

    DESCRIPTORS: bool  # operands come and exponentials go by the tensor memory accelerator
    COLUMNS: int
    DEPTH: int
    HALVINGS: int  # how often a row of a segment is halved to find the target in it
    FROM_TOP: bool  # halves are left and right, not even and odd columns
    POLYNOMIAL: int  # so many columns of a segment are raised by multiplications
    ROWS: int = 128
    num_warps: int = 8
    num_stages: int = 3


# A thread of sm_90 holds every eighth pair of columns of two rows, one of sm_100 a row of a segment: their
# registers are halved without an exchange. The special function units of sm_100 alone would take 6.3 % of the
# time of a product 4096 deep.
HOPPER = Tiles(DESCRIPTORS=True, COLUMNS=256, DEPTH=64, HALVINGS=4, FROM_TOP=True, POLYNOMIAL=0)
BLACKWELL = Tiles(DESCRIPTORS=True, COLUMNS=256, DEPTH=64, HALVINGS=7, FROM_TOP=False, POLYNOMIAL=6)
OTHERS = Tiles(DESCRIPTORS=False, COLUMNS=128, DEPTH=32, HALVINGS=0, FROM_TOP=True, POLYNOMIAL=0)


@triton.jit
def _power_of_two(z):
    """2^z by multiplications, within 2e-7: 2^n by its bits, n whole, times a polynomial in z - n."""
    z = tl.maximum(z, -127.0, propagate_nan=tl.PropagateNan.ALL)  # at which the bits below are those of 0
    shifted = z + 12582912.0  # 1.5 2^23: the sum's last bits are n
    part = z - (shifted - 12582912.0)
    power = part * 0.001326472731307149 + 0.009671512991189957
    power = power * part + 0.05550733581185341
    power = power * part + 0.24022242426872253
    power = power * part + 0.6931470036506653
    power = power * part + 1.0
    exponent = shifted.to(tl.int32, bitcast=True) << 23
    return (power.to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True)


@triton.jit
def _half(tile, column, FROM_TOP: tl.constexpr):
    """Of `[rows, segments, n]` those n / 2 among which the column is, and where it is in them."""
    HALF: tl.constexpr = tile.shape[2] // 2
    if FROM_TOP:
        left, right = tile.reshape(tile.shape[0], tile.shape[1], 2, HALF).permute(0, 1, 3, 2).split()
        tile = tl.where(((column & HALF) != 0)[:, None, None], right, left)
    else:
        even, odd = tile.reshape(tile.shape[0], tile.shape[1], HALF, 2).split()
        tile = tl.where(((column & 1) != 0)[:, None, None], odd, even)
        column = column >> 1
    return tile, column


@triton.jit
def _logit_at(tile, column, HALVINGS: tl.constexpr, FROM_TOP: tl.constexpr):
    """Of each segment, the logit at `column` modulo its width, `[rows, segments]`: one selection for each
    logit of the tile, where comparing every column with the target's would take three instructions."""
    for _ in tl.static_range(HALVINGS):
        tile, column = _half(tile, column, FROM_TOP)
    LEFT: tl.constexpr = tile.shape[2]
    is_target = tl.arange(0, LEFT)[None, :] == (column & (LEFT - 1))[:, None]
    return tl.sum(tl.where(is_target[:, None, :], tile, 0.0), axis=2)


@triton.jit
def _without_padding(tile, is_word, bits):
    """Columns beyond the vocabulary get a logit so low that its power is 0, yet finite.

    A segment that is all padding becomes -inf, and nobody looks at it.
    """
    highest = tl.max(tl.where(is_word, tile, float("-inf")), axis=2)
    lowest = highest - tl.abs(highest) + VANISHED / bits
    return tl.where(is_word, tile, lowest[:, :, None])


@triton.jit
def tile_kernel(
    hidden,  # [num_tokens, hidden size], a pointer or a descriptor, as the next
    weight,  # [vocab, hidden size]
    exponentials,  # [num_tokens, columns of all tiles], or None
    statistics_ptr,  # [num_tokens, segments, 4]: reference, sum of 2^z, sum of z 2^z, the target's z
    columns_ptr,  # [num_tokens] int32
    stride_hidden,
    stride_weight,
    num_tokens,
    vocab,
    hidden_size,
    bits,
    WANT_ENTROPY: tl.constexpr,
    HEADROOM: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SEGMENT: tl.constexpr,
    GROUP: tl.constexpr,
    HALVINGS: tl.constexpr,
    FROM_TOP: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
):
    row_tiles = tl.cdiv(num_tokens, ROWS)
    column_tiles = tl.cdiv(vocab, COLUMNS)
    program = tl.program_id(0)
    group = program // (GROUP * column_tiles)
    place = program % (GROUP * column_tiles)
    of_group = tl.minimum(row_tiles - group * GROUP, GROUP)
    first_row = (group * GROUP + place % of_group) * ROWS
    first_column = place // of_group * COLUMNS
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)

    sum_type: tl.constexpr = statistics_ptr.dtype.element_ty
    logits = tl.zeros((ROWS, COLUMNS), sum_type)
    if DESCRIPTORS:
        for depth in tl.range(0, hidden_size, DEPTH):
            states = hidden.load([first_row, depth])
            words = weight.load([first_column, depth])
            logits = tl.dot(states, words.T, logits, input_precision="ieee", out_dtype=sum_type)
    else:
        depths = tl.arange(0, DEPTH)
        # Rows beyond the last are the last: what is made of them is never stored.
        row_offsets = tl.minimum(rows, num_tokens - 1).to(tl.int64) * stride_hidden
        column_offsets = tl.minimum(columns, vocab - 1).to(tl.int64) * stride_weight
        hidden += row_offsets[:, None] + depths[None, :]
        weight += column_offsets[:, None] + depths[None, :]
        for depth in tl.range(0, hidden_size, DEPTH):
            is_inside = depths[None, :] < hidden_size - depth
            states = tl.load(hidden + depth, mask=is_inside, other=0.0)
            words = tl.load(weight + depth, mask=is_inside, other=0.0)
            logits = tl.dot(states, words.T, logits, input_precision="ieee", out_dtype=sum_type)

    SEGMENTS: tl.constexpr = COLUMNS // SEGMENT
    tile = logits.reshape(ROWS, SEGMENTS, SEGMENT)
    if first_column + COLUMNS > vocab:  # a branch, so that only the last tile of a row pays for it
        tile = _without_padding(tile, (columns < vocab).reshape(1, SEGMENTS, SEGMENT), bits)
    is_token = rows < num_tokens
    # Before the powers: with it the logits are needed no longer than their powers take.
    column = tl.load(columns_ptr + rows, mask=is_token, other=0)
    chosen = _logit_at(tile, column, HALVINGS, FROM_TOP)
    reference = tl.maximum(tl.max(tile, axis=2) * bits - HEADROOM, LOWEST)  # [ROWS, SEGMENTS]
    shifted = tl.fma(tile, tl.full(tile.shape, bits, tile.dtype), -reference[:, :, None])
    power = tl.exp2(shifted)
    if POLYNOMIAL > 0:
        within = tl.arange(0, SEGMENT)[None, None, :]
        power = tl.where(within < POLYNOMIAL, _power_of_two(shifted), power)

    total = tl.sum(power, axis=2)
    weighted = tl.zeros((ROWS, SEGMENTS), tile.dtype)
    if WANT_ENTROPY:
        weighted = tl.sum(shifted * power, axis=2)

    if exponentials is not None:
        power = power.reshape(ROWS, COLUMNS)
        if DESCRIPTORS:
            exponentials.store([first_row, first_column], power.to(exponentials.dtype))
        else:
            pointers = exponentials + rows.to(tl.int64)[:, None] * (column_tiles * COLUMNS) + columns[None, :]
            tl.store(pointers, power.to(exponentials.dtype.element_ty), mask=is_token[:, None])

    chosen = tl.fma(chosen, tl.full(chosen.shape, bits, chosen.dtype), -reference)
    # The outer join counts fastest.
    record = tl.join(tl.join(reference, weighted), tl.join(total, chosen)).reshape(ROWS, SEGMENTS, 4)
    segments = first_column // SEGMENT + tl.arange(0, SEGMENTS)
    num_segments = tl.cdiv(vocab, SEGMENT)
    offsets = rows.to(tl.int64)[:, None] * num_segments + segments[None, :]
    is_known = is_token[:, None] & (segments < num_segments)[None, :]
    offsets = offsets[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    tl.store(statistics_ptr + offsets, record, mask=is_known[:, :, None])


@triton.jit
def _logarithm(power, EXACT: tl.constexpr):
    """log2 of at least the least normal number; within 1e-4, which is less than rounding a power to half
    precision has done to it, unless it is to be exact."""
    power = tl.maximum(power, LEAST, propagate_nan=tl.PropagateNan.ALL)
    if EXACT:
        return tl.log2(power)
    bits = power.to(tl.int32, bitcast=True)
    # Into the last bits of 2^23: the exponent as a number, 127 too large.
    exponent = ((bits >> 23) + 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + 127.0)
    part = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5
    logarithm = part * -0.08161581307649612 + 0.15544752776622772
    logarithm = logarithm * part - 0.31934791803359985
    logarithm = logarithm * part + 0.9609629511833191
    return logarithm * part + (exponent + 0.5849379897117615)


@triton.jit
def _replace(
    powers_ptr,  # [num_segments, SEGMENT] of this row, as the next two
    factors_ptr,  # [num_segments]
    slopes_ptr,
    begin,
    num_segments,
    column,
    for_target,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    segments = begin + tl.arange(0, SEGMENTS)
    is_known = segments < num_segments
    if IS_WHOLE:
        is_known = None
    is_inside = None if is_known is None else is_known[:, None]
    columns = segments[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    power = tl.load(powers_ptr + columns, mask=is_inside)
    factors = tl.load(factors_ptr + segments, mask=is_known)[:, None]
    is_half: tl.constexpr = power.dtype.primitive_bitwidth == 16
    power = power.to(factors.dtype)
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + segments, mask=is_known)[:, None]
        factors += slopes * _logarithm(power, not is_half)
    gradient = power * factors + tl.where(columns == column, for_target, 0.0)
    tl.store(powers_ptr + columns, gradient.to(powers_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def gradient_kernel(
    exponentials_ptr,  # [num_tokens, num_segments SEGMENT or more], replaced by the gradient
    factors_ptr,  # [num_tokens, num_segments] coefficient of 2^z
    slopes_ptr,  # [num_tokens, num_segments] coefficient of z 2^z, or None
    for_target_ptr,  # [num_tokens] added at the target
    columns_ptr,  # [num_tokens] int32
    stride_row,
    num_segments,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    powers_ptr = exponentials_ptr + token * stride_row
    factors_ptr += token * num_segments
    if slopes_ptr is not None:
        slopes_ptr += token * num_segments
    column = tl.load(columns_ptr + token)
    for_target = tl.load(for_target_ptr + token)
    whole = num_segments // SEGMENTS * SEGMENTS
    for begin in tl.range(0, whole, SEGMENTS):
        _replace(
            *(powers_ptr, factors_ptr, slopes_ptr, begin, num_segments, column, for_target),
            SEGMENT,
            SEGMENTS,
            True,
        )
    if whole < num_segments:
        _replace(
            *(powers_ptr, factors_ptr, slopes_ptr, whole, num_segments, column, for_target),
            SEGMENT,
            SEGMENTS,
            False,
        )


def tiles_for(device: torch.device) -> Tiles:
    if torch.version.hip:
        return OTHERS
    return {9: HOPPER, 10: BLACKWELL}.get(torch.cuda.get_device_capability(device)[0], OTHERS)


def _has_descriptor(matrix: Tensor) -> bool:
    """Its rows begin where the tensor memory accelerator can."""
    size = matrix.element_size()
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * size % 16 == 0


def exponentials(
    states: Tensor,  # [tokens, hidden size], contiguous
    weight: Tensor,  # [vocab, hidden size], the numbers of a word side by side
    columns: Tensor,  # [tokens] int32: the target's, or -1 for another shard's
    bits: float,
    *,
    want_entropy: bool,
    want_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Statistics `[tokens, segments, 4]`, and 2^z `[tokens, vocab or more]` if there is to be a gradient.

    Statistics are of each segment: the reference, the sum of 2^z, the sum of z 2^z (0 unless entropy is
    wanted) and the z of the target, or if it is not here of any other logit.
    """
    num_tokens, vocab = states.shape[0], weight.shape[0]
    tiles = tiles_for(states.device)
    if tiles.DESCRIPTORS and not (_has_descriptor(states) and _has_descriptor(weight)):
        tiles = OTHERS
    column_tiles = triton.cdiv(vocab, tiles.COLUMNS)
    dtype = accumulation_dtype(states)
    statistics = states.new_empty((num_tokens, triton.cdiv(vocab, SEGMENT), 4), dtype=dtype)
    powers = states.new_empty((num_tokens, column_tiles * tiles.COLUMNS)) if want_gradient else None
    if num_tokens == 0:
        return statistics, powers
    operands: list[Any] = [states, weight, powers]
    if tiles.DESCRIPTORS:
        blocks = [tiles.ROWS, tiles.DEPTH], [tiles.COLUMNS, tiles.DEPTH], [tiles.ROWS, tiles.COLUMNS]
        operands = [
            None if operand is None else TensorDescriptor.from_tensor(operand, block)
            for operand, block in zip(operands, blocks, strict=True)
        ]
    with torch.cuda.device_of(states):
        tile_kernel[(triton.cdiv(num_tokens, tiles.ROWS) * column_tiles,)](
            *operands,
            statistics,
            columns,
            states.stride(0),
            weight.stride(0),
            num_tokens,
            vocab,
            weight.shape[1],
            bits,
            WANT_ENTROPY=want_entropy,
            HEADROOM=HEADROOM.get(states.dtype, 0.0),
            SEGMENT=SEGMENT,
            GROUP=GROUP,
            **asdict(tiles),
        )
    return statistics, powers


def replace_by_gradient(
    powers: Tensor,  # [tokens, vocab or more]
    factors: Tensor,  # [tokens, segments] coefficient of 2^z
    slopes: Tensor | None,  # [tokens, segments] coefficient of z 2^z
    for_target: Tensor,  # [tokens] added at the target
    columns: Tensor,  # [tokens] as for `exponentials`
) -> None:
    """d loss / d logits, in the memory of the exponentials."""
    if powers.shape[0] == 0:
        return
    with torch.cuda.device_of(powers):
        gradient_kernel[(powers.shape[0],)](
            powers,
            factors.contiguous(),
            None if slopes is None else slopes.contiguous(),
            for_target.contiguous(),
            columns,
            powers.stride(0),
            factors.shape[1],
            SEGMENT=SEGMENT,
            SEGMENTS=SEGMENTS,
            num_warps=THREADS // (64 if torch.version.hip else 32),
        )
