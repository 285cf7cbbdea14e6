"""A machine that fails, and callers that do: verdicts are right, or a SandboxFault says what is wrong."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlef_sandbox import Executor, Job, Limits, SandboxFault, Test, Verdict
from tests.sandbox.machines import NO_MEMORY_FILES
from tests.sandbox.processes import descendants, wait_until


def python(program: str, *options: str) -> list[str]:
    """The lines that a program prints. It has no descriptor but its standard streams."""
    done = subprocess.run(
        [sys.executable, "-c", program, *options], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


ON_A_FULL_DISK = """
import os, sys, tempfile
from rlef_sandbox import Executor, Test
[folder] = sys.argv[1:]
os.chdir(folder)
tempfile.tempdir = os.environ["TMPDIR"] = os.environ["HOME"] = folder
for place in (folder, "/dev/shm", "/var/tmp", "/run"):
    try:
        with open(os.path.join(place, "filler"), "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
    except OSError as error:
        print(error.strerror)
with Executor(workers=1) as executor:
    for tests in (1, 3):
        program = "print('x' * 1_000_000); print(len(input()))"
        results = executor.run(program, [Test("y" * 1_000_000, "x" * 1_000_000 + " 1000000")] * tests)
        print(*[result.verdict.value for result in results])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_no_disk_is_needed(tmp_path: Path):
    mounts = [
        f"mount -t tmpfs -o size=64k none {place}" for place in (tmp_path, "/dev/shm", "/var/tmp", "/run")
    ]
    script = " && ".join([*mounts, f'exec {sys.executable} -c "$0" {tmp_path}'])

    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, ON_A_FULL_DISK], capture_output=True, text=True, timeout=60
    )

    assert done.stderr == ""
    assert done.stdout.splitlines() == ["No space left on device"] * 4 + ["passed", "passed passed passed"]


OUT_OF_DESCRIPTORS = """
import resource, sys
from rlef_sandbox import Checker, Executor, Job, SandboxFault, Test
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
checker = Checker(program="def check(input, expected_output, output):\\n    return output == '1\\\\n'")
workers = int(sys.argv[1])
jobs = [Job("print(input())", [Test("1", "1")] * tests, judge=judge) for tests in (1, 3) for judge in (None, checker)]

def run(executor, limit):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    try:
        results = (executor or Executor(workers=workers)).run_many(jobs)
    except SandboxFault as fault:
        return f"fault: {fault}"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return " ".join(sorted({result.verdict.value for of_job in results for result in of_job}))

for limit in LIMITS:
    print(run(None, limit))
print("----")
with Executor(workers=workers) as executor:
    for limit in LIMITS:
        print(run(executor, limit))
        assert any(run(executor, most) == "passed" for _ in range(10))  # a start that had begun may fail yet
    print(executor.restarts())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "enough"), [(1, 16), (3, 24)])
def test_a_caller_out_of_descriptors_at_any_step_gets_a_fault_and_then_verdicts_again(workers, enough):
    none = 3  # beside the standard streams

    lines = python(f"LIMITS = range({none}, {enough + 1})" + OUT_OF_DESCRIPTORS, str(workers))

    while_starting, while_running = lines[: lines.index("----")], lines[lines.index("----") + 1 : -1]
    for said in (while_starting, while_running):
        faults = {line for line in said if line.startswith("fault: ")}
        assert set(said) == faults | {"passed"}
        assert said[-1] == "passed"
        assert any("Too many open files" in fault for fault in faults)
    assert int(lines[-1]) > 0


def test_workers_that_cannot_be_isolated_any_more_are_a_fault_until_they_can(monkeypatch, tmp_path: Path):
    interpreter = tmp_path / "python"
    interpreter.symlink_to(sys.executable)
    monkeypatch.setattr(os.path, "realpath", lambda path: str(interpreter) if path else path)
    with Executor(workers=1) as single:
        interpreter.unlink()
        interpreter.write_text(f'#!/bin/sh\nulimit -n 9\nexec {sys.executable} "$@"\n')
        interpreter.chmod(0o755)
        os.kill(single.worker_pids()[0], signal.SIGKILL)
        with pytest.raises(SandboxFault, match="Too many open files"):
            single.run("print(1)", [Test("", "1")])
        interpreter.unlink()
        interpreter.symlink_to(sys.executable)

        wait_until(lambda: can_run(single))


def can_run(executor: Executor) -> bool:
    try:
        return executor.run("print(1)", [Test("", "1")])[0].verdict is Verdict.PASSED
    except SandboxFault:
        return False


WITHOUT_A_NOTIFIER = """
import asyncio, os, resource
from rlef_sandbox import Executor, Job, SandboxFault, Test
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)

async def main():
    with Executor(workers=1) as executor:
        batch = executor.as_completed([Job(f"import time; time.sleep({seconds})", [Test("", "")]) for seconds in (0, 1)])
        next(batch)  # the only worker has been given the other one
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, most))
        try:
            await anext(batch)
        except SandboxFault as fault:
            print(fault)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        print([results[0].verdict.value async for _, results in batch])

asyncio.run(main())
"""


def test_a_task_that_cannot_have_a_descriptor_to_wait_on_gets_a_fault():
    assert python(WITHOUT_A_NOTIFIER) == ["eventfd: Too many open files", "['passed']"]


FILES_CANNOT_GROW = """
import resource
from rlef_sandbox import Executor, SandboxFault, Test
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
with Executor(workers=1) as executor:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
    for size in (10, 100_000):
        try:
            print(executor.run("print(len(input()))", [Test("x" * size, str(size))])[0].verdict.value)
        except SandboxFault as fault:
            print(fault)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    print(executor.run("print(len(input()))", [Test("x" * 100_000, "100000")])[0].verdict.value)
"""


def test_an_input_that_cannot_be_written_is_a_fault_until_it_can():
    small, large, later = python(FILES_CANNOT_GROW)

    assert (small, later) == ("passed", "passed")
    assert large == "an executor worker failed: write a test's input: File too large (3 attempts)"


def test_a_machine_without_memory_for_files_is_a_fault():
    program = (
        "from rlef_sandbox import Executor, SandboxFault\ntry:\n    Executor(workers=2)\n"
        "except SandboxFault as fault:\n    print(fault)"
    )

    assert python(NO_MEMORY_FILES + program) == ["memfd_create: Cannot allocate memory"]


def test_workers_killed_at_random_moments_change_no_verdict():
    draw = random.Random(0)
    killed: list[int] = []
    done = threading.Event()
    with Executor(workers=2, limits=Limits(cpu_s=60.0)) as pair:

        def kill_now_and_then() -> None:
            while not done.wait(draw.uniform(0.0, 0.3)):
                alive = [worker for worker in pair.worker_pids() if worker not in killed]
                if alive:
                    killed.append(draw.choice(alive))
                    os.kill(killed[-1], signal.SIGKILL)

        def run(number: int) -> str:
            tests = [Test(str(number), str(number if number % 3 else -1))] * draw.choice([1, 2, 4])
            try:
                return " ".join({result.verdict.value for result in pair.run("print(input())", tests)})
            except SandboxFault as fault:
                return str(fault)

        killer = threading.Thread(target=kill_now_and_then)
        killer.start()
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(run, range(200)))
        done.set()
        killer.join()

        for number, said in enumerate(found):
            right = "passed" if number % 3 else "wrong_output"
            assert said == right or said.startswith("an executor worker failed: "), said
        assert killed
        wait_until(lambda: pair.restarts() == len(killed))
        wait_until(lambda: len(pair.worker_pids()) == 2)
        assert pair.run("print(input())", [Test("1", "1")])[0].verdict is Verdict.PASSED


def test_programs_whose_workers_are_stopped_or_killed_are_run_again_in_bounded_time_and_counted():
    program = "import time; n = int(input()); time.sleep(3 * (n == 1)); print(n)"
    jobs = [Job(program, [Test("1", "1"), Test("2", "3")], limits=Limits(cpu_s=2.0, wall_s=6.0))] * 2
    with Executor(workers=2, patience_s=2.0) as pair:
        batch = pair.as_completed(jobs)
        stopped, killed = pair.worker_pids()
        wait_until(lambda: all(map(descendants, (stopped, killed))))  # both run a program
        os.kill(stopped, signal.SIGSTOP)
        os.kill(killed, signal.SIGKILL)
        verdicts = [[result.verdict.value for result in results] for _, results in batch]
        tally = pair.take_tally()

    assert verdicts == [["passed", "wrong_output"]] * 2
    assert (tally.restarts, tally.retries) == (2, 2)
    assert tally.longest_s > 6.0 + 2.0  # the wall limit, and the patience with the one that was stopped


FORKING_CALLER = """
import gc, os, sys, threading, warnings
from rlef_sandbox import Executor, Job, SandboxFault, Test
warnings.simplefilter("ignore")  # newer interpreters warn of forks beside threads
executor = Executor(workers=2)
verdicts = []

def work():
    for number in range(60):
        results = executor.run("print(input())", [Test(str(number), str(number))] * (1 + number % 4))
        verdicts.extend(result.verdict.value for result in results)

def refused(call):
    try:
        call()
    except SandboxFault as fault:
        return str(fault) == "this executor belongs to the process before the fork: make one here"

def in_a_fork(kind):
    global executor, batch
    if kind == "close":
        executor.close()
    elif kind == "let go":
        del executor, batch
        gc.collect()
    elif kind == "cancel":
        batch.cancel()
    else:
        calls = [lambda: next(batch), executor.restarts, executor.worker_pids, lambda: executor.run("", [])]
        assert all(map(refused, calls))

threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
kinds = ["close", "let go", "cancel", "use", "nothing"]
forks = 0
while any(thread.is_alive() for thread in threads) or forks < len(kinds):
    batch = executor.as_completed([Job("print(1)", [Test("", "1")])])
    child = os.fork()
    if child == 0:
        in_a_fork(kinds[forks % len(kinds)])
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7, kinds[forks % len(kinds)]
    verdicts.extend(results[0].verdict.value for _, results in batch)
    forks += 1
print(set(verdicts) == {"passed"}, len(verdicts) == forks + 2 * 60 * 10 // 4, executor.restarts())
"""


def test_a_caller_that_forks_while_programs_run_loses_nothing_and_its_forks_end():
    assert python(FORKING_CALLER) == ["True True 0"]
