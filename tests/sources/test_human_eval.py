"""HumanEval, HumanEval+ and MBPP+, through the real executor."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlef.prompts import extract_code
from rlef.records import Assertion, Expression, Problem
from rlef.sources.common import Found, Reason, SetAside
from rlef_sandbox import Executor, Tokens
from tests.sources import examples


def found(format_name: str, path: Path, executor: Executor | None = None) -> list[Problem]:
    outcomes = examples.read(format_name, path, executor)
    assert all(isinstance(outcome, Found) for outcome in outcomes), outcomes
    return [outcome.problem for outcome in outcomes if isinstance(outcome, Found)]


@pytest.mark.parametrize("name", ["HumanEval.jsonl", "HumanEval.jsonl.gz"])
def test_the_canonical_solution_passes_and_an_empty_body_fails(
    tmp_path: Path, executor: Executor, name: str
) -> None:
    path = examples.json_lines(tmp_path / name, examples.HUMAN_EVAL_ROWS)
    for problem in found("humaneval", path):
        assert examples.passes(executor, problem, problem.solutions[0])
        assert not examples.passes(executor, problem, problem.starter_code + "    pass\n")


def test_feedback_lists_assertions_and_the_prompt_begins_each_answer(
    tmp_path: Path, executor: Executor
) -> None:
    human_eval = found("humaneval", examples.json_lines(tmp_path / "H.jsonl", examples.HUMAN_EVAL_ROWS))
    path = examples.json_lines(tmp_path / "P.jsonl", [examples.HUMAN_EVAL_PLUS_ROW])
    for problem in (*human_eval, *found("humanevalplus", path, executor)):
        assert (problem.dialect, problem.stub) == ("evalplus", problem.starter_code.lstrip("\n"))
        assert problem.stub.strip() in problem.statement  # for models that are not begun with it
        body = problem.solutions[0].lstrip("\n").removeprefix(problem.stub)
        assert examples.passes(executor, problem, extract_code(f"{body}```\n", stub=problem.stub) or "")
    path = examples.json_lines(tmp_path / "M.jsonl", [examples.MBPP_PLUS_ROW])
    (mbpp_plus,) = found("mbppplus", path, executor)
    assert (mbpp_plus.dialect, mbpp_plus.stub) == ("evalplus", "")


def test_single_assertions_are_public_where_there_is_nothing_else(tmp_path: Path) -> None:
    path = examples.json_lines(tmp_path / "HumanEval.jsonl", examples.HUMAN_EVAL_ROWS)
    simple, loop = found("humaneval", path)
    assert simple.public_tests == (
        Assertion("assert add_all([1, 2], 3) == 6"),
        Assertion("assert add_all([], 1) == 1, 'empty'"),
    )
    assert loop.public_tests == loop.private_tests


def test_an_answer_need_not_repeat_what_the_stub_imports_and_defines(
    tmp_path: Path, executor: Executor
) -> None:
    path = examples.json_lines(tmp_path / "HumanEval.jsonl", examples.HUMAN_EVAL_ROWS)
    imports, helper = found("humaneval", path)
    assert examples.passes(
        executor, imports, "def add_all(numbers: List[int], start): return start + sum(numbers)"
    )
    assert examples.passes(executor, helper, "def twice(n): return helper(n) + 1")


def test_inputs_of_evalplus_get_the_values_of_the_canonical_solution(
    tmp_path: Path, executor: Executor
) -> None:
    path = examples.json_lines(tmp_path / "HumanEvalPlus.jsonl.gz", [examples.HUMAN_EVAL_PLUS_ROW])
    (problem,) = found("humanevalplus", path, executor)
    assert problem.public_tests == (
        Expression("halves([1, 2])", "[0.5, 1.0]"),
        Expression("halves([])", "[]"),
    )
    assert problem.private_tests == (
        Expression("halves([3.5])", "[1.75]"),
        Expression("halves([1000000000000])", "[500000000000.0]"),
        Expression("halves([float('inf')])", "[1e999]"),
    )
    assert problem.judge == Tokens(absolute=1e-6, relative=1e-7)
    assert problem.prelude == "import math"
    assert examples.passes(executor, problem, "def halves(numbers): return [n / 2 + 1e-8 for n in numbers]")
    assert not examples.passes(executor, problem, "def halves(numbers): return [n // 2 for n in numbers]")
    assert not examples.passes(executor, problem, "def halves(numbers): return tuple(n / 2 for n in numbers)")


def test_arguments_of_mbpp_get_their_tuples_and_its_sets_are_compared_as_sets(
    tmp_path: Path, executor: Executor
) -> None:
    path = examples.json_lines(tmp_path / "MbppPlus.jsonl.gz", [examples.MBPP_PLUS_ROW])
    (problem,) = found("mbppplus", path, executor)
    (public,) = problem.public_tests
    assert isinstance(public, Expression)
    assert public.code == "set(similar_elements((3, 4, 5, 6), (5, 7, 4, 10)))"
    assert problem.statement.startswith("Write a function to find the shared elements")
    assert "`similar_elements`" in problem.statement
    assert examples.passes(
        executor, problem, "def similar_elements(a, b): return [n for n in b if n in a] * 2"
    )
    assert not examples.passes(executor, problem, "def similar_elements(a, b): return list(a)")


def mbpp(function: str, body: str, *arguments: list[object]) -> examples.Row:
    row = examples.MBPP_PLUS_ROW | {"task_id": "Mbpp/9999", "entry_point": function}
    solution = f"def {function}(*given):\n    {body}\n"
    return row | {
        "canonical_solution": solution,
        "base_input": [arguments[0]],
        "plus_input": list(arguments),
    }


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        (mbpp("sum_div", "return 7", [8], [9]), "def sum_div(n): return 0", "def sum_div(n): return 1"),
        (
            mbpp("surface_Area", "return 33", [3, 4]),
            "def surface_Area(b, h): return 35",
            "def surface_Area(b, h): return 34",
        ),
        (
            mbpp("digit_distance_nums", "return 1", [12, 305]),
            "def digit_distance_nums(a, b): return 3 + 1 + 3",
            "def digit_distance_nums(a, b): return 8",
        ),
        (
            mbpp("check_str", "import re; return re.match('a', given[0])", ["a"], ["b"]),
            "def check_str(s): return s == 'a'",
            "def check_str(s): return True",
        ),
        (
            mbpp("are_equivalent", "return True", [1, 2]),
            "def are_equivalent(a, b): pass",
            "are_equivalent = 1",
        ),
    ],
    ids=lambda value: value["entry_point"] if isinstance(value, dict) else "",
)
def test_tasks_that_evalplus_judges_otherwise_are_judged_so(
    tmp_path: Path, executor: Executor, row: examples.Row, right: str, wrong: str
) -> None:
    (problem,) = found("mbppplus", examples.json_lines(tmp_path / "M.jsonl", [row]), executor)
    assert examples.passes(executor, problem, problem.solutions[0])
    assert examples.passes(executor, problem, right)
    assert not examples.passes(executor, problem, wrong)


def test_a_root_is_judged_by_the_value_of_the_polynomial(tmp_path: Path, executor: Executor) -> None:
    row = examples.HUMAN_EVAL_PLUS_ROW | {
        "entry_point": "find_zero",
        "prompt": "def find_zero(xs):\n",
        "canonical_solution": "    return -xs[0] / xs[1]\n",
        "base_input": [[[2, 4]]],
        "plus_input": [[[-1, 2]]],
        "atol": 1e-4,
    }
    (problem,) = found("humanevalplus", examples.json_lines(tmp_path / "H.jsonl", [row]), executor)
    assert examples.passes(executor, problem, "def find_zero(xs): return -xs[0] / xs[1] + 1e-6")
    assert not examples.passes(executor, problem, "def find_zero(xs): return -xs[0] / xs[1] + 1e-3")


def test_an_input_on_which_the_reference_exceeds_a_limit_is_left_out_and_the_problem_flagged(
    tmp_path: Path, executor: Executor
) -> None:
    """Of the values one is longer than a literal may be, one than what is kept, one takes for ever, and one
    has more digits than Python reads."""
    row = mbpp(
        "f", "return 'x' * given[0] if given[0] > 0 else sum(iter(int, 1))", [1], [1 << 21], [9**9], [0]
    )
    (problem,) = found("mbppplus", examples.json_lines(tmp_path / "M.jsonl", [row]), executor)
    assert [test.code for test in problem.private_tests] == ["f(1)"]
    assert problem.flags == ("tests_left_out",)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"plus_input": []}, Reason.NO_PRIVATE_TESTS),
        ({"base_input": None}, Reason.NO_PUBLIC_TESTS),
        ({"plus_input": [3]}, Reason.INVALID),
        ({"canonical_solution": "    return 1 / 0\n"}, Reason.REFERENCE_FAILS),
        ({"canonical_solution": "    return [b'\\\\0' * 10**8]\n"}, Reason.REFERENCE_FAILS),
        ({"atol": "0"}, Reason.INVALID),
        ({"task_id": "Mbpp/115", "base_input": [[3]]}, Reason.INVALID),
    ],
)
def test_a_task_without_usable_inputs_is_set_aside(
    tmp_path: Path, executor: Executor, change: examples.Row, reason: Reason
) -> None:
    path = examples.json_lines(tmp_path / "H.jsonl", [examples.HUMAN_EVAL_PLUS_ROW | change])
    (outcome,) = examples.read("humanevalplus", path, executor)
    assert isinstance(outcome, SetAside)
    assert outcome.reason is reason


def test_a_task_without_floats_is_compared_exactly(tmp_path: Path, executor: Executor) -> None:
    row = examples.HUMAN_EVAL_PLUS_ROW | {"canonical_solution": "    return [str(n) for n in numbers]\n"}
    (problem,) = found("humanevalplus", examples.json_lines(tmp_path / "H.jsonl", [row]), executor)
    assert problem.judge is None
