"""What `rlef problems check` finds amiss, on problems that have it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rlef.cli import main
from rlef.judging import CHECKER_LIMITS
from rlef.problem_check import ProblemCheck, check_problems, summary
from rlef.problems import write_jsonl
from rlef.records import Assertion, Expression, Problem
from rlef_sandbox import Call, Checker, Executor, Test

DOUBLE = Problem(
    id="double",
    statement="Print twice the number. For 20 print 40.",
    public_tests=(Test("2\n", "4\n"),),
    private_tests=(Test("3\n", "6\n"),),
    time_limit_s=2.0,
    memory_limit_bytes=1 << 28,
    source="test",
    solutions=("print(2 * int(input()))", "n = int(input())\nprint(n + n)"),
    incorrect_solutions=("print(int(input()) ** 2)",),
)


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(workers=1) as executor:
        yield executor


def checked(executor: Executor, **changes: Any) -> ProblemCheck:
    (check,) = check_problems([replace(DOUBLE, **changes)], executor, runs=3, solutions=9)
    return check


def test_a_problem_whose_programs_do_as_they_should_is_sound(executor: Executor) -> None:
    check = checked(executor)
    assert check.is_sound
    assert (check.solutions, check.incorrect_solutions) == (2, 1)


def test_a_solution_that_fails_is_told_with_its_test_and_verdict(executor: Executor) -> None:
    check = checked(executor, solutions=("print(4)", "1 / 0"))
    assert check.failing == [
        "solution 0, test 1: wrong_output",
        "solution 1, test 0: exception (ZeroDivisionError: division by zero)",
    ]
    assert not check.is_sound


def test_a_wrong_program_that_passes_is_told(executor: Executor) -> None:
    check = checked(
        executor, incorrect_solutions=("print(5)", "n = int(input())\nprint(2 * n if n < 9 else 0)")
    )
    assert check.accepted == ["incorrect solution 1"]
    assert not check.failing


def test_a_program_whose_verdict_changes_is_flaky(executor: Executor) -> None:
    program = "import time\nn = int(input())\nprint(2 * n if n < 3 or time.time_ns() // 1000 % 2 else 0)"
    for _ in range(20):  # three equal tosses are one in four
        check = checked(executor, solutions=(program,))
        if check.flaky:
            break
    assert check.flaky == ["solution 0, test 1: passed, wrong_output"]


@pytest.mark.parametrize(
    ("public", "private", "told"),
    [
        (Test("2\n", "4\n"), Test("2", "4"), "private test 0 is a public one"),
        (Call([2], 4), Call([2], 4), "private test 0 is a public one"),
        (Expression("f(2)", "4"), Expression("f(2)", "4"), "private test 0 is a public one"),
        (Assertion("assert f(2) == 4"), Assertion("assert f(2) == 4 "), "private test 0 is a public one"),
        (
            Test("2\n", "4\n"),
            Test("For 20 print\n", "40.\n"),
            "private test 0 stands in the statement with its answer",
        ),
    ],
)
def test_a_private_test_that_is_given_away_is_told(
    executor: Executor, public: Any, private: Any, told: str
) -> None:
    function = "f" if isinstance(public, Call) else ""
    check = checked(
        executor,
        public_tests=(public,),
        private_tests=(private,),
        function=function,
        solutions=(),
        incorrect_solutions=(),
    )
    assert check.leaks == [told]


def test_a_short_answer_in_the_statement_is_no_leak(executor: Executor) -> None:
    assert checked(executor, private_tests=(Test("20\n", "40\n"),)).leaks == []


def test_a_checker_that_never_ends_is_told_and_the_next_problem_is_checked(executor: Executor) -> None:
    endless = Checker(
        program="def check(*texts):\n    while True: pass", limits=replace(CHECKER_LIMITS, cpu_s=0.2)
    )
    problems = [replace(DOUBLE, judge=endless), DOUBLE]
    first, second = check_problems(problems, executor, runs=1, solutions=1)
    assert len(first.faults) == 1
    assert second.is_sound


def test_the_summary_counts_problems_and_keeps_those_amiss(executor: Executor) -> None:
    checks = [checked(executor), checked(executor, solutions=("print(4)",))]
    found = summary(checks)
    assert (found["problems"], found["sound"], found["solutions"]) == (2, 1, 3)
    assert found["problems_with"] == {"failing": 1, "accepted": 0, "flaky": 0, "leaks": 0, "faults": 0}
    assert [check["id"] for check in found["amiss"]] == ["double"]


def test_the_command_prints_a_table_writes_json_and_says_by_its_status(tmp_path: Path) -> None:
    bad = replace(DOUBLE, id="bad", solutions=("print(4)",))
    for name, problems, status in (("good", [DOUBLE], 0), ("both", [DOUBLE, bad], 1)):
        write_jsonl(tmp_path / name, iter(problems))
        result = CliRunner().invoke(
            main, ["problems", "check", str(tmp_path / name), "--output", str(tmp_path / f"{name}.json")]
        )
        assert result.exit_code == status
        found = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert found["problems"] == len(problems)
        assert f"1 of {len(problems)} problems are sound" in result.output
        assert ("solution 0, test 1: wrong_output" in result.output) == (status == 1)


def test_a_file_that_is_not_there_is_refused() -> None:
    result = CliRunner().invoke(main, ["problems", "check", "nowhere.jsonl"])
    assert result.exit_code == 2
    assert "there is no file 'nowhere.jsonl'; give a JSONL file of problems" in result.stderr
