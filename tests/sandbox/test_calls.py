"""Functions that are called, and the values that they return."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlef_sandbox import Call, Executor, Job, Test, Tokens, Verdict
from rlef_sandbox.values import text_of

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def call(executor: Executor, program: str, *calls: Call, function: str = "solve", **options):
    return executor.run(program, list(calls), function=function, **options)


@pytest.mark.parametrize("count", [1, 3])  # without a solution process, and with one
def test_a_function_passes_when_it_returns_what_is_expected(executor: Executor, count: int):
    calls = [Call([i, 2], i + 2) for i in range(count)]

    results = call(executor, "def solve(a, b):\n    return a + b", *calls)

    assert [(result.verdict, result.stdout) for result in results] == [
        (Verdict.PASSED, f"{i + 2}\n") for i in range(count)
    ]


def test_the_value_that_it_returned_is_reported(executor: Executor):
    [result] = call(
        executor, "def solve(n):\n    return {'squares': [i * i for i in range(n)]}", Call([4], {})
    )

    assert result.verdict is Verdict.WRONG_OUTPUT
    assert json.loads(result.stdout) == {"squares": [0, 1, 4, 9]}


def test_a_method_of_solution_is_called_on_a_new_object(executor: Executor):
    program = "class Solution:\n    def solve(self, words):\n        return ' '.join(words)"

    [result] = call(executor, program, Call([["a", "b"]], "a b"))

    assert result.verdict is Verdict.PASSED


def test_what_a_function_prints_is_no_part_of_its_value(executor: Executor):
    [result] = call(
        executor, "print('loading')\ndef solve():\n    print('thinking')\n    return 1", Call([], 1)
    )

    assert (result.verdict, result.stdout, result.stderr) == (Verdict.PASSED, "1\n", "loading\nthinking\n")


def test_the_main_block_of_a_program_does_not_run(executor: Executor):
    program = "def solve():\n    return 1\nif __name__ == '__main__':\n    print(input())"

    assert call(executor, program, Call([], 1))[0].verdict is Verdict.PASSED


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("x = 1", "NameError: the program has no function 'solve'"),
        ("class Solution: pass", "AttributeError: 'Solution' object has no attribute 'solve'"),
        ("def solve(a, b): return 1", "missing 1 required positional argument: 'b'"),
        ("def solve(a): return {1}", "TypeError: what solve returned is no JSON value: Object of type set"),
        (
            "def solve(a):\n    x = [a]\n    x.append(x)\n    return x",
            "TypeError: what solve returned is no JSON value",
        ),
        ("solve = 3", "'int' object is not callable"),
    ],
)
def test_what_cannot_be_called_is_an_exception_that_says_why(executor: Executor, program, said):
    [result] = call(executor, program, Call([1], 1))

    assert (result.verdict, result.stdout) == (Verdict.EXCEPTION, "")
    assert said in result.stderr


def test_a_traceback_shows_frames_of_the_program_alone(executor: Executor):
    [result] = call(
        executor, "def solve(x):\n    return half(x)\ndef half(x):\n    return 1 / x", Call([0], 1)
    )

    assert result.stderr.count("  File ") == result.stderr.count('  File "solution.py"') == 2
    assert result.stderr.startswith("Traceback (most recent call last):\n")


def test_calls_are_judged_by_their_tokens_unless_the_job_says_otherwise(executor: Executor):
    program = "def solve():\n    return [0.1 + 0.2, 'Ab']"
    expected = Call([], [0.3, "Ab"])

    assert call(executor, program, expected)[0].verdict is Verdict.WRONG_OUTPUT
    assert call(executor, program, expected, judge=Tokens(relative=1e-9))[0].verdict is Verdict.PASSED


def test_human_eval_style_assertions_are_a_program_without_input(executor: Executor):
    program = "def add(a, b):\n    return a + b\n"
    test = "def check(candidate):\n    assert candidate(1, 2) == {}\ncheck(add)"

    right, wrong = executor.run_many([Job(program + test.format(value), [Test("", "")]) for value in (3, 4)])

    assert [right[0].verdict, wrong[0].verdict] == [Verdict.PASSED, Verdict.EXCEPTION]
    assert "AssertionError" in wrong[0].stderr


def test_calls_without_a_function_and_a_function_that_is_no_name_are_refused(executor: Executor):
    with pytest.raises(ValueError, match="tests are calls: name the function that they call"):
        executor.run("", [Call([], 1)])
    with pytest.raises(ValueError, match=r"function is 'a\.b': give the name of one"):
        call(executor, "", Call([], 1), function="a.b")
    with pytest.raises(TypeError, match="Object of type set is not JSON serializable"):
        call(executor, "def solve(): pass", Call([{1}], 1))


@given(VALUES)
def test_the_text_of_a_value_is_json_of_that_value(value: object):
    assert json.loads(text_of(value)) == json.loads(json.dumps(value))


@given(VALUES)
def test_no_blank_of_the_text_is_inside_a_token(value: object):
    for token in text_of(value).split(" "):
        assert token in {"{", "}", "[", "]", ",", ":"} or json.dumps(json.loads(token)) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [((1, 2), [1, 2]), (2.0, 2), ({"b": 1, "a": 2}, {"a": 2, "b": 1}), ({1: 0}, {"1": 0}), (-0.0, 0)],
)
def test_equal_values_have_equal_texts(one: object, other: object):
    assert text_of(one) == text_of(other)


@pytest.mark.parametrize(
    ("one", "other"), [(True, 1), ("1", 1), (None, 0), ([], {}), ("a b", "a  b"), (2.5, 2)]
)
def test_unequal_values_have_unequal_texts(one: object, other: object):
    assert text_of(one) != text_of(other)
