"""From rewards, log-probabilities and values to the advantage of each response (RLEF, section 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rlef.config import GroupMethod
from rlef.records import Batch
from rlef_kernels import masked_whiten, segment_mean, turn_returns


def turn_kl(
    policy_logprobs: Tensor,  # [tokens]
    reference_logprobs: Tensor,  # [tokens]
    batch: Batch,
) -> Tensor:
    """Mean log-ratio of the tokens of each response, `[turns]` float32.

    It is the log-ratio of two response probabilities when a response's probability is the geometric mean of
    its tokens': a long response costs no more than a short one. Tokens that the policy did not choose are not
    read.
    """
    mask = batch.response_mask
    turns = batch.token_turns[mask]  # [response tokens] ascending
    borders = torch.searchsorted(turns, torch.arange(batch.num_turns + 1, device=turns.device))
    return segment_mean(policy_logprobs[mask] - reference_logprobs[mask], borders)


def advantages_and_returns(
    batch: Batch,
    old_logprobs: Tensor,  # [tokens]
    reference_logprobs: Tensor,  # [tokens]
    values: Tensor,  # [values]
    *,
    kl_coef: float,
) -> tuple[Tensor, Tensor]:
    """(returns, advantages), each `[values]` float32, not whitened.

    A turn's reward is R = r - kl_coef KL; its return G is R plus that of all later turns of the episode,
    without discount or bootstrapping, so the KL of a later response counts against the earlier ones too; its
    advantage is G - V. With a value per token (the ablation) each token has the return of its turn.
    """
    rewards = batch.turn_rewards - kl_coef * turn_kl(old_logprobs, reference_logprobs, batch)  # [turns]
    returns = turn_returns(rewards, batch.turn_sequences)[batch.value_turns]  # [values]
    return returns, returns - values


def episode_returns(batch: Batch, returns: Tensor) -> Tensor:
    """The return of each episode's first turn, `[sequences]`: of `returns`, which are `[turns]`."""
    sequences = torch.arange(batch.num_sequences, device=returns.device)
    return returns[torch.searchsorted(batch.turn_sequences, sequences)]


def group_baselines(
    returns: Tensor,  # [episodes] of the first turns; a group's are next to each other
    rewards: Tensor,  # [episodes] of the environment, added up over the turns
    *,
    method: GroupMethod,
    size: int,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    """(baselines, scales), each `[episodes]`: the advantage of a turn with the return G of episode i is
    (G - baselines[i]) scales[i].

    The `size` episodes of a group are rollouts of one problem. With G_j the return of episode j's first turn,
    which is that of the whole episode, and r_j its reward without the KL term:

    - `grpo` (arXiv 2402.03300, outcome supervision): the baseline is mean_j G_j over the group, and the
      scale 1 / std_j r_j, with n - 1 in its denominator. Where all r_j are equal the scale is 0, and so
      is each advantage. The KL term is not in the deviation: among episodes that all failed it would be all
      that there is, and division would blow its noise up to the size of a reward. Without `normalise` the
      scale is 1 everywhere (arXiv 2503.20783).
    - `rloo` (arXiv 2402.14740): the baseline is the mean of G_j over the *other* episodes, the scale 1.

    A turn keeps its own return, to which rewards and KL of earlier turns do not belong; later turns have no
    baseline of their own, since each stands in another dialog. That of `rloo` depends on the problem and on
    other episodes alone, so it leaves the expectation of the policy's gradient as it is.
    """
    groups = returns.view(-1, size)
    if method == "rloo":
        others = (groups.sum(1, keepdim=True) - groups) / (size - 1)
        return others.flatten(), torch.ones_like(returns)
    baselines = groups.mean(1, keepdim=True).expand_as(groups).flatten()
    if not normalise:
        return baselines, torch.ones_like(returns)
    of_group = rewards.view(-1, size)
    differs = of_group.amax(1, keepdim=True) > of_group.amin(1, keepdim=True)  # a deviation of 0 is rounded
    scales = torch.where(differs, 1 / of_group.std(1, keepdim=True), 0.0)
    return baselines, scales.expand_as(groups).flatten()


def whiten(advantages: Sequence[Tensor], *, group: ProcessGroup | None = None) -> list[Tensor]:
    """Mean 0 and variance 1 over all values of all these micro-batches, on all processes of `group`.

    Every value counts once: a turn at turn level, however long its response; a token at token level.
    Collective: a process without micro-batches passes an empty list.
    """
    whole = torch.cat(list(advantages)) if advantages else torch.empty(0)
    return list(torch.split(masked_whiten(whole, group=group), [part.numel() for part in advantages]))
