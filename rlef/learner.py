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
from rlef.advantages import advantages_and_returns, turn_kl, whiten
from rlef.config import PPOConfig, RewardConfig
from rlef.faults import SkippedInARow, doing
from rlef.packing import assign_to_ranks, pack, split_micro_batches
from rlef.ports import Networks, ParallelState, UpdateStats
from rlef.records import Batch, Episode
from rlef.rewards import turn_rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """A micro-batch with everything that its losses need."""

    batch: Batch
    old_logprobs: Tensor  # [tokens]
    old_values: Tensor  # [values]
    returns: Tensor  # [values]
    advantages: Tensor  # [values]
    kl: Tensor  # [turns] mean log-ratio to the reference policy


class Learner:
    """Turns episodes into updates of the policy and the value network."""

    def __init__(
        self, networks: Networks, *, ppo: PPOConfig, rewards: RewardConfig, max_skipped_updates: int = 0
    ) -> None:
        """`max_skipped_updates` of one network in a row are too many; 0: none are."""
        self._networks = networks
        self._parallel = networks.parallel
        self._ppo = ppo
        self._rewards = rewards
        self._skipped = SkippedInARow(max_skipped_updates)
        self.scoring_s = 0.0  # of the last step, of this process, before it waits for others

    def step(self, episodes: Sequence[Episode], *, train_policy: bool = True) -> dict[str, float]:
        """Learn from all episodes of a step; every rank passes the same ones. Metrics, equal on every rank.

        Raises:
            SkippedTooOftenError: too many updates in a row had a gradient that is not finite; on every rank.
        """
        self.scoring_s = 0.0
        rewarded = [replace(episode, rewards=turn_rewards(episode, self._rewards)) for episode in episodes]
        updates = [self._score(chunk) for chunk in _split_evenly(rewarded, self._ppo.updates_per_step)]
        metrics = _summarise(updates, self._parallel)
        policy_stats: list[UpdateStats] = []
        value_stats: list[UpdateStats] = []
        for scored in updates:
            if train_policy:
                policy_stats.append(self._update_policy(scored))
                self._skipped.add("policy", skipped=policy_stats[-1].skipped)
            value_stats.append(self._update_value(scored))
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
            values = self._networks.value.forward(batches)
            if self._parallel.device.type == "cuda":
                torch.cuda.synchronize(self._parallel.device)  # else the seconds are those of the launches
        self.scoring_s += time.monotonic() - started
        scored: list[_Scored] = []
        for batch, old, reference, value in zip(
            batches, old_logprobs, reference_logprobs, values, strict=True
        ):
            returns, advantages = advantages_and_returns(
                batch, old, reference, value, kl_coef=self._rewards.kl_coef
            )
            kl = turn_kl(old, reference, batch)
            scored.append(
                _Scored(
                    batch=batch,
                    old_logprobs=old,
                    old_values=value,
                    returns=returns,
                    advantages=advantages,
                    kl=kl,
                )
            )
        if not self._ppo.normalise_advantages:
            return scored
        whitened = whiten([item.advantages for item in scored], group=self._parallel.data_parallel_group)
        return [
            replace(item, advantages=advantages) for item, advantages in zip(scored, whitened, strict=True)
        ]

    def _update_policy(self, scored: Sequence[_Scored]) -> UpdateStats:
        tokens = self._total(item.batch.num_response_tokens for item in scored)

        def loss(logits: Tensor, index: int, rows: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
            item = scored[index]
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

    def _update_value(self, scored: Sequence[_Scored]) -> UpdateStats:
        count = self._total(item.old_values.numel() for item in scored)

        def loss(values: Tensor, index: int, _rows: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
            item = scored[index]
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
            return self._networks.value.update(batches, loss)

    def _total(self, counts: Iterable[int]) -> float:
        """Added up over this rank's micro-batches and over all ranks."""
        return float(_sum_over_ranks([float(sum(counts))], self._parallel)[0])


def _split_evenly(episodes: Sequence[Episode], parts: int) -> list[Sequence[Episode]]:
    """`parts` interleaved shares, so that each has its part of every kind of problem."""
    return [episodes[part::parts] for part in range(parts)]


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


def _summarise(updates: Sequence[Sequence[_Scored]], parallel: ParallelState) -> dict[str, float]:
    """Means over the turns and values of the step, on all ranks."""
    scored = [item for update in updates for item in update]
    kl = torch.cat([item.kl for item in scored])
    returns = torch.cat([item.returns for item in scored])
    errors = returns - torch.cat([item.old_values for item in scored])
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
    return {
        "kl": kl_sum / num_turns,
        "return": return_sum / num_values,
        "explained_variance": 1 - error_variance / return_variance if return_variance > 0 else 0.0,
    }


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
