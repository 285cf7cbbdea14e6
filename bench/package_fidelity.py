"""Whether verdicts are as the labels of published problem packages say.

    python bench/package_fidelity.py FOLDER [--pypy /usr/bin/pypy3] [--only NAME ...]

FOLDER holds problem packages as Kattis and the ICPC write them (docs/problems.md names some). Each
submission that is one file of Python or C++ is judged on all tests: those in `accepted` should pass them, and
those in the folders for wrong ones should not. C++ is compiled with the machine's g++, in the sandbox.
Python runs in CPython, as the programs of a policy do; but labels of Python are for PyPy, and `--pypy` runs
it there instead, as a command.

A package that states no time limit has the one that its format defines: a multiple of what the slowest
accepted submission takes, in whole seconds, here of those in the same language. Accepted ones have as long
as `PATIENCE_S`, or 10 s in CPython. Exceptions are named. The last line of standard output is JSON: the
shares of verdicts as labelled, and of failures of the kind that the folder's name says.
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

PATIENCE_S = 60.0  # for accepted submissions of a package that states no limit
PATIENCE_WITH_CPYTHON_S = 10.0  # it may take a hundred times as long as PyPy
# The format leaves memory to the judge; problemtools has 2 GiB.
DEFAULTS = ExecutorConfig(default_time_limit_s=PATIENCE_S, default_memory_limit_bytes=2 << 30)
STACK_BYTES = DEFAULTS.default_memory_limit_bytes  # as much as there is memory, as on Kattis
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
    program: str | Command | None  # None if it does not compile


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
    parser.add_argument("--pypy", default="", metavar="PATH", help="runs Python; CPython if left out")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these packages alone")
    arguments = parser.parse_args()
    judged, not_compiled = list[Judged](), list[str]()
    with tempfile.TemporaryDirectory() as folder, Executor() as executor:
        packages = [arguments.folder / name for name in arguments.only or [""]]
        problems, conversion = converted(packages, Path(folder), executor)
        for problem in problems:
            package = arguments.folder / problem.id
            for each in judgements(problem, package, executor, arguments.pypy, not_compiled):
                judged.append(each)
                if not each.of_the_labelled_kind:
                    print(each, flush=True)
    print(json.dumps(report(judged, not_compiled, conversion)))


def converted(packages: Sequence[Path], folder: Path, executor: Executor) -> tuple[list[Problem], Conversion]:
    """The problems; those that state no time limit have `PATIENCE_S`."""
    choices = Choices(
        defaults=DEFAULTS,
        max_test_bytes=ProblemsConfig().max_test_bytes,
        public_tests=1,
        generated_tests=False,
        solutions=0,
    )
    output = folder / "problems.jsonl"
    conversion = convert("kattis", packages, output, choices=choices, executor=executor)
    return list(read_jsonl(output, defaults=DEFAULTS)), conversion


def judgements(
    problem: Problem, package: Path, executor: Executor, pypy: str, not_compiled: list[str]
) -> Iterator[Judged]:
    """Of all submissions; those that do not compile are added to `not_compiled`."""
    submissions = list[Submission]()
    for submission in submissions_of(package, executor, pypy):
        if submission.program is None:
            not_compiled.append(f"{problem.id} {submission.label}/{submission.name}")
        else:
            submissions.append(submission)
    for language in dict.fromkeys(LANGUAGES.values()):
        of_language = [each for each in submissions if each.language == language]
        is_slow = language == "Python" and not pypy
        patience_s = PATIENCE_WITH_CPYTHON_S if is_slow else PATIENCE_S
        yield from judgements_of_language(
            problem, of_language, executor, patience_s, time_multiplier(package)
        )


def submissions_of(package: Path, executor: Executor, pypy: str) -> Iterator[Submission]:
    for label in KINDS:
        for path in sorted((package / "submissions" / label).glob("*")):
            if path.suffix in LANGUAGES:
                language = LANGUAGES[path.suffix]
                program = program_of(path.read_bytes(), language, executor, pypy)
                yield Submission(label=label, name=path.name, language=language, program=program)


def program_of(source: bytes, language: str, executor: Executor, pypy: str) -> str | Command | None:
    """None where the compiler refuses it."""
    if language == "Python" and not pypy:
        return source.decode("utf-8")
    if language == "Python":
        return Command([pypy, "program.py"], files={"program.py": source}, stack_bytes=STACK_BYTES)
    return compiled(source, executor)


def compiled(source: bytes, executor: Executor) -> Command | None:
    """None where the compiler refuses it."""
    compiler = ["/usr/bin/g++", "-std=gnu++17", "-O2", "-w", "-o", "program", "program.cpp"]
    built = executor.build(Command(compiler, files={"program.cpp": source}, outputs=["program"]))
    if built.verdict is not Verdict.PASSED:
        return None
    return Command(["./program"], files=built.files, stack_bytes=STACK_BYTES)


def judgements_of_language(
    problem: Problem,
    submissions: Sequence[Submission],
    executor: Executor,
    patience_s: float,
    multiplier: float,
) -> Iterator[Judged]:
    """The accepted submissions first: they set the others' time limit if none is stated."""
    states_limit = problem.time_limit_s != PATIENCE_S
    limited = problem if states_limit else replace(problem, time_limit_s=patience_s)
    accepted = [each for each in submissions if each.label == "accepted"]
    slowest_s = 0.0
    for each, results in results_of(limited, accepted, executor):
        slowest_s = max(slowest_s, *(result.cpu_s for result in results))
        yield judged_as(limited, each, results)
    if accepted and not states_limit:
        limit_s = min(max(1, math.ceil(multiplier * slowest_s)), patience_s)
        limited = replace(problem, time_limit_s=limit_s)
    wrong = [each for each in submissions if each.label != "accepted"]
    for each, results in results_of(limited, wrong, executor):
        yield judged_as(limited, each, results)


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
    assert submission.program is not None
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
