"""Arithmetic as the hardware rounds it; where a result is approximate, wrong by as much as the manual allows.

The error of an approximate function is drawn from the bits of its operand, evenly within the bound of
NVIDIA's PTX manual, so that it is the same in every run, and a kernel that needs more accuracy than promised
is found out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
SMALLEST_NORMAL = np.finfo(np.float32).tiny
ROUNDING = 2.0**-24  # relative; part of the error that a manual's bound covers


def flushed(value: Array) -> Array:
    """Subnormal numbers as zero of their sign."""
    return np.where(np.abs(value) < SMALLEST_NORMAL, np.copysign(value.dtype.type(0), value), value)


def bfloat16_of(value: Array) -> Array:
    """Bits of float32 rounded to nearest even."""
    bits = value.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded.astype(np.uint16))


def of_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def of_tf32(bits: Array) -> Array:
    """The tensor cores ignore the low 13 bits of a word."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def tf32_of(value: Array) -> Array:
    """To nearest, ties away from zero."""
    bits = value.view(np.uint32)
    return np.where(np.isfinite(value), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """Of float32, rounded once; of float64, by way of extended precision, which may round twice."""
    if a.dtype == np.float64:
        extended = a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)
        return extended.astype(np.float64)
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)  # exact, both
    total = product + addend
    part = total - product
    lost = (product - (total - part)) + (addend - part)
    # A sum that is made odd where it is not exact lies on no border between two float32.
    is_even = (total.view(np.uint64) & np.uint64(1)) == 0
    nudge = is_even & (lost != 0) & np.isfinite(lost)
    total = np.where(nudge, np.nextafter(total, np.copysign(np.inf, lost)), total)
    return total.astype(np.float32)


def towards_zero(value: Array) -> Array:
    """To float32, as tensor cores round the sums that they accumulate."""
    rounded = value.astype(np.float32)
    is_beyond = np.isfinite(value) & (np.abs(rounded.astype(np.float64)) > np.abs(value))
    return np.where(is_beyond, np.nextafter(rounded, np.float32(0)), rounded)


def chance(bits: Array) -> Array:
    """Numbers in [-1, 1] that look drawn, and are the same for the same bits."""
    mixed = bits.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    return mixed.astype(np.float64) * 2.0**-63 - 1.0


def approximate(name: str, operand: Array) -> Array:
    """Of float32: ex2, lg2, rcp, sqrt or rsqrt, as `.approx` promises them."""
    exact, relative = {
        "ex2": (np.exp2, 2.0**-22),
        "lg2": (np.log2, 2.0**-22),
        "rcp": (np.reciprocal, 2.0**-23),
        "sqrt": (np.sqrt, 2.0**-23),
        "rsqrt": (lambda value: 1 / np.sqrt(value), 2.0**-22.9),
    }[name]
    value = exact(operand.astype(np.float64))
    size = np.abs(value)
    if name == "lg2":  # the error is absolute near 1, where the logarithm vanishes
        size = np.where((operand > 0.5) & (operand < 2), 1.0, size)
    is_special = ~np.isfinite(value) | (operand == 0)
    error = size * (relative - ROUNDING) * chance(operand.view(np.uint32))
    return np.where(is_special, value, value + error).astype(np.float32)


def approximate_quotient(a: Array, b: Array) -> Array:
    """`div.full` and `div.approx` of float32: within two units in the last place."""
    value = a.astype(np.float64) / b.astype(np.float64)
    unit = np.spacing(np.abs(value).astype(np.float32)).astype(np.float64)
    error = 1.5 * unit * chance(a.view(np.uint32) ^ (b.view(np.uint32) << np.uint32(1)))
    return np.where(np.isfinite(unit), value + error, value).astype(np.float32)


def gross_reciprocal(operand: Array) -> Array:
    """`rcp.approx.ftz.f64`: of the upper words, in the upper words; a start for Newton's method, no more."""
    upper = np.uint64(0xFFFFFFFF00000000)
    given = (operand.view(np.uint64) & upper).view(np.float64)
    given = np.where(np.abs(given) < np.finfo(np.float64).tiny, np.copysign(0.0, given), given)
    return (np.reciprocal(given).view(np.uint64) & upper).view(np.float64)
