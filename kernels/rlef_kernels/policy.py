"""The clipped policy loss of PPO, corrected for tokens that older weights sampled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlef_kernels._checks import (
    accumulation_dtype,
    check_floating,
    check_normaliser,
    check_positive,
)
from rlef_kernels._triton import has_triton
from rlef_kernels.policy_terms import (
    METRICS,
    SETTINGS_SCHEMA,
    KLEstimator,
    PolicyMetrics,
    PolicySettings,
    TokenData,
    check_coefficient,
    check_tokens,
    loss_and_gradient,
    metrics_of,
    reduced,
    token_terms,
)

__all__ = [
    "KLEstimator",
    "PolicyMetrics",
    "PolicySettings",
    "check_tokens",
    "loss_and_gradient",
    "ppo_policy_loss",
]


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
    loss, metrics, _, _ = torch.ops.rlef_kernels.ppo_policy_loss(
        logprobs,
        entropy,
        *(each.detach() for each in (old_logprobs, behaviour_logprobs, advantages)),
        mask,
        None if weights is None else weights.detach(),
        None if reference_logprobs is None else reference_logprobs.detach(),
        *divisors(normaliser, logprobs),
        *settings.for_operator(),
    )
    return loss, metrics_of(metrics)


def divisors(normaliser: float | Tensor, like: Tensor) -> tuple[Tensor | None, float]:
    """The normaliser as a tensor on the device of `like`, or as a number: the other is None, or 1.

    Raises ValueError unless it is one number, and above 0: of a tensor, `check_normaliser` asks that in the
    operator, so that nothing is read where torch.compile traces.
    """
    if not isinstance(normaliser, Tensor):
        check_positive("normaliser", float(normaliser))
        return None, float(normaliser)
    if normaliser.numel() != 1:
        raise ValueError(f"normaliser has shape {list(normaliser.shape)}; it must be one number")
    dtype = accumulation_dtype(like)
    return normaliser.detach().reshape(()).to(like.device, dtype, non_blocking=True), 1.0


def _loss_in_torch(
    logprobs: Tensor,  # [tokens]
    entropy: Tensor | None,  # [tokens]
    old_logprobs: Tensor,  # [tokens]
    behaviour_logprobs: Tensor,  # [tokens]
    advantages: Tensor,  # [tokens]
    mask: Tensor,  # [tokens]
    weights: Tensor | None,  # [tokens]
    reference_logprobs: Tensor | None,  # [tokens]
    normaliser: Tensor | None,  # []
    divisor: float,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics `[8]`, and d loss / d logprobs and d loss / d entropy, `[tokens]` (or none, `[0]`)."""
    scale = 1 / divisor if normaliser is None else checked_normaliser(normaliser).reciprocal()
    data = TokenData(
        old_logprobs=old_logprobs,
        behaviour_logprobs=behaviour_logprobs,
        advantages=advantages,
        weights=weights,
        reference_logprobs=reference_logprobs,
    )
    dtype = accumulation_dtype(logprobs)
    chosen = mask.nonzero()[:, 0]  # [chosen]
    terms, slopes, for_entropy = token_terms(
        logprobs[chosen].to(dtype),
        None if entropy is None else entropy[chosen].to(dtype),
        data.at(chosen, dtype),
        PolicySettings.of_operator(*settings),
    )
    loss, metrics = reduced(terms)
    gradient = slopes.new_zeros(mask.shape)
    of_entropy = slopes.new_zeros(0 if entropy is None else mask.shape)
    gradient[chosen] = slopes * scale
    if for_entropy is not None:
        of_entropy[chosen] = for_entropy * scale
    return loss * scale, metrics, gradient, of_entropy


def checked_normaliser(normaliser: Tensor) -> Tensor:
    check_normaliser(normaliser)
    return normaliser


def _loss_on_cuda(logprobs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if logprobs.dtype == torch.float64 or not has_triton():
        return _loss_in_torch(logprobs, *arguments)
    from rlef_kernels._policy_triton import loss_in_triton

    return loss_in_triton(logprobs, *arguments)


def _shapes_of_loss(
    logprobs: Tensor,  # [tokens]
    entropy: Tensor | None,  # [tokens]
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What torch.compile needs to know of the outputs."""
    of_tokens = logprobs.new_empty(logprobs.shape, dtype=accumulation_dtype(logprobs))
    of_entropy = of_tokens.new_empty(0) if entropy is None else torch.empty_like(of_tokens)
    return of_tokens.new_empty(()), of_tokens.new_empty(len(METRICS)), of_tokens, of_entropy


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logprobs, entropy, *_ = inputs
    _, metrics, gradient, of_entropy = output
    ctx.mark_non_differentiable(metrics, gradient, of_entropy)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient, of_entropy)
    ctx.dtypes, ctx.others = (logprobs.dtype, None if entropy is None else entropy.dtype), len(inputs) - 2


@once_differentiable
def _scale_gradient(ctx: Any, for_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    gradients = [
        (gradient * for_loss).to(dtype) if for_loss is not None and dtype is not None and needed else None
        for gradient, dtype, needed in zip(
            ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:2], strict=True
        )
    ]
    return *gradients, *[None] * ctx.others


# An operator, so that torch.compile steps over it: its torch form asks how many tokens the mask has.
torch.library.define(
    "rlef_kernels::ppo_policy_loss",
    "(Tensor logprobs, Tensor? entropy, Tensor old_logprobs, Tensor behaviour_logprobs, Tensor advantages,"
    " Tensor mask, Tensor? weights, Tensor? reference_logprobs, Tensor? normaliser, float divisor, "
    f"{SETTINGS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("rlef_kernels::ppo_policy_loss", "default", _loss_in_torch)
torch.library.impl("rlef_kernels::ppo_policy_loss", "cuda", _loss_on_cuda)
torch.library.register_fake("rlef_kernels::ppo_policy_loss", _shapes_of_loss)
torch.library.register_autograd(
    "rlef_kernels::ppo_policy_loss", _scale_gradient, setup_context=_save_gradient
)
