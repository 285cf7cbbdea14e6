"""Generalized advantage estimation over packed sequences, of tokens or of turns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlef_kernels._checks import (
    accumulation_dtype,
    check_border_order,
    check_borders,
    check_floating,
    check_fraction,
    check_like,
    check_mask,
    check_turn_sequences,
)
from rlef_kernels._triton import has_triton
from rlef_kernels.segments import discounted_sums, turn_borders


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageEstimate:
    """One number per step, in float32 (float64 for float64 values). No gradient."""

    advantages: Tensor  # [steps] A
    returns: Tensor  # [steps] A + V, what the value is trained towards


def gae(
    values: Tensor,  # [tokens]
    rewards: Tensor,  # [tokens]
    action_mask: Tensor,  # [tokens]
    cu_seqlens: Tensor,  # [sequences + 1]
    *,
    gamma: float,
    lambda_: float,
) -> AdvantageEstimate:
    """A_t = r_t + gamma V_t' - V_t + gamma lambda A_t', where t' is the next *action* token of the sequence.

    Tokens that the environment wrote are no steps of the policy and take no time: however many lie between
    t and t', nothing is discounted for them, no value is read there, and A_t' reaches t as it would were the
    two neighbours. After the last action token of a sequence V and A are 0: sequences are whole episodes.

    On CUDA the Triton kernel of `_gae_triton` computes it, elsewhere (and without Triton) torch.

    Args:
        values: `[tokens]` V, any floating type.
        rewards: `[tokens]` r, any floating type.
        action_mask: `[tokens]` bool, True where the policy chose the token. Nothing is read where it is
            False: what the environment pays for its own tokens belongs on the action token before them.
        cu_seqlens: `[sequences + 1]` int32 or int64, where each sequence begins, and the number of tokens.
        gamma: discount per action token, 0 to 1.
        lambda_: 1 is the Monte-Carlo return minus the value, 0 the error of one step.

    Returns:
        Advantages and returns, `[tokens]`, 0 where `action_mask` is False.

    Raises:
        ValueError: shapes, types or devices that do not fit, a setting out of range, or (on a CPU)
            `cu_seqlens` that do not cover the tokens.
    """
    check_floating("values", values)
    check_floating("rewards", rewards)
    check_mask("action_mask", action_mask)
    for name, tensor in (("rewards", rewards), ("action_mask", action_mask)):
        check_like(name, tensor, "values", values)
    check_borders("cu_seqlens", cu_seqlens, "values", values)
    check_fraction("gamma", gamma)
    check_fraction("lambda_", lambda_)
    advantages, returns = torch.ops.rlef_kernels.gae(
        values.detach(), rewards.detach(), action_mask, cu_seqlens, float(gamma), float(lambda_)
    )
    return AdvantageEstimate(advantages=advantages, returns=returns)


def turn_gae(
    turn_values: Tensor,  # [turns]
    turn_rewards: Tensor,  # [turns]
    turn_sequences: Tensor,  # [turns]
    *,
    gamma: float,
    lambda_: float,
) -> AdvantageEstimate:
    """The same with one step per turn: V is the value at the turn's start, r what the whole turn earned.

    With gamma 1 and lambda 1, RLEF's own, the returns are those of `turn_returns`.

    Args:
        turn_values: `[turns]` V, any floating type.
        turn_rewards: `[turns]` r, any floating type.
        turn_sequences: `[turns]` int64, ascending: turns with the same number are one sequence, in order of
            time.
        gamma: discount per turn, 0 to 1.
        lambda_: 1 is the Monte-Carlo return minus the value, 0 the error of one turn.

    Returns:
        Advantages and returns, `[turns]`.

    Raises:
        ValueError: shapes, types or devices that do not fit, a setting out of range, or (on a CPU) sequences
            that do not ascend.
    """
    check_floating("turn_values", turn_values)
    check_floating("turn_rewards", turn_rewards)
    check_like("turn_rewards", turn_rewards, "turn_values", turn_values)
    check_turn_sequences("turn_sequences", turn_sequences, "turn_values", turn_values)
    every_turn = torch.ones_like(turn_sequences, dtype=torch.bool)
    borders = turn_borders(turn_sequences)  # [turns + 1]
    return gae(turn_values, turn_rewards, every_turn, borders, gamma=gamma, lambda_=lambda_)


def _gae_in_torch(
    values: Tensor,  # [tokens]
    rewards: Tensor,  # [tokens]
    action_mask: Tensor,  # [tokens]
    cu_seqlens: Tensor,  # [sequences + 1]
    gamma: float,
    lambda_: float,
) -> tuple[Tensor, Tensor]:
    """Leave out all but the action tokens, so that t' is t + 1; work; put back."""
    check_border_order("cu_seqlens", cu_seqlens, values.shape[0])
    dtype = accumulation_dtype(values)
    advantages, returns = (values.new_zeros(values.shape, dtype=dtype) for _ in range(2))
    values, rewards = values[action_mask].to(dtype), rewards[action_mask].to(dtype)  # [actions]
    borders = pad(action_mask.cumsum(0), (1, 0))[cu_seqlens.long()]  # [sequences + 1] counted in actions
    ends = torch.repeat_interleave(borders[1:], borders.diff())  # [actions]
    left = ends - torch.arange(ends.shape[0], device=ends.device)  # [actions] of its sequence, its own too
    next_values = torch.where(left > 1, values.roll(-1), 0)
    errors = rewards + gamma * next_values - values
    estimates = discounted_sums(errors, left, gamma * lambda_)
    advantages[action_mask], returns[action_mask] = estimates, estimates + values
    return advantages, returns


def _gae_on_cuda(
    values: Tensor,  # [tokens]
    rewards: Tensor,  # [tokens]
    action_mask: Tensor,  # [tokens]
    cu_seqlens: Tensor,  # [sequences + 1]
    gamma: float,
    lambda_: float,
) -> tuple[Tensor, Tensor]:
    if not has_triton():
        return _gae_in_torch(values, rewards, action_mask, cu_seqlens, gamma, lambda_)
    from rlef_kernels._gae_triton import gae_in_triton

    return gae_in_triton(values, rewards, action_mask, cu_seqlens, gamma, lambda_)


def _shapes_of_gae(
    values: Tensor,  # [tokens]
    *_: object,
) -> tuple[Tensor, Tensor]:
    """What torch.compile needs to know of the outputs."""
    dtype = accumulation_dtype(values)
    return values.new_empty(values.shape, dtype=dtype), values.new_empty(values.shape, dtype=dtype)


# An operator, so that torch.compile steps over it: its torch form asks how long the longest sequence is.
torch.library.define(
    "rlef_kernels::gae",
    "(Tensor values, Tensor rewards, Tensor action_mask, Tensor cu_seqlens, float gamma, float lambda_)"
    " -> (Tensor, Tensor)",
)
torch.library.impl("rlef_kernels::gae", "default", _gae_in_torch)
torch.library.impl("rlef_kernels::gae", "cuda", _gae_on_cuda)
torch.library.register_fake("rlef_kernels::gae", _shapes_of_gae)
