from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlef_kernels import turn_returns


def test_each_turn_gets_its_own_and_all_later_rewards_of_its_sequence() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    assert turn_returns(rewards, torch.tensor([0, 0, 0, 1, 1])).tolist() == [7.0, 6.0, 4.0, 24.0, 16.0]


def test_sequence_numbers_may_leave_gaps() -> None:
    assert turn_returns(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3, 3, 9])).tolist() == [3.0, 2.0, 4.0]


@given(st.lists(st.lists(st.floats(-10, 10), min_size=1, max_size=5), max_size=5))
def test_equals_a_loop_over_each_sequence(sequences: list[list[float]]) -> None:
    rewards = torch.tensor([reward for turns in sequences for reward in turns], dtype=torch.float64)
    numbers = [number for number, turns in enumerate(sequences) for _ in turns]
    expected = [sum(turns[index:]) for turns in sequences for index in range(len(turns))]
    actual = turn_returns(rewards, torch.tensor(numbers, dtype=torch.int64))
    assert actual.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(st.lists(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=5), min_size=1, max_size=5))
def test_a_sequence_gets_the_same_bits_alone_as_among_others(sequences: list[list[float]]) -> None:
    rewards = torch.tensor([reward for turns in sequences for reward in turns])
    numbers = torch.tensor([number for number, turns in enumerate(sequences) for _ in turns])
    together = turn_returns(rewards, numbers)
    for number, turns in enumerate(sequences):
        alone = turn_returns(torch.tensor(turns), torch.zeros(len(turns), dtype=torch.int64))
        assert torch.equal(together[numbers == number], alone)


def test_a_nan_stays_in_its_sequence() -> None:
    rewards = torch.tensor([1.0, torch.nan, 2.0, 4.0])
    assert turn_returns(rewards, torch.tensor([0, 1, 1, 2])).isnan().tolist() == [False, True, False, False]


def test_no_turn_gives_no_return() -> None:
    assert turn_returns(torch.empty(0), torch.empty(0, dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize(
    ("rewards", "sequences", "message"),
    [
        (torch.zeros(2), torch.tensor([1, 0]), r"turn_sequences do not ascend; sort the turns by sequence"),
        (torch.zeros(2), torch.tensor([0]), r"turn_sequences has shape \[1\] but turn_rewards has \[2\]"),
        (torch.zeros(1), torch.zeros(1), r"turn_sequences is torch.float32; convert it to torch.int64"),
        (torch.zeros(1).int(), torch.tensor([0]), r"turn_rewards is torch.int32; convert it to a floating"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(
    rewards: torch.Tensor, sequences: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        turn_returns(rewards, sequences)
