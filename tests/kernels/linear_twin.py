"""The policy loss from hidden states as one would write it down: all logits in memory, and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def example(
    tokens: int, seed: int, *, hidden_size: int = 5, vocab: int = 7, rows: int | None = None
) -> dict[str, Tensor]:
    """Arguments of `linear_ppo_loss` in float64, with weights and a reference."""
    random = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    return {
        "hidden": numbers(rows or tokens, hidden_size),
        "weight": numbers(vocab, hidden_size),
        "targets": torch.randint(0, vocab, (tokens,), generator=random),
        "old_logprobs": numbers(tokens) / 2 - 2,
        "behaviour_logprobs": numbers(tokens) / 2 - 2,
        "advantages": numbers(tokens),
        "mask": torch.rand(tokens, generator=random) < 0.7,
        "weights": torch.rand(tokens, generator=random, dtype=torch.float64),
        "reference_logprobs": numbers(tokens) / 2 - 2,
    }


def slow_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_ratio: tuple[float, float],
    behaviour_correction: bool,
    normaliser: float,
    weights: Tensor,
    reference_logprobs: Tensor,
    entropy_coef: float = 0.0,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss with KL estimator k3, and the metrics that need pi."""
    logits = (hidden if rows is None else hidden[rows]) @ weight.T
    every = (logits / temperature).log_softmax(dim=1)
    logprobs = every.gather(1, targets[:, None])[:, 0]
    entropy = -(every.exp() * every).sum(dim=1)
    low, high = clip_ratio
    ratio = (logprobs - old_logprobs).exp()
    corrected = ratio
    if behaviour_correction:
        corrected = ratio * (logprobs - behaviour_logprobs).exp().clamp(max=1).detach()
    objective = torch.minimum(corrected * advantages, corrected.clamp(1 - low, 1 + high) * advantages)
    if dual_clip is not None:
        bounded = torch.maximum(objective, dual_clip * advantages)
        objective = torch.where(advantages < 0, bounded, objective)
    difference = logprobs - reference_logprobs
    kl = (-difference).exp() - 1 + difference
    losses = weights * (-objective - entropy_coef * entropy + kl_coef * kl)
    metrics = {
        "entropy": entropy[mask].sum(),
        "reference_kl": kl[mask].sum(),
        "approximate_kl": (ratio - 1 - ratio.log())[mask].sum(),
    }
    return losses[mask].sum() / normaliser, metrics


def with_gradients(
    function: Any, arguments: dict[str, Tensor], **settings: Any
) -> tuple[Tensor, Any, Tensor, Tensor]:
    """Loss, metrics, and the gradients in hidden states and weight."""
    arguments = dict(arguments)
    hidden, weight = (arguments.pop(name).clone().requires_grad_() for name in ("hidden", "weight"))
    loss, metrics = function(hidden, weight, **arguments, **settings)
    for_hidden, for_weight = torch.autograd.grad(2 * loss, (hidden, weight))
    return loss.detach(), metrics, for_hidden, for_weight
