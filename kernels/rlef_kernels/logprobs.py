"""Log-probability, entropy and logsumexp of chosen tokens, from logits that may be split over the vocabulary.

Neither pass holds more than a few rows of probabilities: the forward pass reduces each row to four numbers,
and the backward pass computes the probabilities again from the logits and two of those numbers. Exponentials
are base 2: torch's exp2 takes a quarter of the time of its exp on a CPU, and the base change costs nothing
beside the temperature.

On a GPU each shard's part of both passes is a Triton kernel of `_logprobs_triton`; the torch code here is its
reference, and serves what the kernels do not. The merge over shards and autograd are the same for both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from rlef_kernels._checks import accumulation_dtype, check_floating, check_integer, check_like, check_positive
from rlef_kernels._triton import has_triton

# How many logits are worked on at a time. On a CPU the temporaries should stay in its cache; on a GPU the
# launches should not count.
CPU_CHUNK_ELEMENTS = 1 << 17
GPU_CHUNK_ELEMENTS = 1 << 26
LN_2 = math.log(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """What the model says of each chosen token, in float32 (float64 for float64 logits)."""

    logprobs: Tensor  # [tokens]
    entropy: Tensor | None  # [tokens] in nats, None unless it was asked for
    logsumexp: Tensor  # [tokens] of the logits divided by the temperature


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStatistics:
    """What is left of each row of a whole vocabulary, enough to compute its probabilities again."""

    maximum: Tensor  # [tokens] of the logits, before the temperature
    chosen: Tensor  # [tokens] the target's logit, before the temperature
    log_sum: Tensor  # [tokens] ln of sum 2^z, where z = (logit - maximum) / (temperature ln 2)
    mean: Tensor  # [tokens] expectation of z; 0 when the entropy is not wanted

    def logprobs(self, temperature: float) -> Tensor:
        return (self.chosen - self.maximum) / temperature - self.log_sum

    def entropy(self) -> Tensor:
        return self.log_sum - LN_2 * self.mean


def _triton_serves(logits: Tensor) -> bool:
    """Its kernels want a GPU, and the words of a row side by side."""
    return logits.is_cuda and logits.stride(1) == 1 and logits.shape[0] > 0 and has_triton()


class Shard:
    """This process's part of the vocabulary, read in chunks of rows."""

    def __init__(
        self,
        logits: Tensor,  # [rows, vocab / ranks]
        targets: Tensor,  # [tokens]
        rows: Tensor | None,  # [tokens]
        temperature: float,
        group: ProcessGroup | None,
    ) -> None:
        self.logits, self.rows, self.bits = logits, rows, 1 / (temperature * LN_2)
        self.tokens, self.vocab = targets.shape[0], logits.shape[1]
        self.dtype = accumulation_dtype(logits)
        # [tokens] the target's column here; outside 0 to vocab - 1, that of another shard
        self.columns = targets if group is None else targets - dist.get_rank(group) * self.vocab

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        elements = CPU_CHUNK_ELEMENTS if self.logits.device.type == "cpu" else GPU_CHUNK_ELEMENTS
        step = max(1, elements // self.vocab)
        for begin in range(0, self.tokens, step):
            part = slice(begin, min(begin + step, self.tokens))
            if self.rows is None:
                yield part, self.logits[part]
            else:
                yield part, self.logits.index_select(0, self.rows[part])

    def shifted(self, chunk: Tensor, maximum: Tensor, *, finite: bool) -> Tensor:
        """z = (logit - maximum) / (temperature ln 2): a new tensor, `[chunk rows, vocab]`."""
        shifted = (chunk - maximum[:, None]).mul_(self.bits)
        if finite:  # a logit of -inf has probability 0; its share of a mean must be 0, not 0 * -inf = NaN
            shifted.clamp_(min=torch.finfo(self.dtype).min)
        return shifted

    def statistics(self, want_entropy: bool) -> Tensor:
        """Of this shard alone: maximum, sum 2^z, the target's logit and sum z 2^z, `[3 or 4, tokens]`."""
        if _triton_serves(self.logits):
            from rlef_kernels._logprobs_triton import shard_statistics

            return shard_statistics(
                self.logits, self.columns, self.rows, self.bits, want_entropy=want_entropy
            )
        columns = self.columns.clamp(0, self.vocab - 1)[:, None]  # where not ours, any: the merge drops it
        partial = self.logits.new_zeros((4 if want_entropy else 3, self.tokens), dtype=self.dtype)
        for part, chunk in self.chunks():
            # Finite even where a whole shard is -inf, so that no difference below is inf - inf.
            maximum = chunk.amax(dim=1).to(self.dtype).clamp_(min=torch.finfo(self.dtype).min)
            shifted = self.shifted(chunk, maximum, finite=want_entropy)
            partial[0, part] = maximum
            partial[2, part] = chunk.gather(1, columns[part])[:, 0].to(self.dtype)
            if want_entropy:
                exponentials = shifted.exp2()
                partial[1, part] = exponentials.sum(dim=1)
                partial[3, part] = shifted.mul_(exponentials).sum(dim=1)
            else:
                partial[1, part] = shifted.exp2_().sum(dim=1)
        return partial

    def gradient(
        self,
        maximum: Tensor,  # [tokens]
        for_every: Tensor,  # [tokens] coefficient of 2^z
        for_shifted: Tensor | None,  # [tokens] coefficient of z 2^z
        for_target: Tensor,  # [tokens] added at the target
    ) -> Tensor:
        """d loss / d logits, `[rows, vocab]` in the type of the logits."""
        if _triton_serves(self.logits):
            from rlef_kernels._logprobs_triton import shard_gradient

            return shard_gradient(
                self.logits,
                self.columns,
                self.rows,
                self.bits,
                maximum=maximum,
                for_every=for_every,
                for_shifted=for_shifted,
                for_target=for_target,
            )
        columns = self.columns.clamp(0, self.vocab - 1)[:, None]
        fill = torch.empty_like if self.rows is None else torch.zeros_like
        gradient = fill(self.logits, memory_format=torch.contiguous_format)
        for_target = torch.where(columns[:, 0] == self.columns, for_target, 0)
        for part, chunk in self.chunks():
            shifted = self.shifted(chunk, maximum[part], finite=for_shifted is not None)
            if for_shifted is None:
                rows = shifted.exp2_().mul_(for_every[part, None])
            else:
                exponentials = shifted.exp2()
                rows = shifted.mul_(for_shifted[part, None]).add_(for_every[part, None]).mul_(exponentials)
            rows.scatter_add_(1, columns[part], for_target[part, None])
            if self.rows is None:
                gradient[part] = rows
            else:
                gradient.index_add_(0, self.rows[part], rows.to(gradient.dtype))
        return gradient


def whole_vocabulary(
    partial: Tensor,  # [3 or 4, tokens]
    targets: Tensor,
    shard: Shard,
    group: ProcessGroup | None,
) -> RowStatistics:
    """Merge the shards' statistics: one all-gather of at most 16 bytes per token, then local arithmetic."""
    partials = _all_gather(partial, group)  # [ranks, 3 or 4, tokens]
    maxima, sums, chosen = partials[:, 0], partials[:, 1], partials[:, 2]
    maximum = maxima.amax(dim=0)
    # Finite, as in the shards: a shard of -inf has the sum 0, and 0 * -inf would be NaN.
    shifts = ((maxima - maximum) * shard.bits).clamp(min=torch.finfo(shard.dtype).min)  # [ranks, tokens]
    weights = shifts.exp2()
    total = (weights * sums).sum(dim=0)
    mean = torch.zeros_like(total)
    if partial.shape[0] == 4:
        mean = (weights * (partials[:, 3] + shifts * sums)).sum(dim=0) / total
    owner = torch.div(targets, shard.vocab, rounding_mode="floor")
    return RowStatistics(
        maximum=maximum,
        chosen=chosen.gather(0, owner[None])[0],
        log_sum=total.log(),
        mean=mean,
    )


def _all_gather(partial: Tensor, group: ProcessGroup | None) -> Tensor:
    if group is None or partial.numel() == 0:
        return partial[None]
    gathered = partial.new_empty((dist.get_world_size(group), *partial.shape))
    dist.all_gather(list(gathered.unbind()), partial, group=group)
    return gathered


def logits_gradient(
    shard: Shard,
    row: RowStatistics,
    for_logprobs: Tensor,  # [tokens]
    for_entropy: Tensor | None,  # [tokens]
    for_logsumexp: Tensor | None,  # [tokens]
) -> Tensor:
    """d loss / d logits of the shard, from d loss / d each statistic.

    With y = z ln 2: d logprob = [target] - p, d logsumexp = p, d entropy = -p (y - E y).
    """
    scale = shard.bits * LN_2 / row.log_sum.exp()  # [tokens] p / 2^z, and the derivative of y
    for_every, for_shifted = -for_logprobs, None
    if for_logsumexp is not None:
        for_every = for_every + for_logsumexp
    if for_entropy is not None:
        for_every = for_every + LN_2 * for_entropy * row.mean
        for_shifted = -LN_2 * for_entropy * scale
    for_target = for_logprobs * (shard.bits * LN_2)
    return shard.gradient(row.maximum, for_every * scale, for_shifted, for_target)


def check_rows(rows: Tensor, targets: Tensor, number: int, of: str) -> None:
    """Raise ValueError unless `rows` are `[tokens]` ascending indices into `number` rows."""
    check_integer("rows", rows)
    check_like("rows", rows, "targets", targets)
    _check_range("rows", rows, number)
    if rows.device.type == "cpu" and not bool((rows[1:] > rows[:-1]).all()):
        raise ValueError(f"rows do not ascend; sort them, each row of {of} at most once")


def check_targets(targets: Tensor, vocab: int, group: ProcessGroup | None) -> None:
    """Raise ValueError unless targets are ids of the whole vocabulary, of which each process has `vocab`."""
    _check_range("targets", targets, vocab * (1 if group is None else dist.get_world_size(group)))


def _check_range(name: str, indices: Tensor, size: int) -> None:
    # Only on a CPU: on a GPU it would wait for the device, whose own indexing reports the same error.
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    low, high = indices.aminmax()
    if low < 0 or high >= size:
        raise ValueError(
            f"{name} reach from {int(low)} to {int(high)}; they must lie within 0 and {size - 1}"
        )


def logprobs_from_logits(
    logits: Tensor,  # [rows, vocab / ranks]
    targets: Tensor,  # [tokens]
    *,
    rows: Tensor | None = None,  # [tokens]
    temperature: float = 1.0,
    want_entropy: bool = False,
    group: ProcessGroup | None = None,
) -> TokenLogprobs:
    """Log-probabilities of `targets` under softmax(logits / temperature), differentiable in `logits`.

    Args:
        logits: `[rows, vocab / ranks]`, half, bfloat16, single or double precision. Never modified, and kept
            (not copied) for the backward pass.
        targets: `[tokens]` int64, ids in the whole vocabulary, whichever shard holds them.
        rows: `[tokens]` int64 ascending, the row of logits that predicts each target, none twice; row i
            predicts target i when left out. Rows that nothing asks for are not read, and their gradient is 0.
        temperature: divides the logits.
        want_entropy: also return each row's entropy, which costs a second sum over the vocabulary.
        group: the processes over which the vocabulary is split in equal, ascending shards; None means not
            split. Collective: every process of the group calls with the same targets and rows, and gets the
            same result. They exchange 12 bytes per token (16 with entropy) in the forward pass, and nothing
            in the backward pass, where each process receives the gradient of its own shard.

    Raises:
        ValueError: a shape, type, device, temperature or (on a CPU) target or row that cannot be right.
    """
    check_logits(logits, targets, rows)
    check_positive("temperature", temperature)
    logprobs, entropy, logsumexp, _ = torch.ops.rlef_kernels.logprobs_from_logits(
        logits, targets, rows, float(temperature), want_entropy, name_of(group)
    )
    return TokenLogprobs(logprobs=logprobs, entropy=entropy if want_entropy else None, logsumexp=logsumexp)


def check_logits(logits: Tensor, targets: Tensor, rows: Tensor | None) -> None:
    """Raise ValueError unless logits are `[rows, vocab]`, and targets and rows fit: not reading a value."""
    check_floating("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"logits have shape {list(logits.shape)}; they must be [rows, vocab], vocab at least 1"
        )
    check_integer("targets", targets)
    if rows is None:
        check_like("targets", targets, "the first dimension of logits", logits[:, 0])
    else:
        check_integer("rows", rows)
        check_like("rows", rows, "targets", targets)


def name_of(group: ProcessGroup | None) -> str:
    """What stands for the group among an operator's arguments."""
    return "" if group is None else group.group_name


def group_of(name: str) -> ProcessGroup | None:
    return _resolve_process_group(name) if name else None  # type: ignore[arg-type]


def _logprobs_of_logits(
    logits: Tensor,  # [rows, vocab / ranks]
    targets: Tensor,  # [tokens]
    rows: Tensor | None,  # [tokens]
    temperature: float,
    want_entropy: bool,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, entropy (`[0]` if not wanted), logsumexp; for the backward pass, `[3, tokens]`."""
    group = group_of(group_name)
    if rows is not None:
        check_rows(rows, targets, logits.shape[0], "logits")
    check_targets(targets, logits.shape[1], group)
    shard = Shard(logits, targets, rows, temperature, group)
    row = whole_vocabulary(shard.statistics(want_entropy), targets, shard, group)
    entropy = row.entropy() if want_entropy else row.maximum.new_empty(0)
    logsumexp = row.maximum / temperature + row.log_sum
    return row.logprobs(temperature), entropy, logsumexp, torch.stack([row.maximum, row.log_sum, row.mean])


def _shapes_of_logprobs(
    logits: Tensor, targets: Tensor, _rows: Tensor | None, _temperature: float, want_entropy: bool, _name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What torch.compile needs to know of the outputs."""
    logprobs = logits.new_empty(targets.shape, dtype=accumulation_dtype(logits))
    entropy = torch.empty_like(logprobs) if want_entropy else logprobs.new_empty(0)
    return logprobs, entropy, torch.empty_like(logprobs), logprobs.new_empty((3, *targets.shape))


def _gradient_of_logits(
    logits: Tensor,  # [rows, vocab / ranks]
    targets: Tensor,  # [tokens]
    rows: Tensor | None,  # [tokens]
    statistics: Tensor,  # [3, tokens]
    for_logprobs: Tensor | None,  # [tokens]
    for_entropy: Tensor | None,  # [tokens]
    for_logsumexp: Tensor | None,  # [tokens]
    temperature: float,
    group_name: str,
) -> Tensor:
    shard = Shard(logits, targets, rows, temperature, group_of(group_name))
    maximum, log_sum, mean = statistics
    zero = torch.zeros_like(maximum)
    row = RowStatistics(maximum=maximum, chosen=zero, log_sum=log_sum, mean=mean)
    return logits_gradient(
        shard, row, zero if for_logprobs is None else for_logprobs, for_entropy, for_logsumexp
    )


def _save_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, rows, ctx.temperature, ctx.want_entropy, ctx.group_name = inputs
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, rows, output[3])


@once_differentiable
def _logprobs_backward(
    ctx: Any, for_logprobs: Tensor | None, for_entropy: Tensor | None, for_logsumexp: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.rlef_kernels.logprobs_from_logits_backward(
        *ctx.saved_tensors,
        for_logprobs,
        for_entropy if ctx.want_entropy else None,
        for_logsumexp,
        ctx.temperature,
        ctx.group_name,
    )
    return gradient, None, None, None, None, None


# Operators, so that torch.compile steps over them: their torch form asks for the values of targets and rows.
torch.library.define(
    "rlef_kernels::logprobs_from_logits",
    "(Tensor logits, Tensor targets, Tensor? rows, float temperature, bool want_entropy, str group_name)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("rlef_kernels::logprobs_from_logits", "default", _logprobs_of_logits)
torch.library.register_fake("rlef_kernels::logprobs_from_logits", _shapes_of_logprobs)
torch.library.register_autograd(
    "rlef_kernels::logprobs_from_logits", _logprobs_backward, setup_context=_save_statistics
)
torch.library.define(
    "rlef_kernels::logprobs_from_logits_backward",
    "(Tensor logits, Tensor targets, Tensor? rows, Tensor statistics, Tensor? for_logprobs,"
    " Tensor? for_entropy, Tensor? for_logsumexp, float temperature, str group_name) -> Tensor",
)
torch.library.impl("rlef_kernels::logprobs_from_logits_backward", "default", _gradient_of_logits)
torch.library.register_fake(
    "rlef_kernels::logprobs_from_logits_backward",
    lambda logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
)
