"""Generalized advantage estimation the slow way, and packed sequences to try it on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """The tensors of `gae`, in its order."""

    values: Tensor  # [tokens] float64, NaN at what the environment wrote
    rewards: Tensor  # [tokens] float64, likewise
    action_mask: Tensor  # [tokens]
    cu_seqlens: Tensor  # [sequences + 1] int32

    def in_type(self, dtype: torch.dtype) -> Pack:
        return Pack(
            values=self.values.to(dtype),
            rewards=self.rewards.to(dtype),
            action_mask=self.action_mask,
            cu_seqlens=self.cu_seqlens,
        )

    def alone(self, sequence: int) -> Pack:
        """One sequence as a pack of its own."""
        begin, end = self.cu_seqlens[sequence : sequence + 2].tolist()
        return Pack(
            values=self.values[begin:end],
            rewards=self.rewards[begin:end],
            action_mask=self.action_mask[begin:end],
            cu_seqlens=torch.tensor([0, end - begin], dtype=torch.int32),
        )

    def rounding(self) -> float:
        """What float32 may lose: some units in the last place of all that could be summed up."""
        sizes = (self.values.abs() + self.rewards.abs())[self.action_mask]
        return 1e-6 * (1 + float(sizes.double().sum()))


def pack_of(lengths: list[int], *, seed: int, acting: float = 0.6) -> Pack:
    """Random numbers; a share of `acting` of the tokens is the policy's."""
    random = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    values, rewards = torch.randn(2, tokens, generator=random, dtype=torch.float64)
    mask = torch.rand(tokens, generator=random) < acting
    return Pack(
        values=torch.where(mask, values, torch.nan),
        rewards=torch.where(mask, rewards, torch.nan),
        action_mask=mask,
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
    )


def packs(longest: int = 20) -> st.SearchStrategy[Pack]:
    return st.builds(
        lambda lengths, seed, acting: pack_of(lengths, seed=seed, acting=acting),
        st.lists(st.integers(0, longest), max_size=5),
        st.integers(0, 2**32),
        st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    )


FRACTIONS = st.one_of(st.sampled_from([0.0, 0.95, 1.0]), st.floats(0, 1))


def naive_gae(pack: Pack, *, gamma: float, lambda_: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns in float64, from the last token of each sequence back."""
    advantages, returns = torch.zeros_like(pack.values), torch.zeros_like(pack.values)
    borders = pack.cu_seqlens.tolist()
    for begin, end in pairwise(borders):
        next_value = next_advantage = torch.zeros((), dtype=pack.values.dtype)
        for token in reversed(range(begin, end)):
            if not pack.action_mask[token]:
                continue
            value = pack.values[token]
            error = pack.rewards[token] + gamma * next_value - value
            next_advantage = error + gamma * lambda_ * next_advantage
            next_value = value
            advantages[token], returns[token] = next_advantage, next_advantage + value
    return advantages, returns
