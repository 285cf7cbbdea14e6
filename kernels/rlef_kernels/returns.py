"""The undiscounted return of each turn of a dialog."""

from __future__ import annotations

import torch
from torch import Tensor

from rlef_kernels._checks import check_floating, check_turn_sequences


def turn_returns(
    turn_rewards: Tensor,  # [turns]
    turn_sequences: Tensor,  # [turns]
) -> Tensor:
    """Each turn's reward plus those of all later turns of its sequence: the Monte-Carlo return with gamma 1.

    A sequence is summed in its own row, from its last turn back: what it gets does not depend, bit for bit,
    on the sequences around it, and a NaN stays in the sequence that has it.

    Args:
        turn_rewards: `[turns]`, any floating type.
        turn_sequences: `[turns]` int64, ascending: turns with the same number are one sequence, in order of
            time.

    Returns:
        `[turns]` in the type of `turn_rewards`.

    Raises:
        ValueError: shapes, types or devices that do not fit, or (on a CPU) sequences that do not ascend.
    """
    check_floating("turn_rewards", turn_rewards)
    check_turn_sequences("turn_sequences", turn_sequences, "turn_rewards", turn_rewards)
    if turn_rewards.numel() == 0:
        return turn_rewards.clone()
    _, row, counts = torch.unique_consecutive(turn_sequences, return_inverse=True, return_counts=True)
    firsts = counts.cumsum(0) - counts  # [sequences]
    column = torch.arange(row.shape[0], device=row.device) - firsts[row]  # [turns]
    table = turn_rewards.new_zeros((counts.shape[0], int(counts.max())))  # [sequences, longest]
    table[row, column] = turn_rewards
    return table.flip(1).cumsum(1).flip(1)[row, column]
