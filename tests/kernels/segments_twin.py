"""Sums over packed segments the slow way, and segments to try them on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """The tensors of `segment_sum`."""

    values: Tensor  # [tokens] float64, NaN outside the mask
    cu_seqlens: Tensor  # [segments + 1] int32
    mask: Tensor  # [tokens]

    @property
    def number(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def chosen(self) -> list[Tensor]:
        """Of each segment, the values inside the mask."""
        limits = [slice(*each) for each in pairwise(self.cu_seqlens.tolist())]
        return [self.values[each][self.mask[each]] for each in limits]

    def alone(self, segment: int) -> Segments:
        """One segment as a pack of its own."""
        begin, end = self.cu_seqlens[segment : segment + 2].tolist()
        borders = torch.tensor([0, end - begin], dtype=torch.int32)
        return Segments(values=self.values[begin:end], cu_seqlens=borders, mask=self.mask[begin:end])

    def in_type(self, dtype: torch.dtype) -> Segments:
        return Segments(values=self.values.to(dtype), cu_seqlens=self.cu_seqlens, mask=self.mask)

    def rounding(self) -> float:
        """What float32 may lose: some units in the last place of all that could be summed up."""
        return 1e-6 * (1 + float(self.values[self.mask].double().abs().sum()))


def segments_of(lengths: list[int], *, seed: int, chosen: float = 0.6) -> Segments:
    """Random numbers; a share of `chosen` of the tokens is inside the mask."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), generator=random, dtype=torch.float64)
    mask = torch.rand(sum(lengths), generator=random) < chosen
    return Segments(
        values=torch.where(mask, values, torch.nan),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
        mask=mask,
    )


def some_segments(longest: int = 20) -> st.SearchStrategy[Segments]:
    return st.builds(
        lambda lengths, seed, chosen: segments_of(lengths, seed=seed, chosen=chosen),
        st.lists(st.integers(0, longest), max_size=5),
        st.integers(0, 2**32),
        st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    )


def naive_sums(segments: Segments) -> Tensor:
    return torch.tensor([sum(each.tolist()) for each in segments.chosen()], dtype=torch.float64)


def naive_counts(segments: Segments) -> list[int]:
    return [len(each) for each in segments.chosen()]


def naive_means(segments: Segments) -> Tensor:
    counts = torch.tensor(naive_counts(segments), dtype=torch.float64)
    return naive_sums(segments) / counts.clamp(min=1)


def naive_expansion(numbers: list[float], segments: Segments) -> list[float]:
    limits = pairwise(segments.cu_seqlens.tolist())
    whole = [number for number, (begin, end) in zip(numbers, limits, strict=True) for _ in range(begin, end)]
    return [number if chosen else 0.0 for number, chosen in zip(whole, segments.mask.tolist(), strict=True)]
