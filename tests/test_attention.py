"""Attention over packed sequences, against the same sequences one by one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlef.attention import packed_attention

DIM = 4


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of one sequence, `[tokens, heads, dim]`, with one key head per query head, by the textbook."""
    scores = torch.einsum("qhd,khd->hqk", query, key) / DIM**0.5
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), value)


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    groups=st.integers(1, 2),
    queries_per_group=st.integers(1, 3),
)
def test_packed_sequences_attend_as_each_would_alone(
    lengths: list[int], groups: int, queries_per_group: int
) -> None:
    tokens, heads = sum(lengths), groups * queries_per_group
    query, gradient = torch.randn(2, tokens, heads, DIM)
    key, value = torch.randn(2, tokens, groups, DIM)
    inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    twins = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    output = packed_attention(*inputs, cu_seqlens)
    repeated = [twins[0], *(tensor.repeat_interleave(queries_per_group, dim=1) for tensor in twins[1:])]
    alone = [
        plain_attention(*parts) for parts in zip(*(tensor.split(lengths) for tensor in repeated), strict=True)
    ]
    expected = torch.cat(alone)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)

    output.backward(gradient)
    expected.backward(gradient)
    for found, twin in zip(inputs, twins, strict=True):
        torch.testing.assert_close(found.grad, twin.grad, rtol=1e-4, atol=1e-5)


def test_a_later_token_and_another_sequence_are_not_seen() -> None:
    query, key, value = torch.randn(3, 5, 2, DIM)
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    before = packed_attention(query, key, value, cu_seqlens)
    key[2], value[2] = 100.0, 100.0  # the last token of the first sequence
    after = packed_attention(query, key, value, cu_seqlens)
    assert torch.equal(after[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
    assert not torch.equal(after[2], before[2])
