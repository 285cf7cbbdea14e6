"""Each verdict, and the facts that come with it."""

from __future__ import annotations

import signal

import pytest

from rlef_sandbox import Executor, Limits, Test, Verdict


def test_expected_output_passes(run):
    result = run("print(int(input()) * 2)", "4\n", "8\n")

    assert (result.verdict, result.exit_code, result.signal) == (Verdict.PASSED, 0, None)
    assert (result.stdout, result.stderr) == ("8\n", "")


def test_other_output_is_wrong(run):
    result = run("print(int(input()) * 2)", "4\n", "9\n")

    assert (result.verdict, result.exit_code, result.stdout) == (Verdict.WRONG_OUTPUT, 0, "8\n")


def test_exception_shows_the_traceback_of_the_solution_alone(run):
    result = run("def half(x):\n    return 1 / x\nprint(half(0))\n")

    assert (result.verdict, result.exit_code) == (Verdict.EXCEPTION, 1)
    lines = [
        line for line in result.stderr.splitlines() if line.strip(" ~^")
    ]  # marks differ between versions
    assert lines == [
        "Traceback (most recent call last):",
        '  File "solution.py", line 3, in <module>',
        "    print(half(0))",
        '  File "solution.py", line 2, in half',
        "    return 1 / x",
        "ZeroDivisionError: division by zero",
    ]


@pytest.mark.parametrize(
    ("program", "exit_code"),
    [
        ("raise SystemExit(3)", 3),
        ("raise SystemExit('no')", 1),
        ("exit(4)", 4),
        ("import os; os._exit(5)", 5),
        ("import os; os._exit(250)", 250),
        ("import sys; sys.exit(256 + 7)", 7),
        *((f"import os; os._exit({status})", status) for status in (100, 120, 127, 250, 255)),
    ],
)
def test_exit_status_other_than_zero_is_an_exception(executor, program, exit_code):
    for tests in (1, 3):  # without a solution process, and with one
        result = executor.run(program, [Test("", "")] * tests)[-1]

        assert (result.verdict, result.exit_code) == (Verdict.EXCEPTION, exit_code)


@pytest.mark.parametrize(
    "program", ["exit()", "import sys; sys.exit(0)", "raise SystemExit", "import os; os._exit(0)"]
)
def test_exit_status_zero_leaves_the_verdict_to_the_output(run, program):
    assert run(program, expected="").verdict is Verdict.PASSED
    assert run(program, expected="42").verdict is Verdict.WRONG_OUTPUT


def test_right_output_before_a_crash_does_not_pass(run):
    assert run("print(8)\n1 / 0", expected="8\n").verdict is Verdict.EXCEPTION


def test_signal_that_nobody_explains_is_an_exception(run):
    result = run("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")

    assert (result.verdict, result.exit_code, result.signal) == (Verdict.EXCEPTION, None, signal.SIGTERM)


def test_busy_loop_times_out_by_its_cpu_time(run):
    result = run("while True: pass", limits=Limits(cpu_s=0.2, wall_s=20.0))

    assert result.verdict is Verdict.TIMEOUT
    assert 0.2 <= result.cpu_s < 0.5


def test_sleep_times_out_by_the_wall_clock(run):
    result = run("import time; time.sleep(60)", limits=Limits(cpu_s=5.0, wall_s=0.2))

    assert result.verdict is Verdict.TIMEOUT
    assert result.wall_s >= 0.2
    assert result.cpu_s < 0.2


def test_output_before_a_timeout_is_kept(run):
    result = run("print('so far', flush=True)\nwhile True: pass", limits=Limits(cpu_s=0.1))

    assert (result.verdict, result.stdout) == (Verdict.TIMEOUT, "so far\n")


def test_allocation_beyond_the_limit_is_out_of_memory(run):
    result = run("x = bytearray(10**11)")

    assert result.verdict is Verdict.OUT_OF_MEMORY
    assert result.stderr.endswith("MemoryError\n")


def test_memory_that_was_really_used_counts_though_the_program_ended_well(run):
    result = run("x = bytearray(b'1') * (100 << 20)", limits=Limits(memory_bytes=50 << 20))

    assert (result.verdict, result.exit_code) == (Verdict.OUT_OF_MEMORY, 0)
    assert result.peak_memory_bytes > 100 << 20


def test_handled_memory_error_is_no_failure(run):
    program = "try:\n    x = bytearray(10**11)\nexcept MemoryError:\n    print('ok')"

    assert run(program, expected="ok\n").verdict is Verdict.PASSED


def test_output_beyond_the_limit_is_output_limit(run):
    result = run("while True: print('x' * 1000)", limits=Limits(output_bytes=100_000, kept_output_bytes=10))

    assert (result.verdict, result.signal) == (Verdict.OUTPUT_LIMIT, signal.SIGXFSZ)
    assert (result.stdout, result.stdout_truncated) == ("x" * 10, True)


def test_output_of_exactly_the_limit_passes(run):
    limits = Limits(output_bytes=1000)

    assert run("print('x' * 1000, end='')", expected="x" * 1000, limits=limits).verdict is Verdict.PASSED


def test_standard_error_has_the_same_limit(run):
    program = "import sys\nwhile True: sys.stderr.write('x' * 1000)"

    assert run(program, limits=Limits(output_bytes=100_000)).verdict is Verdict.OUTPUT_LIMIT


def test_standard_error_keeps_its_end(run):
    result = run("import sys; sys.stderr.write('abcdef')", limits=Limits(kept_output_bytes=3))

    assert (result.stderr, result.stderr_truncated) == ("def", True)


@pytest.mark.parametrize(
    "program", ["def f(:", "x = 'a", "if True:\nx = 1", "x = 1\0", "x = '\udc80'", "\xa0= 1", "return"]
)
def test_what_does_not_parse_is_a_syntax_error(run, program):
    result = run(program)

    assert (result.verdict, result.exit_code) == (Verdict.SYNTAX_ERROR, 1)
    said = ("SyntaxError", "IndentationError", "null bytes")  # the last is all that Python 3.10 says
    assert any(words in result.stderr for words in said)


def test_syntax_error_points_at_the_line(run):
    assert run("x = 1\ny = )\n").stderr == (
        "  File \"solution.py\", line 2\n    y = )\n        ^\nSyntaxError: unmatched ')'\n"
    )


def test_syntax_error_on_a_long_line_keeps_its_name(executor: Executor):
    for tests in (1, 3):  # without a solution process, and with one
        result = executor.run("x = '" + "y" * 100_000, [Test("", "")] * tests)[0]

        assert result.stderr.endswith("^\nSyntaxError: unterminated string literal (detected at line 1)\n")


def test_source_that_overflows_the_compiler_harms_nobody(executor: Executor):
    deep = executor.run("(" * 100_000, [Test("", "")])[0]
    chain = executor.run("x = " + "-" * 200_000 + "1", [Test("", "")])[0]
    after = executor.run("print(1)", [Test("", "1")])[0]

    assert deep.verdict is Verdict.SYNTAX_ERROR
    assert chain.verdict in {Verdict.SYNTAX_ERROR, Verdict.EXCEPTION, Verdict.OUT_OF_MEMORY}
    assert after.verdict is Verdict.PASSED


def test_hostile_system_call_is_a_security_verdict(run):
    result = run("import socket; socket.socket()")

    assert (result.verdict, result.signal) == (Verdict.SECURITY, signal.SIGSYS)


def test_tests_after_the_first_failure_are_skipped(executor: Executor):
    tests = [Test("1", "1"), Test("2", "9"), Test("3", "3")]

    results = executor.run("print(input())", tests, stop_at_first_failure=True)

    assert [result.verdict.value for result in results] == ["passed", "wrong_output", "skipped"]
    assert (results[2].exit_code, results[2].signal, results[2].stdout) == (None, None, "")


def test_every_test_runs_unless_told_to_stop(executor: Executor):
    tests = [Test("1", "1"), Test("2", "9"), Test("3", "3")]

    results = executor.run("print(input())", tests)

    assert [result.verdict.value for result in results] == ["passed", "wrong_output", "passed"]


def test_syntax_error_is_the_verdict_of_every_test_unless_told_to_stop(executor: Executor):
    tests = [Test("", "")] * 3

    every = executor.run("(", tests)
    first = executor.run("(", tests, stop_at_first_failure=True)

    assert [result.verdict.value for result in every] == ["syntax_error"] * 3
    assert [result.verdict.value for result in first] == ["syntax_error", "skipped", "skipped"]


def test_output_that_is_not_utf8_is_decoded_with_replacement(run):
    result = run("import sys; sys.stdout.buffer.write(b'a\\xffb\\x00')")

    assert result.stdout == "a\ufffdb\x00"


@pytest.mark.parametrize(
    ("program", "stopped_by"),
    [
        ("while True: pass", "cpu_limit"),
        ("import time; time.sleep(60)", "wall_limit"),
        ("x = bytearray(10**11)", "memory_limit"),
        ("x = bytearray(b'1') * (100 << 20)", "memory_limit"),
        ("while True: print('x' * 1000)", "output_limit"),
        ("import os; os.execv('/bin/true', ['true'])", "system_call_filter"),
        ("1 / 0", None),
        ("import os; os.abort()", None),
        ("print(1", None),
        ("print(8)", None),
    ],
)
def test_result_says_what_ended_a_program_that_did_not_end_of_itself(run, program, stopped_by):
    wall_s = 0.5 if stopped_by == "wall_limit" else 30.0
    limits = Limits(cpu_s=0.5, wall_s=wall_s, memory_bytes=50 << 20, output_bytes=100_000)

    assert run(program, limits=limits).stopped_by == stopped_by


@pytest.mark.parametrize("tests", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("print(input())", "passed"),
        ("print(1", "syntax_error"),
        ("1 / 0", "exception"),
        ("while True: pass", "timeout"),
        ("import os; os.kill(os.getpid(), 9)", "exception"),
        ("x = " + "(" * 150 + "1" + ")" * 150, "wrong_output"),
    ],
)
def test_verdict_does_not_depend_on_how_many_tests_there_are(executor, program, verdict, tests):
    limits = Limits(cpu_s=0.2, memory_bytes=256 << 20)

    results = executor.run(program, [Test("7", "7")] * tests, limits=limits)

    assert [result.verdict.value for result in results] == [verdict] * tests


def test_compiling_is_not_charged_to_the_test(executor):
    long_to_compile = "if 0:\n" + "    x = [1, 2, 3]\n" * 100_000 + "print(input())"
    for tests in (1, 3):
        result = executor.run(
            long_to_compile, [Test("7", "7")] * tests, limits=Limits(cpu_s=0.15, wall_s=30)
        )[0]

        assert result.verdict is Verdict.PASSED
        assert result.cpu_s < 0.15
