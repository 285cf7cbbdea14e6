"""Causal attention over packed sequences, for the Megatron policy and for its plain torch twin.

On CPU it is one call of torch's flash kernel per sequence. That was measured against padding all sequences to
the longest one, and against padding buckets of similar length: with sequences of 60 to 200 tokens and heads
of 32 channels, both pay more for copying tokens than the loop pays for its calls.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

FLASH_ATTENTION = find_spec("flash_attn") is not None


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, key_cu_seqlens: Tensor | None = None
) -> Tensor:
    """Each token attends to itself and to the earlier tokens of its own sequence.

    With `key_cu_seqlens` a sequence has more keys than queries, and the queries are its last tokens.

    Args:
        query: [tokens, heads, dim]
        key: [keys, groups, dim], where `groups` divides `heads` (grouped-query attention)
        value: [keys, groups, dim]
        cu_seqlens: [sequences + 1] int32, where each sequence starts, and the number of tokens at the end
        key_cu_seqlens: [sequences + 1] int32, the same of the keys; None: as many as tokens

    Returns:
        [tokens, heads, dim], in the type of the query. Scores are scaled by 1 / sqrt(dim).
    """
    if FLASH_ATTENTION and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _flash_attention(query, key, value, cu_seqlens, key_cu_seqlens)
    lengths = _lengths(cu_seqlens)
    key_lengths = lengths if key_cu_seqlens is None else _lengths(key_cu_seqlens)
    heads_first = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]  # [1, heads, tokens, dim]
    # One split, not a slice per sequence: the backward of a slice fills a whole zero tensor each time.
    splits = zip(heads_first, (lengths, key_lengths, key_lengths), strict=True)
    queries, keys, values = (torch.split(tensor, sizes, dim=2) for tensor, sizes in splits)
    outputs = list(map(_attend, queries, keys, values))
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


def _lengths(cu_seqlens: Tensor) -> list[int]:
    lengths: list[int] = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    return lengths


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One sequence, `[1, heads, tokens, dim]`; the queries are its last tokens."""
    own, all_ = query.shape[2], key.shape[2]
    attend = partial(functional.scaled_dot_product_attention, query, key, value, enable_gqa=True)
    if own == all_:
        return attend(is_causal=True)
    return attend(attn_mask=torch.ones(own, all_, dtype=torch.bool, device=query.device).tril(all_ - own))


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, key_cu_seqlens: Tensor | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    key_cu_seqlens = cu_seqlens if key_cu_seqlens is None else key_cu_seqlens
    longest = max(_lengths(cu_seqlens))
    longest_key = max(_lengths(key_cu_seqlens))
    output: Tensor = flash_attn_varlen_func(
        query, key, value, cu_seqlens, key_cu_seqlens, longest, longest_key, causal=True
    )
    return output
