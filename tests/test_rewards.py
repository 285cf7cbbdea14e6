from __future__ import annotations

from dataclasses import replace

import pytest

from rlef.config import RewardConfig
from rlef.records import TurnOutcome
from rlef.rewards import turn_rewards
from tests.ppo_examples import episode

PAPER = RewardConfig()


def test_only_the_last_turn_is_rewarded_for_solving() -> None:
    assert turn_rewards(episode(".#.#.#", solved=True), PAPER) == (0.0, 0.0, 1.0)


def test_only_the_last_turn_is_punished_for_failing() -> None:
    assert turn_rewards(episode(".#.#.#", solved=False), PAPER) == (0.0, 0.0, -1.0)


def test_an_earlier_response_without_code_costs_a_fifth() -> None:
    outcomes = (TurnOutcome.NO_CODE, TurnOutcome.WRONG_OUTPUT, TurnOutcome.PASSED)
    assert turn_rewards(episode(".#.#.#", outcomes=outcomes, solved=True), PAPER) == (-0.2, 0.0, 1.0)


def test_a_last_response_without_code_costs_no_more_than_any_failure() -> None:
    assert turn_rewards(episode(".#", outcomes=(TurnOutcome.NO_CODE,)), PAPER) == (-1.0,)


@pytest.mark.parametrize(
    "outcome", [outcome for outcome in TurnOutcome if outcome is not TurnOutcome.NO_CODE]
)
def test_an_earlier_program_costs_nothing_however_it_fails(outcome: TurnOutcome) -> None:
    assert turn_rewards(episode(".#.#", outcomes=(outcome, TurnOutcome.PASSED), solved=True), PAPER) == (
        0.0,
        1.0,
    )


def test_passing_the_public_tests_alone_is_a_failure() -> None:
    assert turn_rewards(episode(".#", outcomes=(TurnOutcome.PASSED,), solved=False), PAPER) == (-1.0,)


def test_each_reward_is_a_setting() -> None:
    settings = RewardConfig(solved=5.0, failed=-3.0, no_code=-2.0)
    outcomes = (TurnOutcome.NO_CODE, TurnOutcome.PASSED)
    attempt = episode(".#.#", outcomes=outcomes, solved=True)
    assert turn_rewards(attempt, settings) == (-2.0, 5.0)
    assert turn_rewards(replace(attempt, solved=False), settings) == (-2.0, -3.0)


def test_an_episode_without_turns_is_refused() -> None:
    with pytest.raises(ValueError, match=r"episode 0 of example has no turn; drop it before scoring"):
        turn_rewards(episode(".."), PAPER)
