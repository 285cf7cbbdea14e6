"""Generalized advantage estimation on a GPU: one program per sequence. Its reference is in `advantages`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlef_kernels._checks import accumulation_dtype

BLOCK = 1024  # tokens that a program scans at once


@triton.jit
def _after(first_decay, first_sum, second_decay, second_sum):  # type: ignore[no-untyped-def]
    """x -> first, then second, of two maps x -> decay x + sum."""
    return first_decay * second_decay, second_decay * first_sum + second_sum


@triton.jit  # type: ignore[untyped-decorator]
def _gae_kernel(  # type: ignore[no-untyped-def]
    values_ptr,
    rewards_ptr,
    action_mask_ptr,
    cu_seqlens_ptr,
    advantages_ptr,
    returns_ptr,
    tokens,
    GAMMA: tl.constexpr,
    LAMBDA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scan what each token hands to the one before it, from the end of the sequence.

    With the return R = A + V and t' the next action token, the recursion of `gae` reads
    R_t = r_t + h_t', where h_t = gamma (1 - lambda) V_t + gamma lambda R_t is all that a token needs to know
    of its future. So an action token maps h to gamma lambda h + (gamma (1 - lambda) V + gamma lambda r), any
    other maps h to h, and one number carries the state from block to block.
    """
    dtype = advantages_ptr.dtype.element_ty
    sequence = tl.program_id(0).to(tl.int64)
    begin = tl.maximum(tl.load(cu_seqlens_ptr + sequence).to(tl.int64), 0)
    end = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64), tokens)
    lanes = tl.arange(0, BLOCK)
    carried = tl.full((), 0.0, dtype)
    last = end - 1
    for _ in tl.range(0, tl.cdiv(end - begin, BLOCK)):
        token = last - lanes  # lane 0 is the last in time
        last -= BLOCK
        inside = token >= begin

        # The lane of a token scans the maps of the tokens after it: what it gets is the h of its successor.
        after_inside = inside & (token + 1 < end)
        after_acts = tl.load(action_mask_ptr + token + 1, mask=after_inside, other=0) != 0
        after_value = tl.load(values_ptr + token + 1, mask=after_acts, other=0.0).to(dtype)
        after_reward = tl.load(rewards_ptr + token + 1, mask=after_acts, other=0.0).to(dtype)
        decay = tl.where(after_acts, tl.full((), GAMMA * LAMBDA, dtype), tl.full((), 1.0, dtype))
        term = GAMMA * (1 - LAMBDA) * after_value + GAMMA * LAMBDA * after_reward
        decays, sums = tl.associative_scan((decay, term), 0, _after)
        handed = decays * carried + sums
        carried = tl.sum(tl.where(lanes == BLOCK - 1, handed, 0.0), 0)

        acts = tl.load(action_mask_ptr + token, mask=inside, other=0) != 0
        value = tl.load(values_ptr + token, mask=acts, other=0.0).to(dtype)
        reward = tl.load(rewards_ptr + token, mask=acts, other=0.0).to(dtype)
        advantage = reward + handed - value  # the value is added again, so that a NaN in it shows in both
        tl.store(advantages_ptr + token, tl.where(acts, advantage, 0.0), mask=inside)
        tl.store(returns_ptr + token, tl.where(acts, advantage + value, 0.0), mask=inside)


def gae_in_triton(
    values: Tensor,  # [tokens]
    rewards: Tensor,  # [tokens]
    action_mask: Tensor,  # [tokens]
    cu_seqlens: Tensor,  # [sequences + 1]
    gamma: float,
    lambda_: float,
    *,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, `[tokens]`; NaN at tokens of no sequence, should `cu_seqlens` leave any out."""
    tokens, sequences = values.shape[0], cu_seqlens.shape[0] - 1
    advantages = values.new_full((tokens,), torch.nan, dtype=accumulation_dtype(values))
    returns = advantages.clone()
    if tokens:
        with torch.cuda.device(values.get_device()):  # -1, and no device, in the interpreter
            _gae_kernel[(sequences,)](
                values.contiguous(),
                rewards.contiguous(),
                action_mask.contiguous().view(torch.uint8),
                cu_seqlens.contiguous(),
                advantages,
                returns,
                tokens,
                GAMMA=gamma,
                LAMBDA=lambda_,
                BLOCK=block,
            )
    return advantages, returns
