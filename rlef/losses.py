"""The losses of the policy and the value network on a packed batch, as `ports.LossFunction` wants them.

They only line tokens up with what predicts them and with the advantages they take; the arithmetic is
rlef_kernels'.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

import rlef_kernels
from rlef.config import PPOConfig
from rlef.records import Batch


def token_logprobs(
    logits: Tensor,  # [tokens, vocab / ranks]
    batch: Batch,
    *,
    rows: Tensor | None = None,  # [rows of the logits] ascending; None: all tokens
    group: ProcessGroup | None = None,
) -> Tensor:
    """Log-prob of each response token, `[tokens]` float32, aligned with the token itself; 0 elsewhere.

    The logits at position i - 1 predict token i. Only the rows that predict a response token are read. With
    `rows`, those are the positions that the logits belong to, and tokens that none of them predicts have 0.
    Differentiable.
    """
    tokens, predicting = _predicted(batch, rows)
    logprobs = rlef_kernels.logprobs_from_logits(
        logits, batch.token_ids[tokens], rows=predicting, group=group
    ).logprobs
    return logprobs.new_zeros(batch.num_tokens).index_copy(0, tokens, logprobs)


def _predicted(batch: Batch, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """The response tokens that a row of the logits predicts, and for each the number of its row."""
    tokens = batch.response_mask.nonzero()[:, 0]  # [response tokens]
    if rows is None:
        return tokens, tokens - 1
    numbers = torch.searchsorted(rows, tokens - 1).clamp(max=rows.shape[0] - 1)
    held = rows[numbers] == tokens - 1
    return tokens[held], numbers[held]


def policy_loss(
    logits: Tensor,  # [tokens, vocab / ranks]
    batch: Batch,
    *,
    old_logprobs: Tensor,  # [tokens]
    advantages: Tensor,  # [values]
    settings: PPOConfig,
    normaliser: float | Tensor,
    rows: Tensor | None = None,  # [rows of the logits] as in `token_logprobs`
    group: ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy loss of the response tokens, divided by `normaliser`, and its statistics.

    The gradient takes the place of the logits, so that there is no second matrix of their size.

    With `normaliser` the number of response tokens in the whole update, the statistics add up, like the loss,
    to means over those tokens: `loss`, `clip_fraction`, `approximate_kl` (to the policy that starts the
    update), `behaviour_weight` (mean of min(pi / pi_behaviour, 1)) and `entropy`. `tokens` adds up to their
    number, and `ratio_max` is the largest pi / pi_old.
    """
    tokens, predicting = _predicted(batch, rows)
    loss, metrics = rlef_kernels.ppo_policy_loss_from_logits(
        logits,
        batch.token_ids[tokens],
        old_logprobs[tokens],
        batch.behaviour_logprobs[tokens],
        advantages[batch.token_values[tokens]],
        torch.ones_like(tokens, dtype=torch.bool),
        rows=predicting,
        clip_ratio=settings.clip_ratio,
        behaviour_correction=settings.behaviour_correction,
        normaliser=normaliser,
        entropy_coef=settings.entropy_coef,
        want_entropy=True,  # a tenth of the loss's time, and the first sign of a policy that collapses
        group=group,
        in_place=True,  # nobody needs the logits any more
    )
    return loss, {
        "loss": loss.detach(),
        "tokens": metrics.tokens,
        "clip_fraction": metrics.clipped / normaliser,
        "approximate_kl": metrics.approximate_kl / normaliser,
        "behaviour_weight": metrics.behaviour_weight / normaliser,
        "entropy": metrics.entropy / normaliser,
        "ratio_max": metrics.ratio_max,
    }


def imitation_loss(
    logits: Tensor,  # [tokens, vocab / ranks]
    batch: Batch,
    *,
    normaliser: float | Tensor,
    rows: Tensor | None = None,  # [rows of the logits] as in `token_logprobs`
    group: ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the response tokens, divided by `normaliser`, and its statistics.

    With `normaliser` the number of response tokens in the whole update, `loss` adds up to the mean over those
    tokens, and `tokens` to their number.
    """
    tokens, predicting = _predicted(batch, rows)
    logprobs = rlef_kernels.logprobs_from_logits(
        logits, batch.token_ids[tokens], rows=predicting, group=group
    ).logprobs
    loss = -logprobs.sum() / normaliser
    return loss, {"loss": loss.detach(), "tokens": torch.tensor(float(tokens.numel()), device=loss.device)}


def value_loss(
    values: Tensor,  # [values]
    batch: Batch,
    *,
    old_values: Tensor,  # [values]
    returns: Tensor,  # [values]
    settings: PPOConfig,
    normaliser: float | Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped value loss, divided by `normaliser`, and its statistics.

    With `normaliser` the number of values in the whole update, `loss`, `clip_fraction` and `squared_error`
    add up to means over those values. `values` adds up to their number.

    Raises:
        ValueError: not as many values as the batch has.
    """
    expected = batch.value_positions.shape[0]
    if values.shape != (expected,):
        raise ValueError(f"values have shape {list(values.shape)}; the batch has {expected} values")
    loss, metrics = rlef_kernels.value_loss(
        values, old_values, returns, value_clip=settings.value_clip, normaliser=normaliser
    )
    return loss, {
        "loss": loss.detach(),
        "values": metrics.values,
        "clip_fraction": metrics.clipped / normaliser,
        "squared_error": metrics.squared_error / normaliser,
    }
