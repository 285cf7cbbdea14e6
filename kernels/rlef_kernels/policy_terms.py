"""What the policy loss and its metrics sum over tokens, and its slope: the reference of all forms of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlef_kernels._checks import (
    accumulation_dtype,
    check_floating,
    check_like,
    check_mask,
    check_not_negative,
    check_positive,
)

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


METRICS = tuple(PolicyMetrics.__dataclass_fields__)


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
            low=float(low),
            high=float(high),
            dual_clip=None if dual_clip is None else float(dual_clip),
            behaviour_correction=behaviour_correction,
            entropy_coef=float(entropy_coef),
            kl_coef=float(kl_coef),
            kl_estimator=kl_estimator,
        )

    @classmethod
    def of_operator(
        cls,
        low: float,
        high: float,
        dual_clip: float | None,
        behaviour_correction: bool,
        entropy_coef: float,
        kl_coef: float,
        kl_estimator: KLEstimator,
    ) -> PolicySettings:
        """From what `SETTINGS_SCHEMA` lists."""
        return cls(
            low=low,
            high=high,
            dual_clip=dual_clip,
            behaviour_correction=behaviour_correction,
            entropy_coef=entropy_coef,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
        )

    def for_operator(self) -> tuple[float, float, float | None, bool, float, float, KLEstimator]:
        return (
            self.low,
            self.high,
            self.dual_clip,
            self.behaviour_correction,
            self.entropy_coef,
            self.kl_coef,
            self.kl_estimator,
        )


# The settings as the last arguments of an operator.
SETTINGS_SCHEMA = (
    "float low, float high, float? dual_clip, bool behaviour_correction, float entropy_coef, float kl_coef,"
    " str kl_estimator"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenData:
    """What the loss knows of each token besides pi; all `[tokens]`."""

    old_logprobs: Tensor
    behaviour_logprobs: Tensor
    advantages: Tensor
    weights: Tensor | None
    reference_logprobs: Tensor | None

    def at(self, tokens: Tensor | slice, dtype: torch.dtype) -> TokenData:
        """Of these tokens alone, in the type of the sums."""
        return TokenData(
            old_logprobs=self.old_logprobs[tokens].to(dtype),
            behaviour_logprobs=self.behaviour_logprobs[tokens].to(dtype),
            advantages=self.advantages[tokens].to(dtype),
            weights=None if self.weights is None else self.weights[tokens].to(dtype),
            reference_logprobs=(
                None if self.reference_logprobs is None else self.reference_logprobs[tokens].to(dtype)
            ),
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


def token_terms(
    logprobs: Tensor,  # [tokens]
    entropy: Tensor | None,  # [tokens]
    data: TokenData,
    settings: PolicySettings,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the loss and each metric sum over tokens, `[9, tokens]`; d loss / d logprobs; d loss / d entropy.

    The rows are the loss and then the fields of `PolicyMetrics`, for `reduced`.
    """
    low, high, advantages = settings.low, settings.high, data.advantages
    log_ratio = logprobs - data.old_logprobs
    ratio = log_ratio.exp()
    one, none = torch.ones_like(ratio), torch.zeros_like(ratio)
    weight = one
    if settings.behaviour_correction:
        weight = (logprobs - data.behaviour_logprobs).clamp(max=0).exp()
    corrected = ratio * weight
    clipped = ((corrected > 1 + high) & (advantages > 0)) | ((corrected < 1 - low) & (advantages < 0))
    bounded = torch.where(clipped, corrected.clamp(1 - low, 1 + high), corrected)
    if settings.dual_clip is not None:
        clipped = clipped | ((corrected > settings.dual_clip) & (advantages < 0))
        bounded = torch.where(advantages < 0, bounded.clamp(max=settings.dual_clip), bounded)
    losses = -bounded * advantages
    slopes = torch.where(clipped, 0, -corrected * advantages)  # d ratio = ratio; the weight is a constant
    reference_kl, for_entropy = none, None
    if data.reference_logprobs is not None:
        reference_kl, kl_slopes = _kl_and_slope(logprobs - data.reference_logprobs, settings.kl_estimator)
        losses = losses + settings.kl_coef * reference_kl
        slopes = slopes + settings.kl_coef * kl_slopes
    if entropy is not None and settings.entropy_coef > 0:
        losses = losses - settings.entropy_coef * entropy
        for_entropy = -settings.entropy_coef * one
    if data.weights is not None:
        losses, slopes = losses * data.weights, slopes * data.weights
        for_entropy = None if for_entropy is None else for_entropy * data.weights
    terms = torch.stack(
        [
            losses,
            one,
            clipped.to(ratio.dtype),
            torch.expm1(log_ratio) - log_ratio,
            weight,
            none if entropy is None else entropy,
            reference_kl,
            ratio,
            ratio,
        ]
    )
    return terms, slopes, for_entropy


def reduced(terms: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss, and the metrics `[8]` in the order of `PolicyMetrics`, of `token_terms`."""
    sums = terms[:7].sum(dim=1)
    largest = torch.cat([terms[7], terms.new_zeros(1)]).amax()
    smallest = torch.cat([terms[8], terms.new_full((1,), float("inf"))]).amin()
    return sums[0].clone(), torch.cat([sums[1:], largest[None], smallest[None]])


def metrics_of(numbers: Tensor) -> PolicyMetrics:
    """The metrics, of `[8]` numbers in their order."""
    return PolicyMetrics(**dict(zip(METRICS, numbers.detach().unbind(), strict=True)))


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
    data = TokenData(
        old_logprobs=old_logprobs,
        behaviour_logprobs=behaviour_logprobs,
        advantages=advantages,
        weights=weights,
        reference_logprobs=reference_logprobs,
    )
    dtype = accumulation_dtype(logprobs)
    chosen = mask.nonzero()[:, 0]  # [chosen]
    terms, slopes, _ = token_terms(logprobs[chosen].to(dtype), None, data.at(chosen, dtype), settings)
    loss, metrics = reduced(terms)
    return loss, slopes.new_zeros(mask.shape).index_copy(0, chosen, slopes), metrics_of(metrics)
