"""Assertions that remember the values of their sides, beside the plain ones that they were made from."""

from __future__ import annotations

import math
import warnings
from types import TracebackType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlef.assertions import TEST_FILE, VALUES_MARK, remembering, text_of, told_failure

Outcome = tuple[list[object], str, str]


def executed(code: str, *, plain: bool) -> Outcome:
    """Each call of `f` with what it was given, what was raised, and what is told of it."""
    calls: list[object] = []

    def f(*values: Any) -> Any:
        calls.append(values)
        return values[0] if values else None

    def g() -> None:
        raise AssertionError("of the program")

    names: dict[str, object] = {"f": f, "g": g, "math": math, "eps": 1e-6}
    test = compile(code if plain else remembering(code), TEST_FILE, "exec")
    try:
        exec(test, names)
    except Exception as error:  # noqa: BLE001  of any kind: two are compared
        return calls, repr(error), told_failure(error, _frames_of_test(error))
    return calls, "", ""


def _frames_of_test(error: Exception) -> TracebackType | None:
    assert error.__traceback__ is not None
    return error.__traceback__.tb_next


SHOWN = [
    ("assert f(2) == 6", ["f(2) is 2"]),
    ("assert f(2) == 6, 'six'", ["f(2) is 2"]),
    ("assert f(2) == f(3)", ["f(2) is 2", "f(3) is 3"]),
    ("assert not f(2)", ["f(2) is 2"]),
    ("assert f(0)", ["f(0) is 0"]),
    ("assert f(2) is None", ["f(2) is 2"]),
    ("assert f(2) in (4, 5)", ["f(2) is 2"]),
    ("assert f(2) not in {2, 3}", ["f(2) is 2"]),
    ("assert abs(f(2.5) - 1.5) < 1e-6", ["f(2.5) is 2.5"]),
    ("assert abs(f(2.5) - f(1.5)) < eps", ["f(2.5) is 2.5", "f(1.5) is 1.5", "eps is 1e-06"]),
    ("assert math.isclose(f(2.5), 1.5, rel_tol=f(1e-9))", ["f(2.5) is 2.5", "f(1e-09) is 1e-09"]),
    ("assert set(f((1, 1))) == set((2, 3))", ["f((1, 1)) is (1, 1)"]),
    ("assert 0 <= f(7) < f(5) < f(9)", ["f(7) is 7", "f(5) is 5"]),
    ("assert f(1) == 1 and f(2) == 3 and f(4)", ["f(1) is 1", "f(2) is 2"]),
    ("assert f(1) == 2 or f(2) == 3", ["f(1) is 1", "f(2) is 2"]),
    ("assert isinstance(f('a'), int)", ["f('a') is 'a'"]),
    ("assert [f(1), f(2)] == [1, 3]", ["[f(1), f(2)] is [1, 2]"]),
    ("assert f('a\\nb')[0] == 'b'", ["f('a\\nb')[0] is 'a'"]),
    ("for n in range(3):\n    assert f(n) + n < 4, n", ["f(n) is 2", "n is 2"]),
    ("def check(candidate):\n    x = 3\n    assert candidate(x) == 4\ncheck(f)", ["candidate(x) is 3"]),
    ("class A:\n    assert f(1) == 2", ["f(1) is 1"]),
    ("try:\n    assert f(1) == 2\nexcept AssertionError:\n    assert f(3) == 4", ["f(3) is 3"]),
]
UNSHOWN = [
    "assert all(f(n) == n + 1 for n in range(3))",
    "assert False",
    "assert 1 == 2",
    "assert g() == 1",
    "assert f(1) == g()",
    "assert f(1) == 2, 1 / 0",
    "assert f(1) == 2, g()",
    "assert f(1) < 'a'",
    "raise ValueError",
    "assert f(1)[2]",
]
PASSING = [
    "assert f(1) == 1 or g()",
    "assert not (f(0) and g())",
    "assert 1 < f(2) < 3",
    "try:\n    assert f(1) == 2\nexcept AssertionError as error:\n    assert str(error) == ''",
    "import asyncio as a\nasync def b():\n    assert await a.sleep(0, f(1)) == 1\na.run(b())",
    "assert (lambda: f(1))() == 1",
    "assert (n := f(4)) == 4 and n == 4",
    "assert max(*[f(1), f(2)]) == 2",
]


@pytest.mark.parametrize(("code", "lines"), SHOWN, ids=lambda value: value if isinstance(value, str) else "")
def test_a_failure_names_the_values_of_its_sides(code: str, lines: list[str]) -> None:
    mark, source, *told = executed(code, plain=False)[2].split("\n")
    assert mark == VALUES_MARK
    assert source.startswith("assert ")
    assert told == lines


@pytest.mark.parametrize("code", UNSHOWN)
def test_nothing_is_told_where_no_side_can_be_shown_or_the_program_raised(code: str) -> None:
    _, raised, told = executed(code, plain=False)
    assert raised
    assert told == ""


@pytest.mark.parametrize("code", [*(code for code, _ in SHOWN), *UNSHOWN, *PASSING])
def test_calls_their_order_and_what_is_raised_are_those_of_the_plain_assertion(code: str) -> None:
    plain, remembered = executed(code, plain=True), executed(code, plain=False)
    assert remembered[:2] == plain[:2]
    assert (plain[1] == "") == (code in PASSING)


NUMBERS = st.integers(-2, 2)
SIDES = st.recursive(
    st.one_of(NUMBERS.map(lambda n: f"f({n})"), NUMBERS.map(str), st.just("g()")),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["<", "==", "is not", "in", "+", "and", "or"]), inner).map(
            lambda parts: f"({' '.join(parts)})"
        ),
        st.tuples(inner, inner, inner).map(lambda parts: f"({' <= '.join(parts)})"),
        inner.map(lambda side: f"abs({side})"),
        inner.map(lambda side: f"(not {side})"),
        inner.map(lambda side: f"set([{side}])"),
    ),
    max_leaves=6,
)


@given(SIDES, st.sampled_from(["", ", f(9)", ", g()"]))
def test_no_assertion_behaves_otherwise_when_it_remembers(side: str, message: str) -> None:
    code = f"assert {side}{message}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of comparisons with literals
        assert executed(code, plain=False)[:2] == executed(code, plain=True)[:2]


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()),
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(st.text(), inner),
        st.frozensets(st.integers()),
        st.sets(st.text()),
    ),
)


@given(VALUES)
def test_a_short_value_is_told_as_python_writes_it(value: object) -> None:
    if len(repr(value)) < 200:
        assert text_of(value) == repr(value)


@given(VALUES, st.integers(1, 40))
def test_a_long_value_takes_little_more_than_its_room(value: object, room: int) -> None:
    text = text_of(value, room)
    assert len(text) <= 12 * room + 40  # one character can take ten as an escape
    assert "\n" not in text


def test_huge_and_endless_values_are_told_at_once() -> None:
    endless: list[object] = []
    endless.append(endless)
    assert text_of(10**100_000) == "an integer of 332193 bits"
    assert text_of("x" * 10**7).endswith("x'...")
    assert text_of(range(3)) == "range(0, 3)"
    assert len(text_of([0] * 10**6)) < 600
    assert len(text_of(endless)) < 1200


def test_a_value_that_cannot_be_written_is_told_by_its_type() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise KeyError

    assert text_of([Odd()]) == "[<Odd>]"
