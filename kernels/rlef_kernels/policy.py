"""The clipped policy loss of PPO, corrected for tokens that older weights sampled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from rlef_kernels._checks import (
    accumulation_dtype,
    check_floating,
    check_like,
    check_mask,
    check_normaliser,
    check_not_negative,
    check_positive,
)
from rlef_kernels.logprobs import logprobs_from_logits


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyMetrics:
    """Sums over the tokens inside the mask, to be added up over batches and processes. No gradient."""

    tokens: Tensor
    clipped: Tensor  # tokens whose gradient the clip stopped
    approximate_kl: Tensor  # of (pi_old || pi): x - 1 - ln x with x = pi / pi_old, never negative
    behaviour_weight: Tensor  # min(pi / pi_behaviour, 1), or 1 per token without the correction
    entropy: Tensor  # 0 when no entropy was given
    ratio_max: Tensor  # the largest pi / pi_old: a maximum, not a sum; 0 without tokens


def _loss_and_gradient(
    logprobs: Tensor,
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    low: float,
    high: float,
    behaviour_correction: bool,
) -> tuple[Tensor, Tensor, PolicyMetrics]:
    """The summed loss, its gradient `[tokens]` in `logprobs`, the metrics. Masked tokens are not read."""
    dtype = accumulation_dtype(logprobs)
    chosen = mask.nonzero()[:, 0]  # [chosen]
    advantages = advantages[chosen].to(dtype)
    log_ratio = logprobs[chosen].to(dtype) - old_logprobs[chosen].to(dtype)
    ratio = log_ratio.exp()
    weight = torch.ones_like(ratio)
    if behaviour_correction:
        weight = (logprobs[chosen].to(dtype) - behaviour_logprobs[chosen].to(dtype)).clamp(max=0).exp()
    corrected = ratio * weight
    clipped = ((corrected > 1 + high) & (advantages > 0)) | ((corrected < 1 - low) & (advantages < 0))
    surrogate = torch.where(clipped, corrected.clamp(1 - low, 1 + high), corrected) * advantages
    gradient = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    # d ratio / d logprob = ratio, and the weight is a constant
    gradient[chosen] = torch.where(clipped, 0, -corrected * advantages)
    metrics = PolicyMetrics(
        tokens=mask.sum().to(dtype),
        clipped=clipped.sum().to(dtype),
        approximate_kl=(torch.expm1(log_ratio) - log_ratio).sum(),
        behaviour_weight=weight.sum(),
        entropy=gradient.new_zeros(()),
        ratio_max=torch.cat([ratio, ratio.new_zeros(1)]).amax(),
    )
    return -surrogate.sum(), gradient, metrics


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = logprobs.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_loss: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * for_loss).to(ctx.dtype), None, None


def ppo_policy_loss(
    logprobs: Tensor,  # [tokens]
    old_logprobs: Tensor,  # [tokens]
    behaviour_logprobs: Tensor,  # [tokens]
    advantages: Tensor,  # [tokens]
    mask: Tensor,  # [tokens]
    *,
    clip_ratio: float | tuple[float, float],
    behaviour_correction: bool,
    normaliser: float | Tensor,
    entropy: Tensor | None = None,  # [tokens]
    entropy_coef: float = 0.0,
) -> tuple[Tensor, PolicyMetrics]:
    """-sum over the mask of min(r A, clip(r, 1 - low, 1 + high) A) + entropy_coef H, divided by `normaliser`.

    With the behaviour correction, r = (pi / pi_old) * w with w = min(pi / pi_behaviour, 1), a constant for
    the gradient (RLEF, section 2). pi_old are the weights at the start of the update and bound how far it
    goes; pi_behaviour are the weights that really sampled the token, one or more versions older when rollouts
    and learning overlap. The clip acts on the product r, as the paper writes it, not on pi / pi_old alone. So
    a token that pi finds less likely than its sampler did counts less; and one with w < 1 - low and a
    negative advantage has no gradient at all: pi has already moved away from it by more than the clip allows.
    w is cut off at 1 so that it only ever takes weight away, and the variance stays bounded. Without the
    correction, w = 1.

    Args:
        logprobs: `[tokens]` under pi, the only argument besides `entropy` that gets a gradient.
        old_logprobs, behaviour_logprobs, advantages: `[tokens]`, any floating type.
        mask: `[tokens]` bool. Nothing is read where it is False, so that NaN may stand there.
        clip_ratio: (low, high), or one number for both.
        behaviour_correction: False ignores `behaviour_logprobs`.
        normaliser: one number above 0, no gradient: usually how many tokens the whole update trains on.
        entropy: `[tokens]` of pi, for the bonus and the metrics.
        entropy_coef: weight of the entropy bonus.

    Returns:
        The scalar loss and the metrics, in float32 (float64 when `logprobs` is). A ratio that overflows makes
        the loss infinite or NaN: it is reported, not hidden.

    Raises:
        ValueError: shapes, types or devices that differ, or a setting out of range.
    """
    check_floating("logprobs", logprobs)
    tensors = {
        "old_logprobs": old_logprobs,
        "behaviour_logprobs": behaviour_logprobs,
        "advantages": advantages,
    }
    for name, tensor in tensors.items() if entropy is None else [*tensors.items(), ("entropy", entropy)]:
        check_floating(name, tensor)
        check_like(name, tensor, "logprobs", logprobs)
    check_mask("mask", mask)
    check_like("mask", mask, "logprobs", logprobs)
    low, high = clip_ratio if isinstance(clip_ratio, tuple) else (clip_ratio, clip_ratio)
    check_positive("clip_ratio", low)
    check_positive("clip_ratio", high)
    check_normaliser(normaliser)
    check_not_negative("entropy_coef", entropy_coef)
    if entropy is None and entropy_coef > 0:
        raise ValueError(
            f"entropy_coef is {entropy_coef} but entropy is missing; pass it, or set the coefficient to 0"
        )
    with torch.no_grad():
        total, gradient, metrics = _loss_and_gradient(
            logprobs, old_logprobs, behaviour_logprobs, advantages, mask, low, high, behaviour_correction
        )
    loss: Tensor = _PolicyLoss.apply(logprobs, total, gradient)  # type: ignore[no-untyped-call]
    if entropy is not None:
        entropy_sum = entropy[mask].to(loss.dtype).sum()
        metrics = replace(metrics, entropy=entropy_sum.detach())
        loss = loss - entropy_coef * entropy_sum
    return loss / normaliser, metrics


def ppo_policy_loss_from_logits(
    logits: Tensor,  # [rows, vocab / ranks]
    targets: Tensor,  # [tokens]
    old_logprobs: Tensor,  # [tokens]
    behaviour_logprobs: Tensor,  # [tokens]
    advantages: Tensor,  # [tokens]
    mask: Tensor,  # [tokens]
    *,
    clip_ratio: float | tuple[float, float],
    behaviour_correction: bool,
    normaliser: float | Tensor,
    entropy_coef: float = 0.0,
    want_entropy: bool = False,
    rows: Tensor | None = None,  # [tokens]
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, PolicyMetrics]:
    """`ppo_policy_loss` of `logprobs_from_logits`; the arguments are theirs.

    Only the rows of logits that predict a token inside the mask are read; the others get the gradient 0.
    Entropy is computed when it has a weight or is wanted for the metrics. Every process of a
    vocabulary-parallel group returns the same loss and metrics.
    """
    check_mask("mask", mask)
    check_like("mask", mask, "targets", targets)
    if rows is None:
        rows = torch.arange(targets.shape[0], device=targets.device)
    chosen = logprobs_from_logits(
        logits,
        targets[mask],
        rows=rows[mask],
        temperature=temperature,
        want_entropy=want_entropy or entropy_coef > 0,
        group=group,
    )
    return ppo_policy_loss(
        chosen.logprobs,
        old_logprobs[mask],
        behaviour_logprobs[mask],
        advantages[mask],
        torch.ones_like(chosen.logprobs, dtype=torch.bool),
        clip_ratio=clip_ratio,
        behaviour_correction=behaviour_correction,
        normaliser=normaliser,
        entropy=chosen.entropy,
        entropy_coef=entropy_coef,
    )
