"""Arithmetic of whole numbers, bits and predicates."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx.block import TYPES, Block
from tests.kernels.ptx.faults import Unsupported
from tests.kernels.ptx.floats import FLOATS, float_arithmetic
from tests.kernels.ptx.operations import operation
from tests.kernels.ptx.program import Immediate, Instruction, bits_of

Array = NDArray[Any]


def _quotient(a: Array, b: Array) -> Array:
    """Rounded towards zero. A division by zero has no defined value: here it is all ones."""
    whole = np.abs(a.astype(object)) // np.where(b == 0, 1, np.abs(b.astype(object)))
    signed = np.where((a < 0) != (b < 0), -whole, whole).astype(a.dtype)
    return np.where(b == 0, ~np.zeros_like(a), signed)


_BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "div": _quotient,
    "rem": lambda a, b: a - _quotient(a, b) * b,
}
_UNARY = {"neg": np.negative, "abs": np.abs, "not": np.invert}


@operation(*_BINARY, *_UNARY)
def _arithmetic(block: Block, instruction: Instruction) -> None:
    name, kind = instruction.opcode[0], instruction.kind
    if kind in FLOATS:
        float_arithmetic(block, instruction)
        return
    instruction.only(kind)
    if kind not in TYPES or kind.endswith("x2"):
        raise Unsupported(f"{name} of {kind}")
    sources = [block.read(each, kind) for each in instruction.operands[1:]]
    block.write(instruction.operands[0], (_BINARY if len(sources) == 2 else _UNARY)[name](*sources))


@operation("mul", "mad")
def _multiply(block: Block, instruction: Instruction) -> None:
    kind = instruction.kind
    if kind in FLOATS:
        float_arithmetic(block, instruction)
        return
    instruction.only("lo", "hi", "wide", kind)
    part, bits = instruction.opcode[1], bits_of(kind)
    a, b = (block.read(each, kind) for each in instruction.operands[1:3])
    if part == "wide":
        product = a.astype(TYPES[f"{kind[0]}{2 * bits}"]) * b
        kind = f"{kind[0]}{2 * bits}"
    elif part == "hi":
        product = ((a.astype(object) * b.astype(object)) >> bits).astype(a.dtype)
    else:
        product = a * b
    if instruction.opcode[0] == "mad":
        product = product + block.read(instruction.operands[3], kind)
    block.write(instruction.operands[0], product)


@operation("shl", "shr")
def _shift(block: Block, instruction: Instruction) -> None:
    kind, bits = instruction.kind, bits_of(instruction.kind)
    instruction.only(kind)
    value = block.read(instruction.operands[1], kind)
    by = block.read(instruction.operands[2], "u32")
    clamped = np.minimum(by, bits - 1).astype(value.dtype)
    if instruction.opcode[0] == "shl":
        shifted = np.where(by < bits, value << clamped, 0)
    else:  # a signed number keeps its sign however far it goes
        shifted = np.where((by < bits) | (kind[0] == "s"), value >> clamped, 0)
    block.write(instruction.operands[0], shifted.astype(value.dtype))


@operation("shf")
def _funnel_shift(block: Block, instruction: Instruction) -> None:
    instruction.only("l", "r", "wrap", "b32")
    low, high, by = (block.read(each, "u32").astype(np.uint64) for each in instruction.operands[1:])
    both, by = low | (high << np.uint64(32)), by & np.uint64(31)
    shifted = (both << by) >> np.uint64(32) if instruction.opcode[1] == "l" else both >> by
    block.write(instruction.operands[0], shifted.astype(np.uint32))


@operation("bfe")
def _extract_bits(block: Block, instruction: Instruction) -> None:
    """Beyond the highest bit of the word, and of a signed field, its sign goes on."""
    instruction.only("u32", "s32", "u64", "s64")
    bits, is_signed = bits_of(instruction.kind), instruction.kind[0] == "s"
    value = block.read(instruction.operands[1], instruction.kind)
    position, length = (
        (block.read(each, "u32") & np.uint32(255)).astype(np.int64) for each in instruction.operands[2:]
    )
    result = np.zeros_like(value)
    sign = value >> value.dtype.type(bits - 1) if is_signed else result
    for place in range(bits):
        source = place + position
        if is_signed:
            source = np.minimum(source, np.maximum(position + length - 1, 0))
        bit = (value >> np.minimum(source, bits - 1).astype(value.dtype)) & value.dtype.type(1)
        bit = np.where(source < bits, bit, sign & value.dtype.type(1))
        is_taken = (length > 0) if is_signed else (place < length)
        result |= np.where(is_taken, bit, 0).astype(value.dtype) << value.dtype.type(place)
    block.write(instruction.operands[0], result)


@operation("prmt")
def _permute_bytes(block: Block, instruction: Instruction) -> None:
    instruction.only("b32")
    low, high, selector = (block.read(each, "u32").astype(np.uint64) for each in instruction.operands[1:])
    both, result = low | (high << np.uint64(32)), np.zeros(block.threads, np.uint64)
    for place in range(4):
        chosen = (selector >> np.uint64(4 * place)) & np.uint64(15)
        byte = (both >> ((chosen & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result |= np.where(chosen & np.uint64(8), sign, byte) << np.uint64(8 * place)
    block.write(instruction.operands[0], result.astype(np.uint32))


@operation("lop3")
def _any_logic(block: Block, instruction: Instruction) -> None:
    """The bits of the table are the results for a, b, c = 000 to 111."""
    instruction.only("b32")
    a, b, c = (block.read(each, "u32") for each in instruction.operands[1:4])
    table = instruction.operands[4]
    assert isinstance(table, Immediate)
    result = np.zeros_like(a)
    for case in (case for case in range(8) if table.bits >> case & 1):
        result |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
    block.write(instruction.operands[0], result)


@operation("popc")
def _count_bits(block: Block, instruction: Instruction) -> None:
    instruction.only("b32", "b64")
    counts = np.bitwise_count(block.read(instruction.operands[1], instruction.kind))
    block.write(instruction.operands[0], counts.astype(np.uint32))
