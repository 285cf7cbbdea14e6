"""Checkers: programs that judge, in the sandbox too."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from rlef_sandbox import Checker, Executor, Job, Limits, SandboxFault, Test, outputs_match
from tests.sandbox.processes import descendants

# Any two numbers with the right sum, as in a problem with several answers.
SUM = Checker(
    program="def check(input, expected_output, output):\n"
    "    numbers = list(map(int, output.split()))\n"
    "    return len(numbers) == 2 and sum(numbers) == int(input)"
)
SPLIT = "n = int(input())\nprint(n // 3, n - n // 3)"


def verdicts(executor: Executor, program: str, tests: list[Test], judge: Checker, **options) -> list[str]:
    return [result.verdict.value for result in executor.run(program, tests, judge=judge, **options)]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_checker_accepts_any_of_several_answers(executor: Executor, count: int):
    tests = [Test(f"{i}\n", "see the checker") for i in range(count)]

    assert verdicts(executor, SPLIT, tests, SUM) == ["passed"] * count


def test_a_checker_decides_test_by_test(executor: Executor):
    tests = [Test(f"{i}\n", "") for i in (1, 2, 3, 4)]

    assert verdicts(executor, "n = int(input())\nprint(n // 2, n // 2)", tests, SUM) == [
        "wrong_output",
        "passed",
        "wrong_output",
        "passed",
    ]


def test_what_did_not_end_well_is_not_checked(executor: Executor):
    program = "n = int(input())\nif n == 1: 1 / 0\nwhile n == 2: pass\nprint(n, 0)"
    tests = [Test(f"{i}\n", "") for i in (1, 2, 3)]

    found = verdicts(executor, program, tests, SUM, limits=Limits(cpu_s=0.2))

    assert found == ["exception", "timeout", "passed"]
    assert verdicts(executor, "print(", tests, SUM) == ["syntax_error"] * 3


def test_after_the_first_failure_that_a_checker_finds_tests_count_as_skipped(executor: Executor):
    tests = [Test(f"{i}\n", "") for i in (2, 3, 4)]
    program = "n = int(input())\nprint(n // 2, n // 2)"

    assert verdicts(executor, program, tests, SUM, stop_at_first_failure=True) == [
        "passed",
        "wrong_output",
        "skipped",
    ]


def test_a_checker_sees_the_three_texts_as_they_are(executor: Executor):
    checker = Checker(
        program="def check(input, expected_output, output):\n"
        "    return (input, expected_output, output) == ('in\\r\\n\\u00e4', 'out\\0', ' x\\udcff\\r\\n')"
    )
    program = "import sys\nsys.stdout.buffer.write(b' x\\xff\\r\\n')"

    assert verdicts(executor, program, [Test("in\r\nä", "out\0")], checker) == ["passed"]


def test_a_checker_finds_surrogates_where_an_input_is_no_text(executor: Executor):
    checker = Checker(program="def check(input, expected_output, output):\n    return input == 'a\\udcff'")

    assert verdicts(executor, "", [Test(b"a\xff", "")], checker) == ["passed"]


def test_a_checker_sees_the_whole_output_and_the_result_keeps_its_beginning(executor: Executor):
    checker = Checker(program="def check(input, expected_output, output):\n    return len(output) == 100_001")
    limits = Limits(kept_output_bytes=10)

    [result] = executor.run("print('x' * 100_000)", [Test("", "")], judge=checker, limits=limits)

    assert (result.verdict.value, result.stdout, result.stdout_truncated) == ("passed", "x" * 10, True)


def test_the_program_that_is_judged_cannot_find_what_its_checker_is_given(executor: Executor):
    program = (
        "import os\nfor file in range(3, 64):\n    try: os.fstat(file); print(file)\n    except OSError: pass"
    )
    checker = Checker(program="def check(input, expected_output, output):\n    return output == ''")

    assert verdicts(executor, program, [Test("", "secret")] * 3, checker) == ["passed"] * 3


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (
            "def check(input, expected_output, output):\n    return 1 / 0",
            "ZeroDivisionError: division by zero",
        ),
        ("def check(input, expected_output, output):\n    return 1", "it must return True or False, not 1"),
        ("def check(input, expected_output, output):\n    raise SystemExit(1)", "its exit status is 1"),
        ("def judge(): pass", "the program has no function 'check'"),
        ("def check(", "SyntaxError: '(' was never closed"),
        ("def check(input, expected_output, output):\n    while True: pass", "it was ended by signal 9"),
    ],
)
def test_a_checker_that_fails_is_never_the_programs_fault(executor: Executor, program, said):
    judge = Checker(program=program, limits=Limits(cpu_s=0.2))

    with pytest.raises(SandboxFault, match="the checker failed on test 0: ") as caught:
        executor.run("print(1)", [Test("", "")], judge=judge)

    assert said in str(caught.value)
    assert verdicts(executor, SPLIT, [Test("3", "")], SUM) == ["passed"]


def test_jobs_with_checkers_and_without_run_side_by_side():
    jobs = [Job(SPLIT, [Test("9", "3 6")] * (1 + i % 4), judge=SUM if i % 2 else "exact") for i in range(20)]
    with Executor(workers=2) as pair:
        found = dict(pair.as_completed(jobs))

    assert [len(found[i]) for i in range(20)] == [1 + i % 4 for i in range(20)]
    assert {result.verdict.value for results in found.values() for result in results} == {"passed"}


def test_a_worker_that_dies_while_it_checks_is_replaced():
    slow = Checker(program="import time\ndef check(i, e, o):\n    time.sleep(0.5)\n    return True")
    with Executor(workers=1) as single:
        [worker] = single.worker_pids()

        def kill_while_it_checks() -> None:
            time.sleep(0.3)
            while not descendants(worker):
                time.sleep(0.01)
            os.kill(worker, signal.SIGKILL)

        killer = threading.Thread(target=kill_while_it_checks)
        killer.start()
        found = verdicts(single, "print(1)", [Test("", "")] * 2, slow)
        killer.join()

        assert found == ["passed", "passed"]
        assert single.worker_pids() != [worker]


def test_a_checker_needs_an_executor():
    with pytest.raises(ValueError, match=r"to an executor, Checker"):
        outputs_match("1", "1", judge=SUM)
