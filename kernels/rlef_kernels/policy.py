"""The clipped policy loss of PPO, corrected for tokens that older weights sampled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

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
from rlef_kernels.segments import mean_weights  # noqa: F401 (where it used to be)

KLEstimator = Literal["k1", "k2", "k3"]
_KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyMetrics:
    """Sums over the tokens inside the mask, to be added up over batches and processes. No gradient; each
    token counts once, whatever its weight."""

    tokens: Tensor
    clipped: Tensor  # tokens whose gradient a clip stopped
    approximate_kl: Tensor  # of (pi_old || pi): x - 1 - ln x with x = pi / pi_old, never negative
    behaviour_weight: Tensor  # min(pi / pi_behaviour, 1), or 1 per token without the correction
    entropy: Tensor  # 0 when no entropy was given
    reference_kl: Tensor  # of (pi || pi_reference) by the estimator; 0 without a reference
    ratio_max: Tensor  # the largest pi / pi_old: a maximum, not a sum; 0 without tokens
    ratio_min: Tensor  # the smallest: a minimum; infinite without tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySettings:
    """What is asked of the loss, checked."""

    low: float
    high: float
    dual_clip: float | None
    behaviour_correction: bool
    entropy_coef: float
    kl_coef: float
    kl_estimator: KLEstimator

    @classmethod
    def checked(
        cls,
        *,
        clip_ratio: float | tuple[float, float],
        dual_clip: float | None,
        behaviour_correction: bool,
        entropy_coef: float,
        reference_logprobs: Tensor | None,
        kl_coef: float,
        kl_estimator: KLEstimator,
    ) -> PolicySettings:
        """Raises ValueError for a setting out of range."""
        low, high = clip_ratio if isinstance(clip_ratio, tuple) else (clip_ratio, clip_ratio)
        check_positive("clip_ratio", low)
        check_positive("clip_ratio", high)
        if dual_clip is not None and not 1 + high < dual_clip < float("inf"):
            raise ValueError(
                f"dual_clip is {dual_clip}; it must be a finite number above 1 + clip_ratio = {1 + high}"
            )
        check_not_negative("entropy_coef", entropy_coef)
        check_coefficient("kl_coef", kl_coef, "reference_logprobs", reference_logprobs)
        if kl_estimator not in _KL_ESTIMATORS:
            raise ValueError(f"kl_estimator is {kl_estimator!r}; give 'k1', 'k2' or 'k3'")
        return cls(
            low=low,
            high=high,
            dual_clip=dual_clip,
            behaviour_correction=behaviour_correction,
            entropy_coef=entropy_coef,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
        )


def check_coefficient(name: str, coefficient: float, tensor_name: str, tensor: Tensor | None) -> None:
    """Raise ValueError unless the coefficient is 0, or above and its tensor is there."""
    check_not_negative(name, coefficient)
    if tensor is None and coefficient > 0:
        raise ValueError(
            f"{name} is {coefficient} but {tensor_name} is missing; pass it, or set the coefficient to 0"
        )


def check_tokens(base_name: str, base: Tensor, mask: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all are `[tokens]` as `base`, of floating types, and the mask is bool."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check_floating(name, tensor)
            check_like(name, tensor, base_name, base)
    check_mask("mask", mask)
    check_like("mask", mask, base_name, base)


def _kl_and_slope(difference: Tensor, estimator: KLEstimator) -> tuple[Tensor, Tensor]:
    """An estimate of KL(pi || pi_reference) from ln (pi / pi_reference), and its derivative in ln pi."""
    if estimator == "k1":
        return difference, torch.ones_like(difference)
    if estimator == "k2":
        return difference.square() / 2, difference
    slope = -torch.expm1(-difference)
    return difference - slope, slope


def loss_and_gradient(
    logprobs: Tensor,
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    reference_logprobs: Tensor | None,
    settings: PolicySettings,
) -> tuple[Tensor, Tensor, PolicyMetrics]:
    """The summed loss, its gradient `[tokens]` in `logprobs`, the metrics. Masked tokens are not read."""
    dtype = accumulation_dtype(logprobs)
    low, high = settings.low, settings.high
    chosen = mask.nonzero()[:, 0]  # [chosen]
    advantages = advantages[chosen].to(dtype)
    log_ratio = logprobs[chosen].to(dtype) - old_logprobs[chosen].to(dtype)
    ratio = log_ratio.exp()
    weight = torch.ones_like(ratio)
    if settings.behaviour_correction:
        weight = (logprobs[chosen].to(dtype) - behaviour_logprobs[chosen].to(dtype)).clamp(max=0).exp()
    corrected = ratio * weight
    clipped = ((corrected > 1 + high) & (advantages > 0)) | ((corrected < 1 - low) & (advantages < 0))
    bounded = torch.where(clipped, corrected.clamp(1 - low, 1 + high), corrected)
    if settings.dual_clip is not None:
        clipped = clipped | ((corrected > settings.dual_clip) & (advantages < 0))
        bounded = torch.where(advantages < 0, bounded.clamp(max=settings.dual_clip), bounded)
    losses = -bounded * advantages  # [chosen]
    slopes = torch.where(clipped, 0, -corrected * advantages)  # d ratio = ratio; the weight is a constant
    reference_kl = torch.zeros_like(losses)
    if reference_logprobs is not None:
        difference = logprobs[chosen].to(dtype) - reference_logprobs[chosen].to(dtype)
        reference_kl, kl_slopes = _kl_and_slope(difference, settings.kl_estimator)
        losses = losses + settings.kl_coef * reference_kl
        slopes = slopes + settings.kl_coef * kl_slopes
    if weights is not None:
        losses, slopes = losses * weights[chosen].to(dtype), slopes * weights[chosen].to(dtype)
    gradient = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    gradient[chosen] = slopes
    metrics = PolicyMetrics(
        tokens=mask.sum().to(dtype),
        clipped=clipped.sum().to(dtype),
        approximate_kl=(torch.expm1(log_ratio) - log_ratio).sum(),
        behaviour_weight=weight.sum(),
        entropy=gradient.new_zeros(()),
        reference_kl=reference_kl.sum(),
        ratio_max=torch.cat([ratio, ratio.new_zeros(1)]).amax(),
        ratio_min=torch.cat([ratio, ratio.new_full((1,), float("inf"))]).amin(),
    )
    return losses.sum(), gradient, metrics


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
    weights: Tensor | None = None,  # [tokens]
    dual_clip: float | None = None,
    reference_logprobs: Tensor | None = None,  # [tokens]
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
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

    Without `weights` each token counts the same. With `mean_weights` of sequences or turns, and their number
    as the `normaliser`, each sequence or turn does.

    `dual_clip` (Ye et al. 2020, arXiv 1912.09729, section 3.4) bounds what a token with a negative advantage
    can do once pi finds it more than `dual_clip` times as likely: without it that is unbounded.

    With a reference, kl_coef times an estimate of KL(pi || pi_reference) is added for each token: of
    d = ln (pi / pi_reference), k1 = d, k2 = d^2 / 2 and k3 = e^-d - 1 + d (Schulman, "Approximating KL
    divergence", 2020). As a loss, k2 has the gradient of the KL divergence for tokens that pi sampled; k1's
    has the mean 0, and is of use in rewards alone.

    Args:
        logprobs: `[tokens]` under pi, the only argument besides `entropy` that gets a gradient.
        old_logprobs, behaviour_logprobs, advantages: `[tokens]`, any floating type.
        mask: `[tokens]` bool. Nothing is read where it is False, so that NaN may stand there.
        clip_ratio: (low, high), or one number for both.
        behaviour_correction: False ignores `behaviour_logprobs`.
        normaliser: one number above 0, no gradient: usually how many tokens the whole update trains on.
        entropy: `[tokens]` of pi, for the bonus and the metrics.
        entropy_coef: weight of the entropy bonus.
        weights: `[tokens]` of the loss, bonus and KL included; metrics are not weighted.
        dual_clip: above 1 + high, or None.
        reference_logprobs: `[tokens]` under the reference policy.
        kl_coef: weight of the KL to it.
        kl_estimator: "k1", "k2" or "k3".

    Returns:
        The scalar loss and the metrics, in float32 (float64 when `logprobs` is). A ratio that overflows makes
        the loss infinite or NaN: it is reported, not hidden.

    Raises:
        ValueError: shapes, types or devices that differ, or a setting out of range.
    """
    check_floating("logprobs", logprobs)
    check_tokens(
        "logprobs",
        logprobs,
        mask,
        old_logprobs=old_logprobs,
        behaviour_logprobs=behaviour_logprobs,
        advantages=advantages,
        entropy=entropy,
        weights=weights,
        reference_logprobs=reference_logprobs,
    )
    check_normaliser(normaliser)
    check_coefficient("entropy_coef", entropy_coef, "entropy", entropy)
    settings = PolicySettings.checked(
        clip_ratio=clip_ratio,
        dual_clip=dual_clip,
        behaviour_correction=behaviour_correction,
        entropy_coef=entropy_coef,
        reference_logprobs=reference_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
    )
    with torch.no_grad():
        total, gradient, metrics = loss_and_gradient(
            logprobs,
            old_logprobs,
            behaviour_logprobs,
            advantages,
            mask,
            weights,
            reference_logprobs,
            settings,
        )
    loss: Tensor = _PolicyLoss.apply(logprobs, total, gradient)  # type: ignore[no-untyped-call]
    if entropy is not None:
        entropies = entropy[mask].to(loss.dtype)
        metrics = replace(metrics, entropy=entropies.sum().detach())
        weighted = entropies if weights is None else entropies * weights[mask].to(loss.dtype)
        loss = loss - entropy_coef * weighted.sum()
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
    weights: Tensor | None = None,  # [tokens]
    dual_clip: float | None = None,
    reference_logprobs: Tensor | None = None,  # [tokens]
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
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
        weights=None if weights is None else weights[mask],
        dual_clip=dual_clip,
        reference_logprobs=None if reference_logprobs is None else reference_logprobs[mask],
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
    )
