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
from torch.distributed import distributed_c10d as c10d

from rlef_kernels._checks import (
    accumulation_dtype,
    check_floating,
    check_integer,
    check_like,
    check_normaliser,
    check_positive,
)
from rlef_kernels.linear_chunk import Chunk
from rlef_kernels.logprobs import check_rows, check_targets
from rlef_kernels.policy import KLEstimator, PolicyMetrics, PolicySettings, check_tokens, loss_and_gradient

# How many logits are in memory at a time. Large enough for the matrix products, small beside the model.
CPU_CHUNK_ELEMENTS = 1 << 22
GPU_CHUNK_ELEMENTS = 1 << 28
_SETTINGS = tuple(field.name for field in fields(PolicySettings))  # as the operator has them
_METRICS = tuple(field.name for field in fields(PolicyMetrics))


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

    Gradients in `hidden` and `weight` are made in the forward pass if autograd is on and they require one,
    and summed over chunks in float32 (float64 for float64 inputs); the backward pass only scales them, and
    has no second derivative. Everything else is as there. A row is read only if it predicts a token inside
    the mask.

    Args:
        hidden: `[rows, hidden size]`, the same on all processes of `group`.
        weight: `[vocab / ranks, hidden size]`, of the type of `hidden`: this process's part of the words.
        rows: `[tokens]` int64 ascending, the row of hidden states that predicts each target.
        group: as for `logprobs_from_logits`. For each chunk there is one all-gather of at most 16 bytes per
            token, and one all-reduce of the gradient in the hidden states, which therefore is the same whole
            gradient on all processes.
        chunk_elements: how many logits of this process are in memory at a time; at least one row is.

    On a GPU and in half precision, log-probabilities come from sums that were never rounded to it, and the
    gradient in the logits from exponentials rounded once. A logit of -inf, which only an infinite weight can
    make, gives the entropy NaN there.

    Raises:
        ValueError: shapes, types or devices that differ, or a setting out of range.
    """
    _check_shapes(hidden, weight, targets, rows)
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
    with_gradient = torch.is_grad_enabled()
    loss, metrics, _, _ = torch.ops.rlef_kernels.linear_ppo_loss(
        hidden,
        weight,
        targets,
        *(each.detach() for each in (old_logprobs, behaviour_logprobs, advantages)),
        mask,
        rows,
        *(None if each is None else each.detach() for each in (weights, reference_logprobs)),
        *_divisors(normaliser, hidden),
        *(getattr(settings, name) for name in _SETTINGS),
        want_entropy or entropy_coef > 0,
        float(temperature),
        int(chunk_elements),
        "" if group is None else group.group_name,
        with_gradient and hidden.requires_grad,
        with_gradient and weight.requires_grad,
    )
    return loss, PolicyMetrics(**dict(zip(_METRICS, metrics.unbind(), strict=True)))


def _divisors(normaliser: float | Tensor, like: Tensor) -> tuple[Tensor | None, float]:
    """As a tensor, whose value the operator checks where it can be read, or as a number."""
    if not isinstance(normaliser, Tensor):
        check_normaliser(normaliser)
        return None, float(normaliser)
    if normaliser.numel() != 1:
        raise ValueError(f"normaliser has shape {list(normaliser.shape)}; it must be one number")
    return normaliser.detach().reshape(()).to(like.device, accumulation_dtype(like), non_blocking=True), 1.0


def _check_shapes(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None) -> None:
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
        check_integer("rows", rows)
        check_like("rows", rows, "targets", targets)


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    rows: Tensor | None,
    weights: Tensor | None,
    reference_logprobs: Tensor | None,
    normaliser: Tensor | None,
    divisor: float,
    low: float,
    high: float,
    dual_clip: float | None,
    behaviour_correction: bool,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: KLEstimator,
    want_entropy: bool,
    temperature: float,
    chunk_elements: int,
    group_name: str,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics `[8]`, and the gradients of the loss before its division; one not wanted has no rows."""
    group: ProcessGroup | None = None
    if group_name:
        group = c10d._resolve_process_group(group_name)  # type: ignore[attr-defined,arg-type]  # noqa: SLF001
    check_targets(targets, weight.shape[0], group)
    if rows is not None:
        check_rows(rows, targets, hidden.shape[0], "hidden states")
    if normaliser is not None:
        check_normaliser(normaliser)
    settings = PolicySettings(
        low=low,
        high=high,
        dual_clip=dual_clip,
        behaviour_correction=behaviour_correction,
        entropy_coef=entropy_coef,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
    )
    dtype = accumulation_dtype(hidden)
    for_hidden = hidden.new_zeros((hidden.shape[0] if wants_hidden else 0, hidden.shape[1]), dtype=dtype)
    for_weight = weight.new_zeros((weight.shape[0] if wants_weight else 0, weight.shape[1]), dtype=dtype)
    tokens = mask.nonzero()[:, 0]  # [chosen]
    step = max(1, chunk_elements // weight.shape[0])
    total, all_metrics = for_hidden.new_zeros(()), []
    for begin in range(0, max(1, tokens.shape[0]), step):
        part = tokens[begin : begin + step]  # [chunk]
        places = part if rows is None else rows[part]
        states = hidden.index_select(0, places)  # [chunk, hidden size]
        loss, metrics, for_logits = _of_logits(
            Chunk(
                states,
                weight,
                targets[part],
                temperature,
                group,
                want_entropy=want_entropy,
                want_gradient=wants_hidden or wants_weight,
            ),
            old_logprobs[part],
            behaviour_logprobs[part],
            advantages[part],
            None if weights is None else weights[part],
            None if reference_logprobs is None else reference_logprobs[part],
            settings,
            want_gradient=wants_hidden or wants_weight,
        )
        total += loss
        all_metrics.append(metrics)
        if for_logits is not None and wants_hidden:
            for_states = (for_logits @ weight).to(dtype)
            if group is not None:
                dist.all_reduce(for_states, group=group)
            for_hidden[places] = for_states
        if for_logits is not None and wants_weight:
            if states.dtype == dtype:
                for_weight.addmm_(for_logits.T, states)  # no second matrix of this size
            else:
                for_weight += for_logits.T @ states
        del for_logits  # the next chunk takes its memory
    return (
        total / (divisor if normaliser is None else normaliser),
        _merged(all_metrics),
        for_hidden,
        for_weight,
    )


def _of_logits(
    chunk: Chunk,
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    reference_logprobs: Tensor | None,
    settings: PolicySettings,
    *,
    want_gradient: bool,
) -> tuple[Tensor, PolicyMetrics, Tensor | None]:
    """The summed loss, the metrics, and the loss's gradient in the chunk's logits."""
    loss, for_logprobs, metrics = loss_and_gradient(
        chunk.logprobs,
        old_logprobs,
        behaviour_logprobs,
        advantages,
        torch.ones_like(chunk.columns, dtype=torch.bool),
        weights,
        reference_logprobs,
        settings,
    )
    for_entropy = None
    if chunk.entropy is not None:
        metrics = replace(metrics, entropy=chunk.entropy.sum())
        if settings.entropy_coef > 0:
            for_entropy = torch.full_like(chunk.entropy, -settings.entropy_coef)
            if weights is not None:
                for_entropy *= weights
            loss = loss + (for_entropy * chunk.entropy).sum()
    return loss, metrics, chunk.gradient(for_logprobs, for_entropy) if want_gradient else None


def _merged(parts: list[PolicyMetrics]) -> Tensor:
    """`[8]`: sums of sums, the largest of the maxima and the smallest of the minima."""
    merge = {"ratio_max": torch.amax, "ratio_min": torch.amin}
    return torch.stack(
        [
            merge.get(field.name, torch.sum)(
                torch.stack([getattr(part, field.name) for part in parts]), dim=0
            )
            for field in fields(PolicyMetrics)
        ]
    )


def _shapes(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What torch.compile needs to know of the outputs."""
    wants_hidden, wants_weight = others[-2:]
    dtype = accumulation_dtype(hidden)
    for_hidden = hidden.new_empty((hidden.shape[0] if wants_hidden else 0, hidden.shape[1]), dtype=dtype)
    for_weight = weight.new_empty((weight.shape[0] if wants_weight else 0, weight.shape[1]), dtype=dtype)
    metrics = for_hidden.new_empty(len(_METRICS))
    return for_hidden.new_empty(()), metrics, for_hidden, for_weight


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, _, *others = inputs
    _, metrics, for_hidden, for_weight = output
    normaliser, ctx.divisor = others[8:10]
    ctx.mark_non_differentiable(metrics, for_hidden, for_weight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(for_hidden, for_weight, normaliser)
    ctx.dtype, ctx.others = hidden.dtype, len(others)


@once_differentiable
def _scale_gradients(ctx: Any, for_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    *gradients, normaliser = ctx.saved_tensors
    if for_loss is None:
        return None, None, *[None] * ctx.others
    factor = for_loss / (ctx.divisor if normaliser is None else normaliser)
    scaled = [
        (gradient * factor).to(ctx.dtype) if needed else None
        for gradient, needed in zip(gradients, ctx.needs_input_grad[:2], strict=True)
    ]
    return *scaled, *[None] * ctx.others


# An operator, so that torch.compile steps over it: it asks how many tokens the mask has.
torch.library.define(
    "rlef_kernels::linear_ppo_loss",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor old_logprobs, Tensor behaviour_logprobs,"
    " Tensor advantages, Tensor mask, Tensor? rows, Tensor? weights, Tensor? reference_logprobs,"
    " Tensor? normaliser, float divisor, float low, float high, float? dual_clip, bool behaviour_correction,"
    " float entropy_coef, float kl_coef, str kl_estimator, bool want_entropy, float temperature,"
    " SymInt chunk_elements, str group_name, bool wants_hidden, bool wants_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("rlef_kernels::linear_ppo_loss", "default", _loss_and_gradients)
torch.library.register_fake("rlef_kernels::linear_ppo_loss", _shapes)
torch.library.register_autograd(
    "rlef_kernels::linear_ppo_loss", _scale_gradients, setup_context=_save_gradients
)
