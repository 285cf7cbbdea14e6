"""What judging costs: private tests in their order, in the order that past failures teach, and with a cache.

    python bench/judging.py [--rounds N]

For 1, 10, 50 and 200 private tests of equal cost: 8 problems, of each 12 programs that fail some of them
and 2 that pass all, in 60 drawn submissions, so that some repeat. A wrong program fails where a rule does
that holds for some inputs: for 1 in 2 to 1 in 50. Submissions come in 6 batches, as the steps of training
do. Each round measures the three ways one after another; ratios are those to the fixed order in the same
round, and their medians are told. The verdicts must be equal. `tests` are those that programs were judged
on, `recalled` is the share of programs that were not run since their results were known. The last line of
standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import time
from dataclasses import dataclass

from rlef.execution import SparingExecutor
from rlef_sandbox import Job, Test, Verdict

NUM_TESTS = (1, 10, 50, 200)
PROBLEMS, WRONG, RIGHT, SUBMISSIONS, BATCHES = 8, 12, 2, 60, 6
WAYS = {
    "fixed": {"learn_order": False, "cache_bytes": 0},
    "learned": {"learn_order": True, "cache_bytes": 0},
    "learned_and_cache": {"learn_order": True, "cache_bytes": 64 << 20},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of all submissions, judged in one way."""

    tests: int
    cpu_s: float  # of this process and of all below it, the start of the worker included
    wall_s: float
    recalled: float  # share of submissions that were not run
    solved: tuple[bool, ...]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    rounds = arguments.parse_args().rounds
    figures = {str(count): of_tests(count, rounds) for count in NUM_TESTS}
    print(json.dumps({"rounds": rounds, "cores": len(os.sched_getaffinity(0)), "private_tests": figures}))


def of_tests(count: int, rounds: int) -> dict[str, dict[str, float]]:
    batches = submissions(count)
    ratios: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        costs = {way: cost_of(batches, **settings) for way, settings in WAYS.items()}  # type: ignore[arg-type]
        fixed = costs["fixed"]
        for way, cost in costs.items():
            assert cost.solved == fixed.solved, f"{way} changes a verdict"
            ratios[way].append(
                (cost.tests / fixed.tests, cost.cpu_s / fixed.cpu_s, cost.wall_s / fixed.wall_s)
            )
    found: dict[str, dict[str, float]] = {
        way: {
            name: round(statistics.median(row[place] for row in rows), 3)
            for place, name in enumerate(("tests", "cpu", "wall"))
        }
        for way, rows in ratios.items()
        if way != "fixed"
    }
    found["learned_and_cache"]["recalled"] = round(costs["learned_and_cache"].recalled, 3)
    found["fixed"] = {
        "tests": fixed.tests,
        "cpu_s": round(fixed.cpu_s, 2),
        "solved": statistics.fmean(fixed.solved),
    }
    print(count, found, flush=True)
    return found


def submissions(count: int) -> list[list[Job]]:
    """Of all problems, in an order that is drawn."""
    generator = random.Random(count)
    jobs = []
    for problem in range(PROBLEMS):
        tests = [Test(f"{number}\n", f"{number + problem}\n") for number in range(count)]
        programs = [f"print(int(input()) + {problem})  # {number}" for number in range(RIGHT)]
        for number in range(WRONG):
            share = generator.choice((2, 5, 10, 20, 50))
            wrong = {generator.randrange(count)} | {n for n in range(count) if generator.random() < 1 / share}
            programs.append(f"n = int(input())\nprint(n + {problem} + (n in {wrong}))  # {number}")
        jobs += [
            Job(program, tests, stop_at_first_failure=True)
            for program in generator.choices(programs, k=SUBMISSIONS)
        ]
    generator.shuffle(jobs)
    return [jobs[number::BATCHES] for number in range(BATCHES)]


def cost_of(batches: list[list[Job]], *, learn_order: bool, cache_bytes: int) -> Cost:
    before = cpu_s()
    tests, solved = 0, []
    with SparingExecutor(workers=1, learn_order=learn_order, cache_bytes=cache_bytes) as executor:
        started = time.monotonic()
        for batch in batches:
            for results in executor.run_many(batch):
                tests += sum(result.verdict is not Verdict.SKIPPED for result in results)
                solved.append(all(result.verdict is Verdict.PASSED for result in results))
        wall_s = time.monotonic() - started
        recalled = executor.take_tally().recalled / len(solved)
    return Cost(tests=tests, cpu_s=cpu_s() - before, wall_s=wall_s, recalled=recalled, solved=tuple(solved))


def cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    main()
