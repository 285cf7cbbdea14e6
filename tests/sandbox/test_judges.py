"""Which outputs are accepted."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlef_sandbox import Executor, Test, Tokens, outputs_match

WORD = st.text(alphabet="abcXYZ019.-+e", min_size=1, max_size=6)
BLANK = st.sampled_from([" ", "\n", "\t", "\r\n", "  ", "\v"])


@pytest.mark.parametrize(
    ("expected", "output"),
    [
        ("1 2 3", "1\n2\n3\n"),
        ("YES", "yes"),
        ("0.5", "0.500001"),
        ("007", "7"),
        ("1e3", "1000"),
        ("+5", "5"),
        (str(10**18), str(10**18 + 1)),
        ("nan", "NaN"),
        ("inf", "Inf"),
        ("", " \n"),
        ("a\x0cb", "A\x0cB"),
    ],
)
def test_code_contests_accepts(expected, output):
    assert outputs_match(expected, output)


@pytest.mark.parametrize(
    ("expected", "output"),
    [
        ("1 2", "1 2 3"),
        ("1 2 3", "1 2"),
        ("12", "1 2"),
        ("1", "1.00001"),
        ("yes", "no"),
        ("0x10", "16"),
        ("1", "+-1"),
        ("nan 1", "nan 1.0"),  # not a number is near nothing, once the lists differ as words
        ("a b", "a\x0cb"),  # a form feed does not separate
        ("1", ""),
    ],
)
def test_code_contests_rejects(expected, output):
    assert not outputs_match(expected, output)


@pytest.mark.parametrize(
    ("expected", "output", "accepted"),
    [
        ("1 2\n", "1 2", True),
        ("1 2 \n3\n\n", "1 2\n3", True),
        ("1\r\n2", "1\n2", True),
        ("", "\n \n", True),
        ("1 2", "1\n2", False),
        ("1 2", "1  2", False),
        ("YES", "yes", False),
        ("1.0", "1", False),
        ("1", " 1", False),
        ("1\n2", "1\n\n2", False),
    ],
)
def test_exact_ignores_nothing_but_blanks_at_ends(expected, output, accepted):
    assert outputs_match(expected, output, judge="exact") is accepted


@given(st.lists(st.tuples(WORD, BLANK, BLANK)))
def test_code_contests_ignores_how_words_are_separated(words):
    one = "".join(word + blank for word, blank, _ in words)
    other = "".join(blank + word.swapcase() + " " for word, _, blank in words)

    assert outputs_match(one, other)


@given(st.floats(-1e6, 1e6), st.floats(-3e-5, 3e-5))
def test_code_contests_compares_numbers_by_their_distance(number, distance):
    other = number + distance

    near = abs(number - other) < 1e-5

    assert outputs_match(repr(number), repr(other)) is near


@given(st.lists(WORD), st.lists(WORD))
def test_code_contests_agrees_with_its_definition(expected, output):
    def same(left: str, right: str) -> bool:
        numbers = [_number(left), _number(right)]
        if None in numbers:
            return left.lower() == right.lower()
        return abs(numbers[0] - numbers[1]) < 1e-5

    equal_words = [word.lower() for word in expected] == [word.lower() for word in output]
    pairwise = len(expected) == len(output) and all(map(same, expected, output))

    assert outputs_match(" ".join(expected), " ".join(output)) is (equal_words or pairwise)


def _number(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else math.copysign(math.inf, value)


@given(st.text(), st.text())
def test_exact_agrees_with_its_definition(expected, output):
    def lines(text: str) -> list[str]:
        kept = [line.rstrip(" \t\r\v\f") for line in text.split("\n")]
        while kept and not kept[-1]:
            kept.pop()
        return kept

    assert outputs_match(expected, output, judge="exact") is (lines(expected) == lines(output))


@pytest.mark.parametrize(
    ("expected", "output", "judge", "accepted"),
    [
        ("1 2\n3", "1\n2 3\n", "tokens", True),
        ("YES", "yes", "tokens", False),
        ("007", "7", "tokens", False),
        (str(10**18), str(10**18 + 1), "tokens", False),
        ("1 2", "1 2 3", "tokens", False),
        ("1 2", "12", "tokens", False),
        ("YES", "yes", Tokens(ignore_case=True), True),
        ("1.0", "1.01", Tokens(absolute=0.01), False),  # as doubles the two are more than 0.01 apart
        ("1.0", "1.009", Tokens(absolute=0.01), True),
        ("-200", "-201", Tokens(relative=0.005), True),
        ("-200", "-201.1", Tokens(relative=0.005), False),
        ("0", "0.5", Tokens(absolute=1, relative=0.1), True),  # one of the two suffices
        ("x=1.0", "x=1.001", Tokens(absolute=0.1), False),  # not a number
        ("nan", "nan", Tokens(absolute=1), True),  # equal as words
        ("nan", "NaN", Tokens(absolute=1), False),
        ("inf", "1e999", Tokens(absolute=1), False),
        ("1e999", "1", Tokens(relative=1), False),
    ],
)
def test_tokens_agree_one_by_one_within_the_tolerances(expected, output, judge, accepted):
    assert outputs_match(expected, output, judge=judge) is accepted


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9), st.floats(0, 10), st.floats(0, 10))
def test_tolerances_agree_with_their_definition(expected, output, absolute, relative):
    distance = abs(expected - output)
    near = distance <= absolute or distance <= relative * abs(expected)
    same = repr(expected) == repr(output)
    judge = Tokens(absolute=absolute, relative=relative)

    assert outputs_match(repr(expected), repr(output), judge=judge) is (
        same or (near and (absolute or relative) != 0)
    )


@given(st.lists(WORD), st.lists(WORD))
def test_tokens_without_tolerance_are_equal_lists_of_words(expected, output):
    assert outputs_match(" ".join(expected), "\n".join(output), judge="tokens") is (expected == output)


@pytest.mark.parametrize("name", ["absolute", "relative"])
@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf"), "0.1", True])
def test_tolerance_that_is_no_number_from_zero_is_named(name, value):
    with pytest.raises(ValueError, match=rf"{name} is .*: give a number from 0"):
        Tokens(**{name: value})


def test_a_job_is_judged_with_its_tolerance(executor: Executor):
    thirds = [Test("", "0.33333")]

    near = executor.run("print(1 / 3)", thirds, judge=Tokens(absolute=1e-4))
    far = executor.run("print(1 / 3)", thirds, judge=Tokens(absolute=1e-6))

    assert [near[0].verdict.value, far[0].verdict.value] == ["passed", "wrong_output"]
