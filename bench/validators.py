"""What an output validator in C++ costs for each test, beside a comparison and a checker in Python.

    python bench/validators.py [--rounds N] [--programs N]

One right program with 20 tests on one worker, judged by each of three that accept the same: tokens, a checker
in Python, and a validator in C++. Told is CPU time of this process and of all below it, for a test; the start
of the workers and the compiler fall out as the difference between runs of 2 N programs and of N. Medians over
rounds, in which the three take turns, and the CPU time of compiling the validator, which is small. The last
line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics

from rlef.judging import CHECKER_LIMITS, job_of
from rlef.records import Problem, Validator
from rlef.validators import checker_of
from rlef_sandbox import Checker, Executor, Judge, Test, Tokens, Verdict

TESTS = tuple(Test(f"{number} 1\n", f"{number + 1}\n") for number in range(20))
PROGRAM = "print(sum(map(int, input().split())))"
PYTHON = (
    "def check(input, expected_output, output):\n    return sum(map(int, input.split())) == int(output)\n"
)
CPP = """#include <fstream>
#include <iostream>
int main(int, char** names) {
    std::ifstream question(names[1]);
    long a, b, sum;
    return question >> a >> b && std::cin >> sum && a + b == sum ? 42 : 43;
}
"""
VALIDATOR = Validator(files={"validate.cc": CPP})
JUDGES: dict[str, Judge | Validator] = {
    "tokens": Tokens(),
    "checker_in_python": Checker(program=PYTHON, limits=CHECKER_LIMITS),
    "validator_in_cpp": VALIDATOR,
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--programs", type=int, default=20)
    given = arguments.parse_args()
    measured: dict[str, list[float]] = {name: [] for name in JUDGES}
    for _ in range(given.rounds):
        for name, judge in JUDGES.items():
            twice, once = (cpu_s_of(judge, times * given.programs) for times in (2, 1))
            measured[name].append(1000 * (twice - once) / (given.programs * len(TESTS)))
        print({name: round(each[-1], 2) for name, each in measured.items()}, flush=True)
    figures = {
        "rounds": given.rounds,
        "cores": len(os.sched_getaffinity(0)),
        "cpu_ms_of_a_test": {name: round(statistics.median(each), 2) for name, each in measured.items()},
        "spread_ms": {name: [round(min(each), 2), round(max(each), 2)] for name, each in measured.items()},
        "cpu_s_of_compiling": compile_cpu_s(given.rounds),
    }
    print(json.dumps(figures))


def cpu_s_of(judge: Judge | Validator, programs: int) -> float:
    problem = Problem(
        id="sum",
        statement="Add.",
        public_tests=TESTS,
        private_tests=TESTS,
        time_limit_s=10.0,
        memory_limit_bytes=1 << 30,
        source="bench",
        judge=judge,
    )
    before = cpu_s()
    with Executor(workers=1) as executor:
        for results in executor.run_many([job_of(problem, PROGRAM, TESTS)] * programs):
            assert all(result.verdict is Verdict.PASSED for result in results)
    return cpu_s() - before


def compile_cpu_s(rounds: int) -> float:
    with Executor(workers=1) as executor:
        built = executor.build_checkers([checker_of(VALIDATOR)] * rounds)
    return round(statistics.median(result.cpu_s for result in built), 2)


def cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    main()
