"""From rewards, log-probabilities and values to the advantage of each response (RLEF, section 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

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


def whiten(advantages: Sequence[Tensor], *, group: ProcessGroup | None = None) -> list[Tensor]:
    """Mean 0 and variance 1 over all values of all these micro-batches, on all processes of `group`.

    Every value counts once: a turn at turn level, however long its response; a token at token level.
    Collective: a process without micro-batches passes an empty list.
    """
    whole = torch.cat(list(advantages)) if advantages else torch.empty(0)
    return list(torch.split(masked_whiten(whole, group=group), [part.numel() for part in advantages]))
