"""Many executions: verdicts that the load cannot change, and nothing left behind."""

from __future__ import annotations

import os
import random
import resource
from pathlib import Path

from rlef_sandbox import Executor, Job, Limits, Test
from tests.sandbox.processes import descendants, process_tree, wait_until

CORES = len(os.sched_getaffinity(0))
LIMITS = Limits(cpu_s=0.1, wall_s=60.0, memory_bytes=64 << 20, output_bytes=100_000)
PROGRAMS = {
    "print(int(input()) + 1)": "passed",
    "print(input())": "wrong_output",
    "import time\nend = time.process_time() + 0.02\nwhile time.process_time() < end: pass\nprint(int(input()) + 1)": "passed",
    "import time; time.sleep(0.02); print(int(input()) + 1)": "passed",
    "1 / 0": "exception",
    "x = bytearray(10**10)": "out_of_memory",
    "while True: print('x' * 1000)": "output_limit",
    "import socket; socket.socket()": "security",
    "print(": "syntax_error",
}
BUSY = "while True: pass"


def mixed_jobs(tests: int) -> list[Job]:
    """Programs of every kind with one to twenty tests; some of the tests end at the CPU limit."""
    draw = random.Random(0)
    jobs: list[Job] = []
    while tests > 0:
        busy = draw.random() < 0.1
        count = min(tests, 1 if busy else draw.choice([1, 2, 5, 20]))
        program = BUSY if busy else draw.choice(list(PROGRAMS))
        jobs.append(Job(program, [Test(f"{i}\n", f"{i + 1}\n") for i in range(count)], limits=LIMITS))
        tests -= count
    return jobs


def test_verdicts_under_twice_as_many_workers_as_cores_are_those_of_an_idle_machine():
    jobs = mixed_jobs(2000)
    expected = [[{BUSY: "timeout", **PROGRAMS}[job.program]] * len(job.tests) for job in jobs]
    found = []
    for workers in (1, 2 * CORES):
        with Executor(workers=workers) as executor:
            results = executor.run_many(jobs)
        found.append([[result.verdict.value for result in of_job] for of_job in results])

    assert found[0] == expected
    assert found[1] == expected


def test_thousands_of_executions_leave_no_process_no_file_and_no_memory():
    jobs = [job for job in mixed_jobs(300) if job.program != BUSY]
    with Executor(workers=2) as pair:
        workers = pair.worker_pids()
        pair.run_many(jobs * 6)  # as many as below: what a heap keeps depends on how much it held
        kept = {pid: (open_files(pid), resident_bytes(pid)) for pid in (os.getpid(), *workers)}
        pair.run_many(jobs * 6)

        assert pair.worker_pids() == workers
        for pid, (files, memory) in kept.items():
            wait_until(lambda pid=pid, files=files: open_files(pid) <= files)
            assert resident_bytes(pid) < memory + (8 << 20)
        wait_until(lambda: not any(descendants(worker) for worker in workers))
        everybody = [pid for worker in workers for pid in process_tree(worker)]
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in everybody))  # no zombie either


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
