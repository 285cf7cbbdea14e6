from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlef.advantages import advantages_and_returns, turn_kl, whiten
from rlef.packing import pack
from rlef.records import Episode
from tests.ppo_examples import episode, episodes, log_uniform, noise

levels = st.sampled_from(["turn", "token"])


def test_kl_is_the_mean_log_ratio_of_a_response_however_long() -> None:
    batch = pack([episode(".##.#")], value_level="turn")
    policy = torch.tensor([0.0, -1.0, -2.0, 0.0, -3.0])
    reference = torch.tensor([0.0, -1.5, -3.5, 0.0, -2.5])
    assert turn_kl(policy, reference, batch).tolist() == [1.0, -0.5]


def test_two_turns_by_hand() -> None:
    """Rewards 0 and 1, beta 0.5, KL 0.2 and -0.1: R = -0.1, 1.05; G = 0.95, 1.05; A = G - V."""
    batch = pack([episode(".##.##", rewards=(0.0, 1.0))], value_level="turn")
    old = torch.tensor([0.0, -1.0, -1.0, 0.0, -1.0, -1.0])
    reference = torch.tensor([0.0, -1.1, -1.3, 0.0, -0.8, -1.0])
    returns, advantages = advantages_and_returns(batch, old, reference, torch.tensor([0.5, 1.0]), kl_coef=0.5)
    torch.testing.assert_close(returns, torch.tensor([0.95, 1.05]))
    torch.testing.assert_close(advantages, torch.tensor([0.45, 0.05]))


def test_kl_of_a_later_turn_lowers_the_return_of_an_earlier_one() -> None:
    batch = pack([episode(".#.#")], value_level="turn")
    old, reference = torch.tensor([0.0, -1.0, 0.0, -1.0]), torch.tensor([0.0, -1.0, 0.0, -2.0])
    returns, _ = advantages_and_returns(batch, old, reference, torch.zeros(2), kl_coef=0.1)
    torch.testing.assert_close(returns, torch.tensor([-0.1, -0.1]))


def test_last_reward_reaches_every_turn_undiscounted() -> None:
    batch = pack([episode(".#.#.#", rewards=(0.0, 0.0, 1.0))], value_level="turn")
    returns, _ = advantages_and_returns(batch, torch.zeros(6), torch.zeros(6), torch.zeros(3), kl_coef=0.0)
    assert returns.tolist() == [1.0, 1.0, 1.0]


def test_one_turn_is_a_bandit() -> None:
    """With one turn the advantage is reward - beta KL - V, and nothing else."""
    batch = pack([episode(".#", rewards=(1.0,)), episode(".#", rewards=(-1.0,))], value_level="turn")
    old, reference = torch.tensor([0.0, -1.0, 0.0, -2.0]), torch.tensor([0.0, -3.0, 0.0, -2.0])
    _, advantages = advantages_and_returns(batch, old, reference, torch.tensor([0.25, 0.5]), kl_coef=0.1)
    torch.testing.assert_close(advantages, torch.tensor([1.0 - 0.1 * 2.0 - 0.25, -1.0 - 0.0 - 0.5]))


def test_at_token_level_each_token_takes_its_turns_return_and_its_own_value() -> None:
    batch = pack([episode(".##.#", rewards=(0.0, 1.0))], value_level="token")
    values = torch.tensor([0.25, 0.5, 2.0])
    returns, advantages = advantages_and_returns(batch, torch.zeros(5), torch.zeros(5), values, kl_coef=0.0)
    assert returns.tolist() == [1.0, 1.0, 1.0]
    assert advantages.tolist() == [0.75, 0.5, -1.0]


@given(episodes(), levels, st.sampled_from([0.5, 1e9, float("inf"), float("nan")]))
def test_observation_tokens_cannot_move_an_advantage(made: list[Episode], level: str, poison: float) -> None:
    batch = pack(made, value_level=level)
    old, reference = log_uniform(batch.num_tokens, seed=1), log_uniform(batch.num_tokens, seed=2)
    values = noise(batch.value_positions.shape[0])
    clean = advantages_and_returns(batch, old, reference, values, kl_coef=0.05)
    poisoned = advantages_and_returns(
        replace(batch, token_ids=torch.where(batch.response_mask, batch.token_ids, 10**9)),
        torch.where(batch.response_mask, old, poison),
        torch.where(batch.response_mask, reference, poison),
        values,
        kl_coef=0.05,
    )
    assert torch.equal(clean[0], poisoned[0])
    assert torch.equal(clean[1], poisoned[1])


@given(episodes(), levels)
def test_packed_equals_each_episode_alone(made: list[Episode], level: str) -> None:
    whole = pack(made, value_level=level)
    old, reference = log_uniform(whole.num_tokens, seed=1), log_uniform(whole.num_tokens, seed=2)
    values = noise(whole.value_positions.shape[0])
    returns, advantages = advantages_and_returns(whole, old, reference, values, kl_coef=0.05)
    tokens = seen = 0
    for item in made:
        alone = pack([item], value_level=level)
        own = slice(tokens, tokens + alone.num_tokens)
        part = slice(seen, seen + alone.value_positions.shape[0])
        expected = advantages_and_returns(alone, old[own], reference[own], values[part], kl_coef=0.05)
        assert torch.equal(returns[part], expected[0])
        assert torch.equal(advantages[part], expected[1])
        tokens, seen = own.stop, part.stop


def test_whitening_spans_micro_batches() -> None:
    whitened = whiten([torch.tensor([1.0, 2.0]), torch.tensor([3.0])])
    assert [part.tolist() for part in whitened] == [
        pytest.approx([-(1.5**0.5), 0.0]),
        pytest.approx([1.5**0.5]),
    ]


def test_whitening_no_micro_batch_gives_none() -> None:
    assert whiten([]) == []
