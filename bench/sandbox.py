"""Programs per second: the executor against one `python -I -S` process per test, in the same run.

Both sides run the same programs on the same tests, side by side in `--workers` lanes, in alternating rounds;
the ratios are medians of the rounds' ratios. On a busy machine only the ratio of CPU times means something.
The last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rlef_sandbox import NAMESPACES, Executor, Job, Layer, Test, Verdict, check

PROGRAM = "count = int(input())\nnumbers = list(map(int, input().split()))\nprint(sum(numbers) + {salt})\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=60, help="a round of the executor")
    parser.add_argument("--tests", type=int, nargs="+", default=[1, 5, 20], help="tests per program")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--allow-missing-namespaces", action="store_true")
    arguments = parser.parse_args()

    missing = NAMESPACES if arguments.allow_missing_namespaces else frozenset[Layer]()
    with Executor(workers=arguments.workers, allow_missing=missing) as executor:
        rows = [measure(executor, tests, arguments) for tests in arguments.tests]
    for row in rows:
        print(
            f"{row['tests_per_program']:3} tests per program: {row['programs_per_s']:7.1f} programs/s, "
            f"{row['cpu_ms_per_test']:.2f} CPU-ms a test; "
            f"subprocess {row['subprocess_cpu_ms_per_test']:.2f} CPU-ms; "
            f"ratio {row['cpu_ratio']:.1f} in CPU time, {row['wall_ratio']:.1f} on the wall clock"
        )
    print(
        json.dumps(
            {
                "bench": "sandbox",
                "machine": platform.machine(),
                "kernel": platform.release(),
                "python": platform.python_version(),
                "cores": len(os.sched_getaffinity(0)),
                "workers": arguments.workers,
                "load": os.getloadavg()[0],
                "layers_missing": [report.layer.value for report in check() if not report.given],
                "rows": rows,
            }
        )
    )


def measure(
    executor: Executor, tests: int, arguments: argparse.Namespace
) -> dict[str, float | tuple[float, float]]:
    executor.run_many(jobs_of(arguments.workers, tests))
    rounds = []
    for _ in range(arguments.rounds):
        jobs = jobs_of(arguments.programs, tests)
        compared = jobs[: max(1, arguments.programs // 20)]
        ours = cost_of(lambda jobs=jobs: run_by_executor(executor, jobs), executor) / (len(jobs) * tests)
        theirs = cost_of(lambda jobs=compared: run_by_subprocess(jobs, arguments.workers), executor)
        rounds.append((ours, theirs / (len(compared) * tests)))
    ours, theirs = (median_cost([pair[side] for pair in rounds]) for side in (0, 1))
    wall_ratios = [theirs.wall_s / ours.wall_s for ours, theirs in rounds]
    cpu_ratios = [theirs.cpu_s / ours.cpu_s for ours, theirs in rounds]
    return {
        "tests_per_program": tests,
        "programs_per_s": 1 / ours.wall_s / tests,
        "tests_per_s": 1 / ours.wall_s,
        "cpu_ms_per_test": 1000 * ours.cpu_s,
        "subprocess_tests_per_s": 1 / theirs.wall_s,
        "subprocess_cpu_ms_per_test": 1000 * theirs.cpu_s,
        "wall_ratio": statistics.median(wall_ratios),
        "wall_ratio_range": (min(wall_ratios), max(wall_ratios)),
        "cpu_ratio": statistics.median(cpu_ratios),
        "cpu_ratio_range": (min(cpu_ratios), max(cpu_ratios)),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    wall_s: float
    cpu_s: float  # of this process, its workers, and every process that they or it waited for

    def __truediv__(self, tests: int) -> Cost:
        return Cost(wall_s=self.wall_s / tests, cpu_s=self.cpu_s / tests)


def median_cost(costs: list[Cost]) -> Cost:
    return Cost(
        wall_s=statistics.median(cost.wall_s for cost in costs),
        cpu_s=statistics.median(cost.cpu_s for cost in costs),
    )


def cost_of(work: Callable[[], None], executor: Executor) -> Cost:
    started, cpu = time.perf_counter(), cpu_seconds(executor)
    work()
    return Cost(wall_s=time.perf_counter() - started, cpu_s=cpu_seconds(executor) - cpu)


def cpu_seconds(executor: Executor) -> float:
    ticks = 0
    for pid in ["self", *executor.worker_pids()]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))  # user, system, and those of waited-for children
    return ticks / os.sysconf("SC_CLK_TCK")


def run_by_executor(executor: Executor, jobs: list[Job]) -> None:
    for of_job in executor.run_many(jobs):
        assert all(result.verdict is Verdict.PASSED for result in of_job)


def jobs_of(programs: int, tests: int) -> list[Job]:
    """Programs that differ, so that nothing could be remembered."""
    return [
        Job(PROGRAM.format(salt=salt), [Test(f"3\n1 2 {i}\n", f"{3 + i + salt}\n") for i in range(tests)])
        for salt in range(programs)
    ]


def run_by_subprocess(jobs: list[Job], lanes: int) -> None:
    def run(pair: tuple[str, Test]) -> bool:
        program, test = pair
        interpreter = os.path.realpath(sys.executable)
        done = subprocess.run(
            [interpreter, "-I", "-S", "-c", program],
            input=test.input,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout == test.expected_output

    with ThreadPoolExecutor(lanes) as threads:
        assert all(threads.map(run, [(job.program, test) for job in jobs for test in job.tests]))


if __name__ == "__main__":
    main()
