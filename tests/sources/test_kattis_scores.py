"""Which packages with scores can be judged by all of their tests."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlef.sources.common import Found, SetAside
from rlef.sources.kattis_scores import Points, aggregated
from tests.sources import examples


def of_secret(flags: str) -> dict[str, str | None]:
    """Groups are graded with these flags, and nothing says how many points there are."""
    return {"data/testdata.yaml": None, "data/secret/testdata.yaml": f"grader_flags: {flags}\n"}


MIN_GROUPS = {
    f"data/secret/g{number}/testdata.yaml": "grader_flags: min\naccept_score: 40\n" for number in (1, 2)
}
AVERAGE_OF_THE_FIRST = {  # groups give 3, 1, 1 and 1 points, and if judging ends at the second, 3 and 0
    "data/secret/g1/testdata.yaml": "accept_score: 3\n",
    "data/secret/g2/testdata.yaml": "grader_flags: min\n",
    **{f"data/secret/g{number}/a.{ending}": "1\n" for number in (3, 4) for ending in ("in", "ans")},
}


@pytest.mark.parametrize(
    "changes",
    [
        of_secret("avg accept_if_any_accepted"),
        {"data/secret/testdata.yaml": "grader_flags: always_accept\n"},
        of_secret("max first_error"),
        of_secret("min accept_if_any_accepted") | MIN_GROUPS,
        {"problem.yaml": "type: [pass-fail, scoring]\n"},
    ],
)
def test_a_package_whose_full_score_takes_every_test_becomes_a_problem(
    tmp_path: Path, changes: dict[str, str | None]
) -> None:
    (outcome,) = examples.read("kattis", examples.kattis(tmp_path, "triple", **changes))
    assert isinstance(outcome, Found), outcome
    assert len(outcome.problem.private_tests) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            of_secret("max accept_if_any_accepted"),
            "the full score of 60 can be had without some of the tests",
        ),
        (
            of_secret("min accept_if_any_accepted")
            | {"data/secret/g2/testdata.yaml": "grader_flags: sum\naccept_score: 60\n"},
            "the full score of 40 can be had",
        ),
        (of_secret("avg accept_if_any_accepted") | AVERAGE_OF_THE_FIRST, "the full score of 1.5 can be had"),
        (
            {"data/secret/g1/testdata.yaml": "accept_score: 0\ngrader_flags: min\n"},
            "all tests give 60 points",
        ),
        ({"data/secret/g1/testdata.yaml": "accept_score: 3\nreject_score: 4\n"}, "and 4 if not"),
        ({"data/secret/g1/testdata.yaml": "accept_score: many\n"}, "accept_score 'many' is no number"),
        ({"data/secret/g1/testdata.yaml": "range: 40\n"}, "range 40 is not two numbers"),
        ({"data/secret/g1/testdata.yaml": "grading: custom\n"}, "grading 'custom'"),
        ({"data/secret/g1/testdata.yaml": "grader_flags: median\n"}, "no flag 'median'"),
        ({"data/secret/g1/testdata.yaml": "on_reject: pause\n"}, "on_reject 'pause'"),
        ({"data/secret/g1/test_group.yaml": "max_score: 40\n"}, "max_score"),
        ({"problem.yaml": "type: scoring\ngrading: {objective: min}\n"}, "the objective 'min'"),
        ({"problem.yaml": "type: scoring\ngrading: {accept_score: 2}\n"}, "grading says accept_score"),
        ({"problem.yaml": "type: scoring\ngrading: custom\n"}, "grading 'custom'"),
        ({"graders/grade.py": ""}, "graders of its own"),
        (
            {"problem.yaml": "type: scoring\nproblem_format_version: 2023-07\n", "output_validator/v.py": ""},
            "an output validator may give points",
        ),
    ],
)
def test_a_package_of_another_grading_is_set_aside(
    tmp_path: Path, changes: dict[str, str | None], said: str
) -> None:
    (outcome,) = examples.read("kattis", examples.kattis(tmp_path, "triple", **changes))
    assert isinstance(outcome, SetAside), outcome
    assert said in outcome.detail


# A group is its settings and its parts; a test is None.
Tree = tuple[dict[str, Any], list[Any]]
SETTINGS = st.fixed_dictionaries(
    {
        "on_reject": st.sampled_from(["break", "continue"]),
        "grader_flags": st.tuples(
            st.sampled_from(["", "sum", "avg", "min", "max"]),
            st.sampled_from(["", "first_error", "always_accept", "accept_if_any_accepted"]),
        ).map(" ".join),
        "accept_score": st.integers(1, 3),
        "reject_score": st.integers(0, 1),
    }
)
TESTS = st.lists(st.none(), min_size=1, max_size=3)
GROUPS = st.lists(st.none() | st.tuples(SETTINGS, TESTS), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(st.tuples(SETTINGS, GROUPS))
def test_no_less_than_all_tests_gives_a_full_score_that_takes_all(tree: Tree) -> None:
    assume(_points(tree, {}).takes_all_tests)
    num_tests = sum(1 if part is None else len(part[1]) for part in tree[1])
    _, full = _graded(tree, {}, iter([True] * num_tests))
    for passes in product([True, False], repeat=num_tests):
        accepted, score = _graded(tree, {}, iter(passes))
        assert all(passes) or not accepted or score < full


def _points(tree: Tree | None, inherited: dict[str, Any]) -> Points:
    if tree is None:
        return Points(full=inherited["accept_score"], most_with_a_failure=inherited["reject_score"])
    return aggregated([_points(part, tree[0]) for part in tree[1]], tree[0])


def _graded(tree: Tree | None, inherited: dict[str, Any], passes: Iterator[bool]) -> tuple[bool, float]:
    """What problemtools' judge and default grader give: whether it is accepted, and its score."""
    if tree is None:
        return (True, inherited["accept_score"]) if next(passes) else (False, inherited["reject_score"])
    judged = [_graded(part, tree[0], passes) for part in tree[1]]
    verdicts = [verdict for verdict, _ in judged]
    if tree[0]["on_reject"] == "break" and not all(verdicts):
        judged = judged[: verdicts.index(False) + 1]
        verdicts = verdicts[: len(judged)]
    flags, scores = tree[0]["grader_flags"].split(), [score for _, score in judged]
    any_is_enough = "accept_if_any_accepted" in flags and any(verdicts)
    accepted = any_is_enough or "always_accept" in flags or all(verdicts)
    if "avg" in flags:
        return accepted, sum(scores) / len(scores)
    return accepted, min(scores) if "min" in flags else max(scores) if "max" in flags else sum(scores)
