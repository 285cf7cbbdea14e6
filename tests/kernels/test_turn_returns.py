"""`interpreted_segments.py` runs these tests a second time, with the Triton kernels."""

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


def test_gradients_equal_finite_differences_twice() -> None:
    rewards = torch.randn(6, dtype=torch.float64, requires_grad=True)
    sequences = torch.tensor([0, 0, 0, 2, 5, 5])

    def returns(rewards: torch.Tensor) -> torch.Tensor:
        return turn_returns(rewards * rewards, sequences)

    assert torch.autograd.gradcheck(returns, (rewards,))
    assert torch.autograd.gradgradcheck(returns, (rewards,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    rewards = torch.ones(600, dtype=dtype)
    returns = turn_returns(rewards, torch.zeros(600, dtype=torch.int64))
    assert torch.equal(returns, torch.arange(600, 0, -1).to(dtype))


def test_strided_rewards_give_the_same_returns() -> None:
    table = torch.arange(8.0).view(4, 2)
    assert turn_returns(table[:, 1], torch.tensor([0, 0, 0, 1])).tolist() == [9.0, 8.0, 5.0, 7.0]


def test_torch_compile_steps_over_it_without_a_break() -> None:
    sequences = torch.tensor([3, 3, 3, 7])

    def whole(rewards: torch.Tensor) -> torch.Tensor:
        return turn_returns(2 * rewards, sequences) + 1

    rewards, same = (torch.arange(4.0, requires_grad=True) for _ in range(2))
    found, expected = torch.compile(whole, fullgraph=True, backend="aot_eager")(rewards), whole(same)
    found.sum().backward()
    expected.sum().backward()
    assert rewards.grad is not None
    assert torch.equal(found, expected)
    assert torch.equal(rewards.grad, same.grad)


def test_one_turn_returns_its_reward() -> None:
    assert turn_returns(torch.tensor([3.0]), torch.tensor([8])).tolist() == [3.0]


def test_no_turn_gives_no_return() -> None:
    assert turn_returns(torch.empty(0), torch.empty(0, dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize(
    ("rewards", "sequences", "message"),
    [
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


def test_on_a_cpu_sequences_that_do_not_ascend_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^turn_sequences do not ascend; sort the turns by sequence$"):
        turn_returns(torch.zeros(2), torch.tensor([1, 0]))
