"""What a failed turn is told, in the dialect of its problem (PAPER section 1).

`code_contests` is `prompts.feedback_text`: the failing public tests, each with its input and what came of it.
`evalplus` lists all public tests as assertions, the failing ones first, since a long message is cut off at
its end; a failing one comes with the values of its sides. tests/golden/ shows whole dialogs of both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from rlef import prompts
from rlef.judging import shown, told_values
from rlef.prompts import FailedTest, cut
from rlef.records import Assertion, Expression, Problem, ProblemTest
from rlef_sandbox import Call, Checker, Result, Verdict

TESTS_OPENING = "Your code does not pass all of these tests:"
FAILED_HEADING = "\n- failed: "
PASSED_HEADING = "\n- passed: "
FAILED_AT = "it failed at: "


def message_after(
    problem: Problem, code: str | None, results: Sequence[Result], *, max_test_characters: int
) -> str:
    """The user message after a turn that failed: `results` are those of the public tests, in their order."""
    if code is None:
        return prompts.no_code_text()
    pairs = list(zip(problem.public_tests, results, strict=True))
    failed = [(test, result) for test, result in pairs if result.verdict is not Verdict.PASSED]
    if problem.dialect == "code_contests":
        items = [FailedTest(test=test, result=result) for test, result in failed]
        return prompts.feedback_text(items, max_test_characters=max_test_characters)
    bullets = [_failed_bullet(problem, test, result, max_test_characters) for test, result in failed]
    bullets += [
        PASSED_HEADING + cut(_as_assertion(problem, test), max_test_characters)
        for test, result in pairs
        if result.verdict is Verdict.PASSED
    ]
    return "".join([TESTS_OPENING, *bullets, prompts.TRY_AGAIN, prompts.FORMAT_REQUEST])


def _as_assertion(problem: Problem, test: ProblemTest) -> str:
    if isinstance(test, Assertion):
        return test.code.strip()
    called = _called(problem, test)
    if isinstance(test, Expression):
        if isinstance(problem.judge, Checker):  # only it knows what else would do
            return f"{called} should be right for {test.expected}"
        return f"assert {called} == {test.expected}"
    assert isinstance(test, Call)
    return f"assert {called} == {test.expected!r}"


def _called(problem: Problem, test: ProblemTest) -> str:
    if isinstance(test, Expression):
        return test.code
    assert isinstance(test, Call), "tests with text for input have no assertion"
    return f"{problem.function}({', '.join(repr(argument) for argument in test.arguments)})"


def _failed_bullet(problem: Problem, test: ProblemTest, result: Result, max_characters: int) -> str:
    head = FAILED_HEADING + cut(_as_assertion(problem, test), max_characters)
    if result.verdict in prompts.REMARKS:
        return head + prompts.REMARKS[result.verdict]
    if result.verdict is Verdict.WRONG_OUTPUT:
        return head + _value_line(problem, test, result, max_characters)
    if told := told_values(result):
        source, *sides = told
        code = test.code.strip() if isinstance(test, Assertion) else ""
        is_whole = code.startswith("assert ") and not any(mark in code for mark in "\n;")
        lines = sides if is_whole else [FAILED_AT + source, *sides]
        return head + "\n" + cut("\n".join(lines), max_characters)
    return head + prompts.TRACE_HEADING + prompts.shorten_trace(result.stderr, max_characters=max_characters)


def _value_line(problem: Problem, test: ProblemTest, result: Result, max_characters: int) -> str:
    value = "" if isinstance(test, Assertion) else shown(test, result).output.strip()
    if not value:
        return prompts.ENDED_EARLY_REMARK
    if isinstance(test, Call):
        value = _as_python(result.stdout)
    return "\n" + cut(f"{cut(_called(problem, test), max_characters)} is {value}", 2 * max_characters)


def _as_python(output: str) -> str:
    """A value that travelled as JSON; the text itself where it was cut off."""
    try:
        return repr(json.loads(output))
    except (ValueError, RecursionError):
        return output.strip()
