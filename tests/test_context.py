"""Shares of a pack: of all ranks together they are the pack, in what they hold and in what they compute."""

from __future__ import annotations

from itertools import accumulate

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlef.attention import packed_attention
from rlef.context import ContextShare, context_share, gathered_places

DIM = 4
lengths_of_packs = st.lists(st.integers(1, 9), min_size=1, max_size=4)
numbers_of_ranks = st.integers(1, 3)


def shares_of(lengths: list[int], ranks: int) -> tuple[Tensor, list[ContextShare]]:
    """The pack, padded by a sequence of its own, and each rank's share."""
    padding = -sum(lengths) % (2 * ranks)
    cu_seqlens = torch.tensor([0, *accumulate(lengths + [padding] * (padding > 0))], dtype=torch.int32)
    return cu_seqlens, [context_share(cu_seqlens, rank=rank, ranks=ranks) for rank in range(ranks)]


@given(lengths_of_packs, numbers_of_ranks)
def test_each_token_is_held_by_one_rank_and_all_hold_as_many(lengths: list[int], ranks: int) -> None:
    cu_seqlens, shares = shares_of(lengths, ranks)
    held = torch.cat([share.positions for share in shares])
    assert sorted(held.tolist()) == list(range(int(cu_seqlens[-1])))
    assert len({share.positions.shape[0] for share in shares}) == 1
    for share in shares:
        assert share.positions.tolist() == sorted(share.positions.tolist())


@given(lengths_of_packs, numbers_of_ranks)
def test_gathered_places_are_where_gathering_puts_tokens(lengths: list[int], ranks: int) -> None:
    cu_seqlens, shares = shares_of(lengths, ranks)
    gathered = torch.cat([share.positions for share in shares])
    tokens = int(cu_seqlens[-1])
    assert torch.equal(
        gathered[gathered_places(torch.arange(tokens), tokens=tokens, ranks=ranks)], torch.arange(tokens)
    )


@given(lengths_of_packs, numbers_of_ranks)
def test_shares_attend_as_the_whole_pack_does(lengths: list[int], ranks: int) -> None:
    """In values, and in the gradients that all ranks' queries send to keys and values together."""
    cu_seqlens, shares = shares_of(lengths, ranks)
    tokens = int(cu_seqlens[-1])
    query, gradient = torch.randn(2, tokens, 4, DIM)
    key, value = torch.randn(2, tokens, 2, DIM)
    whole = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    expected = packed_attention(*whole, cu_seqlens)
    expected.backward(gradient)

    divided = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    order = torch.cat([share.positions for share in shares])
    keys, values = divided[1][order], divided[2][order]
    for share in shares:
        found = packed_attention(
            divided[0][share.positions],
            keys[share.keys],
            values[share.keys],
            share.query_cu_seqlens,
            share.key_cu_seqlens,
        )
        torch.testing.assert_close(found, expected[share.positions], rtol=1e-4, atol=1e-5)
        found.backward(gradient[share.positions], retain_graph=True)
    for one, twin in zip(divided, whole, strict=True):
        torch.testing.assert_close(one.grad, twin.grad, rtol=1e-4, atol=1e-5)


def test_of_one_long_sequence_every_rank_has_the_same_work() -> None:
    _, shares = shares_of([24], ranks=3)
    work = []
    for share in shares:
        queries = share.query_cu_seqlens.diff().tolist()
        keys = share.key_cu_seqlens.diff().tolist()
        work.append(sum(own * all_ - own * (own - 1) // 2 for own, all_ in zip(queries, keys, strict=True)))
    assert work == [100, 100, 100]
