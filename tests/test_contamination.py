"""What an evaluation set has in common with a training set, on pairs whose answer is plain."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from rlef.cli import main
from rlef.contamination import (
    MIN_OVERLAP,
    MIN_SHARED_TESTS,
    MIN_SOLUTION_NODES,
    MIN_WORDS,
    N_GRAM_WORDS,
    find_contamination,
)
from rlef.problem_commands import find_contaminated_problems
from rlef.problems import write_jsonl
from rlef.records import Problem
from rlef_sandbox import Call, Test
from tests.small_runs import ROOT

STATEMENT = (
    "A farmer has a row of apple trees. Each tree bears a known number of apples. He picks all apples of "
    "some trees, no two of which are neighbours. Print the largest number of apples that he can have."
)
OTHER = "Given a text, print how often each letter of the alphabet is in it, without regard to case."
PROGRAM = """
apples = list(map(int, input().split()))
take, leave = 0, 0
for number in apples:
    take, leave = leave + number, max(take, leave)
print(max(take, leave))
"""


def problem(name: str, statement: str, **fields: Any) -> Problem:
    own_tests = tuple(Test(f"{name} {number}\n", f"{number}\n") for number in range(3))
    return replace(
        Problem(
            id=name,
            statement=statement,
            public_tests=own_tests[:1],
            private_tests=own_tests[1:],
            time_limit_s=1.0,
            memory_limit_bytes=1 << 28,
            source="hand",
        ),
        **fields,
    )


ASKED = problem("asked", STATEMENT, solutions=(PROGRAM,))


def evidence(*train: Problem, **settings: Any) -> list[tuple[str, str]]:
    found = find_contamination([problem("innocent", OTHER), *train], [ASKED], **settings)
    return [(each.train_id, each.evidence) for each in found]


def test_problems_with_nothing_in_common_are_not_found() -> None:
    assert evidence() == []


def test_a_statement_that_differs_in_case_and_blanks_is_the_same() -> None:
    assert evidence(problem("copy", STATEMENT.upper().replace(" ", "\n"))) == [("copy", "statement")]


def test_a_statement_with_another_frame_and_ending_is_nearly_the_same() -> None:
    near = f"Problem 7! {STATEMENT.rpartition('.')[0].replace(',', '')} after the harvest."
    (found,) = find_contamination([problem("near", near)], [ASKED])
    assert (found.evidence, found.overlap) == ("near_statement", 1.0)
    start_alone = problem("start", STATEMENT[: len(STATEMENT) // 2] + OTHER)
    assert evidence(start_alone) == []
    assert evidence(start_alone, min_overlap=0.2) == [("start", "near_statement")]


def test_a_short_statement_inside_another_is_found_and_a_very_short_one_is_not() -> None:
    short = problem("short", "Print the largest number of apples that he can have.")
    very_short = problem("very short", "Print the largest number.")
    found = find_contamination([ASKED], [short, very_short])
    assert [(each.eval_id, each.evidence) for each in found] == [("short", "near_statement")]


def test_all_tests_of_a_problem_in_another_are_found_whatever_their_order_and_blanks() -> None:
    tests = tuple(Test(f" {number} \r\n", "x") for number in range(MIN_SHARED_TESTS))
    asked = replace(ASKED, public_tests=tests[:1], private_tests=tests[1:])
    more = tuple(Test(f"{number}", " x\n") for number in reversed(range(MIN_SHARED_TESTS + 2)))
    train = problem("tests", OTHER, public_tests=more[:2], private_tests=more[2:])
    found = list(find_contamination([train], [asked]))
    assert [each.evidence for each in found] == ["tests"]
    assert list(find_contamination([asked], [train])) == []  # which has two tests of its own
    few = replace(asked, private_tests=tests[1 : MIN_SHARED_TESTS - 1])
    assert list(find_contamination([train], [few])) == []


def test_calls_are_compared_by_their_values() -> None:
    calls = tuple(Call([number], [number, "a"]) for number in range(MIN_SHARED_TESTS))
    asked = replace(ASKED, public_tests=calls[:1], private_tests=calls[1:])
    assert [each.evidence for each in find_contamination([replace(asked, id="same")], [asked])] == [
        "statement",
        "tests",
        "solution",
    ]


@pytest.mark.parametrize("program", ["print(", "\0", "1 is 1", "(" * 10_000, "print(1)"])
def test_a_solution_counts_by_its_syntax_tree_unless_it_is_none_or_a_commonplace(program: str) -> None:
    asked = replace(ASKED, solutions=(program, PROGRAM))
    laid_out = PROGRAM.replace("    take", "  # either\n  take").replace(" + ", "+")
    train = problem("solved", OTHER, solutions=(laid_out, program))
    assert [each.evidence for each in find_contamination([train], [asked])] == ["solution"]
    assert list(find_contamination([replace(train, solutions=(program,))], [asked])) == []


words = st.lists(st.sampled_from("abc"), min_size=8, max_size=24).map(" ".join)


@given(st.lists(words, min_size=1, max_size=4), st.lists(words, min_size=1, max_size=4))
def test_the_index_finds_what_comparing_all_pairs_finds(train: list[str], asked: list[str]) -> None:
    def grams(text: str, length: int) -> set[str]:
        split = text.split()
        return {" ".join(split[start : start + length]) for start in range(len(split) - length + 1)}

    expected = set()
    for wanted_place, wanted in enumerate(asked):
        length = min(13, len(wanted.split()))
        for place, text in enumerate(train):
            own = grams(wanted, length)
            if wanted == text or len(own & grams(text, length)) / len(own) >= 0.5:
                expected.add((str(wanted_place), str(place)))
    found = find_contamination(
        [problem(str(place), text) for place, text in enumerate(train)],
        [problem(str(place), text) for place, text in enumerate(asked)],
    )
    statements = [each for each in found if each.evidence in ("statement", "near_statement")]
    assert {(each.eval_id, each.train_id) for each in statements} == expected
    assert len(statements) == len(expected)


def test_the_command_tells_each_pair_and_ends_with_status_1_if_there_is_one(tmp_path: Path) -> None:
    train, asked, output = (tmp_path / name for name in ("train.jsonl", "eval.jsonl", "found.json"))
    write_jsonl(train, iter([problem("innocent", OTHER), problem("copy", STATEMENT)]))
    write_jsonl(asked, iter([ASKED]))
    arguments = ["problems", "contamination", str(train), str(asked), "--output", str(output)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "asked ~ copy: statement: the same but for case and blanks",
        f"1 problems of {asked} are in {train}, whole or in part",
    ]
    assert json.loads(output.read_text()) == [
        {
            "eval_id": "asked",
            "train_id": "copy",
            "evidence": "statement",
            "overlap": 1.0,
            "detail": "the same but for case and blanks",
        }
    ]
    write_jsonl(train, iter([problem("innocent", OTHER)]))
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert json.loads(output.read_text()) == []


def test_the_document_and_the_command_have_the_limits_of_the_code() -> None:
    text = " ".join((ROOT / "docs" / "problems.md").read_text(encoding="utf-8").split())
    for said in (
        f"n-grams of {N_GRAM_WORDS} words",
        f"A statement of {MIN_WORDS} to {N_GRAM_WORDS - 1} words is one n-gram",
        f"if they are {MIN_SHARED_TESTS} or more",
        f"at least {MIN_SOLUTION_NODES} nodes",
    ):
        assert said in text
    options = find_contaminated_problems.make_context("contamination", ["a", "b"]).params
    assert (options["words"], options["min_overlap"]) == (N_GRAM_WORDS, MIN_OVERLAP)
