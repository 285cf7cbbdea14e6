from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlef.config import PPOConfig
from rlef.losses import policy_loss, token_logprobs, value_loss
from rlef.packing import pack
from rlef.ports import combine_statistics
from rlef.records import Batch, Episode
from tests.ppo_examples import VOCAB, episode, episodes, log_uniform, noise

SETTINGS = PPOConfig(entropy_coef=0.01)
levels = st.sampled_from(["turn", "token"])


def predicts_response(batch: Batch) -> Tensor:
    """[tokens] True where the next token was chosen by the policy."""
    return torch.cat([batch.response_mask[1:], torch.tensor([False])])


def loss_and_gradient(
    logits: Tensor, batch: Batch, old: Tensor, advantages: Tensor, normaliser: float = 5.0
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    logits = logits.clone().requires_grad_()
    loss, statistics = policy_loss(
        logits, batch, old_logprobs=old, advantages=advantages, settings=SETTINGS, normaliser=normaliser
    )
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad, statistics


def test_logprobs_stand_at_the_token_that_they_are_of() -> None:
    batch = pack([episode("..##.#")], value_level="turn")
    logits = noise(6, VOCAB)
    expected = [0.0] * 6
    for token in (2, 3, 5):
        expected[token] = float(logits[token - 1].log_softmax(0)[batch.token_ids[token]])
    assert token_logprobs(logits, batch).tolist() == pytest.approx(expected)


def test_logprobs_carry_a_gradient_to_the_predicting_rows_alone() -> None:
    batch = pack([episode("..##.#")], value_level="turn")
    logits = noise(6, VOCAB).requires_grad_()
    token_logprobs(logits, batch).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().amax(1).gt(0).tolist() == [False, True, True, False, True, False]


@given(made=episodes(), level=levels, chunks=st.integers(1, 4), seed=st.integers(0, 9))
def test_losses_of_some_rows_add_up_to_that_of_all(
    made: list[Episode], level: str, chunks: int, seed: int
) -> None:
    """Rows dealt out to three ranks, some of which may hold none that predicts anything."""
    batch = pack(made, value_level=level)  # type: ignore[arg-type]
    logits = noise(batch.num_tokens, VOCAB, seed=seed)
    old, advantages = log_uniform(batch.num_tokens), noise(batch.value_positions.shape[0], seed=seed)
    loss, gradient, statistics = loss_and_gradient(logits, batch, old, advantages)
    logprobs = token_logprobs(logits, batch)
    summed: list[dict[str, Tensor]] = []
    for rank in range(3):
        rows = torch.arange(batch.num_tokens)[torch.arange(batch.num_tokens) // chunks % 3 == rank]
        if rows.numel() == 0:
            continue
        own = logits[rows].requires_grad_()
        part, found = policy_loss(
            own,
            batch,
            old_logprobs=old,
            advantages=advantages,
            settings=SETTINGS,
            normaliser=5.0,
            rows=rows,
        )
        (moved,) = torch.autograd.grad(part, own)
        torch.testing.assert_close(moved, gradient[rows])
        logprobs = logprobs - token_logprobs(logits[rows], batch, rows=rows)
        loss = loss - part.detach()
        summed.append(found)
    assert float(loss) == pytest.approx(0.0, abs=1e-5)
    torch.testing.assert_close(logprobs, torch.zeros(batch.num_tokens))
    assert combine_statistics(summed) == pytest.approx(combine_statistics([statistics]), abs=1e-5)


def test_fresh_policy_moves_each_token_by_its_advantage_over_the_count() -> None:
    """When pi = pi_old = pi_behaviour, d loss / d logprob is -A / normaliser: policy gradient."""
    batch = pack([episode(".#.##")], value_level="turn")
    logits = noise(5, VOCAB).requires_grad_()
    logprobs = token_logprobs(logits, batch)
    batch = replace(batch, behaviour_logprobs=logprobs.detach())
    settings = PPOConfig()
    surrogate = -(2.0 * logprobs[1] - logprobs[3] - logprobs[4]) / 3.0
    (expected,) = torch.autograd.grad(surrogate, logits)
    loss, _ = policy_loss(
        logits,
        batch,
        old_logprobs=logprobs.detach(),
        advantages=torch.tensor([2.0, -1.0]),
        settings=settings,
        normaliser=3.0,
    )
    (actual,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(actual, expected)
    assert float(loss.detach()) == pytest.approx(0.0)  # -(2 - 1 - 1) / 3


def test_statistics_are_means_over_the_response_tokens() -> None:
    batch = pack([episode(".##")], value_level="turn")
    logits = torch.zeros(3, VOCAB)
    uniform = -torch.tensor(float(VOCAB)).log()
    old = torch.tensor([0.0, float(uniform), float(uniform) - 1.0])  # ratios 1 and e
    batch = replace(batch, behaviour_logprobs=torch.tensor([0.0, float(uniform), float(uniform) + 1.0]))
    _, _, statistics = loss_and_gradient(logits, batch, old, torch.ones(1), normaliser=2.0)
    e = 2.718281828
    assert {name: float(value) for name, value in statistics.items() if name != "loss"} == pytest.approx(
        {
            "tokens": 2.0,
            "clip_fraction": 0.0,  # e min(1 / e, 1) is not beyond the clip
            "approximate_kl": (e - 2.0) / 2.0,
            "behaviour_weight": (1.0 + 1.0 / e) / 2.0,
            "entropy": float(-uniform),
            "ratio_max": e,
        },
        rel=1e-5,
    )


@given(episodes(), levels, st.sampled_from([3.0, 1e9, float("nan")]))
def test_observation_tokens_cannot_move_the_policy_loss_or_its_gradient(
    made: list[Episode], level: str, poison: float
) -> None:
    batch = pack(made, value_level=level)
    logits, old = noise(batch.num_tokens, VOCAB), log_uniform(batch.num_tokens)
    advantages = noise(batch.value_positions.shape[0], seed=1)
    loss, gradient, statistics = loss_and_gradient(logits, batch, old, advantages)
    rows = predicts_response(batch)
    poisoned_loss, poisoned_gradient, poisoned_statistics = loss_and_gradient(
        torch.where(rows[:, None], logits, poison),
        replace(
            batch,
            token_ids=torch.where(batch.response_mask, batch.token_ids, 10**9),
            behaviour_logprobs=torch.where(batch.response_mask, batch.behaviour_logprobs, poison),
        ),
        torch.where(batch.response_mask, old, poison),
        advantages,
    )
    assert torch.equal(loss, poisoned_loss)
    assert torch.equal(gradient, poisoned_gradient)
    assert not gradient[~rows].any()
    assert statistics == poisoned_statistics


@given(episodes(), levels)
def test_packed_losses_are_the_sum_of_each_episodes_own(made: list[Episode], level: str) -> None:
    whole = pack(made, value_level=level)
    logits, old = noise(whole.num_tokens, VOCAB), log_uniform(whole.num_tokens)
    advantages = noise(whole.value_positions.shape[0], seed=1)
    loss, gradient, statistics = loss_and_gradient(logits, whole, old, advantages)
    summed = torch.zeros(())
    tokens = values = 0
    for item in made:
        alone = pack([item], value_level=level)
        own = slice(tokens, tokens + alone.num_tokens)
        part = slice(values, values + alone.value_positions.shape[0])
        own_loss, own_gradient, own_statistics = loss_and_gradient(
            logits[own], alone, old[own], advantages[part]
        )
        torch.testing.assert_close(gradient[own], own_gradient)
        assert own_statistics["ratio_max"] <= statistics["ratio_max"]
        summed += own_loss
        tokens, values = own.stop, part.stop
    torch.testing.assert_close(loss, summed)


def test_policy_settings_reach_the_loss() -> None:
    batch = pack([episode(".#")], value_level="turn")
    batch = replace(batch, behaviour_logprobs=torch.tensor([0.0, 0.0]))
    logits, old = torch.zeros(2, VOCAB), torch.tensor([0.0, -3.0])
    ratio = float(torch.tensor(3.0).exp() / VOCAB)  # about 2.87; min(pi / pi_behaviour, 1) = 1 / 7

    def loss(**changes: float | bool) -> float:
        settings = PPOConfig(**({"behaviour_correction": False} | changes))  # type: ignore[arg-type]
        value, _ = policy_loss(
            logits, batch, old_logprobs=old, advantages=torch.ones(1), settings=settings, normaliser=1.0
        )
        return float(value)

    assert loss() == pytest.approx(-1.2)
    assert loss(clip_ratio=0.5) == pytest.approx(-1.5)
    assert loss(clip_ratio=9.0) == pytest.approx(-ratio)
    assert loss(behaviour_correction=True) == pytest.approx(-ratio / VOCAB)
    assert loss(entropy_coef=0.1) == pytest.approx(-1.2 - 0.1 * float(torch.tensor(float(VOCAB)).log()))


def test_value_loss_by_hand() -> None:
    """V = 0.5 from V_old = 0, G = 1: clipped to 0.2, so 1/2 (0.2 - 1)^2; and V = V_old = 2, G = 1: 1/2."""
    batch = pack([episode(".#.#")], value_level="turn")
    loss, statistics = value_loss(
        torch.tensor([0.5, 2.0]),
        batch,
        old_values=torch.tensor([0.0, 2.0]),
        returns=torch.ones(2),
        settings=PPOConfig(),
        normaliser=2.0,
    )
    assert float(loss) == pytest.approx((0.32 + 0.5) / 2)
    assert {name: float(value) for name, value in statistics.items()} == pytest.approx(
        {"loss": 0.41, "values": 2.0, "clip_fraction": 0.5, "squared_error": 0.625}
    )


def test_values_of_another_batch_are_refused() -> None:
    batch = pack([episode(".#.#")], value_level="turn")
    with pytest.raises(ValueError, match=r"values have shape \[3\]; the batch has 2 values"):
        value_loss(
            torch.zeros(3),
            batch,
            old_values=torch.zeros(3),
            returns=torch.zeros(3),
            settings=PPOConfig(),
            normaliser=1.0,
        )
