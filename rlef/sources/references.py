"""What a source's own program gives, in the sandbox: expected values where a source ships inputs alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rlef.judging import job_of
from rlef.problems import is_literal
from rlef.records import Expression, Problem
from rlef.sources.common import Choices, Reason, UnusableProblemError, read_json
from rlef_sandbox import Executor, Result, Verdict


def values_of(
    problem: Problem, program: str, expressions: Sequence[str], choices: Choices, executor: Executor
) -> list[str]:
    """The literals of Python expressions' values, evaluated where `program` was loaded, within the problem's
    limits.

    Raises:
        UnusableProblemError: one of them raises, exceeds a limit, or has a value that is too large or no
            literal.
    """
    values = []
    for value in _outcomes(problem, program, expressions, choices, executor):
        if isinstance(value, UnusableProblemError):
            raise value
        values.append(value)
    return values


def values_within_limits(
    problem: Problem, program: str, expressions: Sequence[str], choices: Choices, executor: Executor
) -> list[str | None]:
    """As `values_of`, but None for an expression that exceeds a limit or has a value that is too large, or
    no literal."""
    outcomes = _outcomes(problem, program, expressions, choices, executor)
    return [None if isinstance(value, UnusableProblemError) else value for value in outcomes]


_LIMITS = {Verdict.TIMEOUT, Verdict.OUT_OF_MEMORY, Verdict.OUTPUT_LIMIT}


def _outcomes(
    problem: Problem, program: str, expressions: Sequence[str], choices: Choices, executor: Executor
) -> Iterator[str | UnusableProblemError]:
    """The error where a value is not to be had within the limits. Raises it where the program is at fault."""
    job = job_of(problem, program, [Expression(expression, "None") for expression in expressions])
    assert job.limits is not None
    limits = replace(job.limits, kept_output_bytes=choices.max_test_bytes)
    (results,) = executor.run_many([replace(job, judge="any", limits=limits)])
    for index, result in enumerate(results):
        if result.verdict in _LIMITS or result.stdout_truncated:
            yield _failed(index, result, "too much to keep")
            continue
        if result.verdict is not Verdict.PASSED:
            raise _failed(index, result)
        value = read_json(result.stdout)
        if not isinstance(value, str):
            raise UnusableProblemError(Reason.REFERENCE_FAILS, f"on input {index}: it prints over its value")
        too_large = f"no literal, or one too large: {len(value):,} characters"
        yield value if is_literal(value) else _failed(index, result, too_large)


def _failed(index: int, result: Result, what_passed: str = "") -> UnusableProblemError:
    said = result.stderr.strip().rpartition("\n")[2][:100]
    what = what_passed if result.verdict is Verdict.PASSED else result.verdict.value
    return UnusableProblemError(Reason.REFERENCE_FAILS, f"on input {index}: {what} {said}".rstrip())
