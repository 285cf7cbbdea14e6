"""The policy loss from hidden states and the output weight, without logits in memory.

Everything that the gradient of PPO's loss in the logits depends on is known when the logits are: old and
behaviour log-probabilities and advantages are data. So the forward pass makes the logits of a few tokens at a
time, takes their loss and their gradient, multiplies that back onto the hidden states and the weight, and
forgets them: three products of V H for each token and no second pass, where a backward pass that makes the
logits again needs four.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from rlef_kernels._checks import (
    accumulation_dtype,
    check_floating,
    check_integer,
    check_like,
    check_normaliser,
    check_positive,
)
from rlef_kernels.logprobs import Shard, check_rows, check_targets, logits_gradient, whole_vocabulary
from rlef_kernels.policy import KLEstimator, PolicyMetrics, PolicySettings, check_tokens, loss_and_gradient

# How many logits are in memory at a time. Large enough for the matrix products, small beside the model.
CPU_CHUNK_ELEMENTS = 1 << 22
GPU_CHUNK_ELEMENTS = 1 << 28


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, loss: Tensor, for_hidden: Tensor, for_weight: Tensor
    ) -> Tensor:
        ctx.save_for_backward(for_hidden, for_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            (gradient * for_loss).to(dtype) if needed else None
            for gradient, dtype, needed in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:2], strict=True
            )
        ]
        return *gradients, None, None, None


def linear_ppo_loss(
    hidden: Tensor,  # [rows, hidden size]
    weight: Tensor,  # [vocab / ranks, hidden size]
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
    chunk_elements: int | None = None,
) -> tuple[Tensor, PolicyMetrics]:
    """`ppo_policy_loss_from_logits` of `hidden @ weight.T`, of which no more than a chunk is ever in memory.

    Gradients in `hidden` and `weight` are made in the forward pass, in float32 (float64 for float64 inputs);
    the backward pass only scales them. Everything else is as there. A row is read only if it predicts a token
    inside the mask.

    Args:
        hidden: `[rows, hidden size]`, the same on all processes of `group`.
        weight: `[vocab / ranks, hidden size]`, of the type of `hidden`: this process's part of the words.
        rows: `[tokens]` int64 ascending, the row of hidden states that predicts each target.
        group: as for `logprobs_from_logits`. For each chunk there is one all-gather of at most 16 bytes per
            token, and one all-reduce of the gradient in the hidden states, which therefore is the same whole
            gradient on all processes.
        chunk_elements: how many logits of this process are in memory at a time; at least one row is.

    Raises:
        ValueError: shapes, types or devices that differ, or a setting out of range.
    """
    _check_shapes(hidden, weight, targets, rows, group)
    check_tokens(
        "targets",
        targets,
        mask,
        old_logprobs=old_logprobs,
        behaviour_logprobs=behaviour_logprobs,
        advantages=advantages,
        weights=weights,
        reference_logprobs=reference_logprobs,
    )
    check_positive("temperature", temperature)
    check_normaliser(normaliser)
    settings = PolicySettings.checked(
        clip_ratio=clip_ratio,
        dual_clip=dual_clip,
        behaviour_correction=behaviour_correction,
        entropy_coef=entropy_coef,
        reference_logprobs=reference_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
    )
    if chunk_elements is None:
        chunk_elements = CPU_CHUNK_ELEMENTS if hidden.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    check_positive("chunk_elements", chunk_elements)
    with torch.no_grad():
        tokens = mask.nonzero()[:, 0]  # [chosen]
        step = max(1, chunk_elements // weight.shape[0])
        parts = [tokens[begin : begin + step] for begin in range(0, max(1, tokens.shape[0]), step)]
        dtype = accumulation_dtype(hidden)
        for_hidden = torch.zeros_like(hidden, dtype=dtype, memory_format=torch.contiguous_format)
        for_weight = torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
        total, metrics = hidden.new_zeros((), dtype=dtype), []
        for part in parts:
            places = part if rows is None else rows[part]
            states = hidden.index_select(0, places)  # [chunk, hidden size]
            loss, for_logits, of_part = _loss_of_logits(
                states @ weight.T,
                targets[part],
                old_logprobs[part],
                behaviour_logprobs[part],
                advantages[part],
                None if weights is None else weights[part],
                None if reference_logprobs is None else reference_logprobs[part],
                settings,
                temperature,
                group,
                want_entropy=want_entropy or entropy_coef > 0,
            )
            total += loss
            metrics.append(of_part)
            for_states = (for_logits @ weight).to(dtype)
            if group is not None:
                dist.all_reduce(for_states, group=group)
            for_hidden[places] = for_states
            if states.dtype == dtype:
                for_weight.addmm_(for_logits.T, states)  # no second matrix of this size
            else:
                for_weight += for_logits.T @ states
    loss = _LinearPolicyLoss.apply(hidden, weight, total, for_hidden, for_weight)  # type: ignore[no-untyped-call]
    return loss / normaliser, _merged(metrics)


def _loss_of_logits(
    logits: Tensor,  # [chunk, vocab / ranks]
    targets: Tensor,
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    reference_logprobs: Tensor | None,
    settings: PolicySettings,
    temperature: float,
    group: ProcessGroup | None,
    *,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, PolicyMetrics]:
    """The summed loss, its gradient in the logits, the metrics."""
    shard = Shard(logits, targets, None, temperature, group)
    row = whole_vocabulary(shard.statistics(want_entropy), targets, shard, group)
    logprobs = row.logprobs(temperature)
    loss, for_logprobs, metrics = loss_and_gradient(
        logprobs,
        old_logprobs,
        behaviour_logprobs,
        advantages,
        torch.ones_like(targets, dtype=torch.bool),
        weights,
        reference_logprobs,
        settings,
    )
    for_entropy = None
    if want_entropy:
        entropy = row.entropy()
        metrics = replace(metrics, entropy=entropy.sum())
        for_entropy = torch.full_like(entropy, -settings.entropy_coef)
        if weights is not None:
            for_entropy *= weights
        loss = loss + (for_entropy * entropy).sum()
    return loss, logits_gradient(shard, row, for_logprobs, for_entropy, None), metrics


def _merged(parts: list[PolicyMetrics]) -> PolicyMetrics:
    """Sums of sums, the largest of the maxima and the smallest of the minima."""
    merge = {"ratio_max": torch.amax, "ratio_min": torch.amin}
    values = {
        field.name: merge.get(field.name, torch.sum)(
            torch.stack([getattr(part, field.name) for part in parts]), dim=0
        )
        for field in fields(PolicyMetrics)
    }
    return PolicyMetrics(**values)


def _check_shapes(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, group: ProcessGroup | None
) -> None:
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"hidden has shape {list(hidden.shape)} and weight {list(weight.shape)}; they must be "
            "[rows, hidden size] and [vocab, hidden size], vocab at least 1"
        )
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise ValueError(
            f"hidden is {hidden.dtype} on {hidden.device} but weight {weight.dtype} on {weight.device}; make "
            "them equal"
        )
    check_integer("targets", targets)
    if rows is None:
        check_like("targets", targets, "the first dimension of hidden", hidden[:, 0])
    else:
        check_rows(rows, targets, hidden.shape[0], "hidden states")
    check_targets(targets, weight.shape[0], group)
