"""Context parallelism: which tokens of a pack a rank holds, and what its queries attend to.

A pack is cut into two chunks per rank, and rank r holds chunk r and chunk 2 * ranks - 1 - r: of a causal
triangle each then has about the same area. Every rank gathers the keys and values of all tokens, as for
Llama 3 (arXiv 2407.21783, section 3.3.2), so that attention itself is the local one of `attention.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextShare:
    """One rank's part of a pack. A *part* is what it holds of one sequence in one of its chunks."""

    positions: Tensor  # [own tokens] int64, ascending: the tokens of the pack that it holds
    query_cu_seqlens: Tensor  # [parts + 1] int32, where each part starts among its own tokens
    keys: Tensor  # [keys] int64: the tokens that the parts attend to, as they lie after gathering
    key_cu_seqlens: Tensor  # [parts + 1] int32


def context_share(cu_seqlens: Tensor, *, rank: int, ranks: int) -> ContextShare:
    """What rank `rank` of `ranks` holds of a pack; its number of tokens is a multiple of 2 * ranks.

    A part's queries are the last of its keys, so attention aligns the two at their ends.
    """
    borders = cu_seqlens.tolist()
    size, rest = divmod(borders[-1], 2 * ranks)
    assert rest == 0, "the pack must be padded first"
    queries, keys = [], []
    for chunk in (rank, 2 * ranks - 1 - rank):
        for first, end in pairwise(borders):
            begin, stop = max(first, chunk * size), min(end, (chunk + 1) * size)
            if begin < stop:
                queries.append(torch.arange(begin, stop))
                keys.append(torch.arange(first, stop))
    gathered = gathered_places(torch.cat(keys), tokens=borders[-1], ranks=ranks)
    device = cu_seqlens.device
    return ContextShare(
        positions=torch.cat(queries).to(device),
        query_cu_seqlens=_sums(queries).to(device),
        keys=gathered.to(device),
        key_cu_seqlens=_sums(keys).to(device),
    )


def _sums(parts: list[Tensor]) -> Tensor:
    return torch.tensor([0, *accumulate(part.shape[0] for part in parts)], dtype=torch.int32)


def gathered_places(positions: Tensor, *, tokens: int, ranks: int) -> Tensor:
    """Where tokens of a pack lie when the ranks' own tokens are gathered, one rank after the other."""
    size = tokens // (2 * ranks)
    chunks = positions // size
    is_second = chunks >= ranks
    owners = torch.where(is_second, 2 * ranks - 1 - chunks, chunks)
    return (2 * owners + is_second) * size + positions % size
