"""What the 32 threads of a warp do together: shuffles, votes, reductions, and the tensor cores' matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx import rounding
from tests.kernels.ptx.block import Block, elements
from tests.kernels.ptx.faults import Race, Unsupported
from tests.kernels.ptx.operations import operation
from tests.kernels.ptx.program import Instruction, Operand, Pair
from tests.kernels.ptx.races import WARP

Array = NDArray[Any]
LANES = np.arange(WARP)


@operation("shfl")
def _shuffle(block: Block, instruction: Instruction) -> None:
    """A lane whose source is outside of its segment keeps its own value."""
    instruction.only("sync", "bfly", "up", "down", "idx", "b32")
    _require_all_members(block, instruction.operands[4])
    mode = instruction.opcode[2]
    value, by, limits = (block.read(each, "u32").reshape(-1, WARP) for each in instruction.operands[1:4])
    by, segment, clamp = (
        by.astype(np.int64) & 31,
        (limits >> 8).astype(np.int64) & 31,
        limits.astype(np.int64) & 31,
    )
    lowest, highest = LANES & segment, (LANES & segment) | (clamp & ~segment)
    source = {
        "bfly": LANES ^ by,
        "up": LANES - by,
        "down": LANES + by,
        "idx": lowest | (by & ~segment),
    }[mode]
    is_inside = source >= highest if mode == "up" else source <= highest
    source = np.where(is_inside, source, LANES)
    if block.mask is not None:
        of_warps = block.mask.reshape(-1, WARP)
        if (of_warps & ~np.take_along_axis(of_warps, source, 1)).any():
            raise Race("a shuffle from a lane that takes no part")
    destination = instruction.operands[0]
    if isinstance(destination, Pair):
        block.write(destination.second, is_inside.ravel())
        destination = destination.first
    block.write(destination, np.take_along_axis(value, source, 1).ravel())


def _require_all_members(block: Block, members: Operand) -> None:
    if (block.read(members, "u32") != 0xFFFFFFFF).any():
        raise Unsupported("an instruction of some lanes of a warp")


@operation("vote")
def _vote(block: Block, instruction: Instruction) -> None:
    instruction.only("sync", "any", "all", "ballot", "pred", "b32")
    block.everyone("a vote")
    _require_all_members(block, instruction.operands[2])
    votes = block.read(instruction.operands[1], "pred").reshape(-1, WARP)
    mode = instruction.opcode[2]
    if mode == "ballot":
        result: Array = (votes.astype(np.uint64) << LANES.astype(np.uint64)).sum(1).astype(np.uint32)
    else:
        result = votes.any(1) if mode == "any" else votes.all(1)
    block.write(instruction.operands[0], result.repeat(WARP))


@operation("redux")
def _reduce(block: Block, instruction: Instruction) -> None:
    functions: dict[str, Any] = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    instruction.only("sync", *functions, "s32", "u32", "b32")
    block.everyone("a reduction")
    _require_all_members(block, instruction.operands[2])
    value = block.read(instruction.operands[1], instruction.kind).reshape(-1, WARP)
    result = functions[instruction.opcode[2]].reduce(value, axis=1, dtype=value.dtype)
    block.write(instruction.operands[0], result.repeat(WARP))


@operation("ldmatrix")
def _load_matrix(block: Block, instruction: Instruction) -> None:
    """8 x 8 matrices of 16-bit words: lane i names row i of them all, and gets two words of each."""
    instruction.only("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "b16")
    block.everyone("ldmatrix")
    targets = elements(instruction.operands[0])
    named = np.flatnonzero(np.arange(block.threads) % WARP < 8 * len(targets))
    if block.mask is not None:
        named = named[block.mask[named]]
    rows = np.zeros((block.threads, 8), np.uint16)
    addresses = block.addresses(instruction.operands[1])[named]
    rows[named] = np.ascontiguousarray(block.shared.load(addresses, 16, named, by_warp=True)).view(np.uint16)
    matrices = rows.reshape(-1, 4, 8, 8)  # [warps, matrices, rows, columns]
    if "trans" in instruction.opcode:
        matrices = matrices.transpose(0, 1, 3, 2)
    words = np.ascontiguousarray(matrices).view(np.uint32)  # [warps, matrices, rows, 4]
    for place, each in enumerate(targets):
        block.write(each, words[:, place].reshape(-1))


def _halves(kind: str, words: Array) -> Array:
    """The two numbers of each word, `[..., 2]`, in float64."""
    bits = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)
    return (rounding.of_bfloat16(bits) if kind == "bf16" else bits.view(np.float16)).astype(np.float64)


def _left(registers: int, *, packed: bool) -> list[tuple[Array, Array]]:
    """Rows and columns of the numbers that each register of the left matrix holds, `[lanes, 1 or 2]`."""
    group, pair = LANES[:, None] >> 2, LANES[:, None] & 3
    each = np.arange(2)[None] if packed else np.zeros((1, 1), np.int64)
    per, half = (2, 8) if packed else (1, 4)
    return [(group + 8 * (i & 1) + 0 * each, per * pair + half * (i >> 1) + each) for i in range(registers)]


def _right(registers: int, *, packed: bool) -> list[tuple[Array, Array]]:
    group, pair = LANES[:, None] >> 2, LANES[:, None] & 3
    each = np.arange(2)[None] if packed else np.zeros((1, 1), np.int64)
    per, half = (2, 8) if packed else (1, 4)
    return [(per * pair + half * i + each, group + 0 * each) for i in range(registers)]


SHAPES = {"m16n8k16": 16, "m16n8k8": 8, "m16n8k4": 4}


@operation("mma")
def _multiply_matrices(block: Block, instruction: Instruction) -> None:
    """Products are exact, and their sums rounded towards zero, as was measured on tensor cores."""
    kind, depth = instruction.opcode[-2], SHAPES.get(instruction.opcode[3], 0)
    instruction.only("sync", "aligned", *SHAPES, "row", "col", "f32", "bf16", "f16", "tf32")
    if instruction.opcode[-4:] != ("f32", kind, kind, "f32"):
        raise Unsupported("matrices of these types")
    block.everyone("mma")
    warps, packed = block.threads // WARP, kind != "tf32"
    destination, left, right, addend = (elements(each) for each in instruction.operands)

    def gathered(registers: tuple[Operand, ...], shape: tuple[int, int], places: Any) -> Array:
        matrix = np.zeros((warps, *shape))
        for register, (row, column) in zip(registers, places, strict=True):
            words = block.read(register, "u32").reshape(warps, WARP)
            matrix[:, row, column] = _halves(kind, words) if packed else rounding.of_tf32(words)[..., None]
        return matrix

    a = gathered(left, (16, depth), _left(len(left), packed=packed))
    b = gathered(right, (depth, 8), _right(len(right), packed=packed))
    group, pair = LANES >> 2, LANES & 3
    places = [(group + 8 * (i >> 1), 2 * pair + (i & 1)) for i in range(4)]
    c = np.zeros((warps, 16, 8))
    for register, (row, column) in zip(addend, places, strict=True):
        c[:, row, column] = block.read(register, "f32").reshape(warps, WARP)
    result = rounding.towards_zero(a @ b + c)
    for register, (row, column) in zip(destination, places, strict=True):
        block.write(register, np.ascontiguousarray(result[:, row, column]).ravel())
