"""What a source's own program gives, in the sandbox: expected values where a source ships inputs alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlef.judging import job_of
from rlef.records import Expression, Problem
from rlef.sources.common import Choices, Reason, UnusableProblemError, read_json
from rlef_sandbox import Executor, Verdict


def values_of(
    problem: Problem, program: str, expressions: Sequence[str], choices: Choices, executor: Executor
) -> list[str]:
    """The literals of Python expressions' values, evaluated where `program` was loaded, within the problem's
    limits.

    Raises:
        UnusableProblemError: one of them raises, exceeds a limit, or has a value that is too large.
    """
    job = job_of(problem, program, [Expression(expression, "None") for expression in expressions])
    assert job.limits is not None
    limits = replace(job.limits, kept_output_bytes=choices.max_test_bytes)
    (results,) = executor.run_many([replace(job, judge="any", limits=limits)])
    values = []
    for index, result in enumerate(results):
        if result.verdict is not Verdict.PASSED or result.stdout_truncated:
            said = result.stderr.strip().rpartition("\n")[2][:100]
            what = "too much to keep" if result.verdict is Verdict.PASSED else result.verdict.value
            raise UnusableProblemError(Reason.REFERENCE_FAILS, f"on input {index}: {what} {said}".rstrip())
        value = read_json(result.stdout)
        if not isinstance(value, str):
            raise UnusableProblemError(Reason.REFERENCE_FAILS, f"on input {index}: it prints over its value")
        values.append(value)
    return values
