"""The policy loss token by token, in the words of the papers, in float64; and examples for it."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor


def slow(
    logprobs: Tensor,
    old: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    mask: Tensor,
    low: float,
    high: float,
    correction: bool,
    *,
    weights: Tensor | None = None,
    dual_clip: float | None = None,
    reference_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
) -> tuple[Tensor, dict[str, float]]:
    """Token by token, in the words of the papers; summed, not divided."""
    loss = logprobs.new_zeros(())
    counts = {"tokens": 0.0, "clipped": 0.0, "approximate_kl": 0.0, "behaviour_weight": 0.0, "ratio_max": 0.0}
    counts |= {"reference_kl": 0.0, "ratio_min": math.inf}
    for token in mask.nonzero()[:, 0].tolist():
        advantage = advantages[token]
        ratio = (logprobs[token] - old[token]).exp()
        weight = torch.ones((), dtype=torch.float64)
        if correction:
            weight = (logprobs[token].detach() - behaviour[token]).exp().clamp(max=1)
        r = ratio * weight
        surrogate = torch.minimum(r * advantage, r.clamp(1 - low, 1 + high) * advantage)
        if dual_clip is not None and advantage < 0:
            surrogate = torch.maximum(surrogate, dual_clip * advantage)
        of_token = -surrogate
        if reference_logprobs is not None:
            x = reference_logprobs[token] - logprobs[token]
            kl = {"k1": -x, "k2": x**2 / 2, "k3": x.exp() - 1 - x}[kl_estimator]
            of_token = of_token + kl_coef * kl
            counts["reference_kl"] += float(kl.detach())
        loss = loss + of_token * (1 if weights is None else weights[token])
        counts["tokens"] += 1
        counts["clipped"] += float(surrogate.detach() != r.detach() * advantage)
        counts["approximate_kl"] += float((ratio - 1 - ratio.log()).detach())
        counts["behaviour_weight"] += float(weight)
        counts["ratio_max"] = max(counts["ratio_max"], float(ratio.detach()))
        counts["ratio_min"] = min(counts["ratio_min"], float(ratio.detach()))
    return loss, counts


def example(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    logprobs, old, behaviour = (-2 * torch.rand(3, tokens, generator=random, dtype=torch.float64)).unbind()
    advantages = torch.randn(tokens, generator=random, dtype=torch.float64)
    mask = torch.rand(tokens, generator=random) < 0.7
    return logprobs, old, behaviour, advantages, mask


def slow_from_logits(
    logits: Tensor,  # [rows, vocab] float64
    targets: Tensor,
    old: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_ratio: tuple[float, float],
    behaviour_correction: bool,
    normaliser: float,
    entropy_coef: float = 0.0,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    **options: Any,
) -> tuple[Tensor, dict[str, float]]:
    """With the whole of log_softmax in memory, divided."""
    every = (logits / temperature).log_softmax(dim=1)
    every = every if rows is None else every[rows]
    logprobs = every.gather(1, targets[:, None])[:, 0]
    entropy = -(every.exp() * every.masked_fill(every == -math.inf, 0)).sum(dim=1)
    loss, counts = slow(
        *(logprobs, old, behaviour, advantages, mask, *clip_ratio, behaviour_correction), **options
    )
    counts["entropy"] = float(entropy.detach()[mask].sum())
    weights = options.get("weights")
    loss = loss - entropy_coef * (entropy if weights is None else entropy * weights)[mask].sum()
    return loss / normaliser, counts


# All that may be asked of the loss, of so many tokens.
SETTINGS = st.fixed_dictionaries(
    {
        "clip_ratio": st.sampled_from([(0.2, 0.2), (0.1, 0.5)]),
        "behaviour_correction": st.booleans(),
        "normaliser": st.sampled_from([1.0, 3.0]),
        "dual_clip": st.sampled_from([None, 1.6]),
        "kl_coef": st.sampled_from([0.0, 0.3]),
        "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
    }
)


def optional_data(
    tokens: int, *, has_weights: bool, has_reference: bool, seed: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed + 1)
    weights, reference = torch.rand(2, tokens, generator=random, dtype=torch.float64).to(dtype).unbind()
    found = {"weights": weights} if has_weights else {}
    return found | ({"reference_logprobs": -2 * reference} if has_reference else {})
