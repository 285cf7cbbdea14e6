"""Commands: programs that are executed instead of being given to the warm interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlef_sandbox import Checker, Command, Executor, Job, Limits, SandboxFault, Test, Verdict
from tests.sandbox.commands import compiled
from tests.sandbox.machines import LIKE_DOCKER, as_user
from tests.sandbox.processes import descendants, is_alive, process_tree, wait_until

SUM = "#include <iostream>\nint main() { long a, b; while (std::cin >> a >> b) std::cout << a + b << '\\n'; }"
SHELL = "/bin/sh"


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(workers=1) as single:
        yield single


@pytest.fixture(scope="module")
def add(executor: Executor) -> Command:
    return Command(["./program"], files={"program": compiled(executor, SUM)})


def shell(script: str, **options) -> Command:
    return Command([SHELL, "-c", script], **{"may_fork": True, **options})


def run(executor: Executor, command: Command, stdin: str = "", expected: str = "", **limits: float):
    chosen = Limits(**{"cpu_s": 2.0, "memory_bytes": 256 << 20, **limits})
    return executor.run(command, [Test(stdin, expected)], limits=chosen)[0]


# ---- running


def test_a_compiled_program_runs_on_many_tests(executor, add):
    results = executor.run(add, [Test(f"{i} {i}\n", f"{2 * i}\n") for i in range(50)])

    assert {result.verdict for result in results} == {Verdict.PASSED}
    assert all(0 < result.cpu_s < 1 and result.peak_memory_bytes > 1 << 20 for result in results)


def test_wrong_output_exit_status_and_signal_are_told_apart(executor, add):
    assert run(executor, add, "1 2", "4").verdict is Verdict.WRONG_OUTPUT
    failed = run(executor, shell("exit 3"))
    ended = run(executor, shell("kill -SEGV $$"))

    assert (failed.verdict, failed.exit_code, failed.signal) == (Verdict.EXCEPTION, 3, None)
    assert (ended.verdict, ended.exit_code, ended.signal) == (Verdict.EXCEPTION, None, signal.SIGSEGV)


def test_tests_after_the_first_failure_are_skipped(executor, add):
    tests = [Test("1 1", "2"), Test("1 1", "3"), Test("1 1", "2")]

    results = executor.run(add, tests, stop_at_first_failure=True)

    assert [result.verdict.value for result in results] == ["passed", "wrong_output", "skipped"]


def test_commands_and_python_programs_share_a_batch(executor, add):
    tests = [Test("1 2\n", "3\n")]
    jobs = [Job(add, tests), Job("print(sum(map(int, input().split())))", tests)] * 10

    assert {result.verdict for [result] in executor.run_many(jobs)} == {Verdict.PASSED}


def test_no_more_programs_run_at_once_than_there_are_workers():
    sleeping = "import time; time.sleep(0.2)"
    jobs = [Job(shell("sleep 0.2"), [Test("", "")]), Job(sleeping, [Test("", "")])] * 2
    with Executor(workers=1) as single:
        single.run_many(jobs)
        started = time.monotonic()
        single.run_many(jobs)
        assert time.monotonic() - started > 0.8


@pytest.mark.parametrize("interpreter", [os.path.realpath(sys.executable)])
def test_another_interpreter_runs_from_where_it_is_installed(interpreter):
    program = Command([interpreter, "-I", "add.py"], files={"add.py": "print(int(input()) + 1)"})
    with Executor(workers=1, readable=[sys.base_prefix]) as single:
        result = run(single, program, "41\n", "42\n")

    assert result.verdict is Verdict.PASSED, result.stderr


def test_environment_is_small_and_can_be_added_to(executor):
    script = "echo $GREETING $HOME; env | wc -l"

    result = run(executor, shell(script, environment={"GREETING": "hello", "HOME": "/"}), "", "hello / 7")

    assert result.verdict is Verdict.PASSED, result.stdout  # with PWD, which the shell makes


def test_input_that_is_not_read_hinders_nobody(executor):
    assert run(executor, shell("echo done"), "x" * 1_000_000, "done").verdict is Verdict.PASSED


# ---- files


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8}){0,2}", fullmatch=True).map(lambda name: name + ".bin"),
        st.binary(max_size=20_000),
        max_size=5,
    )
)
def test_files_are_there_as_given(executor, files):
    result = run(executor, Command(["/bin/true"], files=files, outputs=list(files)), file_bytes=4096)

    assert result.files == files


def test_outputs_come_back_byte_by_byte(executor):
    content = bytes(range(256)) * 1000

    result = run(
        executor,
        shell("mkdir -p a && cat in > a/out", files={"in": content}, outputs=["a/out"]),
        file_bytes=1 << 20,
    )

    assert result.files == {"a/out": content}


def test_what_is_not_there_does_not_come_back(executor):
    result = run(executor, shell("echo x > one", outputs=["one", "two"]), file_bytes=4096)

    assert result.files == {"one": b"x\n"}


@pytest.mark.parametrize(
    "script",
    [
        "ln -s /usr/bin/env out",
        "ln -s in out",
        "mkdir out",
        ":",
        "ln -s / d; ln -s d/usr out",
    ],
)
def test_only_files_come_back(executor, script):
    result = run(executor, shell(script, files={"in": "x"}, outputs=["out"]), file_bytes=1 << 20)

    assert result.files == {}


def test_a_folder_of_links_is_not_entered(executor):
    command = shell("ln -s /usr/bin d", outputs=["d/env"])

    assert run(executor, command, file_bytes=4096).files == {}


def test_each_test_finds_the_folder_as_it_was(executor):
    command = shell("ls; cat in; echo changed > in; echo more > new", files={"in": "first\n"})

    results = executor.run(command, [Test("", "in\nfirst\n")] * 5, limits=Limits(file_bytes=1 << 16))

    assert [result.verdict.value for result in results] == ["passed"] * 5


def test_without_file_bytes_nothing_can_be_written(executor):
    result = run(executor, shell("echo x > new || echo read-only"), "", "read-only")

    assert result.verdict is Verdict.PASSED
    assert "Read-only file system" in result.stderr


def test_file_bytes_come_on_top_of_the_files(executor):
    files = {"in": bytes(1 << 20)}
    fits = run(
        executor, shell("head -c 60000 in > out && echo ok", files=files), "", "ok", file_bytes=1 << 16
    )
    full = run(
        executor, shell("head -c 90000 in > out || echo full", files=files), "", "full", file_bytes=1 << 16
    )

    assert (fits.verdict, full.verdict) == (Verdict.PASSED, Verdict.PASSED), (fits.stderr, full.stderr)


def test_large_files_do_not_count_as_memory_of_the_command(executor):
    result = run(executor, shell("echo ok", files={"data": bytes(64 << 20)}), "", "ok", memory_bytes=16 << 20)

    assert result.verdict is Verdict.PASSED
    assert result.peak_memory_bytes < 16 << 20


# ---- compiling


def test_a_compilers_complaint_is_in_the_result(executor):
    command = Command(
        ["/usr/bin/g++", "-o", "x", "x.cpp"], files={"x.cpp": "int main( {"}, outputs=["x"], may_fork=True
    )

    result = executor.build(command)

    assert (result.verdict, result.exit_code, result.files) == (Verdict.EXCEPTION, 1, {})
    assert "x.cpp:1:" in result.stderr


def test_a_source_cannot_include_what_programs_cannot_read(executor):
    source = '#include "/etc/passwd"\nint main() {}'
    command = Command(["/usr/bin/g++", "x.cpp"], files={"x.cpp": source})

    assert "/etc/passwd: No such file" in executor.build(command).stderr


def test_a_compiler_that_never_ends_is_ended(executor):
    source = (
        "constexpr int f() { int s = 0; for (int i = 0; i < 1'000'000'000; ++i) s += i & 1; return s; }\n"
    )
    options = ["-fconstexpr-loop-limit=2000000000", "-fconstexpr-ops-limit=2000000000000"]
    files = {"x.cpp": source + "constexpr int x = f(); int main() {}"}
    command = Command(["/usr/bin/g++", *options, "x.cpp"], files=files)
    limits = Limits(cpu_s=0.5, wall_s=20.0, memory_bytes=1 << 30, file_bytes=1 << 20)

    assert executor.build(command, limits=limits).verdict in {Verdict.TIMEOUT, Verdict.OUT_OF_MEMORY}


# ---- clocks and processes


def test_cpu_time_of_all_processes_counts(executor):
    script = (
        "i=0; while [ $i -lt 4 ]; do (j=0; while [ $j -lt 60000 ]; do j=$((j+1)); done); i=$((i+1)); done"
    )
    whole = run(executor, shell(script), cpu_s=20.0)

    result = run(executor, shell(script), cpu_s=whole.cpu_s / 2)

    assert (result.verdict, result.stopped_by) == (Verdict.TIMEOUT, "cpu_limit")


def test_what_runs_in_the_background_ends_with_the_command(executor):
    [worker] = executor.worker_pids()[-1:]

    result = run(executor, shell("sleep 1000 & sleep 1000 & echo started"), "", "started")

    assert result.verdict is Verdict.PASSED
    wait_until(lambda: not descendants(worker))


def test_cancelling_ends_a_command_and_all_that_it_started():
    with Executor(workers=1) as single:
        batch = single.as_completed([Job(shell("sleep 1000 | sleep 1000"), [Test("", "")])])
        wait_until(lambda: len(single.worker_pids()) == 2 and len(descendants(single.worker_pids()[1])) >= 3)
        running = process_tree(single.worker_pids()[1])
        batch.cancel()
        wait_until(lambda: not any(map(is_alive, running)))
        assert run(single, shell("echo again"), "", "again").verdict is Verdict.PASSED


def test_no_process_outlives_the_caller():
    program = """
import os, signal, threading, time
from rlef_sandbox import Command, Executor, Job, Test
from tests.sandbox.processes import descendants, process_tree
single = Executor(workers=1)
batch = single.as_completed([Job(Command(["/bin/sh", "-c", "sleep 1000 | sleep 1000"], may_fork=True), [Test("", "")])])
while len(single.worker_pids()) < 2 or len(descendants(single.worker_pids()[1])) < 3:
    time.sleep(0.01)
print(*process_tree(single.worker_pids()[1]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    folder = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, timeout=60
    )

    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) >= 5
    wait_until(lambda: not any(map(is_alive, pids)))


def is_in_a_command(worker: int) -> bool:
    """A job process alone may be the last one's, which ends after its result is known."""
    return len(descendants(worker)) > 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_worker_that_dies_is_replaced_and_its_command_runs_again(add, number):
    with Executor(workers=1) as single:
        run(single, add, "1 1", "2")
        batch = single.as_completed([Job(shell("sleep 0.3; echo done"), [Test("", "done")])])
        worker = single.worker_pids()[1]
        wait_until(lambda: is_in_a_command(worker))
        os.kill(worker, number)
        [(_, [result])] = list(batch)
        assert (result.verdict, single.restarts()) == (Verdict.PASSED, 1)


def test_job_process_that_dies_is_no_verdict(add):
    with Executor(workers=1) as single:
        run(single, add, "1 1", "2")
        batch = single.as_completed([Job(shell("sleep 0.3; echo done"), [Test("", "done")])])
        worker = single.worker_pids()[1]
        wait_until(lambda: is_in_a_command(worker))
        os.kill(descendants(worker)[0], signal.SIGKILL)
        [(_, [result])] = list(batch)
        assert (result.verdict, single.restarts()) == (Verdict.PASSED, 1)


# ---- checkers

TESTLIB_STYLE = """
#include <fstream>
#include <iostream>
int main(int, char** names) {
    long sum, a, b;
    std::ifstream input(names[1]), output(names[2]), answer(names[3]);
    input >> sum;
    if (sum == -3) return 3;
    if (!(output >> a >> b)) return std::cerr << "two numbers expected", 2;
    return a + b == sum ? 0 : 1;
}
"""


@pytest.fixture(scope="module")
def checker(executor: Executor) -> Checker:
    return Checker(program=Command(["./program"], files={"program": compiled(executor, TESTLIB_STYLE)}))


SPLIT = "n = int(input())\nprint(*{0: [n, 0], 1: [n, 1], 2: ['x']}.get(n % 3))"


def test_a_compiled_checker_judges_python_programs(executor, checker):
    results = executor.run(SPLIT, [Test(f"{i}\n", "") for i in range(6)], judge=checker)

    assert [result.verdict.value for result in results] == ["passed", "wrong_output", "wrong_output"] * 2


def test_a_compiled_checker_judges_commands(executor, checker):
    command = shell("read n; echo $n 0")

    assert [result.verdict for result in executor.run(command, [Test("5\n", "")] * 3, judge=checker)] == [
        Verdict.PASSED
    ] * 3


def test_a_python_checker_judges_commands(executor, add):
    parity = Checker(program="def check(input, expected_output, output):\n    return int(output) % 2 == 1")

    results = executor.run(add, [Test("1 2", ""), Test("1 1", "")], judge=parity)

    assert [result.verdict.value for result in results] == ["passed", "wrong_output"]


def test_a_checker_that_says_that_it_failed_is_a_fault_of_ours(executor, checker):
    with pytest.raises(SandboxFault, match=r"the checker failed on test 0: its exit status is 3"):
        executor.run("print(1, 2)", [Test("-3\n", "")], judge=checker)


def test_a_checker_is_built_once_before_the_first_job_that_needs_it(executor):
    script = f'#!{SHELL}\nread limit < limit.txt; read said < "$2"; test "$said" -le "$limit"\n'
    build = Command([SHELL, "-c", "cp source checker"], files={"source": script}, outputs=["checker"])
    programs = []
    for limit in ("3", "4"):
        program = Command(["./checker"], files={"limit.txt": limit})
        judge = Checker(program=program, build=build, limits=Limits(cpu_s=2.0))
        executor.take_tally()
        [three, four] = executor.run("print(input())", [Test("3", ""), Test("4", "")], judge=judge)
        assert (three.verdict, four.verdict is Verdict.PASSED) == (Verdict.PASSED, limit == "4")
        programs.append(executor.take_tally().programs)

    assert programs[0] - programs[1] == 1


def test_checkers_can_be_built_ahead_and_one_that_cannot_is_a_fault_of_ours(executor):
    builds = {"passed": "echo > checker", "exception": "echo broken >&2; exit 1"}
    judges = [
        Checker(program=Command(["./checker"]), build=shell(script, outputs=["checker"]))
        for script in builds.values()
    ]

    assert [result.verdict.value for result in executor.build_checkers(judges)] == list(builds)
    with pytest.raises(SandboxFault, match="the checker cannot be built: exception: broken"):
        executor.run("print(1)", [Test("", "")], judge=judges[1])
    with pytest.raises(ValueError, match="checkers: give those that have a build"):
        executor.build_checkers([Checker(program=Command(["./checker"]))])
    nothing = Checker(program=Command(["./checker"]), build=shell("true", outputs=["checker"]))
    with pytest.raises(SandboxFault, match="the checker cannot be built: its build left nothing"):
        executor.run("print(1)", [Test("", "")], judge=nothing)


@pytest.mark.parametrize(
    ("program", "outputs"), [("def check(*texts): return True", ["checker"]), (Command(["./checker"]), [])]
)
def test_a_build_that_is_for_nothing_is_refused(program, outputs):
    with pytest.raises(ValueError, match="build is given: let it name outputs, and program be the Command"):
        Checker(program=program, build=Command(["/bin/cc"], outputs=outputs))


# ---- machines, and mistakes


def test_a_command_that_cannot_be_executed_is_nobodys_verdict(executor):
    with pytest.raises(SandboxFault, match="cannot execute /usr/bin/nowhere: No such file or directory"):
        run(executor, Command(["/usr/bin/nowhere"]))
    with pytest.raises(SandboxFault, match=r"cannot execute \./text: Exec format error"):
        run(executor, Command(["./text"], files={"text": "no machine code"}))
    assert run(executor, Command(["/bin/echo", "well"]), "", "well").verdict is Verdict.PASSED


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"arguments": []}, r"arguments is \[\]: give a list that begins with the executable"),
        ({"arguments": "ls -l"}, "arguments is 'ls -l': give a list"),
        (
            {"arguments": ["ls"]},
            r"arguments\[0\] is 'ls': give an absolute path, or './name' for one of files",
        ),
        ({"arguments": ["/bin/ls", "a\0"]}, "a command holds 'a.x00': no program can be given a NUL"),
        ({"files": {"../x": ""}}, r"the file '\.\./x' is not below the working folder"),
        ({"files": {"/etc/x": ""}}, "the file '/etc/x' is not below the working folder"),
        ({"files": {"": ""}}, "the file '' is not below the working folder"),
        ({"files": {"a": "", "a/b": ""}}, "the file 'a' is the folder of 'a/b', too"),
        ({"outputs": ["a/./b"]}, r"the file 'a/\./b' is not below the working folder"),
        ({"environment": {"A=B": ""}}, "environment names 'A=B': give a name without '='"),
        ({"stack_bytes": 1}, "stack_bytes is 1: give a whole number of at least 65536"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        Command(**{"arguments": ["/bin/ls"], **options})


def test_a_command_has_no_function():
    with pytest.raises(ValueError, match="function is 'solve': a command has none that could be called"):
        Job(Command(["/bin/ls"]), [], function="solve")


@pytest.mark.parametrize("path", ["relative", "/nowhere/at/all", "/"])
def test_what_is_to_be_readable_must_be_there(path):
    with pytest.raises(ValueError, match=f"readable names '{path}': give absolute paths that exist"):
        Executor(workers=1, readable=[path])


IN_DOCKER = """
from rlef_sandbox import Command, Executor, NAMESPACES, SandboxFault, Test, Limits
executable = open({executable!r}, "rb").read()
with Executor(workers=1, allow_missing=NAMESPACES) as executor:
    alone = Command(["./program"], files={{"program": executable}})
    print(*[result.verdict.value for result in executor.run(alone, [Test("1 2", "3")] * 3)])
    for command, limits in (
        (Command(["./program"], files={{"program": executable, "other": ""}}), Limits()),
        (alone, Limits(file_bytes=1)),
        (Command(["/bin/sh", "-c", "ls"], may_fork=True), Limits()),
    ):
        try:
            executor.run(command, [Test("", "")], limits=limits)
        except SandboxFault as fault:
            print(fault)
"""


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_without_namespaces_an_executable_runs_alone_and_the_rest_is_refused(executor, open_folder, user):
    executable = open_folder / "program"
    executable.write_bytes(compiled(executor, SUM))

    said = as_user(user, LIKE_DOCKER + IN_DOCKER.format(executable=str(executable)), open_folder)

    verdicts, *refusals = said.splitlines()
    assert verdicts == "passed passed passed"
    assert [refusal.partition(":")[0] for refusal in refusals] == [
        "this machine gives no mount namespace",
        "this machine gives no mount namespace",
        "this machine gives no pid namespace, or cannot count a program's processes",
    ]


def test_an_executor_without_commands_has_no_worker_for_them():
    with Executor(workers=2) as two:
        two.run("print(1)", [Test("", "1")])
        assert len(two.worker_pids()) == 2


def test_a_missing_executable_of_ours_is_a_fault_of_commands_only(monkeypatch):
    monkeypatch.setattr("rlef_sandbox.workers.COMMAND_WORKER", Path("/nowhere/command_worker"))
    with Executor(workers=1) as single:
        with pytest.raises(SandboxFault, match="start /nowhere/command_worker: No such file or directory"):
            run(single, Command(["/bin/ls"]))
        assert single.run("print(1)", [Test("", "1")])[0].verdict is Verdict.PASSED
