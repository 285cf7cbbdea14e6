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


def packed_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each token attends to itself and to the earlier tokens of its own sequence.

    Args:
        query: [tokens, heads, dim]
        key: [tokens, groups, dim], where `groups` divides `heads` (grouped-query attention)
        value: [tokens, groups, dim]
        cu_seqlens: [sequences + 1] int32, where each sequence starts, and the number of tokens at the end

    Returns:
        [tokens, heads, dim], in the type of the query. Scores are scaled by 1 / sqrt(dim).
    """
    if FLASH_ATTENTION and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _flash_attention(query, key, value, cu_seqlens)
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    heads_first = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]  # [1, heads, tokens, dim]
    # One split, not a slice per sequence: the backward of a slice fills a whole zero tensor each time.
    queries, keys, values = (torch.split(tensor, lengths, dim=2) for tensor in heads_first)
    attend = partial(functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    outputs = list(map(attend, queries, keys, values))
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    output: Tensor = flash_attn_varlen_func(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, causal=True
    )
    return output
