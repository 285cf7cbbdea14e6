"""The Triton kernels of `segments` and `returns` in Triton's interpreter. Here they are the operators for CPU
tensors: the tests of `test_segments` and `test_turn_returns` hold for them too. Then, what is theirs alone.

pytest does not collect this file by itself: `test_interpreted.py` runs it in a process of its own.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import settings

from rlef_kernels import _segments_triton as kernels
from rlef_kernels import segment_count, segment_expand, segment_mean, segment_sum, turn_returns
from rlef_kernels.returns import _running_sums_on_cuda
from rlef_kernels.segments import _count_on_cuda, _expand_on_cuda, _sum_on_cuda
from tests.kernels import (
    interpreter,
    test_segments,
    test_turn_returns,
)
from tests.kernels.segments_twin import naive_counts, naive_expansion, naive_sums, segments_of

BLOCK = 8
NAN = torch.nan

settings.load_profile("few")  # the interpreter is slow

for _name, _kernel in {
    "segment_sum": kernels.sum_in_triton,
    "segment_count": kernels.count_in_triton,
    "segment_expand": kernels.expand_in_triton,
    "running_sums": kernels.running_sums_in_triton,
}.items():
    torch.library.impl(f"rlef_kernels::{_name}", "cpu", partial(_kernel, block=BLOCK))

for _module in (test_segments, test_turn_returns):
    for _name, _test in vars(_module).items():
        if _name.startswith("test_") and "on_a_cpu" not in _name:
            globals()[f"{_name}_in_{_module.__name__.rpartition('_')[2]}"] = _test


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
def test_sums_cross_blocks_in_every_type(length: int, dtype: torch.dtype) -> None:
    segments = segments_of([length, 2, 0, length], seed=length).in_type(dtype)
    values, borders, mask = segments.values, segments.cu_seqlens, segments.mask
    expected = naive_sums(segments.in_type(torch.float64))
    sums = segment_sum(values, borders, mask)
    torch.testing.assert_close(sums.double(), expected, rtol=0, atol=segments.rounding())
    assert segment_count(borders, mask).tolist() == naive_counts(segments)
    numbers = [1.0, 2.0, 3.0, 4.0]
    expanded = segment_expand(torch.tensor(numbers, dtype=dtype), borders, mask)
    assert expanded.tolist() == naive_expansion(numbers, segments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
def test_returns_cross_blocks_in_every_type(length: int, dtype: torch.dtype) -> None:
    rewards = torch.ones(2 * length + 2, dtype=dtype)
    sequences = torch.tensor([0] * length + [2] * 2 + [3] * length)
    expected = [*range(length, 0, -1), 2, 1, *range(length, 0, -1)]
    assert turn_returns(rewards, sequences).tolist() == expected


def test_segments_that_the_tokens_do_not_have_are_nan_and_touch_nothing() -> None:
    """On a GPU nobody reads the borders before the kernel does."""
    memory = torch.ones(100)
    values, mask = memory[40:44], torch.ones(4, dtype=torch.bool)
    for borders in ([-1, 2, 4], [0, 2, 60], [0, 2, 1], [0, 2, 2**40]):
        cu_seqlens = torch.tensor(borders)
        sums = segment_sum(values, cu_seqlens, mask).tolist()
        means = segment_mean(values, cu_seqlens, mask).tolist()
        counts = segment_count(cu_seqlens, mask).tolist()
        right = [0 <= borders[place] <= borders[place + 1] <= 4 for place in range(2)]
        assert sorted(right) == [False, True]
        for place in range(2):
            assert counts[place] == (2 if right[place] else -1)
            for found in (sums[place], means[place]):
                assert (found == found) == right[place]


def test_offsets_beyond_32_bits_find_their_tokens() -> None:
    """All but the last pages of this memory are never touched, and so never there."""
    last = 2**31 + 20
    values, mask = torch.empty(last, dtype=torch.float16), torch.empty(last, dtype=torch.bool)
    values[-20:], mask[-20:] = 2, True
    borders = torch.tensor([2**31, 2**31 + 9, last])
    assert kernels.sum_in_triton(values, borders, mask).tolist() == [18.0, 22.0]
    assert kernels.count_in_triton(borders, mask).tolist() == [9, 11]


def test_tokens_of_no_segment_are_nan() -> None:
    expanded = segment_expand(torch.tensor([1.0]), torch.tensor([1, 3]), torch.ones(4).bool())
    assert expanded.isnan().tolist() == [True, False, False, True]


def test_turns_whose_sequences_do_not_ascend_return_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlef_kernels.segments.check_turn_order", lambda *_: None)  # as on a GPU
    assert turn_returns(torch.ones(3), torch.tensor([0, 2, 1])).isnan().all()
    assert turn_returns(torch.ones(3), torch.tensor([0, 1, 2])).tolist() == [1.0, 1.0, 1.0]


def test_each_token_is_read_and_written_once() -> None:
    values = torch.ones(50)
    borders, mask = torch.tensor([0, 20, 50]), torch.arange(50) % 2 == 0
    traffic = interpreter.traffic
    of_borders = 2 * 2 * 8
    for kernel, loaded, stored in (
        (lambda: segment_sum(values, borders, mask), 25 * 4 + 50, 2 * 4),
        (lambda: segment_sum(values, borders), 50 * 4, 2 * 4),
        (lambda: segment_count(borders, mask), 50, 2 * 8),
        (lambda: segment_expand(values[:2], borders, mask), 50 + 2 * 4, 50 * 4),
        (lambda: kernels.running_sums_in_triton(values, borders, True), 50 * 4, 50 * 4),
    ):
        traffic.loaded = traffic.stored = 0
        kernel()
        assert (traffic.loaded, traffic.stored) == (loaded + of_borders, stored)


def test_the_operators_on_cuda_are_the_kernels() -> None:
    segments = segments_of([5, 0, 7], seed=3)
    values, borders, mask = segments.values, segments.cu_seqlens, segments.mask
    numbers = torch.randn(3)
    for on_cuda, kernel, operands in (
        (_sum_on_cuda, kernels.sum_in_triton, (values, borders, mask)),
        (_count_on_cuda, kernels.count_in_triton, (borders, mask)),
        (_expand_on_cuda, kernels.expand_in_triton, (numbers, borders, mask, 12)),
        (_running_sums_on_cuda, kernels.running_sums_in_triton, (values.nan_to_num(), borders, True)),
    ):
        torch.testing.assert_close(on_cuda(*operands), kernel(*operands), rtol=0, atol=0)
