"""`rlef problems check`: whether problems are what their sources say, by running the programs they ship."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from rlef.judging import job_of
from rlef.records import Assertion, Expression, Problem, ProblemTest, text_input
from rlef_sandbox import Call, Executor, Result, SandboxFault, Test, Verdict

SHORTEST_TELLING_OUTPUT = 8  # characters: a shorter answer stands in a statement by chance


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemCheck:
    """What is amiss with one problem; each list is empty where nothing is."""

    id: str
    solutions: int  # how many were run
    incorrect_solutions: int
    failing: list[str]  # solutions that fail, and on what
    accepted: list[str]  # known-wrong programs that pass
    flaky: list[str]  # programs whose verdicts differ between runs
    leaks: list[str]  # private tests that the public ones or the statement give away
    faults: list[str]  # what kept it from being judged

    @property
    def is_sound(self) -> bool:
        return not (self.failing or self.accepted or self.flaky or self.leaks or self.faults)


def check_problems(
    problems: Iterable[Problem], executor: Executor, *, runs: int, solutions: int
) -> Iterator[ProblemCheck]:
    """Each problem's own programs, at most `solutions` of each kind, `runs` times on all its tests.

    What a checker or the sandbox fails at is told of that problem; the others are checked all the same.
    """
    for problem in problems:
        right, wrong = problem.solutions[:solutions], problem.incorrect_solutions[:solutions]
        found: dict[str, list[str]] = {"failing": [], "accepted": [], "flaky": [], "faults": []}
        tests = [*problem.public_tests, *problem.private_tests]
        jobs = [job_of(problem, program, tests) for program in (*right, *wrong) for _ in range(runs)]
        try:
            results = executor.run_many(jobs)
        except SandboxFault as fault:
            found["faults"].append(str(fault))
            results = []
        for index in range(len(results) // runs):
            _judge(index, len(right), results[index * runs : (index + 1) * runs], found)
        yield ProblemCheck(
            id=problem.id,
            solutions=len(right),
            incorrect_solutions=len(wrong),
            leaks=list(_leaks(problem)),
            **found,
        )


def _judge(index: int, num_right: int, all_runs: list[list[Result]], found: dict[str, list[str]]) -> None:
    """One program: the first `num_right` should pass all tests, the others should not."""
    is_right = index < num_right
    name = f"solution {index}" if is_right else f"incorrect solution {index - num_right}"
    if any([run.verdict for run in runs] != [first.verdict for first in all_runs[0]] for runs in all_runs):
        differing = [
            f"test {number}: {', '.join(sorted({run.verdict.value for run in of_test}))}"
            for number, of_test in enumerate(zip(*all_runs, strict=True))
            if len({run.verdict for run in of_test}) > 1
        ]
        found["flaky"].append(f"{name}, {differing[0]}")
    failed = [
        (number, result) for number, result in enumerate(all_runs[0]) if result.verdict is not Verdict.PASSED
    ]
    if is_right and failed:
        number, result = failed[0]
        found["failing"].append(f"{name}, test {number}: {result.verdict.value}{_last_line(result)}")
    if not is_right and not failed:
        found["accepted"].append(name)


def _last_line(result: Result) -> str:
    line = result.stderr.strip().rpartition("\n")[2][:80]
    return f" ({line})" if line else ""


def _leaks(problem: Problem) -> Iterator[str]:
    """Private tests whose answer a policy is shown: equal to a public test, or written in the statement."""
    public = {_question(test) for test in problem.public_tests}
    for index, test in enumerate(problem.private_tests):
        if _question(test) in public:
            yield f"private test {index} is a public one"
        elif (answer := _answer(test)) and _is_told(_question(test), answer, problem.statement):
            yield f"private test {index} stands in the statement with its answer"


def _question(test: ProblemTest) -> str:
    if isinstance(test, (Assertion, Expression)):
        return test.code.strip()
    return text_input(test).strip() if isinstance(test, Test) else test.input.strip()


def _answer(test: ProblemTest) -> str:
    if isinstance(test, Assertion):
        return ""
    if isinstance(test, Expression):
        return test.expected
    return str(test.expected).strip() if isinstance(test, Call) else test.expected_output.strip()


def _is_told(question: str, answer: str, statement: str) -> bool:
    """Both stand in it, and together they are too long to do so by chance."""
    return (
        len(question) + len(answer) >= SHORTEST_TELLING_OUTPUT
        and bool(question)
        and question in statement
        and answer in statement
    )


def summary(checks: list[ProblemCheck]) -> dict[str, Any]:
    """Counts, and the problems with something amiss."""
    kinds = ("failing", "accepted", "flaky", "leaks", "faults")
    counts = Counter({kind: sum(bool(getattr(check, kind)) for check in checks) for kind in kinds})
    return {
        "problems": len(checks),
        "sound": sum(check.is_sound for check in checks),
        "solutions": sum(check.solutions for check in checks),
        "incorrect_solutions": sum(check.incorrect_solutions for check in checks),
        "problems_with": dict(counts),
        "amiss": [asdict(check) for check in checks if not check.is_sound],
    }


def table(checks: list[ProblemCheck]) -> Table:
    """One row for each problem with something amiss."""
    shown = Table("problem", "own solutions that fail", "wrong ones that pass", "flaky", "leaks", "faults")
    for check in checks:
        if not check.is_sound:
            cells = (check.failing, check.accepted, check.flaky, check.leaks, check.faults)
            shown.add_row(
                check.id, *("; ".join(cell[:2]) + (" ..." if len(cell) > 2 else "") for cell in cells)
            )
    return shown
