"""The Triton kernel of `gae` against its slow twin, in Triton's interpreter.

pytest does not collect this file by itself: `test_interpreted.py` runs it in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.kernels.interpreter  # noqa: F401 - watches the kernel
from rlef_kernels._gae_triton import gae_in_triton
from rlef_kernels.advantages import _gae_on_cuda
from tests.kernels.gae_twin import FRACTIONS, Pack, naive_gae, pack_of, packs

BLOCK = 8


def in_triton(pack: Pack, *, gamma: float = 0.9, lambda_: float = 0.8) -> tuple[torch.Tensor, torch.Tensor]:
    operands = (pack.values, pack.rewards, pack.action_mask, pack.cu_seqlens)
    return gae_in_triton(*operands, gamma, lambda_, block=BLOCK)


def assert_equals_the_twin(pack: Pack, *, gamma: float = 0.9, lambda_: float = 0.8) -> None:
    single = pack.values.dtype != torch.float64
    tolerance = pack.rounding() * (1 if single else 1e-8)
    found = in_triton(pack, gamma=gamma, lambda_=lambda_)
    expected = naive_gae(pack.in_type(torch.float64), gamma=gamma, lambda_=lambda_)
    for actual, twin in zip(found, expected, strict=True):
        assert actual.dtype == (torch.float32 if single else torch.float64)
        torch.testing.assert_close(actual.double(), twin, rtol=0, atol=tolerance)


@settings(max_examples=20)  # the interpreter is slow
@given(packs(longest=3 * BLOCK), FRACTIONS, FRACTIONS)
def test_equals_the_loop(pack: Pack, gamma: float, lambda_: float) -> None:
    assert_equals_the_twin(pack, gamma=gamma, lambda_=lambda_)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK + 3])
def test_state_crosses_blocks_in_every_type(length: int, dtype: torch.dtype) -> None:
    for acting in (0.1, 0.6):
        assert_equals_the_twin(pack_of([length, 2, 0, length], seed=length, acting=acting).in_type(dtype))


def test_state_crosses_whole_blocks_of_the_environment() -> None:
    pack = pack_of([4 * BLOCK], seed=0, acting=1)
    pack.action_mask[3:-2] = False
    pack.values[3:-2] = torch.nan
    pack.rewards[3:-2] = torch.nan
    assert_equals_the_twin(pack, gamma=1, lambda_=0.95)


@pytest.mark.parametrize("written", [0.0, 1e30, torch.inf])
def test_values_of_what_the_environment_wrote_change_no_bit(written: float) -> None:
    pack = pack_of([3 * BLOCK, 5], seed=1)
    expected = in_triton(pack)
    pack.values[~pack.action_mask] = written
    for actual, first in zip(in_triton(pack), expected, strict=True):
        assert torch.equal(actual, first)


@settings(max_examples=20)  # the interpreter is slow
@given(packs(longest=3 * BLOCK), st.sampled_from([torch.float32, torch.float64]))
def test_a_sequence_gets_the_same_bits_alone_as_among_others(pack: Pack, dtype: torch.dtype) -> None:
    pack = pack.in_type(dtype)
    alone = [in_triton(pack.alone(number)) for number in range(len(pack.cu_seqlens) - 1)]
    for place, together in enumerate(in_triton(pack)):
        assert torch.equal(together, torch.cat([together[:0], *(each[place] for each in alone)]))


@pytest.mark.parametrize("where", ["values", "rewards"])
def test_a_nan_inside_the_mask_reaches_all_before_it_in_its_sequence_and_nothing_else(where: str) -> None:
    lengths = [BLOCK, 3 * BLOCK, BLOCK]
    pack = pack_of(lengths, seed=2, acting=1)
    getattr(pack, where)[BLOCK + 2 * BLOCK] = torch.nan
    for results in (in_triton(pack), in_triton(pack, lambda_=1), in_triton(pack, lambda_=0)):
        for result in results:
            assert result.isnan().nonzero().flatten().tolist() == list(range(BLOCK, 3 * BLOCK + 1))


def test_borders_and_rewards_may_be_of_another_type_and_strided() -> None:
    pack = pack_of([BLOCK + 1, 3], seed=3, acting=0.7)
    table = torch.stack([pack.values, pack.rewards], dim=1)
    borders = pack.cu_seqlens.long()
    found = gae_in_triton(*table.unbind(1), pack.action_mask, borders, 0.9, 0.8, block=BLOCK)
    for actual, expected in zip(found, in_triton(pack), strict=True):
        assert torch.equal(actual, expected)
    mixed = gae_in_triton(
        pack.values.float(), pack.rewards.half(), pack.action_mask, borders, 0.9, 0.8, block=BLOCK
    )
    torch.testing.assert_close(mixed[0].double(), in_triton(pack)[0], rtol=0, atol=1e-2)


def test_borders_that_reach_past_the_tokens_touch_nothing_there() -> None:
    # On a GPU nobody reads the borders before the kernel does.
    pack = pack_of([4, 4], seed=4, acting=1)
    wrong = torch.tensor([-3, 2, 2000])
    memory = torch.cat([pack.values, torch.full((2000,), torch.nan, dtype=torch.float64)])
    advantages, _ = gae_in_triton(memory[:8], pack.rewards, pack.action_mask, wrong, 0.9, 0.8, block=BLOCK)
    assert advantages.isfinite().all()


def test_tokens_of_no_sequence_are_nan() -> None:
    pack = pack_of([4, 4], seed=5, acting=1)
    operands = (pack.values, pack.rewards, pack.action_mask)
    advantages, returns = gae_in_triton(*operands, torch.tensor([2, 6]), 0.9, 0.8, block=BLOCK)
    assert advantages.isnan().tolist() == returns.isnan().tolist() == [True] * 2 + [False] * 4 + [True] * 2


def test_the_operator_on_cuda_is_the_kernel() -> None:
    pack = pack_of([4, 4], seed=6)
    found = _gae_on_cuda(pack.values, pack.rewards, pack.action_mask, pack.cu_seqlens, 0.9, 0.8)
    for actual, expected in zip(found, in_triton(pack), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_no_token_gives_no_advantage() -> None:
    for lengths in ([], [0, 0]):
        assert [result.tolist() for result in in_triton(pack_of(lengths, seed=0))] == [[], []]
