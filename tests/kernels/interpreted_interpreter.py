"""What `interpreter.py` puts right or refuses, one by one: each test fails in the interpreter as it comes."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kernels.interpreter import traffic


@triton.jit
def _copy_four(to_ptr, from_ptr):
    lanes = tl.arange(0, 4)
    tl.store(to_ptr + lanes, tl.load(from_ptr + lanes).to(to_ptr.dtype.element_ty))


@triton.jit
def _double(to_ptr, from_ptr):
    number = tl.load(from_ptr)
    tl.store(to_ptr, number + number)


@triton.jit
def _greater(to_ptr, left_ptr, right_ptr):
    tl.store(to_ptr, tl.maximum(tl.load(left_ptr), tl.load(right_ptr)))


def copied(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    found = torch.empty(numbers.shape, dtype=dtype)
    _copy_four[(1,)](found, numbers)
    return found


def test_single_precision_is_rounded_to_the_nearest_bfloat16() -> None:
    numbers = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1.999, torch.nan])
    assert copied(numbers, torch.bfloat16)[:3].tolist() == [1.0, 1.015625, -2.0]
    assert copied(numbers, torch.bfloat16)[3].isnan()


def test_arithmetic_in_bfloat16_is_refused() -> None:
    with pytest.raises(Exception, match="convert to float32 first"):
        _double[(1,)](torch.empty(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16))


def test_an_access_outside_of_every_tensor_is_refused() -> None:
    with pytest.raises(Exception, match="1 lanes reach outside of every tensor"):
        _copy_four[(1,)](torch.empty(4), torch.ones(5)[:3])


def test_bytes_are_counted() -> None:
    traffic.loaded = traffic.stored = 0
    copied(torch.ones(4), torch.bfloat16)
    assert (traffic.loaded, traffic.stored) == (16, 8)


@pytest.mark.parametrize("numbers", [(torch.nan, 1.0), (1.0, torch.nan)])
def test_the_greater_of_a_number_and_nan_is_the_number_as_on_a_gpu(numbers: tuple[float, float]) -> None:
    found = torch.empty(1)
    _greater[(1,)](found, *(torch.tensor([each]) for each in numbers))
    assert found.item() == 1.0
