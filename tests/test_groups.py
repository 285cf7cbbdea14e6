"""Learning without a value network: from groups of rollouts of one problem, and by imitation."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rlef import losses
from rlef.advantages import group_baselines, turn_kl
from rlef.checkpoint import CheckpointStore
from rlef.config import ConfigError, GroupMethod, Method, ParallelConfig, PPOConfig, RewardConfig
from rlef.learner import Learner
from rlef.megatron_policy import build_networks
from rlef.packing import pack
from rlef.plan import TRAINER, make_plan
from rlef.plan_cluster import GPUS, Assumptions, Cluster
from rlef.plan_model import read_model
from rlef.plan_time import workload_of
from rlef.ports import Networks
from rlef.records import Batch, Episode, TurnOutcome
from rlef.rewards import turn_rewards
from rlef.settings_file import load_config
from tests.distributed import run_ranks
from tests.megatron_examples import UNTIED
from tests.ppo_examples import episode
from tests.small_runs import read_lines, run_here
from tests.test_learner import OPTIMIZER, WEIGHTS, equal, networks, weights

methods = st.sampled_from(["grpo", "rloo"])
sizes = st.integers(2, 5)
numbers = st.floats(-2, 2, width=32)
REWARDS = RewardConfig(kl_coef=0.5)
NO_CODE, WRONG = TurnOutcome.NO_CODE, TurnOutcome.WRONG_OUTPUT


def twin(
    turn_returns: Sequence[Sequence[float]],
    rewards: Sequence[float],
    *,
    method: str,
    size: int,
    normalise: bool,
) -> list[list[float]]:
    """Advantages of each episode's turns, group by group and episode by episode."""
    advantages: list[list[float]] = []
    for index, own in enumerate(turn_returns):
        first = index - index % size
        group = range(first, first + size)
        if method == "rloo":
            baseline = statistics.fmean(turn_returns[other][0] for other in group if other != index)
            advantages.append([value - baseline for value in own])
            continue
        baseline = statistics.fmean(turn_returns[other][0] for other in group)
        deviation = statistics.stdev(rewards[other] for other in group) if normalise else 1.0
        advantages.append([(value - baseline) / deviation if deviation else 0.0 for value in own])
    return advantages


@st.composite
def grouped(draw: st.DrawFn) -> tuple[int, list[float], list[float]]:
    """(size of a group, returns, rewards) of one to three groups."""
    size = draw(sizes)
    count = size * draw(st.integers(1, 3))
    rewards = st.lists(st.sampled_from([1.0, -1.0, -1.2, -1.4, 0.8]), min_size=count, max_size=count)
    return size, draw(st.lists(numbers, min_size=count, max_size=count)), draw(rewards)


def first_advantages(
    returns: Sequence[float],
    rewards: Sequence[float],
    *,
    method: GroupMethod,
    size: int,
    normalise: bool = True,
) -> Tensor:
    whole = torch.tensor(returns, dtype=torch.float64)
    of_environment = torch.tensor(rewards, dtype=torch.float64)
    baselines, scales = group_baselines(whole, of_environment, method=method, size=size, normalise=normalise)
    return (whole - baselines) * scales


@given(grouped(), methods, st.booleans())
def test_baselines_and_scales_are_those_of_the_twin(
    made: tuple[int, list[float], list[float]], method: GroupMethod, normalise: bool
) -> None:
    size, returns, rewards = made
    found = first_advantages(returns, rewards, method=method, size=size, normalise=normalise)
    expected = twin([[value] for value in returns], rewards, method=method, size=size, normalise=normalise)
    assert found.tolist() == pytest.approx([own[0] for own in expected], abs=1e-9)


@given(grouped(), methods)
def test_the_advantages_of_a_groups_first_turns_add_up_to_nothing(
    made: tuple[int, list[float], list[float]], method: GroupMethod
) -> None:
    size, returns, rewards = made
    sums = first_advantages(returns, rewards, method=method, size=size).view(-1, size).sum(1)
    assert sums.tolist() == pytest.approx([0.0] * len(sums), abs=1e-9)


@given(grouped(), methods, numbers)
def test_what_every_rollout_of_a_problem_gains_moves_no_advantage(
    made: tuple[int, list[float], list[float]], method: GroupMethod, gain: float
) -> None:
    size, returns, rewards = made
    before = first_advantages(returns, rewards, method=method, size=size)
    shifted = [value + gain for value in returns], [value + gain for value in rewards]
    after = first_advantages(*shifted, method=method, size=size)
    assert after.tolist() == pytest.approx(before.tolist(), abs=1e-6)


@given(sizes, st.sampled_from([1.0, -1.0, -1.2, -1.4]), st.data())
def test_a_group_of_equal_rewards_teaches_grpo_nothing_whatever_its_kl(
    size: int, reward: float, data: st.DataObject
) -> None:
    returns = data.draw(st.lists(numbers, min_size=size, max_size=size))
    assert not first_advantages(returns, [reward] * size, method="grpo", size=size).any()


@given(grouped(), st.floats(0.25, 8))
def test_grpo_does_not_see_the_scale_of_rewards(
    made: tuple[int, list[float], list[float]], scale: float
) -> None:
    size, returns, rewards = made
    before = first_advantages(returns, rewards, method="grpo", size=size)
    scaled = [scale * value for value in returns], [scale * value for value in rewards]
    after = first_advantages(*scaled, method="grpo", size=size)
    assert after.tolist() == pytest.approx(before.tolist(), abs=1e-6)


GROUPS = [
    episode("..##.###", seed=1, solved=True, outcomes=(NO_CODE, WRONG)),
    episode("..#.##", seed=2),
    episode("..####", seed=3, solved=True),
    episode(".##.#.##", seed=4, outcomes=(NO_CODE, NO_CODE, WRONG)),
    episode(".#", seed=5),
    episode(".##.#", seed=6),
    episode("...#.#", seed=7, solved=True),
    episode(".###", seed=8),
]


def without_value() -> Networks:
    return replace(networks(), value=None)


def learner(
    nets: Networks,
    method: Method,
    *,
    updates: int = 1,
    normalise: bool = True,
    micro_batch_tokens: int = 1000,
) -> Learner:
    ppo = PPOConfig(
        method=method,
        updates_per_step=updates,
        normalise_advantages=normalise,
        micro_batch_tokens=micro_batch_tokens,
    )
    return Learner(nets, ppo=ppo, rewards=REWARDS, group_size=4)


def advantages_by_hand(batch: Batch, kl: Tensor, *, method: str, normalise: bool) -> Tensor:
    """Of GROUPS in one pack: returns and baselines turn by turn."""
    returns: list[list[float]] = []
    rewards: list[float] = []
    of_turns = iter(kl.tolist())
    for one in GROUPS:
        own = [reward - REWARDS.kl_coef * next(of_turns) for reward in turn_rewards(one, REWARDS)]
        returns.append([sum(own[turn:]) for turn in range(len(own))])
        rewards.append(sum(turn_rewards(one, REWARDS)))
    found = twin(returns, rewards, method=method, size=4, normalise=normalise)
    advantages = torch.tensor([value for own in found for value in own])
    if method == "rloo" and normalise:
        advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    return advantages


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_step_is_the_ppo_loss_with_the_twins_advantages(method: GroupMethod, normalise: bool) -> None:
    """The second step, since in the first the KL term is zero."""
    found, expected = without_value(), without_value()
    for nets in (found, expected):
        learner(nets, "rloo").step(GROUPS)
    batch = pack([replace(one, rewards=turn_rewards(one, REWARDS)) for one in GROUPS], value_level="turn")
    (old,), (reference,) = expected.policy.forward([batch]), expected.reference.forward([batch])
    kl = turn_kl(old, reference, batch)
    assert float(kl.abs().max()) > 1e-3
    advantages = advantages_by_hand(batch, kl, method=method, normalise=normalise)

    def loss(logits: Tensor, _index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return losses.policy_loss(
            logits,
            batch,
            old_logprobs=old,
            advantages=advantages,
            settings=PPOConfig(),
            normaliser=batch.num_response_tokens,
        )

    expected.policy.update([batch], loss)
    metrics = learner(found, method, normalise=normalise, micro_batch_tokens=8).step(GROUPS)
    assert not {name for name in metrics if name.startswith("value/") or name == "explained_variance"}
    for name, weight in weights(expected.policy).items():
        torch.testing.assert_close(weights(found.policy)[name], weight, rtol=1e-4, atol=1e-6)


def test_an_update_has_whole_groups() -> None:
    """One group is solved and one is not, by all: neither can teach GRPO anything, unless they are mixed."""
    solved = [episode("..##", seed=seed, solved=True) for seed in range(4)]
    failed = [episode("..##", seed=seed) for seed in range(4, 8)]
    nets = without_value()
    before = weights(nets.policy)
    learner(nets, "grpo", updates=2).step([*solved, *failed])
    assert equal(before, weights(nets.policy))


def test_imitation_is_the_cross_entropy_of_solved_responses_alone() -> None:
    found, expected = without_value(), without_value()
    solved = [one for one in GROUPS if one.solved]

    def loss(logits: Tensor, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        one = solved[index]
        chosen = [place for place, sampled in enumerate(one.sampled) if sampled]
        predicted = logits[[place - 1 for place in chosen]]
        targets = torch.tensor([one.token_ids[place] for place in chosen])
        tokens = sum(sum(each.sampled) for each in solved)
        return nn.functional.cross_entropy(predicted, targets, reduction="sum") / tokens, {}

    expected.policy.update([pack([one], value_level="turn") for one in solved], loss)
    metrics = learner(found, "sft").step(GROUPS)
    assert metrics["policy/tokens"] == sum(sum(one.sampled) for one in solved)
    for name, weight in weights(expected.policy).items():
        torch.testing.assert_close(weights(found.policy)[name], weight, rtol=1e-4, atol=1e-6)


def test_imitation_of_nothing_changes_nothing() -> None:
    nets = without_value()
    before = weights(nets.policy)
    assert learner(nets, "sft", updates=2).step([episode("..##", seed=1), episode("..#", seed=2)]) == {}
    assert equal(before, weights(nets.policy))


def test_imitation_makes_an_update_of_each_share_that_has_a_solved_episode() -> None:
    nets = without_value()
    learner(nets, "sft", updates=4).step(GROUPS)  # three are solved
    assert nets.policy.state_dict().facts["updates"] == 3


def learn_on_two_ranks() -> dict[str, tuple[dict[str, float], dict[str, Tensor]]]:
    """Metrics and weights of each method, of one rank of two that divide the episodes."""
    learned: dict[str, tuple[dict[str, float], dict[str, Tensor]]] = {}
    for name, (method, episodes) in CASES.items():
        nets = build_networks(
            UNTIED, WEIGHTS, parallel=ParallelConfig(processes=2), optimizer=OPTIMIZER, has_value=False
        )
        assert list(nets.trained()) == ["policy"]
        learner(nets, method).step(episodes)
        learned[name] = learner(nets, method).step(episodes), weights(nets.policy)
    return learned


CASES: dict[str, tuple[Method, list[Episode]]] = {
    "grpo": ("grpo", GROUPS),
    "rloo": ("rloo", GROUPS),
    "sft": ("sft", GROUPS),
    "sft with one solved": ("sft", GROUPS[2:6]),  # one of the ranks has nothing to learn from
}


@pytest.mark.multiprocess
def test_ranks_that_divide_the_groups_learn_what_one_learns_alone(tmp_path: Path) -> None:
    ranks = run_ranks(learn_on_two_ranks, ranks=2, folder=tmp_path, timeout_s=900)
    for name, (method, episodes) in CASES.items():
        nets = without_value()
        learner(nets, method).step(episodes)
        metrics = learner(nets, method).step(episodes)
        for found, found_weights in (learned[name] for learned in ranks):
            assert found == pytest.approx(metrics, rel=1e-4, abs=1e-6), name
            for weight_name, weight in weights(nets.policy).items():
                torch.testing.assert_close(found_weights[weight_name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ppo.method=grpo"], "rollout.rollouts_per_problem = 1; use at least 2, such as 8"),
        (["rollout.rollouts_per_problem=3"], "multiple of rollout.rollouts_per_problem = 3; use 1023"),
        (["ppo.method=rloo", "rollout.rollouts_per_problem=512"], "= 2048, so that each update has whole"),
        (["ppo.method=sft", "ppo.value_level=token"], "'sft' has none; set ppo.value_level=turn"),
        (["ppo.method=sft", "ppo.value_warmup_steps=2"], "'sft' has none; set ppo.value_warmup_steps=0"),
    ],
)
def test_settings_that_do_not_fit_the_method_are_refused(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    (tmp_path / "run.toml").touch()
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(tmp_path / "run.toml", overrides)


def test_a_plan_counts_no_value_network_where_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "run.toml").touch()
    config = load_config(tmp_path / "run.toml", ["ppo.method=rloo", "rollout.rollouts_per_problem=4"])
    work = workload_of(config, Assumptions(), longest_tokens=100)
    cluster = Cluster(gpu=GPUS["H100"], nodes=1)
    plan = make_plan(read_model("llama-3.2-1b"), cluster, work, Assumptions(), trainer=TRAINER)
    assert {each.memory.value_network for each in plan.candidates} == {0}


def test_a_run_takes_each_problem_as_often_as_it_says_and_keeps_no_value_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned_from: list[list[str]] = []
    learn = Learner.step

    def remember(self: Learner, episodes: Sequence[Episode], **options: Any) -> dict[str, float]:
        learned_from.append([one.problem_id for one in episodes])
        return learn(self, episodes, **options)

    monkeypatch.setattr(Learner, "step", remember)
    path = run_here(tmp_path, "ppo.method=grpo", "rollout.rollouts_per_problem=4")
    problems = [step[::4] for step in learned_from]
    assert learned_from == [[each for each in step for _ in range(4)] for step in problems]
    assert len({each for step in problems for each in step}) == 4  # two a step, none twice
    checkpoint = CheckpointStore(path / "checkpoints", keep=1).load_latest()
    assert checkpoint is not None
    assert checkpoint.shared["cursor"] == 4
    assert set(checkpoint.states) == {"policy"}
    assert "value/loss" not in read_lines(path / "metrics.jsonl")[0]
