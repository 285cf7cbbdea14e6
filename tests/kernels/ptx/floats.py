"""Arithmetic of floating-point numbers, conversions, comparisons and choices."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.ptx import rounding
from tests.kernels.ptx.block import TYPES, Block
from tests.kernels.ptx.faults import Unsupported
from tests.kernels.ptx.operations import operation
from tests.kernels.ptx.program import Instruction, Pair

Array = NDArray[Any]
FLOATS = ("f32", "f64")


def _highest(a: Array, b: Array) -> Array:
    """Of two zeros, the positive one; a number rather than NaN."""
    return np.where((a == 0) & (b == 0), a + b, np.fmax(a, b))


def _lowest(a: Array, b: Array) -> Array:
    return -_highest(-a, -b)


_EXACT = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "fma": rounding.fused_multiply_add,
    "mad": rounding.fused_multiply_add,
    "min": _lowest,
    "max": _highest,
    "neg": np.negative,
    "abs": np.abs,
}


def float_arithmetic(block: Block, instruction: Instruction) -> None:
    """Rounded to nearest even, but for the functions that are approximate by name."""
    name, kind = instruction.opcode[0], instruction.kind
    instruction.only("rn", "ftz", "NaN", "approx", "full", kind)
    flush = "ftz" in instruction.opcode
    sources = [block.read(each, kind) for each in instruction.operands[1:]]
    if flush:
        sources = [rounding.flushed(each) for each in sources]
    if "approx" in instruction.opcode or "full" in instruction.opcode:
        if (name, kind) == ("rcp", "f64"):
            block.write(instruction.operands[0], rounding.gross_reciprocal(*sources))
            return
        if kind != "f32":
            raise Unsupported(f"approximate {name} of {kind}")
        function = rounding.approximate_quotient if name == "div" else rounding.approximate
        result = function(*sources) if name == "div" else function(name, *sources)
    elif name in ("div", "sqrt", "rcp") and "rn" not in instruction.opcode:
        raise Unsupported(f"{name} with no rounding")
    else:
        result = _EXACT[name](*sources)
    if "NaN" in instruction.opcode:
        result = np.where(np.isnan(sources[0]) | np.isnan(sources[1]), result.dtype.type(np.nan), result)
    block.write(instruction.operands[0], rounding.flushed(result) if flush else result)


@operation("fma", "ex2", "lg2", "rcp", "sqrt", "rsqrt")
def _function(block: Block, instruction: Instruction) -> None:
    if instruction.kind not in FLOATS:
        raise Unsupported(f"{instruction.opcode[0]} of {instruction.kind}")
    if instruction.opcode[0] in ("ex2", "lg2", "rsqrt") and "approx" not in instruction.opcode:
        raise Unsupported(f"an exact {instruction.opcode[0]}")
    float_arithmetic(block, instruction)


@operation("setp")
def _compare(block: Block, instruction: Instruction) -> None:
    kind, comparison = instruction.kind, instruction.opcode[1]
    is_float = kind in FLOATS
    instruction.only(comparison, *(("ftz",) if is_float else ()), "and", "or", kind)
    a, b = (block.read(each, kind) for each in instruction.operands[1:3])
    if "ftz" in instruction.opcode:
        a, b = rounding.flushed(a), rounding.flushed(b)
    result = compare(comparison, a, b, is_float=is_float)
    if len(instruction.operands) == 4:
        other = block.read(instruction.operands[3], "pred")
        result = result & other if "and" in instruction.opcode else result | other
    if isinstance(instruction.operands[0], Pair):
        raise Unsupported("setp with two results")
    block.write(instruction.operands[0], result)


def compare(name: str, a: Array, b: Array, *, is_float: bool) -> Array:
    """Of floats, those that end in u are true of NaN, and the others, `ne` too, are not."""
    unordered = np.isnan(a) | np.isnan(b) if is_float else np.zeros(a.shape, bool)
    if name in ("num", "nan"):
        return ~unordered if name == "num" else unordered
    base = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name[:2])
    functions = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    if base not in functions or name[2:] not in (("", "u") if is_float else ("",)):
        raise Unsupported(f"comparison {name}")
    result = functions[base](a, b)
    return result | unordered if name.endswith("u") else result & ~unordered


@operation("selp")
def _select(block: Block, instruction: Instruction) -> None:
    instruction.only(instruction.kind)
    destination, first, second, chooses = instruction.operands
    a, b = (block.read(each, instruction.kind) for each in (first, second))
    block.write(destination, np.where(block.read(chooses, "pred"), a, b))


_SHORT = {
    "bf16": rounding.bfloat16_of,
    "f16": lambda value: value.astype(np.float16).view(np.uint16),
}


@operation("cvt")
def _convert(block: Block, instruction: Instruction) -> None:
    target, source = instruction.opcode[-2:]
    instruction.only("rn", "rzi", "rni", "rmi", "rpi", "rna", "ftz", target, source)
    values = [block.read(each, source) for each in instruction.operands[1:]]
    if "ftz" in instruction.opcode:
        values = [rounding.flushed(each) if source == "f32" else each for each in values]
    if target in ("bf16x2", "f16x2"):
        high, low = (_SHORT[target[:-2]](each).astype(np.uint32) for each in values)
        block.write(instruction.operands[0], (high << np.uint32(16)) | low)
        return
    (value,) = values
    if source == "bf16":
        value, source = rounding.of_bfloat16(value), "f32"
    elif source == "f16":
        value, source = value.view(np.float16).astype(np.float32), "f32"
    if target in _SHORT:
        if source != "f32":
            raise Unsupported(f"{source} to {target}")
        result = _SHORT[target](value)
    elif target == "tf32":
        result = rounding.tf32_of(value)
    elif source in FLOATS and target not in FLOATS:
        result = _to_integer(value, target, instruction)
    else:
        result = value.astype(TYPES[target])
    block.write(instruction.operands[0], result)


def _to_integer(value: Array, target: str, instruction: Instruction) -> Array:
    """Rounded as the opcode says, then held to what the type can hold; NaN becomes 0."""
    functions = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
    (function,) = (functions[each] for each in instruction.opcode if each in functions)
    limits = np.iinfo(TYPES[target])
    whole = np.where(np.isnan(value), 0, function(value)).astype(np.longdouble)
    return np.clip(whole, limits.min, limits.max).astype(TYPES[target])
