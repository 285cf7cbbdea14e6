"""One learning step with the plain torch networks, on episodes that can be followed by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlef.config import OptimizerConfig, ParallelConfig, PPOConfig, RewardConfig, ValueLevel
from rlef.learner import Learner
from rlef.megatron_policy import build_networks
from rlef.packing import pack
from rlef.ports import Networks
from rlef.records import Episode, TurnOutcome
from rlef.torch_model import LlamaModel
from rlef.torch_policy import TorchNetwork
from tests.distributed import run_ranks
from tests.megatron_examples import ALONE, UNTIED, policy_twin, random_weights, value_twin
from tests.ppo_examples import episode

WEIGHTS = random_weights(UNTIED)
# With epsilon 1 AdamW is close to plain gradient descent: see megatron_examples.SMOOTH.
OPTIMIZER = OptimizerConfig(lr=0.1, value_lr=0.1, eps=1.0, warmup_updates=1, weight_decay=0.0)


def networks() -> Networks:
    reference = LlamaModel(UNTIED)
    reference.load_named({name: weight for name, weight in WEIGHTS.items() if name != "value_head.weight"})
    return Networks(
        policy=policy_twin(UNTIED, WEIGHTS, OPTIMIZER),
        reference=TorchNetwork(reference),
        value=value_twin(UNTIED, WEIGHTS, OPTIMIZER),
        parallel=ALONE,
    )


def learner(
    nets: Networks,
    *,
    updates: int = 1,
    value_level: ValueLevel = "turn",
    micro_batch_tokens: int = 1000,
    kl_coef: float = 0.05,
) -> Learner:
    ppo = PPOConfig(updates_per_step=updates, value_level=value_level, micro_batch_tokens=micro_batch_tokens)
    return Learner(nets, ppo=ppo, rewards=RewardConfig(kl_coef=kl_coef))


def on_policy(episodes: Sequence[Episode], policy: object) -> list[Episode]:
    """The episodes as if this policy had sampled them: with its log-probs."""
    (logprobs,) = policy.forward([pack(episodes, value_level="turn")])  # type: ignore[attr-defined]
    parts = torch.split(logprobs, [len(episode.token_ids) for episode in episodes])
    return [replace(episode, logprobs=part.tolist()) for episode, part in zip(episodes, parts, strict=True)]


def response_logprob(nets: Networks, one: Episode) -> float:
    (logprobs,) = nets.policy.forward([pack([one], value_level="turn")])
    return float(logprobs.sum())


def weights(network: object) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in network.named_weights()}  # type: ignore[attr-defined]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def after_step(
    episodes: Sequence[Episode], **settings: object
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    nets = networks()
    learner(nets, **settings).step(episodes)  # type: ignore[arg-type]
    return weights(nets.policy), weights(nets.value)


def test_a_step_makes_rewarded_responses_likelier_and_punished_ones_less_likely() -> None:
    nets = networks()
    solved, failed = on_policy(
        [episode("..###", seed=1, solved=True), episode("..###", seed=2, solved=False)], nets.policy
    )
    before = response_logprob(nets, solved), response_logprob(nets, failed)
    learner(nets).step([solved, failed])
    assert response_logprob(nets, solved) > before[0]
    assert response_logprob(nets, failed) < before[1]


def test_equal_returns_teach_the_policy_nothing() -> None:
    nets = networks()
    nets = replace(nets, value=zero_values())
    before = weights(nets.policy)
    learner(nets).step([episode("..##", seed=1), episode(".###", seed=2)])
    assert equal(before, weights(nets.policy))


def zero_values() -> TorchNetwork:
    """A value network as training starts it: its head at zero."""
    named = WEIGHTS | {"value_head.weight": torch.zeros_like(WEIGHTS["value_head.weight"])}
    return value_twin(UNTIED, named, OPTIMIZER)


def test_the_value_network_moves_towards_the_returns() -> None:
    nets = replace(networks(), value=zero_values())
    one = episode("..##", seed=1, solved=True)
    learner(nets).step([one, episode("..#", seed=2, solved=True)])
    batch = pack([replace(one, rewards=(1.0,))], value_level="turn")
    (values,) = nets.value.forward([batch])
    assert 0 < float(values) < 1


def test_a_value_warm_up_leaves_the_policy_alone() -> None:
    nets = networks()
    policy, value = weights(nets.policy), weights(nets.value)
    metrics = learner(nets).step(
        [episode("..##", seed=1, solved=True), episode(".#", seed=2)], train_policy=False
    )
    assert equal(policy, weights(nets.policy))
    assert not equal(value, weights(nets.value))
    assert "value/loss" in metrics
    assert "policy/loss" not in metrics


def test_the_first_steps_kl_is_zero_and_the_seconds_is_not() -> None:
    nets = networks()
    episodes = [episode("..###", seed=1, solved=True), episode("..##", seed=2)]
    steps = [learner(nets).step(episodes) for _ in range(2)]
    assert steps[0]["kl"] == 0
    assert abs(steps[1]["kl"]) > 1e-4


def test_the_return_is_the_reward_of_the_turns_to_come() -> None:
    no_code_then_solved = episode(
        "..#.#", outcomes=(TurnOutcome.NO_CODE, TurnOutcome.PASSED), solved=True, seed=1
    )
    metrics = learner(networks()).step([no_code_then_solved])
    assert metrics["return"] == pytest.approx(((-0.2 + 1.0) + 1.0) / 2)  # mean over the two turns


def test_each_episode_is_used_in_one_update() -> None:
    nets = networks()
    episodes = [episode("." + "#" * length, seed=length, solved=length % 2 == 0) for length in (1, 2, 3, 4)]
    metrics = learner(nets, updates=2).step(episodes)
    assert metrics["policy/tokens"] * 2 == 1 + 2 + 3 + 4
    assert nets.policy.state_dict().facts["updates"] == 2


@pytest.mark.parametrize(("level", "values"), [("turn", 2), ("token", 5)])
def test_a_value_is_read_per_turn_or_per_response_token(level: ValueLevel, values: int) -> None:
    metrics = learner(networks(), value_level=level).step([episode("..##.###", seed=1)])
    assert metrics["value/values"] == values


def test_with_responses_of_one_token_both_levels_are_the_same() -> None:
    episodes = [episode("..#.#", seed=1, solved=True), episode("...#", seed=2)]
    turn, token = (after_step(episodes, value_level=level) for level in ("turn", "token"))
    assert equal(turn[0], token[0])
    assert equal(turn[1], token[1])


def test_with_longer_responses_the_levels_differ() -> None:
    episodes = [episode("..##.###", seed=1, solved=True), episode("...#", seed=2)]
    turn, token = (after_step(episodes, value_level=level) for level in ("turn", "token"))
    assert not equal(turn[0], token[0])


@settings(max_examples=25)
@given(
    st.lists(st.floats(allow_nan=True), min_size=5, max_size=5),
    st.lists(st.integers(0, 6), min_size=2, max_size=2),
)
def test_what_the_policy_did_not_choose_cannot_move_it(logprobs: list[float], last_ids: list[int]) -> None:
    """Recorded log-probs of the prompt and the feedback, and any token after the last response."""
    one, other = episode("..##.#..", seed=1, solved=True), episode("..#", seed=2)
    positions = [place for place, chosen in enumerate(one.sampled) if not chosen]
    changed = list(one.logprobs)
    for place, logprob in zip(positions, logprobs, strict=True):
        changed[place] = logprob
    disturbed = replace(one, logprobs=changed, token_ids=one.token_ids[:-2] + last_ids)
    expected, found = after_step([one, other]), after_step([disturbed, other])
    assert equal(found[0], expected[0])
    assert equal(found[1], expected[1])


def test_small_micro_batches_give_the_weights_of_a_large_one() -> None:
    episodes = [episode("..##.###", seed=seed, solved=seed % 2 == 0) for seed in range(4)]
    whole, divided = (after_step(episodes, micro_batch_tokens=tokens) for tokens in (1000, 8))
    for expected, found in zip(whole, divided, strict=True):
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted() -> None:
    nets = networks()
    before, value_before = weights(nets.policy), weights(nets.value)
    broken = replace(episode("..##", seed=1, solved=True), logprobs=[0.0, 0.0, math.nan, -1.0])
    metrics = learner(nets, updates=2).step([broken, episode("..#", seed=2, solved=True), *sound_pair()])
    assert metrics["policy/skipped_updates"] == 1
    assert metrics["value/skipped_updates"] == 0
    assert all(bool(weight.isfinite().all()) for weight in weights(nets.policy).values())
    assert not equal(before, weights(nets.policy))  # by the other update
    assert not equal(value_before, weights(nets.value))


def sound_pair() -> list[Episode]:
    return [episode("..#", seed=3), episode("..##", seed=4)]


EPISODES = [
    episode("..####.##", seed=4, solved=True),
    episode(".#.#.#..", seed=5),
    episode("...#", seed=6, solved=True),
    episode("..##.##", seed=7),
]


def learn_with_shared_packs() -> tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor]]:
    """On each of two ranks that share the tokens of every pack: metrics and weights after a step."""
    parallel = ParallelConfig(processes=2, context=2, offload_reference=True)
    nets = build_networks(UNTIED, WEIGHTS, parallel=parallel, optimizer=OPTIMIZER)
    metrics = learner(nets, updates=2, micro_batch_tokens=12).step(EPISODES)
    return metrics, weights(nets.policy), weights(nets.value)


@pytest.mark.multiprocess
def test_ranks_that_share_packs_learn_what_one_learns_alone(tmp_path: Path) -> None:
    nets = networks()
    expected = learner(nets, updates=2, micro_batch_tokens=12).step(EPISODES)
    for metrics, policy, value in run_ranks(learn_with_shared_packs, ranks=2, folder=tmp_path, timeout_s=900):
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
        for found, twin in ((policy, weights(nets.policy)), (value, weights(nets.value))):
            assert found.keys() == twin.keys()
            for name, weight in twin.items():
                torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6)
