from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlef.analysis import (
    Repairs,
    edit_size,
    identical_resubmission_rate,
    outcomes_by_turn,
    repair_rate,
    repairs_by_outcome,
    tallies,
    transitions,
)
from rlef.solve_rate import Tally
from tests.evaluation_examples import NO_CODE, PASSED, RAISED, WRONG, episode, transcript


def test_repairs_are_counted_among_the_episodes_whose_first_turn_failed() -> None:
    episodes = [
        episode(PASSED, solved=True),
        episode(WRONG, PASSED, solved=True),
        episode(WRONG, WRONG, PASSED),
    ]
    assert repair_rate(episodes) == 0.5
    assert repair_rate(episodes[:1]) is None


def test_only_code_that_equals_the_one_before_is_a_resubmission() -> None:
    repeated = episode(WRONG, WRONG, WRONG, codes=["a", "a", "b"])
    empty = episode(NO_CODE, NO_CODE, codes=[None, None])
    assert identical_resubmission_rate([repeated]) == 0.5
    assert identical_resubmission_rate([empty]) == 0.0
    assert identical_resubmission_rate([episode(PASSED)]) is None


def test_an_ended_episode_counts_in_no_later_turn() -> None:
    first, second = outcomes_by_turn([episode(PASSED), episode(WRONG, NO_CODE, codes=["a", None])])
    assert (first["passed"], first["wrong_output"], sum(first.values())) == (1, 1, 2)
    assert (second["no_code"], sum(second.values())) == (1, 1)


def test_transitions_count_each_pair_of_consecutive_outcomes() -> None:
    table = transitions([episode(WRONG, WRONG, PASSED), episode(WRONG, PASSED), episode(PASSED)])
    assert table == {"wrong_output": {"wrong_output": 1, "passed": 2}}


def test_repairs_are_told_apart_by_how_the_first_response_failed() -> None:
    dialogs = [
        episode(PASSED, solved=True),
        episode(WRONG, PASSED, solved=True),
        episode(WRONG, RAISED, WRONG),
        episode(RAISED, WRONG, PASSED),
    ]
    found = repairs_by_outcome(dialogs)
    assert found == {
        "exception": Repairs(failed=1, repaired=0),
        "wrong_output": Repairs(failed=2, repaired=1),
    }
    assert found["wrong_output"].rate == 0.5


def test_transcripts_are_tallied_by_problem_in_their_order() -> None:
    dialogs = [
        transcript(PASSED, solved=True, problem="b"),
        transcript(WRONG, PASSED, problem="a"),
        transcript(WRONG, PASSED, solved=True, problem="b"),
    ]
    assert tallies(dialogs) == [
        Tally(samples=2, passed_public=2, solved=2),
        Tally(samples=1, passed_public=1, solved=0),
    ]
    assert tallies(dialogs, first_only=True) == [
        Tally(samples=2, passed_public=1, solved=1),
        Tally(samples=1, passed_public=0, solved=0),
    ]


def test_an_unchanged_program_is_an_edit_of_size_0_and_another_alphabet_one_of_size_1() -> None:
    assert edit_size([episode(WRONG, WRONG, codes=["print(1)", "print(1)"])]) == 0.0
    assert edit_size([episode(WRONG, WRONG, codes=["aaaa", "zzzz"])]) == 1.0
    assert edit_size([episode(WRONG, WRONG, codes=["", ""])]) == 0.0


def test_an_edit_is_measured_by_the_characters_that_two_programs_share() -> None:
    """Of "ab" and "abab", chrF with beta 2 of orders 1 and 2: each n-gram order's precision and recall."""
    precision, recall = (2 / 4 + 1 / 3) / 2, (2 / 2 + 1 / 1) / 2
    by_hand = 5 * precision * recall / (4 * precision + recall)
    assert edit_size([episode(WRONG, WRONG, codes=["ab", "abab"])]) == pytest.approx(1 - by_hand)


def test_an_edit_needs_two_programs() -> None:
    assert edit_size([episode(WRONG, NO_CODE, WRONG, codes=["a", None, "b"]), episode(PASSED)]) is None


@given(st.text(max_size=30), st.text(max_size=30))
def test_an_edit_is_a_share(earlier: str, later: str) -> None:
    size = edit_size([episode(WRONG, WRONG, codes=[earlier, later])])
    assert size is not None
    assert -1e-9 <= size <= 1 + 1e-9
    assert earlier != later or size == 0.0
