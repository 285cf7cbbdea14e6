"""APPS, TACO and verl: inputs and outputs in one field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlef.records import Assertion, Problem
from rlef.sources.common import Found, Reason, SetAside
from rlef_sandbox import Call, Executor, Test
from tests.sources import examples


def only(format_name: str, path: Path) -> Problem:
    (found,) = examples.read(format_name, path)
    assert isinstance(found, Found), found
    return found.problem


def test_the_first_test_is_public_and_lists_are_lines(tmp_path: Path) -> None:
    problem = only("apps", examples.json_lines(tmp_path / "train.jsonl", [examples.APPS_ROW]))
    assert problem.public_tests == (Test("1 2\n", "3\n"),)
    assert problem.private_tests == (Test("3 4", "7"),)
    assert (problem.id, problem.source, problem.difficulty) == ("apps/12", "apps", "introductory")
    assert len(problem.solutions) == 2


def test_a_value_in_a_list_of_its_own_is_accepted_too(tmp_path: Path, executor: Executor) -> None:
    problem = only("apps", examples.json_lines(tmp_path / "train.jsonl", [examples.APPS_FUNCTION_ROW]))
    assert problem.public_tests == (Call([[1, 2]], [[2, 1]]),)
    assert problem.private_tests == (Call([[3]], [3]),)
    assert examples.passes(executor, problem, problem.solutions[0])
    assert not examples.passes(executor, problem, problem.solutions[0].replace("x[::-1]", "x"))


def test_tacos_limits_have_units(tmp_path: Path) -> None:
    problem = only("taco", examples.json_lines(tmp_path / "train.jsonl", [examples.TACO_ROW]))
    assert (problem.time_limit_s, problem.memory_limit_bytes) == (2.0, 256_000_000)
    assert problem.source == "taco/codeforces"
    assert problem.id.startswith("taco/unnamed/")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"input_output": ""}, Reason.NO_PUBLIC_TESTS),
        ({"input_output": '{"inputs": ["1"], "outputs": ["1"]}'}, Reason.NO_PRIVATE_TESTS),
        ({"input_output": '{"inputs": ["1", "2"], "outputs": ["1"]}'}, Reason.INVALID),
        ({"input_output": '{"inputs": [1, 2], "outputs": ["1", "2"]}'}, Reason.INVALID),
        ({"input_output": '{"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}'}, Reason.INVALID),
        ({"input_output": "{"}, Reason.UNREADABLE),
        ({"input_output": "[]"}, Reason.INVALID),
        ({"solutions": "[1]"}, Reason.INVALID),
        ({"time_limit": "soon"}, Reason.INVALID),
        ({"question": None}, Reason.INVALID),
    ],
)
def test_a_row_that_cannot_be_used_is_set_aside(tmp_path: Path, change: examples.Row, reason: Reason) -> None:
    path = examples.json_lines(tmp_path / "train.jsonl", [examples.TACO_ROW | change])
    (outcome,) = examples.read("taco", path)
    assert isinstance(outcome, SetAside)
    assert outcome.reason is reason


def test_a_row_of_verl_is_what_its_user_says_and_its_ground_truth(tmp_path: Path) -> None:
    problem = only("verl", examples.verl(tmp_path / "train.parquet", {}))
    assert problem.statement == "Print the sum of two numbers."
    assert problem.public_tests == (Test("1 2\n", "3\n"),)
    assert problem.source == "verl/codecontests"
    assert problem.id.startswith("codecontests/3/")


def truth(value: object) -> examples.Row:
    return {"reward_model": {"style": "rule", "ground_truth": json.dumps(value)}}


def test_assertions_of_verl_are_tests_one_by_one(tmp_path: Path, executor: Executor) -> None:
    assertions = truth({"functional": "assert f(1) == 2\n\nassert f(2) == 3\n"})
    problem = only("verl", examples.verl(tmp_path / "train.parquet", assertions))
    assert problem.public_tests == (Assertion("assert f(1) == 2"),)
    assert problem.private_tests == (Assertion("assert f(2) == 3"),)
    assert examples.passes(executor, problem, "def f(n): return n + 1")
    assert not examples.passes(executor, problem, "def f(n): return 2")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (truth({"pytest": "def test(): pass"}), Reason.UNSUPPORTED),
        (truth("72"), Reason.UNSUPPORTED),
        (truth({"functional": "for i in range(3):\n    assert f(i)"}), Reason.NO_PRIVATE_TESTS),
        ({"prompt": [{"role": "system", "content": "Think."}]}, Reason.INVALID),
    ],
)
def test_a_row_of_verl_that_cannot_be_used_is_set_aside(
    tmp_path: Path, change: examples.Row, reason: Reason
) -> None:
    (outcome,) = examples.read("verl", examples.verl(tmp_path / "train.parquet", change))
    assert isinstance(outcome, SetAside)
    assert outcome.reason is reason
