"""CodeContests' parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlef.config import ConfigError
from rlef.records import Problem
from rlef.sources.common import Found, Reason, SetAside
from rlef_sandbox import Test
from tests.sources import examples


def only(path: Path, **changes: Any) -> Problem:
    (found,) = examples.read("codecontests", path, **changes)
    assert isinstance(found, Found), found
    return found.problem


def test_a_row_becomes_a_problem(tmp_path: Path) -> None:
    problem = only(examples.code_contests(tmp_path / "train-00000-of-00039.parquet", {}))
    assert problem == Problem(
        id="1_A. Doubling",
        statement="Given n, print 2n.",
        public_tests=(Test("2\n", "4\n"),),
        private_tests=(Test("3\r\n", "6"), Test("5", "10\n\n")),
        time_limit_s=1.5,
        memory_limit_bytes=256_000_000,
        source="code_contests/codeforces",
        solutions=("print(2 * int(input()))",),
        incorrect_solutions=("print(int(input()) ** 2)",),
        difficulty="A",
        rating=800,
    )


def test_generated_tests_are_private_where_that_is_asked_for(tmp_path: Path) -> None:
    path = examples.code_contests(tmp_path / "valid.parquet", {})
    assert only(path, generated_tests=True).private_tests[2:] == (Test("7\n", "14\n"),)


@pytest.mark.parametrize("limit", [None, {"seconds": 0, "nanos": 0}])
def test_what_the_proto_leaves_unset_takes_the_defaults(tmp_path: Path, limit: object) -> None:
    unset = {"time_limit": limit, "memory_limit_bytes": 0, "cf_rating": 0, "difficulty": 0, "source": 0}
    problem = only(
        examples.code_contests(tmp_path / "p.parquet", unset | {"solutions": None, "generated_tests": None})
    )
    assert (problem.time_limit_s, problem.memory_limit_bytes) == (10.0, 1_000_000_000)
    assert (problem.difficulty, problem.rating, problem.solutions) == ("", None, ())
    assert problem.source == "code_contests/unknown"


@pytest.mark.parametrize(("number", "letter"), [(6, "external"), (7, "A"), (17, "K"), (19, "L"), (29, "V")])
def test_difficulties_are_the_names_of_the_proto(tmp_path: Path, number: int, letter: str) -> None:
    path = examples.code_contests(tmp_path / "p.parquet", {"difficulty": number})
    assert only(path).difficulty == letter


def test_a_statement_that_takes_any_answer_is_flagged(tmp_path: Path) -> None:
    text = "Print two numbers. If there are multiple answers, print any of them."
    problem = only(examples.code_contests(tmp_path / "p.parquet", {"description": text}))
    assert problem.flags == ("several_answers",)


NONE = {"input": [], "output": []}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"public_tests": NONE}, Reason.NO_PUBLIC_TESTS),
        ({"public_tests": None}, Reason.NO_PUBLIC_TESTS),
        ({"private_tests": NONE}, Reason.NO_PRIVATE_TESTS),
        ({"private_tests": {"input": ["1", "2"], "output": ["1"]}}, Reason.INVALID),
        ({"private_tests": {"input": [None], "output": ["1"]}}, Reason.INVALID),
        ({"description": ""}, Reason.INVALID),
        ({"memory_limit_bytes": -1}, Reason.INVALID),
        ({"input_file": "input.txt"}, Reason.UNSUPPORTED),
        ({"description": "This is an interactive problem."}, Reason.INTERACTIVE),
    ],
)
def test_a_row_that_cannot_be_used_is_set_aside_and_the_next_is_read(
    tmp_path: Path, change: examples.Row, reason: Reason
) -> None:
    path = examples.code_contests(tmp_path / "p.parquet", change, {})
    bad, good = examples.read("codecontests", path)
    assert isinstance(bad, SetAside)
    assert (bad.reason, bad.id, bad.place) == (reason, "1_A. Doubling", f"{path}, row 1")
    assert isinstance(good, Found)


def test_the_original_records_are_refused_with_what_to_fetch(tmp_path: Path) -> None:
    path = tmp_path / "code_contests_train.riegeli-00000-of-00128"
    path.write_bytes(b"\x83\xaf\x70\xd1")
    with pytest.raises(
        ConfigError, match=r"no reader is published .* fetch the .parquet files of the same set"
    ):
        examples.read("codecontests", path)
