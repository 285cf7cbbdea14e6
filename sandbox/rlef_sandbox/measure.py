"""What a test costs on this machine, beside two ways of running programs that need nothing installed.

The floor is what no executor of this design can go below: fork and exit of an interpreter that has the
worker's modules loaded. The other is `subprocess.run` of `python -I -S`, which isolates nothing.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path

from rlef_sandbox.checks import check
from rlef_sandbox.executor import Executor
from rlef_sandbox.records import Job, SandboxFault, Test, Verdict
from rlef_sandbox.worker import WARM_MODULES

INTERPRETER = os.path.realpath(sys.executable)
PROGRAM = "count = int(input())\nnumbers = list(map(int, input().split()))\nprint(sum(numbers) + {salt})\n"
FORK_AND_EXIT = """
import gc, json, os, resource, sys, time
forks, *modules = sys.argv[1:]
os.register_at_fork = lambda **_: None  # as in a worker
for name in modules:
    __import__(name)
def clocks():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used), time.perf_counter()
gc.collect()
gc.freeze()
begun = clocks()
for _ in range(int(forks)):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
print(json.dumps([end - begin for begin, end in zip(begun, clocks())]))
"""

FLOOR = "fork and exit of a warm interpreter (the floor)"
BARE = "subprocess.run of python -I -S, no isolation"

_ROUNDS = 3  # alternating between what is measured: on a machine that is shared its load changes
_MOST_SECONDS = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What some tests took together."""

    tests: int
    cpu_s: float  # user and system, of all processes
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the executor takes for a test, with so many tests in a program."""

    tests_per_program: int
    cpu_s: float
    wall_s: float  # from one result to the next
    tests_per_s_per_core: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What another way takes for a test, however many tests a program has."""

    name: str
    cpu_s: float
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    p50: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where figures come from."""

    cpu: str
    cores: int  # that this process may use
    kernel: str
    python: str
    load: float
    layers_missing: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What `python -m rlef_sandbox bench` finds."""

    machine: Machine
    workers: int
    rows: list[Row]
    baselines: list[Baseline]
    latency_s: Percentiles  # from call to result, of one program with one test
    worker_memory_bytes: int


def measure(*, seconds: float, workers: int | None, allow_missing: Collection[str]) -> Measurement:
    """Measure for about so many seconds, and a little longer to get ready.

    Raises ValueError for bad arguments, SandboxFault when programs cannot be run or do not pass.
    """
    if not (isfinite(seconds) and 0 < seconds <= _MOST_SECONDS):
        raise ValueError(f"seconds is {seconds!r}: give a number in (0, {_MOST_SECONDS:.0f}]")
    machine = this_machine()
    with Executor(workers=workers, allow_missing=allow_missing) as executor:
        pids = executor.worker_pids()
        memory = sum(map(proportional_memory, pids)) // len(pids)
        few, many = jobs_of(50 * len(pids), 1), jobs_of(5 * len(pids), 20)
        sides: list[Callable[[], Cost]] = [
            partial(cost_of, executor, partial(run_by_executor, executor), few),
            partial(cost_of, executor, partial(run_by_executor, executor), many),
            partial(cost_of, executor, run_by_command, few[:5]),
            partial(fork_and_exit, 200),
        ]
        share = seconds / (_ROUNDS * len(sides) + 2)
        rounds = [[_repeated(side, share) for side in sides] for _ in range(_ROUNDS)]
        one, twenty, bare, floor = (_of_one_test(costs) for costs in zip(*rounds, strict=True))
        latencies = latency(executor, seconds=2 * share)
    busy_cores = min(len(pids), machine.cores)
    return Measurement(
        machine=machine,
        workers=len(pids),
        rows=[
            Row(
                tests_per_program=count,
                cpu_s=cost.cpu_s,
                wall_s=cost.wall_s,
                tests_per_s_per_core=1 / cost.wall_s / busy_cores,
            )
            for count, cost in ((1, one), (20, twenty))
        ],
        baselines=[
            Baseline(name=name, cpu_s=cost.cpu_s, wall_s=cost.wall_s)
            for name, cost in ((FLOOR, floor), (BARE, bare))
        ],
        latency_s=latencies,
        worker_memory_bytes=memory,
    )


def _repeated(side: Callable[[], Cost], seconds: float) -> Cost:
    side()  # warms up: caches belong to the side before
    costs = [side()]
    while sum(cost.wall_s for cost in costs) < seconds:
        costs.append(side())
    return Cost(
        tests=sum(cost.tests for cost in costs),
        cpu_s=sum(cost.cpu_s for cost in costs),
        wall_s=sum(cost.wall_s for cost in costs),
    )


def _of_one_test(rounds: Sequence[Cost]) -> Cost:
    return Cost(
        tests=1,
        cpu_s=statistics.median(cost.cpu_s / cost.tests for cost in rounds),
        wall_s=statistics.median(cost.wall_s / cost.tests for cost in rounds),
    )


def jobs_of(programs: int, tests: int) -> list[Job]:
    """Programs that differ, so that nothing could be remembered."""
    return [
        Job(PROGRAM.format(salt=salt), [Test(f"3\n1 2 {i}\n", f"{3 + i + salt}\n") for i in range(tests)])
        for salt in range(programs)
    ]


def run_by_executor(executor: Executor, jobs: Sequence[Job]) -> int:
    """How many tests there were. Raises SandboxFault where one does not pass."""
    results = [result for of_job in executor.run_many(jobs) for result in of_job]
    for result in results:
        if result.verdict is not Verdict.PASSED:
            raise SandboxFault(f"a program that is measured ended with {result.verdict.value}, not passed")
    return len(results)


def run_by_command(jobs: Sequence[Job], *, jail: Sequence[str] = ()) -> int:
    """Each test by an interpreter of its own, or by its command, inside the command `jail`."""
    count = 0
    for job in jobs:
        program = job.program
        arguments = (
            [INTERPRETER, "-I", "-S", "-c", program] if isinstance(program, str) else program.arguments
        )
        for test in job.tests:
            command = [*jail, *arguments]
            done = subprocess.run(command, input=test.input, capture_output=True, text=True, check=True)
            assert done.stdout == test.expected_output
            count += 1
    return count


def cost_of(executor: Executor, run: Callable[[Sequence[Job]], int], jobs: Sequence[Job]) -> Cost:
    """What `run` takes, which returns how many tests it ran. The executor's processes count."""
    cpu_begun, begun = cpu_seconds(executor), time.perf_counter()
    tests = run(jobs)
    wall_s = time.perf_counter() - begun
    return Cost(tests=tests, cpu_s=cpu_seconds(executor) - cpu_begun, wall_s=wall_s)


def fork_and_exit(forks: int) -> Cost:
    """The floor; a fork counts as a test. The interpreter that forks is warm before its clocks start."""
    command = [INTERPRETER, "-I", "-S", "-c", FORK_AND_EXIT, str(forks), *WARM_MODULES]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    cpu_s, wall_s = json.loads(said)
    return Cost(tests=forks, cpu_s=cpu_s, wall_s=wall_s)


def cpu_seconds(executor: Executor) -> float:
    """Of this process, of every process that it waited for, of the workers, and of those they waited for."""
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    ticks = 0
    for pid in executor.worker_pids():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return sum(usage.ru_utime + usage.ru_stime for usage in own) + ticks / os.sysconf("SC_CLK_TCK")


def latency(executor: Executor, *, seconds: float) -> Percentiles:
    """Wall seconds from call to result, of programs with one test, one after the other."""
    jobs = jobs_of(100, 1)
    taken: list[float] = []
    while len(taken) < len(jobs) or sum(taken) < seconds:
        begun = time.perf_counter()
        run_by_executor(executor, [jobs[len(taken) % len(jobs)]])
        taken.append(time.perf_counter() - begun)
    percentiles = statistics.quantiles(taken, n=100, method="inclusive")
    return Percentiles(p50=percentiles[49], p99=percentiles[98])


def proportional_memory(pid: int) -> int:
    """Bytes of a worker at rest; what it shares with others counts in part."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/smaps_rollup does not say what the process holds")


def this_machine() -> Machine:
    return Machine(
        cpu=_processor(),
        cores=len(os.sched_getaffinity(0)),
        kernel=platform.release(),
        python=platform.python_version(),
        load=os.getloadavg()[0],
        layers_missing=[report.layer.value for report in check() if not report.given],
    )


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()
