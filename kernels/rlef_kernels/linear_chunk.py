"""A chunk of the logits hidden @ weight.T, of which only exponentials stay.

They are 2^z with z = logit / (temperature ln 2) - reference, a reference for each segment of a row. With a
few sums of them they are all that log-probabilities, entropies and the gradient in the logits need, and the
gradient is written over them. In torch a row is one segment; on a GPU, in half precision, the kernels of
`_linear_triton` make the exponentials where the matrix product ends, in segments of a tile's width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from rlef_kernels._checks import accumulation_dtype
from rlef_kernels._triton import has_triton

# How many logits are worked on at a time: on a CPU what is made of them should stay in its cache.
CPU_BLOCK_ELEMENTS = 1 << 17
GPU_BLOCK_ELEMENTS = 1 << 26
LN_2 = math.log(2)
LOWEST = -1e38  # the reference where every logit is -inf; two of them may be subtracted


def _triton_serves(hidden: Tensor, weight: Tensor) -> bool:
    """Its tensor cores want half precision, and the numbers of a word side by side. Single precision is left
    to torch, whose products of it are as fast as can be."""
    of_kernels = hidden.is_cuda and hidden.dtype in (torch.float16, torch.bfloat16)
    return of_kernels and weight.stride(1) == 1 and weight.shape[1] > 0 and has_triton()


class Chunk:
    """Log-probabilities and entropies `[tokens]` of the targets, and on demand d loss / d logits."""

    def __init__(
        self,
        states: Tensor,  # [tokens, hidden size]
        weight: Tensor,  # [vocab / ranks, hidden size]
        targets: Tensor,  # [tokens]
        temperature: float,
        group: ProcessGroup | None,
        *,
        want_entropy: bool,
        want_gradient: bool,
    ) -> None:
        self.temperature, self.vocab, self.dtype = temperature, weight.shape[0], states.dtype
        self.uses_triton = _triton_serves(states, weight)
        columns = targets if group is None else targets - dist.get_rank(group) * self.vocab
        is_here = (columns >= 0) & (columns < self.vocab)
        self.columns = torch.where(is_here, columns, -1).int()  # [tokens] -1: in another shard
        bits = 1 / (temperature * LN_2)
        if self.uses_triton:
            from rlef_kernels._linear_triton import SEGMENT, exponentials

            self.statistics, self.powers = exponentials(
                states,
                weight,
                self.columns,
                bits,
                want_entropy=want_entropy,
                want_gradient=want_gradient,
            )  # [tokens, segments, 4], [tokens, vocab or more]
            segments = self.columns.clamp(min=0).long() // SEGMENT
        else:
            self.statistics, self.powers = _exponentials(
                states @ weight.T, self.columns, bits, want_entropy=want_entropy
            )
            segments = torch.zeros_like(targets)
        of_shard = _merged(self.statistics, segments)  # [tokens, 4]
        of_shards = _all_gather(of_shard, group, want_entropy=want_entropy)  # [tokens, ranks, 4]
        owners = torch.div(targets, self.vocab, rounding_mode="floor")
        self.reference, total, weighted, chosen = _merged(of_shards, owners).unbind(dim=1)
        self.total, self.mean = total, weighted / total
        self.logprobs = LN_2 * chosen - total.log()
        self.entropy = total.log() - LN_2 * self.mean if want_entropy else None

    def gradient(
        self,
        for_logprobs: Tensor,  # [tokens]
        for_entropy: Tensor | None,  # [tokens]
    ) -> Tensor:
        """d loss / d logits `[tokens, vocab / ranks]`, over the exponentials: it can be had once.

        With y = z ln 2: d logprob = [target] - p, d entropy = -p (y - E y).
        """
        assert self.powers is not None
        powers, self.powers = self.powers, None
        shifts = self.statistics[:, :, 0] - self.reference[:, None]  # [tokens, segments]
        scales = shifts.exp2() / (self.total * self.temperature)[:, None]  # p / 2^z, and the derivative of y
        factors, slopes = -for_logprobs[:, None], None
        if for_entropy is not None:
            of_entropy = LN_2 * for_entropy[:, None]
            factors = factors - of_entropy * (shifts - self.mean[:, None])
            slopes = -of_entropy * scales
        for_target = for_logprobs / self.temperature
        replace = _replace_by_gradient
        if self.uses_triton:
            from rlef_kernels._linear_triton import replace_by_gradient as replace
        replace(powers, factors * scales, slopes, for_target, self.columns)
        return powers[:, : self.vocab].to(self.dtype)


def _blocks(matrix: Tensor, *, with_spare: bool) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A few rows at a time, and as much spare memory if it is needed."""
    elements = CPU_BLOCK_ELEMENTS if matrix.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    step = max(1, min(elements // matrix.shape[1], matrix.shape[0]))
    spare = matrix.new_empty((step if with_spare else 0, matrix.shape[1]))
    for begin in range(0, matrix.shape[0], step):
        block = matrix[begin : begin + step]
        yield slice(begin, begin + step), block, spare[: block.shape[0]]


def _exponentials(
    logits: Tensor,  # [tokens, vocab], overwritten
    columns: Tensor,  # [tokens] of the target, or -1
    bits: float,
    *,
    want_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Statistics `[tokens, 1, 4]` and 2^z, in the memory of the logits where their type is that of sums.

    Statistics are the reference, the sum of 2^z, the sum of z 2^z (0 unless entropy is wanted) and the z of
    the target, or if it is not here of any other logit.
    """
    dtype = accumulation_dtype(logits)
    statistics = logits.new_zeros((logits.shape[0], 4), dtype=dtype)
    powers = logits.to(dtype)
    for part, block, spare in _blocks(powers, with_spare=want_entropy):
        # Finite even where a whole row is -inf, so that no difference below is inf - inf.
        maximum = block.amax(dim=1).clamp_(min=LOWEST)
        shifted = block.sub_(maximum[:, None]).mul_(bits)
        statistics[part, 0] = maximum * bits
        statistics[part, 3] = shifted.gather(1, columns[part, None].clamp(min=0).long())[:, 0]
        if want_entropy:
            torch.clamp(shifted, min=torch.finfo(dtype).min, out=spare)  # 0 * -inf would be NaN
            block.exp2_()
            statistics[part, 2] = spare.mul_(block).sum(dim=1)
        else:
            block.exp2_()
        statistics[part, 1] = block.sum(dim=1)
    return statistics[:, None], powers


def _replace_by_gradient(
    powers: Tensor,  # [tokens, vocab]
    factors: Tensor,  # [tokens, 1] coefficient of 2^z
    slopes: Tensor | None,  # [tokens, 1] coefficient of z 2^z
    for_target: Tensor,  # [tokens] added at the target
    columns: Tensor,  # [tokens] of the target, or -1
) -> None:
    """d loss / d logits, in the memory of the exponentials."""
    for_target = torch.where(columns >= 0, for_target, 0)
    columns = columns.clamp(min=0).long()
    for part, block, spare in _blocks(powers, with_spare=slopes is not None):
        if slopes is None:
            block.mul_(factors[part])
        else:
            torch.clamp(block, min=torch.finfo(block.dtype).tiny, out=spare).log2_()
            block.mul_(spare.mul_(slopes[part]).add_(factors[part]))
        block.scatter_add_(1, columns[part, None], for_target[part, None])


def _merged(
    statistics: Tensor,  # [tokens, parts, 4]
    owners: Tensor,  # [tokens] the part that holds the target
) -> Tensor:
    """The statistics of the parts together, `[tokens, 4]`."""
    references, totals, weighted, chosen = statistics.unbind(dim=2)  # [tokens, parts]
    reference = references.amax(dim=1)
    shifts = references - reference[:, None]
    scales = shifts.exp2()
    return torch.stack(
        [
            reference,
            (scales * totals).sum(dim=1),
            (scales * (weighted + shifts * totals)).sum(dim=1),
            (chosen + shifts).gather(1, owners[:, None])[:, 0],
        ],
        dim=1,
    )


def _all_gather(statistics: Tensor, group: ProcessGroup | None, *, want_entropy: bool) -> Tensor:
    """`[tokens, ranks, 4]` of `[tokens, 4]`; the third is sent only if it is wanted."""
    if group is None or statistics.numel() == 0:
        return statistics[:, None]
    sent = statistics if want_entropy else statistics[:, [0, 1, 3]]
    received = sent.new_empty((dist.get_world_size(group), *sent.shape))
    dist.all_gather(list(received.unbind()), sent.contiguous(), group=group)
    if not want_entropy:
        zeros = torch.zeros_like(received[:, :, :1])
        received = torch.cat([received[:, :, :2], zeros, received[:, :, 2:]], dim=2)
    return received.transpose(0, 1)
