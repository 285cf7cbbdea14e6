"""The arithmetic of the simulator: whole numbers as Python has them, floats as they are rounded once."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.ptx import rounding
from tests.kernels.ptx.faults import Unsupported
from tests.kernels.ptx.floats import compare
from tests.kernels.ptx.snippets import result_of, run

PATTERNS = st.integers(0, 2**32 - 1)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def float_of(bits: int) -> np.ndarray:
    return np.array([bits], np.uint32).view(np.float32)


def singles(*values: float) -> list[np.ndarray]:
    return [np.array([value], np.float32) for value in values]


def one(body: str) -> int:
    return result_of(body)[0]


def signed(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


WORDS = st.integers(-(2**31), 2**31 - 1)


@given(WORDS, WORDS, WORDS)
def test_whole_numbers_wrap_around(a: int, b: int, c: int) -> None:
    found = torch.zeros(32, 8, dtype=torch.int32)
    run(
        f"""
        mov.b32 %r2, {a}; mov.b32 %r3, {b}; mov.b32 %r4, {c};
        mad.lo.s32 %r5, %r2, %r3, %r4;
        mul.hi.s32 %r6, %r2, %r3;
        sub.s32 %r7, %r2, %r3;
        min.s32 %r8, %r2, %r3;
        max.u32 %r9, %r2, %r3;
        mul.wide.s32 %rd5, %r2, %r3;
        mov.b64 {{%r10, %r11}}, %rd5;
        lop3.b32 %r12, %r2, %r3, %r4, 0xE8;
        mul.wide.u32 %rd4, %r0, 32;
        add.s64 %rd4, %rd4, %rd0;
        st.global.v4.b32 [%rd4], {{%r5, %r6, %r7, %r8}};
        st.global.v4.b32 [%rd4+16], {{%r9, %r10, %r11, %r12}};
        """,
        found,
    )
    largest = signed(max(a % 2**32, b % 2**32))
    majority = (a & b) | (a & c) | (b & c)
    product = a * b
    expected = [
        *(signed(product + c), product >> 32, signed(a - b), min(a, b)),
        *(largest, signed(product), product >> 32, majority),
    ]
    assert found.tolist() == [expected] * 32


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("div.s32 %r9, -7, 2;", -3),
        ("rem.s32 %r9, -7, 2;", -1),
        ("div.u32 %r9, -2, 2;", 2**31 - 1),
        ("shl.b32 %r9, 1, 31;", -(2**31)),
        ("shl.b32 %r9, 1, 32;", 0),
        ("shr.u32 %r9, -1, 32;", 0),
        ("shr.s32 %r9, -5, 40;", -1),
        ("shr.s32 %r9, -5, 1;", -3),
        ("shf.l.wrap.b32 %r9, 0x80000000, 1, 1;", 3),
        ("shf.r.wrap.b32 %r9, 2, 1, 1;", signed(0x80000001)),
        ("bfe.u32 %r9, 0xABCD, 4, 8;", 0xBC),
        ("bfe.u32 %r9, 0xABCD, 40, 8;", 0),
        ("bfe.u32 %r9, 0xABCD, 0, 255;", 0xABCD),
        ("bfe.s32 %r9, 0xABCD, 2, 1;", -1),
        ("bfe.s32 %r9, 0xABCD, 4, 4;", -4),
        ("bfe.s32 %r9, 0xABCD, 0, 2;", 1),
        ("bfe.s32 %r9, 0x80000000, 30, 9;", -2),
        ("bfe.s32 %r9, 0xABCD, 3, 0;", 0),
        ("prmt.b32 %r9, 0x44332211, 0x88776655, 0x7210;", signed(0x88332211)),
        ("prmt.b32 %r9, 0x80, 0, 0x8888;", -1),
        ("popc.b32 %r9, 0xF0F0;", 8),
        ("not.b32 %r9, 5;", -6),
        ("neg.s32 %r9, 5;", -5),
        ("abs.s32 %r9, -5;", 5),
        ("mov.u16 %rs1, 0xFFFF; cvt.s32.s16 %r9, %rs1;", -1),
        ("mov.u16 %rs1, 0xFFFF; cvt.u32.u16 %r9, %rs1;", 0xFFFF),
        ("cvt.s8.s32 %rs1, 0x1FE; cvt.s32.s16 %r9, %rs1;", -2),
        ("mov.b16 %rs1, 1; mov.b16 %rs2, 2; mov.b32 %r9, {%rs1, %rs2};", 0x20001),
        ("redux.sync.add.s32 %r9, %r0, -1;", 31 * 16),
        ("setp.lt.u32 %p1, %r0, 3; vote.sync.ballot.b32 %r9, %p1, -1;", 7),
        ("mov.b32 %r2, 0f3FC00000; cvt.rzi.s32.f32 %r9, %r2;", 1),
        ("mov.b32 %r2, 0fC0200000; cvt.rni.s32.f32 %r9, %r2;", -2),
        ("mov.b32 %r2, 0f7FC00000; cvt.rzi.s32.f32 %r9, %r2;", 0),
        ("mov.b32 %r2, 0f7F800000; cvt.rzi.s32.f32 %r9, %r2;", 2**31 - 1),
        ("mov.b32 %r2, 0f00000001; add.ftz.f32 %r9, %r2, %r2;", 0),
        ("mov.b32 %r2, 0f00000001; add.f32 %r9, %r2, %r2;", 2),
        ("mov.b32 %r2, 0f7FC00000; max.f32 %r9, %r2, 0f00000000;", 0),
        ("mov.b32 %r2, 0f7FC00000; max.NaN.f32 %r9, %r2, 0f00000000;", 0x7FC00000),
        ("mov.b32 %r2, 0f80000000; max.f32 %r9, %r2, 0f00000000;", 0),
        ("mov.b32 %r2, 0f80000000; min.f32 %r9, %r2, 0f00000000;", -(2**31)),
    ],
)
def test_one_instruction(body: str, expected: int) -> None:
    assert one(body) == expected


@given(FLOATS, FLOATS, FLOATS)
def test_a_fused_multiply_add_is_rounded_once(a: float, b: float, c: float) -> None:
    with np.errstate(over="ignore"):
        (found,) = rounding.fused_multiply_add(*singles(a, b, c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if not np.isfinite(found):
        assert abs(exact) >= Fraction(float(np.finfo(np.float32).max))
        return
    error = abs(Fraction(float(found)) - exact)
    with np.errstate(over="ignore"):
        neighbours = np.nextafter(found, np.float32(np.inf)), np.nextafter(found, np.float32(-np.inf))
    nearest = (abs(Fraction(float(each)) - exact) for each in neighbours if np.isfinite(each))
    assert all(error <= other for other in nearest)


def test_a_sum_just_beside_the_middle_is_not_rounded_to_even() -> None:
    """2**-60 is lost in double precision, and decides."""
    tiny = 2.0**-30
    for sign in (1, -1):
        (found,) = rounding.fused_multiply_add(*singles(tiny, sign * tiny, 1 + 2.0**-23))
        assert found == np.float32(1 + 2.0**-23)
    halfway = np.float32(1 + 2.0**-12)  # its square is 1 + 2**-11 + 2**-24: a tie, broken by the addend
    up, down = (
        rounding.fused_multiply_add(*singles(halfway, halfway, sign * 2.0**-80))[0] for sign in (1, -1)
    )
    assert (float(up), float(down)) == (1 + 2.0**-11 + 2.0**-23, 1 + 2.0**-11)


@given(PATTERNS)
def test_short_floats_are_rounded_as_torch_rounds_them(bits: int) -> None:
    value = float_of(bits)
    ours = rounding.bfloat16_of(value)
    theirs = torch.from_numpy(value.copy()).bfloat16()
    assert np.isnan(value[0]) == bool(theirs.isnan())
    if not np.isnan(value[0]):
        assert ours.view(np.int16)[0] == theirs.view(torch.int16).item()
        assert rounding.of_bfloat16(ours)[0] == theirs.float().item()


def test_a_pair_of_short_floats_has_its_first_operand_above() -> None:
    for kind, two, three in (("bf16", 0x4000, 0x4040), ("f16", 0x4000, 0x4200)):
        assert one(f"cvt.rn.{kind}x2.f32 %r9, 0f40000000, 0f40400000;") == (two << 16) | three


EXACT = {
    "ex2": math.exp2,
    "lg2": math.log2,
    "rcp": lambda value: 1 / value,
    "sqrt": math.sqrt,
    "rsqrt": lambda value: 1 / math.sqrt(value),
}


@pytest.mark.parametrize("name", EXACT)
@given(value=st.floats(2.0**-20, 2.0**6, width=32))
def test_an_approximate_function_is_wrong_by_no_more_than_the_manual_allows(name: str, value: float) -> None:
    (found,) = rounding.approximate(name, *singles(value))
    exact = EXACT[name](value)
    bound = {"ex2": 2.0**-22, "lg2": 2.0**-22, "rcp": 2.0**-23, "sqrt": 2.0**-23, "rsqrt": 2.0**-22.9}[name]
    allowed = bound if name == "lg2" and 0.5 < value < 2 else bound * abs(exact)
    assert abs(float(found) - exact) <= allowed * (1 + 1e-6)


@pytest.mark.parametrize("name", EXACT)
def test_an_approximate_function_is_wrong_by_nearly_as_much_somewhere(name: str) -> None:
    values = np.linspace(0.1, 20, 4000, dtype=np.float32)
    exact = np.array([EXACT[name](float(value)) for value in values])
    relative = np.abs(rounding.approximate(name, values) - exact) / np.maximum(np.abs(exact), 1e-3)
    assert relative.max() > 1e-7  # rounding alone is wrong by 6e-8 at most


def test_what_is_exact_by_the_manual_stays_exact() -> None:
    assert rounding.approximate("ex2", *singles(0.0)).tolist() == [1.0]
    assert rounding.approximate("ex2", *singles(-math.inf)).tolist() == [0.0]
    assert rounding.approximate("ex2", *singles(math.inf)).tolist() == [math.inf]
    assert np.isnan(rounding.approximate("ex2", *singles(math.nan)))
    with np.errstate(divide="ignore"):
        assert rounding.approximate("lg2", *singles(0.0)).tolist() == [-math.inf]


@given(FLOATS, FLOATS.filter(lambda value: 1e-30 < abs(value) < 1e30))
def test_an_approximate_quotient_is_within_two_units(a: float, b: float) -> None:
    with np.errstate(all="ignore"):
        (found,) = rounding.approximate_quotient(*singles(a, b))
    exact = a / b
    if abs(exact) < 3e38:
        assert abs(float(found) - exact) <= 2 * float(np.spacing(np.float32(abs(exact))))


@given(PATTERNS, PATTERNS)
def test_comparisons_with_nan_are_false_unless_they_end_in_u(left: int, right: int) -> None:
    a, b = float_of(left), float_of(right)
    unordered = np.isnan(a[0]) or np.isnan(b[0])
    for name, holds in (
        ("lt", a[0] < b[0]),
        ("ge", a[0] >= b[0]),
        ("eq", a[0] == b[0]),
        ("ne", a[0] != b[0]),
    ):
        assert compare(name, a, b, is_float=True)[0] == (holds and not unordered)
        assert compare(f"{name}u", a, b, is_float=True)[0] == (holds or unordered)


def test_a_comparison_that_is_not_known_is_refused() -> None:
    with pytest.raises(Unsupported, match="ltx"):
        compare("ltx", *singles(1, 2), is_float=True)


def test_subnormal_numbers_are_flushed_to_zero_of_their_sign() -> None:
    smallest = struct.unpack("<f", struct.pack("<I", 1))[0]
    assert [str(value) for value in rounding.flushed(np.float32([smallest, -smallest]))] == ["0.0", "-0.0"]


def test_sums_of_tensor_cores_are_rounded_towards_zero() -> None:
    ones = np.array([1 + 2.0**-24 + 2.0**-30, -1 - 2.0**-23 * 0.99, 1.0])
    assert rounding.towards_zero(ones).tolist() == [1.0, -1.0, 1.0]


@given(st.floats(1e-300, 1e300))
def test_a_gross_reciprocal_has_only_an_upper_word(value: float) -> None:
    (found,) = rounding.gross_reciprocal(np.array([value]))
    assert abs(found * value - 1) < 2.0**-19
    assert found.view(np.uint64) % 2**32 == 0


def test_it_begins_newtons_method() -> None:
    body = "mov.b64 %rd5, 0d4008000000000000; rcp.approx.ftz.f64 %rd6, %rd5; mov.b64 {%r2, %r9}, %rd6;"
    assert one(body) == 0x3FD55555
