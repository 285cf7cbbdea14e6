"""One learning step: score the episodes, estimate advantages, make the PPO updates (PAPER section 2).

It knows the three networks only as `ports.Network`; the mathematics is in `rewards`, `advantages` and
`losses`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from rlef import losses
from rlef.advantages import advantages_and_returns, episode_returns, group_baselines, turn_kl, whiten
from rlef.config import GroupMethod, PPOConfig, RewardConfig
from rlef.faults import SkippedInARow, doing
from rlef.packing import assign_to_ranks, pack, split_micro_batches
from rlef.ports import Network, Networks, ParallelState, UpdateStats
from rlef.records import Batch, Episode
from rlef.rewards import turn_rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """A micro-batch with everything that its losses need."""

    batch: Batch
    places: Tensor  # [sequences] among the episodes of the update
    old_logprobs: Tensor  # [tokens]
    old_values: Tensor | None  # [values]; None without a value network
    returns: Tensor  # [values]
    advantages: Tensor  # [values]
    kl: Tensor  # [turns] mean log-ratio to the reference policy


class Learner:
    """Turns episodes into updates of the policy and the value network."""

    def __init__(
        self,
        networks: Networks,
        *,
        ppo: PPOConfig,
        rewards: RewardConfig,
        group_size: int = 1,
        max_skipped_updates: int = 0,
    ) -> None:
        """Of `group_size` episodes each, in their order, the problem is the same.

        `max_skipped_updates` of one network in a row are too many; 0: none are.
        """
        assert ppo.has_value == (networks.value is not None), f"{ppo.method} and its value network disagree"
        self._networks = networks
        self._parallel = networks.parallel
        self._ppo = ppo
        self._rewards = rewards
        self._group_size = group_size
        self._skipped = SkippedInARow(max_skipped_updates)
        self.scoring_s = 0.0  # of the last step, of this process, before it waits for others

    def step(self, episodes: Sequence[Episode], *, train_policy: bool = True) -> dict[str, float]:
        """Learn from all episodes of a step; every rank passes the same ones. Metrics, equal on every rank.

        By imitation (`sft`) it learns from those that are solved; a share of them that is empty makes no
        update, and a step without any has no metrics.

        Raises:
            SkippedTooOftenError: too many updates in a row had a gradient that is not finite; on every rank.
        """
        self.scoring_s = 0.0
        rewarded = [replace(episode, rewards=turn_rewards(episode, self._rewards)) for episode in episodes]
        if self._ppo.method == "sft":
            rewarded = [episode for episode in rewarded if episode.solved]
        whole = 1 if self._ppo.group_method is None else self._group_size
        shares = _split_evenly(rewarded, self._ppo.updates_per_step, whole=whole)
        updates = [self._score(share) for share in shares if share]
        if not updates:
            return {}
        metrics = _summarise(updates, self._parallel, has_value=self._ppo.has_value)
        policy_stats: list[UpdateStats] = []
        value_stats: list[UpdateStats] = []
        for scored in updates:
            if train_policy:
                policy_stats.append(self._update_policy(scored))
                self._skipped.add("policy", skipped=policy_stats[-1].skipped)
            if self._networks.value is not None:
                value_stats.append(self._update_value(scored, self._networks.value))
                self._skipped.add("value", skipped=value_stats[-1].skipped)
        return metrics | _average("policy", policy_stats) | _average("value", value_stats)

    def _score(self, episodes: Sequence[Episode]) -> list[_Scored]:
        """This rank's micro-batches of one update, scored by the networks as they are before the step."""
        lengths = [len(episode.token_ids) for episode in episodes]
        mine = assign_to_ranks(lengths, self._parallel.data_parallel_size)[self._parallel.data_parallel_rank]
        groups = split_micro_batches([lengths[index] for index in mine], self._ppo.micro_batch_tokens)
        batches = [
            pack([episodes[mine[index]] for index in group], value_level=self._ppo.value_level).to(
                self._parallel.device
            )
            for group in groups
        ]
        started = time.monotonic()
        with doing(f"scoring {_sizes(batches)}"):
            old_logprobs = self._networks.policy.forward(batches)
            reference_logprobs = self._networks.reference.forward(batches)
            values = None if self._networks.value is None else self._networks.value.forward(batches)
            if self._parallel.device.type == "cuda":
                torch.cuda.synchronize(self._parallel.device)  # else the seconds are those of the launches
        self.scoring_s += time.monotonic() - started
        scored: list[_Scored] = []
        for index, (batch, old, reference) in enumerate(
            zip(batches, old_logprobs, reference_logprobs, strict=True)
        ):
            value = None if values is None else values[index]
            baseline = torch.zeros_like(batch.value_positions, dtype=old.dtype) if value is None else value
            returns, advantages = advantages_and_returns(
                batch, old, reference, baseline, kl_coef=self._rewards.kl_coef
            )
            kl = turn_kl(old, reference, batch)
            scored.append(
                _Scored(
                    batch=batch,
                    places=torch.tensor([mine[place] for place in groups[index]], device=old.device),
                    old_logprobs=old,
                    old_values=value,
                    returns=returns,
                    advantages=advantages,
                    kl=kl,
                )
            )
        if self._ppo.group_method is not None:
            scored = self._against_groups(scored, episodes, self._ppo.group_method)
        if not self._ppo.normalise_advantages or self._ppo.method in ("grpo", "sft"):
            return scored
        whitened = whiten([item.advantages for item in scored], group=self._parallel.data_parallel_group)
        return [
            replace(item, advantages=advantages) for item, advantages in zip(scored, whitened, strict=True)
        ]

    def _against_groups(
        self, scored: Sequence[_Scored], episodes: Sequence[Episode], method: GroupMethod
    ) -> list[_Scored]:
        """With advantages over the other rollouts of each problem, which may lie on other ranks."""
        returns = torch.zeros(len(episodes), dtype=torch.float64, device=self._parallel.device)
        for item in scored:
            returns[item.places] = episode_returns(item.batch, item.returns).double()
        if self._parallel.data_parallel_group is not None:
            dist.all_reduce(returns, group=self._parallel.data_parallel_group)  # each is on one of them
        rewards = torch.tensor([sum(episode.rewards) for episode in episodes]).to(returns)
        baselines, scales = group_baselines(
            returns,
            rewards,
            method=method,
            size=self._group_size,
            normalise=self._ppo.normalise_advantages,
        )
        compared: list[_Scored] = []
        for item in scored:
            places = item.places[item.batch.turn_sequences[item.batch.value_turns]]  # [values]
            advantages = (item.returns - baselines[places]) * scales[places]
            compared.append(replace(item, advantages=advantages.float()))
        return compared

    def _update_policy(self, scored: Sequence[_Scored]) -> UpdateStats:
        tokens = self._total(item.batch.num_response_tokens for item in scored)

        def loss(logits: Tensor, index: int, rows: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
            item = scored[index]
            if self._ppo.method == "sft":
                return losses.imitation_loss(
                    logits,
                    item.batch,
                    normaliser=tokens,
                    rows=rows,
                    group=self._parallel.tensor_parallel_group,
                )
            return losses.policy_loss(
                logits,
                item.batch,
                old_logprobs=item.old_logprobs,
                advantages=item.advantages,
                settings=self._ppo,
                normaliser=tokens,
                rows=rows,
                group=self._parallel.tensor_parallel_group,
            )

        batches = [item.batch for item in scored]
        with doing(f"updating the policy network by {_sizes(batches)}"):
            return self._networks.policy.update(batches, loss)

    def _update_value(self, scored: Sequence[_Scored], network: Network) -> UpdateStats:
        count = self._total(item.returns.numel() for item in scored)

        def loss(values: Tensor, index: int, _rows: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
            item = scored[index]
            assert item.old_values is not None, "scored by a value network"
            return losses.value_loss(
                values,
                item.batch,
                old_values=item.old_values,
                returns=item.returns,
                settings=self._ppo,
                normaliser=count,
            )

        batches = [item.batch for item in scored]
        with doing(f"updating the value network by {_sizes(batches)}"):
            return network.update(batches, loss)

    def _total(self, counts: Iterable[int]) -> float:
        """Added up over this rank's micro-batches and over all ranks."""
        return float(_sum_over_ranks([float(sum(counts))], self._parallel)[0])


def _split_evenly(episodes: Sequence[Episode], parts: int, *, whole: int) -> list[list[Episode]]:
    """`parts` interleaved shares, so that each has its part of every kind of problem.

    `whole` episodes that are next to each other stay together.
    """
    shares: list[list[Episode]] = [[] for _ in range(parts)]
    for place, episode in enumerate(episodes):
        shares[place // whole % parts].append(episode)
    return shares


def _sizes(batches: Sequence[Batch]) -> str:
    """What memory depends on."""
    largest = max((batch.token_ids.numel() for batch in batches), default=0)
    return f"micro-batches: {len(batches)}, tokens of the largest: {largest:,}"


def _sum_over_ranks(values: Sequence[float], parallel: ParallelState) -> list[float]:
    summed = torch.tensor(values, dtype=torch.float64, device=parallel.device)
    if parallel.data_parallel_group is not None:
        dist.all_reduce(summed, group=parallel.data_parallel_group)
    totals: list[float] = summed.tolist()
    return totals


def _summarise(
    updates: Sequence[Sequence[_Scored]], parallel: ParallelState, *, has_value: bool
) -> dict[str, float]:
    """Means over the turns and values of the step, on all ranks."""
    scored = [item for update in updates for item in update]
    kl = _joined([item.kl for item in scored])
    returns = _joined([item.returns for item in scored])
    errors = _joined([item.returns - item.old_values for item in scored if item.old_values is not None])
    sums = _sum_over_ranks(
        [
            float(kl.numel()),
            float(kl.sum()),
            float(returns.numel()),
            float(returns.sum()),
            float(returns.square().sum()),
            float(errors.sum()),
            float(errors.square().sum()),
        ],
        parallel,
    )
    num_turns, kl_sum, num_values, return_sum, return_squares, error_sum, error_squares = sums
    return_variance = return_squares / num_values - (return_sum / num_values) ** 2
    error_variance = error_squares / num_values - (error_sum / num_values) ** 2
    metrics = {"kl": kl_sum / num_turns, "return": return_sum / num_values}
    if has_value:
        explained = 1 - error_variance / return_variance if return_variance > 0 else 0.0
        metrics["explained_variance"] = explained
    return metrics


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """A rank may have none: there may be fewer episodes than ranks."""
    return torch.cat(list(parts)) if parts else torch.empty(0)


def _average(prefix: str, updates: Sequence[UpdateStats]) -> dict[str, float]:
    """Per-update figures averaged over the step's updates; `_max` statistics keep the largest."""
    if not updates:
        return {}
    figures = {
        f"{prefix}/grad_norm": sum(stats.grad_norm for stats in updates) / len(updates),
        f"{prefix}/learning_rate": updates[-1].learning_rate,
        f"{prefix}/skipped_updates": float(sum(stats.skipped for stats in updates)),
    }
    for name in updates[0].statistics:
        values = [stats.statistics[name] for stats in updates]
        figures[f"{prefix}/{name}"] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return figures
