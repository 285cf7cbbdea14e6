"""Whether verdicts are as the labels of published problem packages say.

    python bench/package_fidelity.py FOLDER [--only NAME ...]

FOLDER holds problem packages as Kattis and the ICPC write them (docs/problems.md names some). Each
submission that is one file of Python or C++ is judged on all tests: those in `accepted` should pass them, and
those in the folders for wrong ones should not. C++ is compiled with the machine's g++, in the sandbox.

A package that states no time limit has the one that its format defines: a multiple of what the slowest
accepted submission takes, in whole seconds. Here it is of the submissions in the same language, since labels
of Python are for PyPy and ours is CPython. Where a limit is stated, Python has ten times as much.
Exceptions are named. The last line of standard output is JSON: the shares of verdicts as labelled, and of
failures of the kind that the folder's name says.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from rlef.config import ExecutorConfig, ProblemsConfig
from rlef.judging import job_of
from rlef.problems import read_jsonl
from rlef.records import Problem
from rlef.sources.common import Choices
from rlef.sources.convert import Conversion, convert
from rlef_sandbox import Command, Executor, Job, Result, Verdict

PATIENCE_S = 100.0  # for accepted submissions of a package that states no limit
PYTHON_IS_SLOWER = 10  # times: what PyPy may be ahead of CPython
# The format leaves memory to the judge; problemtools has 2 GiB.
DEFAULTS = ExecutorConfig(default_time_limit_s=PATIENCE_S, default_memory_limit_bytes=2 << 30)
STACK_BYTES = 256 << 20
LANGUAGES = {".py": "Python", ".cc": "C++", ".cpp": "C++"}
KINDS = {
    "accepted": {Verdict.PASSED},
    "wrong_answer": {Verdict.WRONG_OUTPUT, Verdict.OUTPUT_LIMIT},
    "time_limit_exceeded": {Verdict.TIMEOUT},
    "run_time_error": {Verdict.EXCEPTION, Verdict.OUT_OF_MEMORY, Verdict.SECURITY},
    "partially_accepted": set(Verdict) - {Verdict.PASSED},
    "rejected": set(Verdict) - {Verdict.PASSED},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    label: str  # the folder
    name: str
    language: str
    program: str | Command


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What became of a submission: the first test that it failed, if any."""

    problem: str
    submission: Submission
    time_limit_s: float
    verdict: Verdict
    told: str

    @property
    def as_labelled(self) -> bool:
        return (self.verdict is Verdict.PASSED) == (self.submission.label == "accepted")

    @property
    def of_the_labelled_kind(self) -> bool:
        return self.verdict in KINDS[self.submission.label]

    def __str__(self) -> str:
        submission = self.submission
        limit = f"within {self.time_limit_s:g} s"
        return f"{self.problem} {submission.label}/{submission.name}: {self.told} {limit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these packages alone")
    arguments = parser.parse_args()
    judged, not_compiled = list[Judged](), list[str]()
    with tempfile.TemporaryDirectory() as folder, Executor() as executor:
        problems, conversion = converted(arguments.folder, Path(folder), executor)
        for problem in problems:
            if arguments.only and problem.id not in arguments.only:
                continue
            package = arguments.folder / problem.id
            for each in judgements(problem, package, executor, not_compiled):
                judged.append(each)
                if not each.of_the_labelled_kind:
                    print(each, flush=True)
    print(json.dumps(report(judged, not_compiled, conversion)))


def converted(packages: Path, folder: Path, executor: Executor) -> tuple[list[Problem], Conversion]:
    """The problems; those that state no time limit have `PATIENCE_S`."""
    choices = Choices(
        defaults=DEFAULTS,
        max_test_bytes=ProblemsConfig().max_test_bytes,
        public_tests=1,
        generated_tests=False,
        solutions=0,
    )
    output = folder / "problems.jsonl"
    conversion = convert("kattis", [packages], output, choices=choices, executor=executor)
    return list(read_jsonl(output, defaults=DEFAULTS)), conversion


def judgements(
    problem: Problem, package: Path, executor: Executor, not_compiled: list[str]
) -> Iterator[Judged]:
    """Of each language the accepted submissions first: they may set the others' time limit."""
    for language in dict.fromkeys(LANGUAGES.values()):
        submissions = [
            submission
            for label in KINDS
            for submission in submissions_of(package, label, language, executor, not_compiled)
        ]
        accepted = [each for each in submissions if each.label == "accepted"]
        wrong = [each for each in submissions if each.label != "accepted"]
        states_limit = problem.time_limit_s != PATIENCE_S
        factor = PYTHON_IS_SLOWER if states_limit and language == "Python" else 1
        limited = replace(problem, time_limit_s=factor * problem.time_limit_s)
        slowest_s = 0.0
        for each, results in results_of(limited, accepted, executor):
            slowest_s = max(slowest_s, *(result.cpu_s for result in results))
            yield judged_as(limited, each, results)
        if not states_limit and accepted:
            limit_s = max(1, math.ceil(time_multiplier(package) * slowest_s))
            limited = replace(problem, time_limit_s=min(limit_s, PATIENCE_S))
        for each, results in results_of(limited, wrong, executor):
            yield judged_as(limited, each, results)


def submissions_of(
    package: Path, label: str, language: str, executor: Executor, not_compiled: list[str]
) -> Iterator[Submission]:
    for path in sorted((package / "submissions" / label).glob("*")):
        if LANGUAGES.get(path.suffix) != language:
            continue
        source = path.read_bytes()
        program = source.decode("utf-8") if language == "Python" else compiled(source, executor)
        if program is None:
            not_compiled.append(f"{package.name} {label}/{path.name}")
        else:
            yield Submission(label=label, name=path.name, language=language, program=program)


def compiled(source: bytes, executor: Executor) -> Command | None:
    """None where the compiler refuses it."""
    compiler = ["/usr/bin/g++", "-std=gnu++17", "-O2", "-w", "-o", "program", "program.cpp"]
    built = executor.build(Command(compiler, files={"program.cpp": source}, outputs=["program"]))
    if built.verdict is not Verdict.PASSED:
        return None
    return Command(["./program"], files=built.files, stack_bytes=STACK_BYTES)


def time_multiplier(package: Path) -> float:
    """What the slowest accepted submission is multiplied with: of `legacy`, or of `2023-07`."""
    settings = yaml.safe_load((package / "problem.yaml").read_text("utf-8")) or {}
    limits = settings.get("limits") or {}
    if settings.get("problem_format_version", "legacy") == "legacy":
        return float(limits.get("time_multiplier", 5))
    return float((limits.get("time_multipliers") or {}).get("ac_to_time_limit", 2))


def results_of(
    problem: Problem, submissions: Sequence[Submission], executor: Executor
) -> Iterator[tuple[Submission, Sequence[Result]]]:
    for index, results in executor.as_completed([whole_job(problem, each) for each in submissions]):
        yield submissions[index], results


def whole_job(problem: Problem, submission: Submission) -> Job:
    tests = [*problem.public_tests, *problem.private_tests]
    job = job_of(problem, "", tests, stop_at_first_failure=True)
    return replace(job, program=submission.program)


def judged_as(problem: Problem, submission: Submission, results: Sequence[Result]) -> Judged:
    verdict, told = Verdict.PASSED, "passes all tests"
    for number, result in enumerate(results):
        if result.verdict not in (Verdict.PASSED, Verdict.SKIPPED):
            verdict = result.verdict
            told = f"test {number}: {verdict.value} {result.stderr.strip()[-80:]!r}"
            break
    return Judged(
        problem=problem.id,
        submission=submission,
        time_limit_s=problem.time_limit_s,
        verdict=verdict,
        told=told,
    )


def report(
    judged: Sequence[Judged], not_compiled: Sequence[str], conversion: Conversion
) -> dict[str, object]:
    wrong = [each for each in judged if each.submission.label != "accepted"]
    return {
        "problems": len({each.problem for each in judged}),
        "set_aside": dict(Counter(each.reason.value for each in conversion.set_aside)),
        "not_compiled": list(not_compiled),
        "submissions": {
            language: dict(
                Counter(each.submission.label for each in judged if each.submission.language == language)
            )
            for language in dict.fromkeys(LANGUAGES.values())
        },
        "as_labelled": share([each.as_labelled for each in judged]),
        "wrong_ones_of_the_labelled_kind": share([each.of_the_labelled_kind for each in wrong]),
        "exceptions": [str(each) for each in judged if not each.as_labelled],
    }


def share(held: Sequence[bool]) -> float | None:
    return round(sum(held) / len(held), 4) if held else None


if __name__ == "__main__":
    main()
