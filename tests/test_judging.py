"""Problems of each kind of test, run by the real executor; what feedback shows of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from rlef.dialects import message_after
from rlef.judging import job_of, limits_of, public_job, shown, told_values
from rlef.prompts import FailedTest, feedback_text
from rlef.records import Assertion, Expression, Problem, ProblemTest
from rlef_sandbox import Call, Checker, Executor, Judge, Result, Test, Tokens, Verdict


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(workers=1) as executor:
        yield executor


def problem(
    *tests: ProblemTest, judge: Judge | None = None, function: str = "", prelude: str = ""
) -> Problem:
    return Problem(
        id="p",
        statement="s",
        public_tests=tests,
        private_tests=tests,
        time_limit_s=10.0,
        memory_limit_bytes=1 << 28,
        source="test",
        judge=judge,
        function=function,
        prelude=prelude,
    )


def verdicts(executor: Executor, program: str, given: Problem) -> list[Verdict]:
    return [result.verdict for result in executor.run_many([job_of(given, program, given.public_tests)])[0]]


def feedback(executor: Executor, program: str, given: Problem) -> str:
    (results,) = executor.run_many([job_of(given, program, given.public_tests)])
    failed = [
        FailedTest(test=test, result=result)
        for test, result in zip(given.public_tests, results, strict=True)
        if result.verdict is not Verdict.PASSED
    ]
    return feedback_text(failed, max_test_characters=512)


def test_the_problems_limits_hold_and_the_wall_clock_is_the_looser_one() -> None:
    limits = limits_of(problem(Test("", "")))
    assert limits.cpu_s == 10.0
    assert limits.wall_s == 30.0
    assert limits.memory_bytes == 1 << 28


@pytest.mark.parametrize(
    ("judge", "output", "passes"),
    [
        (None, "YES 1.000001", True),  # the paper's rule
        ("tokens", "Yes 1.0", True),
        ("tokens", "YES 1.0", False),
        ("exact", "Yes  1.0", False),
        (Tokens(absolute=1e-3), "Yes 1.0001", True),
        (Tokens(absolute=1e-3), "Yes 1.01", False),
        (Checker(program="def check(i, e, o): return i == '7' and len(o) == len(e)"), "abc 999", True),
        (Checker(program="def check(i, e, o): return False"), "Yes 1.0", False),
    ],
)
def test_the_problems_judge_decides(
    executor: Executor, judge: Judge | None, output: str, passes: bool
) -> None:
    found = verdicts(executor, f"print({output!r}, end='')", problem(Test("7", "Yes 1.0"), judge=judge))
    assert found == [Verdict.PASSED if passes else Verdict.WRONG_OUTPUT]


@pytest.mark.parametrize("statement", ["1 / 0", "exit(3)", "raise MemoryError", "def"])
def test_a_checker_that_raises_rejects_and_the_run_goes_on(executor: Executor, statement: str) -> None:
    checker = Checker(program=f"def check(i, e, o):\n    {statement}\n    return True")
    for test in (Test("", ""), Expression("x", "1")):
        assert verdicts(executor, "x = 1", problem(test, judge=checker)) == [Verdict.WRONG_OUTPUT]


@pytest.mark.parametrize(
    "program", ["def add(a, b): return a + b", "class Solution:\n    def add(self, a, b): return a + b"]
)
def test_a_function_or_a_method_is_called_with_the_arguments(executor: Executor, program: str) -> None:
    given = problem(Call([1, 2], 3), Call(["a b", "c"], "a bc"), Call([[1], [2]], [1, 3]), function="add")
    assert verdicts(executor, program, given) == [Verdict.PASSED, Verdict.PASSED, Verdict.WRONG_OUTPUT]
    expression = problem(Expression("add((1,), (2,))", "(1, 2)"), function="add")
    assert verdicts(executor, program, expression) == [Verdict.PASSED]


@pytest.mark.parametrize(
    ("value", "expected", "passes"),
    [
        ("(1, [2, {'a': {3, 4}}])", "(1, [2, {'a': {4, 3}}])", True),
        ("[1, 2]", "(1, 2)", False),
        ("True", "1", True),
        ("2.0", "2", True),
        ("set()", "set()", True),
        ("frozenset({1})", "{1}", True),
        ("(1,)", "(1,)", True),
        ("float('inf')", "1e999", True),
        ("-float('inf')", "1e999", False),
        ("float('nan')", "...", True),
        ("1 + 2j", "(1+2j)", True),
        ("'a\\n\\\\ b'", r"'a\n\\ b'", True),
        ("10 ** 5000", "1" + "0" * 5000, True),
        ("object()", "1", False),
    ],
)
def test_values_are_compared_as_python_does(
    executor: Executor, value: str, expected: str, passes: bool
) -> None:
    found = verdicts(executor, f"x = {value}", problem(Expression("x", expected)))
    assert found == [Verdict.PASSED if passes else Verdict.WRONG_OUTPUT]


@pytest.mark.parametrize(
    ("value", "passes"),
    [("[1.0000001, (2.0,)]", True), ("[1.1, (2.0,)]", False), ("[1.0, [2.0]]", False), ("[1.0]", False)],
)
def test_near_values_pass_under_a_tolerance(executor: Executor, value: str, passes: bool) -> None:
    given = problem(Expression("x", "[1.0, (2.0,)]"), judge=Tokens(absolute=1e-6))
    assert verdicts(executor, f"x = {value}", given) == [Verdict.PASSED if passes else Verdict.WRONG_OUTPUT]


@pytest.mark.parametrize("value", ["['x' * 1000] * 5000", "10 ** 200_000", "'x' * 9_000_000"])
def test_a_value_that_would_take_the_checker_beyond_its_limits_is_wrong(
    executor: Executor, value: str
) -> None:
    assert verdicts(executor, f"x = {value}", problem(Expression("x", "1"))) == [Verdict.WRONG_OUTPUT]


def test_an_assertion_passes_or_raises(executor: Executor) -> None:
    given = problem(Assertion("assert f(2) == 4"), Assertion("x = f(3)\nassert x == 6, x"))
    assert verdicts(executor, "def f(n): return n * n", given) == [Verdict.PASSED, Verdict.EXCEPTION]
    assert verdicts(executor, "def f(n): return n * 2", given) == [Verdict.PASSED, Verdict.PASSED]


@pytest.mark.parametrize("trick", ["exit(0)", "import os; os._exit(0)", "print('passed')\nexit()"])
@pytest.mark.parametrize("test", [Assertion("assert f(2) == 4"), Expression("f(2)", "4")])
def test_a_program_that_ends_before_its_test_has_not_passed(
    executor: Executor, trick: str, test: ProblemTest
) -> None:
    assert verdicts(executor, trick, problem(test)) == [Verdict.WRONG_OUTPUT]


@pytest.mark.parametrize("test", [Assertion("assert f(2) == 4"), Expression("f(2)", "4")])
def test_a_program_may_call_its_names_what_it_likes(executor: Executor, test: ProblemTest) -> None:
    names = "list = str = len = repr = isinstance = compile = eval = exec = globals = hasattr = getattr = 7"
    assert verdicts(executor, f"def f(n): return n * n\n{names}", problem(test)) == [Verdict.PASSED]


def test_the_prelude_runs_before_the_program(executor: Executor) -> None:
    given = problem(Call([[1, 2]], 2), function="f", prelude="from typing import List")
    assert verdicts(executor, "def f(x: List[int]): return len(x)", given) == [Verdict.PASSED]


def test_feedback_shows_a_call_a_value_and_an_assertion(executor: Executor) -> None:
    program = "def f(a): return [a, 'x y']"
    call = feedback(executor, program, problem(Call(["b c"], ["x"]), function="f"))
    assert '- input:\n"b c"\nexpected output:\n["x"]\nyour output:\n["b c", "x y"]\n' in call
    value = feedback(executor, program, problem(Expression("f((1,))", "(2,)")))
    assert "- input:\nf((1,))\nexpected output:\n(2,)\nyour output:\n[(1,), 'x y']\n" in value
    assertion = feedback(executor, program, problem(Assertion("assert f(1) == 2")))
    assert "- input:\nassert f(1) == 2\nit raised:\nTraceback" in assertion
    trace = assertion.split("it raised:\n")[1].split("\nGive it")[0].splitlines()
    assert [line.strip() for line in trace if not set(line.strip()) <= set("^~")] == [
        "Traceback (most recent call last):",
        'File "test.py", line 1, in <module>',
        "assert f(1) == 2",
        "AssertionError",
    ]


def test_nothing_that_tells_a_passed_assertion_is_shown(executor: Executor) -> None:
    given = problem(Assertion("assert True"))
    text = feedback(executor, "exit()", given)
    assert "- input:\nassert True\nit ended before the test did.\n" in text
    job = job_of(given, "", given.public_tests)
    (secret,) = [test.expected_output.strip('"') for test in job.tests]
    assert len(secret) == 64
    assert secret not in text
    assert secret not in job.program


def run_public(executor: Executor, program: str, *codes: str) -> list[Result]:
    """Assertions whose feedback has values."""
    given = replace(problem(*map(Assertion, codes)), dialect="evalplus")
    return executor.run_many([public_job(given, program)])[0]


def test_a_failed_assertion_tells_the_values_of_its_sides(executor: Executor) -> None:
    program = "def f(n): print('noise'); return [n] * n"
    failed, passed = run_public(executor, program, "assert f(2) == f(1)", "assert f(0) == []")
    assert told_values(failed) == ("assert f(2) == f(1)", "f(2) is [2, 2]", "f(1) is [1]")
    assert (passed.verdict, told_values(passed)) == (Verdict.PASSED, ())


@pytest.mark.parametrize(
    "trick",
    [
        "AssertionError = KeyError",
        "AssertionError = 7",
        "import sys; sys.excepthook = print",
        "import ast; ast.parse = ast.unparse = ast.walk = 7",
        "import sys; sys.setrecursionlimit(60)",
        "hasattr = getattr = repr = compile = exec = type = dict = 7",
        "rlef_1 = rlef_none = rlef_error = rlef_run = told_failure = remembering = text_of = 7",
        "class Odd(int):\n    def __repr__(self): exit(0)\nf = Odd",
    ],
)
def test_no_name_of_a_program_lets_a_wrong_one_pass_an_assertion_that_tells_values(
    executor: Executor, trick: str
) -> None:
    program = f"def f(n): return n\n{trick}"
    wrong, right = run_public(executor, program, "assert f(1) == 2", "assert f(1) == 1")
    assert (wrong.verdict, right.verdict) == (Verdict.EXCEPTION, Verdict.PASSED)


def test_an_assertion_nested_too_deep_to_remember_is_executed_as_it_stands(executor: Executor) -> None:
    deep = "assert f(0) " + "+ 1 " * 700 + "== 700"
    (result,) = run_public(executor, "def f(n): return n", deep)
    assert result.verdict == verdicts(executor, "def f(n): return n", problem(Assertion(deep)))[0]
    assert result.verdict is Verdict.PASSED


def test_what_tells_a_passed_assertion_is_told_in_no_dialect(executor: Executor) -> None:
    given = replace(problem(Assertion("assert f(1) == 2"), Assertion("assert f(1) == 1")), dialect="evalplus")
    job = public_job(given, "def f(n): return n")
    text = message_after(given, "", executor.run_many([job])[0], max_test_characters=512)
    assert "f(1) is 1" in text
    secrets = [test.expected_output.strip('"') for test in job.tests]
    assert [len(secret) for secret in secrets] == [64, 64]
    assert not any(secret in text or secret in job.program for secret in secrets)


def test_long_values_are_cut_and_the_message_goes_on(executor: Executor) -> None:
    given = replace(problem(Assertion("assert f(1) == 2"), Assertion("assert f(2)")), dialect="evalplus")
    (results,) = executor.run_many([public_job(given, "def f(n): return 'x' * 10 ** 6 if n == 1 else 0")])
    text = message_after(given, "", results, max_test_characters=40)
    assert f"f(1) is '{'x' * 31}...\n- failed: assert f(2)\nf(2) is 0\n" in text


def test_calls_and_values_under_a_checker_are_told_as_python_writes_them(executor: Executor) -> None:
    program = "def f(n): return None if n else ''"
    call = replace(problem(Call([1], True), Call([0], ""), function="f"), dialect="evalplus")
    (results,) = executor.run_many([public_job(call, program)])
    text = message_after(call, "", results, max_test_characters=512)
    assert "- failed: assert f(1) == True\nf(1) is None\n- passed: assert f(0) == ''\n" in text
    either = problem(Expression("f(1)", "(1, 2)"), judge=Checker(program="def check(*texts): return False"))
    either = replace(either, dialect="evalplus")
    (results,) = executor.run_many([public_job(either, program)])
    text = message_after(either, "", results, max_test_characters=512)
    assert "- failed: f(1) should be right for (1, 2)\nf(1) is None\n" in text


def test_a_value_that_is_cut_off_is_shown_as_far_as_it_goes(executor: Executor) -> None:
    given = problem(Call([], 1), function="f")
    (results,) = executor.run_many([job_of(given, "def f(): return list(range(20000))", given.public_tests)])
    assert shown(given.public_tests[0], results[0]).output.startswith("[ 0 , 1 , 2 ,")
