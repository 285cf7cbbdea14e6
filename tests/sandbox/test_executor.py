"""The life of an executor: sharing, waiting, dying, and bad arguments."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlef_sandbox import Executor, Job, Limits, SandboxFault, Tally, Test, Verdict
from tests.sandbox.processes import descendants, is_alive, process_tree, wait_until

ECHO = "print(input())"


def test_results_come_in_the_order_of_jobs_and_tests():
    jobs = [Job(f"print(input(), {i})", [Test(str(t), f"{t} {i}") for t in range(3)]) for i in range(10)]
    with Executor(workers=2) as pair:
        results = pair.run_many(jobs)

    assert [[result.stdout for result in of_job] for of_job in results] == [
        [f"{t} {i}\n" for t in range(3)] for i in range(10)
    ]


def test_job_brings_its_own_limits_judge_and_stop(executor: Executor):
    loop = Job("while True: pass", [Test("", "")] * 2, limits=Limits(cpu_s=0.1), stop_at_first_failure=True)
    lines = [Test("", "1\n2")]

    results = executor.run_many([loop, Job("print(1, 2)", lines), Job("print(1, 2)", lines, judge="exact")])

    assert [[result.verdict.value for result in of_job] for of_job in results] == [
        ["timeout", "skipped"],
        ["passed"],
        ["wrong_output"],
    ]


def test_nothing_to_do_is_done_at_once(executor: Executor):
    assert executor.run_many([]) == []
    assert executor.run_many([Job(ECHO, []), Job(ECHO, [Test("1", "1")])])[0] == []


def test_default_limits_are_the_executors():
    with Executor(workers=1, limits=Limits(cpu_s=0.1)) as strict:
        assert strict.run("while True: pass", [Test("", "")])[0].verdict is Verdict.TIMEOUT


def test_threads_share_an_executor(executor: Executor):
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda i: executor.run(ECHO, [Test(str(i), str(i))])[0], range(40)))

    assert [result.stdout for result in results] == [f"{i}\n" for i in range(40)]
    assert {result.verdict for result in results} == {Verdict.PASSED}


def test_interpreter_is_free_while_an_executor_waits(executor: Executor):
    waiting = threading.Thread(target=executor.run, args=("import time; time.sleep(0.5)", [Test("", "")]))
    waiting.start()
    counted = 0
    while waiting.is_alive():
        counted += 1

    assert counted > 1_000  # a held lock lets the other thread run some ten times


def test_programs_run_side_by_side():
    sleep = Job("import time; time.sleep(2)", [Test("", "")])
    with Executor(workers=4) as four:
        started = time.monotonic()
        four.run_many([sleep] * 4)

        assert time.monotonic() - started < 7  # one after the other: 8


def test_interrupt_ends_the_wait_and_the_program(executor: Executor):
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    started = time.monotonic()

    with pytest.raises(KeyboardInterrupt):
        executor.run("while True: pass", [Test("", "")], limits=Limits(cpu_s=60))

    assert time.monotonic() - started < 30  # the program would go on for 60
    assert executor.run(ECHO, [Test("1", "1")])[0].verdict is Verdict.PASSED


def test_worker_that_dies_is_replaced_and_its_program_runs_again():
    with Executor(workers=1) as single:
        [worker] = single.worker_pids()
        killer = threading.Timer(0.2, os.kill, (worker, signal.SIGKILL))
        killer.start()
        results = single.run("import time; time.sleep(0.4); print(input())", [Test("1", "1"), Test("2", "2")])

        assert [result.verdict for result in results] == [Verdict.PASSED, Verdict.PASSED]
        assert single.worker_pids() != [worker]


def test_worker_that_dies_again_and_again_is_our_fault_and_not_the_programs():
    with Executor(workers=1) as single:
        done = threading.Event()

        def kill_every_worker() -> None:
            while not done.is_set():
                for worker in single.worker_pids():
                    if descendants(worker):  # it runs a test
                        os.kill(worker, signal.SIGKILL)
                time.sleep(0.02)

        killer = threading.Thread(target=kill_every_worker)
        killer.start()
        try:
            with pytest.raises(SandboxFault, match=r"an executor worker failed: .* \(3 attempts\)"):
                single.run("import time; time.sleep(5)", [Test("", "")])
        finally:
            done.set()
            killer.join()

        assert single.run(ECHO, [Test("1", "1")])[0].verdict is Verdict.PASSED


FEW, MANY = 1, 3  # tests of a program: each compiles it, or a solution process does so for all


@pytest.mark.parametrize(("tests", "processes"), [(FEW, 1), (MANY, 2)])
def test_closing_ends_every_process_and_the_calls_under_way(tests, processes):
    single = Executor(workers=1)
    [worker] = single.worker_pids()
    faults = []

    def wait() -> None:
        with pytest.raises(SandboxFault) as caught:
            single.run("while True: pass", [Test("", "")] * tests)
        faults.append(str(caught.value))

    waiting = threading.Thread(target=wait)
    waiting.start()
    wait_until(lambda: len(descendants(worker)) == processes)
    everybody = process_tree(worker)
    single.close()
    waiting.join()

    assert faults == ["the executor was closed"]
    wait_until(lambda: not any(is_alive(pid) for pid in everybody))


def test_closed_executor_says_so(executor: Executor):
    single = Executor(workers=1)
    single.close()
    single.close()

    with pytest.raises(SandboxFault, match="the executor is closed"):
        single.run(ECHO, [Test("1", "1")])


CALLER = """
import os, sys, threading
from rlef_sandbox import Executor, Test
executor = Executor(workers=2)
for _ in range(2):
    threading.Thread(target=executor.run, args=("while True: pass", [Test("", "")] * {tests}), daemon=True).start()
print(*executor.worker_pids(), flush=True)
sys.stdin.readline()
{ending}
"""


@pytest.mark.parametrize(
    "ending",
    ["os.kill(os.getpid(), 9)", "os._exit(1)", "sys.exit()", "os.abort()", "raise KeyboardInterrupt"],
)
@pytest.mark.parametrize(("tests", "processes"), [(FEW, 1), (MANY, 2)])
def test_no_process_outlives_the_caller(ending, tests, processes):
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER.format(ending=ending, tests=tests)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert caller.stdout is not None
    workers = [int(pid) for pid in caller.stdout.readline().split()]
    wait_until(lambda: all(len(descendants(worker)) == processes for worker in workers))
    everybody = [pid for worker in workers for pid in process_tree(worker)]
    assert len(everybody) >= 2 * (1 + processes)

    caller.communicate("go\n", timeout=20)

    wait_until(lambda: not any(is_alive(pid) for pid in everybody))


def test_fork_of_the_caller_is_told_to_make_its_own(executor: Executor):
    program = (
        "import os\nfrom rlef_sandbox import Executor, SandboxFault, Test\nexecutor = Executor(workers=1)\n"
        "if os.fork() == 0:\n    try:\n        executor.run('', [Test('', '')])\n"
        "    except SandboxFault as fault:\n        print(fault, flush=True)\n        os._exit(0)\n"
        "os.wait()\nprint(executor.run('', [Test('', '')])[0].verdict.value)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )

    assert done.stdout == "this executor belongs to the process before the fork: make one here\npassed\n"


def test_no_descriptor_is_left_open():
    with Executor(workers=2) as pair:
        pair.run(ECHO, [Test("1", "1")] * 3)
        gc.collect()  # what other tests have dropped
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(20):
            pair.run_many(
                [Job(ECHO, [Test("1", "1")] * 5), Job("(", [Test("", "")]), Job("1/0", [Test("", "")])]
            )

        assert len(list(Path("/proc/self/fd").iterdir())) <= before


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, "2", 2000])
def test_number_of_workers_must_be_sensible(workers):
    with pytest.raises(ValueError, match=r"workers is .*: give a whole number from 1 to 1024"):
        Executor(workers=workers)


@pytest.mark.parametrize("cores", [[], [100_000], [-1]])
def test_cores_must_be_some_that_the_caller_may_use(cores):
    with pytest.raises(ValueError, match=r"cores is .*: give some of those that this thread may use"):
        Executor(workers=1, cores=cores)


@pytest.mark.parametrize("patience_s", [0, -1.0, float("nan"), float("inf"), "2", True])
def test_patience_must_be_sensible(patience_s):
    with pytest.raises(ValueError, match=r"patience_s is .*: give a number of seconds in \(0, 86400\]"):
        Executor(workers=1, patience_s=patience_s)


ON_WHICH_CORES = """
import os
print(*os.sched_getaffinity(0))
try:
    os.sched_setaffinity(0, range(64))
except PermissionError:
    print("denied")
"""


def test_programs_stay_on_the_cores_that_they_are_given_and_so_do_those_of_later_workers():
    before = os.sched_getaffinity(0)
    core = max(before)
    with Executor(cores=[core]) as single:
        assert os.sched_getaffinity(0) == before
        [worker] = single.worker_pids()
        first = single.run(ON_WHICH_CORES, [Test("", "")])[0]
        os.kill(worker, signal.SIGKILL)
        later = single.run(ON_WHICH_CORES, [Test("", "")])[0]
        assert single.restarts() == 1

    assert (first.stdout, later.stdout) == (f"{core}\ndenied\n",) * 2


def test_the_tally_says_how_long_the_last_program_went_on_alone_and_begins_anew():
    sleeps = [Job(f"import time; time.sleep({seconds})", [Test("", "")]) for seconds in (0.2, 1.5)]
    with Executor(workers=2) as pair:
        pair.take_tally()
        pair.run_many(sleeps[1:])
        one = pair.take_tally()
        pair.run_many(sleeps)
        both = pair.take_tally()

        assert pair.take_tally() == Tally()
    assert (one.programs, one.alone_s) == (1, 0.0)
    assert (both.programs, both.restarts, both.retries) == (2, 0, 0)
    assert 0.5 < both.alone_s < both.longest_s
    assert both.longest_s >= 1.5


def test_unknown_layer_is_named():
    with pytest.raises(ValueError, match="allow_missing names 'seccomp': the layers are unprivileged_user, "):
        Executor(workers=1, allow_missing={"seccomp"})


def test_unknown_judge_is_named(executor: Executor):
    with pytest.raises(
        ValueError, match=r"judge is 'fuzzy': give 'code_contests', 'exact', 'tokens', 'any', Tokens"
    ):
        executor.run(ECHO, [Test("", "")], judge="fuzzy")  # type: ignore[arg-type]


def test_interpreter_that_cannot_be_started_is_a_fault(monkeypatch):
    monkeypatch.setattr(sys, "_base_executable", "/nowhere/python")

    with pytest.raises(SandboxFault, match="start /nowhere/python: No such file or directory"):
        Executor(workers=1)


WITHOUT_DESCRIPTORS = """
import os, resource
from rlef_sandbox import Executor, SandboxFault, Test
tests = [Test("1", "1")]
with Executor(workers=1) as executor:
    few = max(map(int, os.listdir("/proc/self/fd")))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))
    try:
        executor.run("print(input())", tests)
    except SandboxFault as fault:
        print(fault)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(executor.run("print(input())", tests)[0].verdict.value, executor.restarts() > 0)
"""


def test_a_caller_out_of_descriptors_gets_a_fault_and_later_verdicts_again():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DESCRIPTORS], capture_output=True, text=True, timeout=60, check=True
    )

    fault, verdict = done.stdout.splitlines()
    assert "Too many open files" in fault
    assert verdict == "passed True"


def test_workers_that_cannot_be_replaced_are_a_fault_until_they_can(monkeypatch, tmp_path: Path):
    interpreter = tmp_path / "python"
    interpreter.symlink_to(sys.executable)
    monkeypatch.setattr(os.path, "realpath", lambda path: str(interpreter) if path else path)
    with Executor(workers=1) as single:
        interpreter.unlink()
        os.kill(single.worker_pids()[0], signal.SIGKILL)
        with pytest.raises(SandboxFault, match="No such file or directory"):
            single.run(ECHO, [Test("1", "1")])
        interpreter.symlink_to(sys.executable)

        wait_until(lambda: len(single.worker_pids()) == 1)
        assert single.run(ECHO, [Test("1", "1")])[0].verdict is Verdict.PASSED
