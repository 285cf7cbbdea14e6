"""The policy loss from logits, and its gradient in them from the same pass.

Everything that the gradient of PPO's loss in the logits depends on is known when the logits are: old and
behaviour log-probabilities and advantages are data. So the forward pass writes the gradient while a row, and
its exponentials, are at hand, and the backward pass has only the number that comes in to multiply by.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from torch.distributed import ProcessGroup

from rlef_kernels._checks import (
    accumulation_dtype,
    check_positive,
)
from rlef_kernels._triton import has_triton
from rlef_kernels.logprobs import (
    GPU_CHUNK_ELEMENTS,
    RowStatistics,
    Shard,
    _triton_serves,
    check_logits,
    check_rows,
    check_targets,
    group_of,
    logits_gradient,
    name_of,
    whole_vocabulary,
)
from rlef_kernels.policy import checked_normaliser, divisors
from rlef_kernels.policy_terms import (
    METRICS,
    SETTINGS_SCHEMA,
    KLEstimator,
    PolicyMetrics,
    PolicySettings,
    TokenData,
    check_tokens,
    metrics_of,
    reduced,
    token_terms,
)

# How many logits a CPU works on at a time. They should stay in its last cache, and be so many that what torch
# does for each chunk of tokens counts little. Those of the inner loop should stay in the cache of a core.
CPU_CHUNK_ELEMENTS = 1 << 21
CACHED_ELEMENTS = 1 << 18


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
    in_place: bool = False,
) -> tuple[Tensor, PolicyMetrics]:
    """`ppo_policy_loss` of `logprobs_from_logits`; the arguments are theirs.

    Only the rows of logits that predict a token inside the mask are read; the others get the gradient 0.
    Entropy is computed when it has a weight or is wanted for the metrics. Every process of a
    vocabulary-parallel group returns the same loss and metrics, after one all-gather of at most 16 bytes per
    token.

    The gradient is made in the forward pass, where autograd is on and the logits require it, and takes as
    much memory as they do. A backward pass multiplies it by the number that comes in; it has no second
    derivative.

    Args:
        in_place: write the gradient over the logits, which nothing may read afterwards: a backward pass that
            saved them before raises torch's error about an in-place operation, and so does a second backward
            pass of this loss. Has no effect where no gradient is wanted, nor under torch.compile, which
            places tensors itself.

    Raises:
        ValueError: shapes, types or devices that differ, a setting out of range, or (on a CPU) a target or
            row that cannot be right.
    """
    check_logits(logits, targets, rows)
    check_positive("temperature", temperature)
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
    settings = PolicySettings.checked(
        clip_ratio=clip_ratio,
        dual_clip=dual_clip,
        behaviour_correction=behaviour_correction,
        entropy_coef=entropy_coef,
        reference_logprobs=reference_logprobs,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
    )
    want_gradient = torch.is_grad_enabled() and logits.requires_grad
    arguments = (
        *(want_gradient, targets, rows),
        *(each.detach() for each in (old_logprobs, behaviour_logprobs, advantages)),
        mask,
        *(None if each is None else each.detach() for each in (weights, reference_logprobs)),
        *divisors(normaliser, logits),
        float(temperature),
        want_entropy or entropy_coef > 0,
        name_of(group),
        *settings.for_operator(),
    )
    if in_place:
        _check_writable(logits)
    if want_gradient and not torch.compiler.is_compiling():
        loss, metrics = _Loss.apply(logits, in_place, arguments)  # type: ignore[no-untyped-call]
    else:
        loss, metrics, _ = torch.ops.rlef_kernels.ppo_policy_loss_from_logits(logits, *arguments)
    return loss, metrics_of(metrics)


def _check_writable(logits: Tensor) -> None:
    rows, vocab = logits.shape
    if (logits.stride(1) != 1 and vocab > 1) or (logits.stride(0) < vocab and rows > 1):
        raise ValueError(
            f"logits have strides {list(logits.stride())}; in_place needs rows that lie one after the other"
        )


def _loss_from_logits(
    logits: Tensor,  # [rows, vocab / ranks]
    want_gradient: bool,
    targets: Tensor,  # [tokens]
    rows: Tensor | None,  # [tokens]
    old_logprobs: Tensor,  # [tokens]
    behaviour_logprobs: Tensor,  # [tokens]
    advantages: Tensor,  # [tokens]
    mask: Tensor,  # [tokens]
    weights: Tensor | None,  # [tokens]
    reference_logprobs: Tensor | None,  # [tokens]
    normaliser: Tensor | None,  # []
    divisor: float,
    temperature: float,
    want_entropy: bool,
    group_name: str,
    *settings: Any,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, metrics `[8]` and d loss / d logits, which has no rows unless it is wanted."""
    group = group_of(group_name)
    check_targets(targets, logits.shape[1], group)
    if rows is not None:
        check_rows(rows, targets, logits.shape[0], "logits")
    data = TokenData(
        old_logprobs=old_logprobs,
        behaviour_logprobs=behaviour_logprobs,
        advantages=advantages,
        weights=weights,
        reference_logprobs=reference_logprobs,
    )
    checked = PolicySettings.of_operator(*settings)
    if _triton_serves(logits):
        gradient = logits if in_place else _empty_gradient(logits, want_gradient)
        loss, metrics = _in_triton(
            *(logits, gradient if want_gradient else None, targets, rows, mask, data, checked, normaliser),
            *(divisor, 1 / temperature),
            group=group,
            want_entropy=want_entropy,
        )
        return loss, metrics, gradient
    scale = 1 / divisor if normaliser is None else checked_normaliser(normaliser).reciprocal()
    tokens = mask.nonzero()[:, 0]  # [chosen]
    places = tokens if rows is None else rows[tokens]
    data = data.at(tokens, accumulation_dtype(logits))
    work = (logits, targets[tokens], places, data, checked, temperature, scale, want_entropy)
    if group is not None:
        loss, metrics, made = _of_shard(*work, group, want_gradient=want_gradient)
        return loss, metrics, logits.copy_(made) if in_place else made
    gradient = _gradient_of_zeros(logits, places, want_gradient=want_gradient, in_place=in_place)
    loss, metrics = _of_rows(*work, gradient if want_gradient else None)
    return loss, metrics, gradient


def _in_triton(
    logits: Tensor, *arguments: Any, group: ProcessGroup | None, want_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Loss and metrics `[8]`; the second argument is where the gradient is written."""
    if group is None:
        from rlef_kernels._policy_rows_triton import loss_of_rows

        return loss_of_rows(logits, *arguments, want_entropy=want_entropy)
    from rlef_kernels._policy_shards_triton import loss_of_shard

    return loss_of_shard(logits, *arguments, group=group, want_entropy=want_entropy)


def _empty_gradient(logits: Tensor, want_gradient: bool) -> Tensor:
    """Contiguous, whatever the logits are."""
    return logits.new_empty((logits.shape[0] if want_gradient else 0, logits.shape[1]))


def _gradient_of_zeros(logits: Tensor, places: Tensor, *, want_gradient: bool, in_place: bool) -> Tensor:
    """Memory for the gradient that is 0 in all rows but `places`, which are to be written."""
    if not want_gradient or (places.shape[0] == logits.shape[0] and not in_place):
        return _empty_gradient(logits, want_gradient)
    if not in_place:
        return logits.new_zeros(logits.shape)
    others = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
    others[places] = False
    return logits.index_fill_(0, others.nonzero()[:, 0], 0)


def _of_rows(
    logits: Tensor,  # [rows, vocab]
    targets: Tensor,  # [chosen]
    places: Tensor,  # [chosen] their rows
    data: TokenData,
    settings: PolicySettings,
    temperature: float,
    scale: float | Tensor,
    want_entropy: bool,
    gradient: Tensor | None,  # [rows, vocab]
) -> tuple[Tensor, Tensor]:
    """A few rows at a time: each logit is read once, and its exponential serves sums and gradient alike.

    What is worked on lies in spare chunks, or, where the types allow, in the gradient itself.
    """
    dtype, vocab = accumulation_dtype(logits), logits.shape[1]
    elements = CPU_CHUNK_ELEMENTS if logits.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    step = max(1, min(elements // vocab, places.shape[0]))
    spare = logits.new_empty((2 if want_entropy else 1, step, vocab), dtype=dtype)
    firsts, lasts = places[::step].tolist(), places[step - 1 :: step].tolist()
    all_terms = [spare.new_zeros((9, 0))]
    for number, begin in enumerate(range(0, places.shape[0], step)):
        part = slice(begin, begin + step)
        columns = targets[part, None]  # [chunk, 1]
        size = columns.shape[0]
        last = lasts[number] if number < len(lasts) else int(places[-1])
        are_adjacent = last - firsts[number] == size - 1
        where = slice(firsts[number], last + 1) if are_adjacent else places[part]
        chunk = logits[where]  # [chunk, vocab]
        chosen = chunk.gather(1, columns)[:, 0].to(dtype)
        is_direct = gradient is not None and are_adjacent and gradient.dtype == dtype
        exponentials = gradient[where] if gradient is not None and is_direct else spare[0, :size]
        products = spare[1, :size] if want_entropy else None
        maximum, total, weighted = _exponentials(chunk, temperature, exponentials, products)
        mean = None if weighted is None else weighted / total
        logprobs = (chosen - maximum) / temperature - total.log()
        entropy = None if mean is None else total.log() - mean
        terms, slopes, for_entropy = token_terms(logprobs, entropy, data.at(part, dtype), settings)
        all_terms.append(terms)
        if gradient is None:
            continue
        # d logprob = [target] - p; d entropy = -p (y - E y), where y is what the exponentials were taken of
        slopes = slopes * (scale / temperature)
        for_every = -slopes / total
        if for_entropy is not None and products is not None and mean is not None:
            for_entropy = for_entropy * (scale / temperature) / total
            for_every = for_every + for_entropy * mean
            exponentials.mul_(for_every[:, None]).sub_(products.mul_(for_entropy[:, None]))
        else:
            exponentials.mul_(for_every[:, None])
        exponentials.scatter_add_(1, columns, slopes[:, None])
        if not is_direct:
            gradient[where] = exponentials.to(gradient.dtype)
    loss, metrics = reduced(torch.cat(all_terms, dim=1))
    return loss * scale, metrics


def _exponentials(
    chunk: Tensor,  # [chunk, vocab]
    temperature: float,
    exponentials: Tensor,  # [chunk, vocab] to be written: e^y, y = (logit - maximum) / temperature
    products: Tensor | None,  # [chunk, vocab] to be written: y e^y
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Maximum, sum e^y and sum y e^y, `[chunk]`; each pass over a few rows finds them in the cache."""
    dtype, (size, vocab) = exponentials.dtype, chunk.shape
    maximum, total, weighted = exponentials.new_empty((3, size)).unbind()
    step = max(1, (CACHED_ELEMENTS if chunk.device.type == "cpu" else chunk.numel()) // vocab)
    for begin in range(0, size, step):
        part = slice(begin, begin + step)
        # Finite even where a whole row is -inf, so that no difference is inf - inf.
        highest = chunk[part].amax(dim=1).to(dtype).clamp_(min=torch.finfo(torch.float32).min)
        shifted = exponentials[part] if products is None else products[part]
        torch.sub(chunk[part], highest[:, None], out=shifted)
        if temperature != 1:
            shifted.mul_(1 / temperature)
        torch.exp(shifted, out=exponentials[part])
        maximum[part], total[part] = highest, exponentials[part].sum(dim=1)
        if products is None:
            continue
        weighted[part] = shifted.mul_(exponentials[part]).sum(dim=1)
        if not bool(weighted[part].isfinite().all()):  # -inf * 0, which is to be 0, or a NaN, which stays one
            weighted[part] = shifted.masked_fill_(exponentials[part] == 0, 0).sum(dim=1)
    return maximum, total, None if products is None else weighted


def _of_shard(
    logits: Tensor,  # [rows, vocab / ranks]
    targets: Tensor,  # [chosen]
    places: Tensor,  # [chosen] their rows
    data: TokenData,
    settings: PolicySettings,
    temperature: float,
    scale: float | Tensor,
    want_entropy: bool,
    group: ProcessGroup,
    *,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a part of the vocabulary: its statistics, then what the others make of them, then its gradient."""
    shard = Shard(logits, targets, places, temperature, group)
    row: RowStatistics = whole_vocabulary(shard.statistics(want_entropy), targets, shard, group)
    entropy = row.entropy() if want_entropy else None
    terms, slopes, for_entropy = token_terms(row.logprobs(temperature), entropy, data, settings)
    loss, metrics = reduced(terms)
    gradient = _empty_gradient(logits, want_gradient)
    if want_gradient:
        for_entropy = None if for_entropy is None else for_entropy * scale
        gradient = logits_gradient(shard, row, slopes * scale, for_entropy, None)
    return loss * scale, metrics, gradient


def _shapes_of_loss(logits: Tensor, want_gradient: bool, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    """What torch.compile needs to know of the outputs."""
    loss = logits.new_empty((), dtype=accumulation_dtype(logits))
    return loss, loss.new_empty(len(METRICS)), _empty_gradient(logits, want_gradient)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, metrics, gradient = output
    ctx.mark_non_differentiable(metrics, gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient)
    ctx.others = len(inputs) - 1


@once_differentiable
def _times_gradient(ctx: Any, for_loss: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return None if for_loss is None else gradient * for_loss, *[None] * ctx.others


class _Loss(torch.autograd.Function):
    """The operator where nothing is traced: the gradient is nobody else's, and is multiplied in its place."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, in_place: bool, arguments: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        loss, metrics, gradient = _loss_from_logits(logits, *arguments, in_place=in_place)
        if in_place:
            increment_version(logits)
        ctx.mark_non_differentiable(metrics)
        ctx.in_place = in_place
        ctx.save_for_backward(gradient)  # at the version that holds it
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        if ctx.in_place:
            increment_version(gradient)  # whoever saved or saves the logits is told that they are no more
            return _scaled_(gradient.detach(), for_loss), None, None
        if torch._C._autograd._get_current_graph_task_keep_graph():  # noqa: SLF001
            return gradient * for_loss, None, None
        return _scaled_(gradient, for_loss), None, None


def _scaled_(gradient: Tensor, factor: Tensor) -> Tensor:
    """The gradient times the factor, in its own memory; untouched where the factor is 1."""
    if gradient.device.type == "cpu":
        return gradient if float(factor) == 1 else gradient.mul_(factor)
    if not has_triton():
        return gradient.mul_(factor)
    from rlef_kernels._policy_rows_triton import scale_in_triton

    return scale_in_triton(gradient, factor)  # asks on the device whether it is 1


# An operator, so that torch.compile steps over it: it asks how many tokens the mask has.
torch.library.define(
    "rlef_kernels::ppo_policy_loss_from_logits",
    "(Tensor logits, bool want_gradient, Tensor targets, Tensor? rows, Tensor old_logprobs,"
    " Tensor behaviour_logprobs, Tensor advantages, Tensor mask, Tensor? weights, Tensor? reference_logprobs,"
    " Tensor? normaliser, float divisor, float temperature, bool want_entropy, str group_name, "
    f"{SETTINGS_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("rlef_kernels::ppo_policy_loss_from_logits", "default", _loss_from_logits)
torch.library.register_fake("rlef_kernels::ppo_policy_loss_from_logits", _shapes_of_loss)
torch.library.register_autograd(
    "rlef_kernels::ppo_policy_loss_from_logits", _times_gradient, setup_context=_save_gradient
)
