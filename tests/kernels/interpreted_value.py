"""The Triton kernel of `value_loss` in Triton's interpreter. Here it is the operator for CPU tensors:
the tests of `test_value_loss` hold for it too. Then, what is its alone.

pytest does not collect this file by itself: `test_interpreted.py` runs it in a process of its own.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import settings

from rlef_kernels._value_triton import value_loss_in_triton
from rlef_kernels.value import _value_loss_in_torch, _value_loss_on_cuda
from tests.kernels import interpreter, test_value_loss

BLOCK = 8

settings.load_profile("few")  # the interpreter is slow

torch.library.impl("rlef_kernels::value_loss", "cpu", partial(value_loss_in_triton, block=BLOCK))

for _name, _test in vars(test_value_loss).items():
    if _name.startswith("test_") and "on_a_cpu" not in _name:
        globals()[_name] = _test


def operands_of(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """NaN outside the mask."""
    random = torch.Generator().manual_seed(count)
    mask = torch.rand(count, generator=random) < 0.7
    numbers = torch.randn(3, count, generator=random, dtype=torch.float64)
    return *torch.where(mask, numbers, torch.nan).to(dtype).unbind(), mask


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
def test_sums_cross_programs_in_every_type(count: int, dtype: torch.dtype) -> None:
    *operands, mask = operands_of(count, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    normaliser = torch.tensor(3.0, dtype=wide)
    found = value_loss_in_triton(*operands, mask, normaliser, 0.5, block=BLOCK)
    expected = _value_loss_in_torch(*(each.double() for each in operands), mask, normaliser.double(), 0.5)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for actual, twin in zip(found, expected, strict=True):
        assert actual.dtype == wide
        torch.testing.assert_close(actual.double(), twin, rtol=tolerance, atol=tolerance)


def test_many_programs_get_the_same_bits_each_time() -> None:
    *operands, mask = operands_of(500, torch.float32)
    first, second = (
        value_loss_in_triton(*operands, mask, torch.tensor(3.0), 0.5, block=BLOCK) for _ in range(2)
    )
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, 1e30])
def test_what_overflows_does_so_as_in_torch(value: float) -> None:
    values, old, returns = torch.tensor([value, 0.1]), torch.zeros(2), torch.ones(2)
    operands = (values, old, returns, None, torch.tensor(1.0), 0.2)
    for actual, twin in zip(value_loss_in_triton(*operands), _value_loss_in_torch(*operands), strict=True):
        torch.testing.assert_close(actual, twin, equal_nan=True)


def test_each_value_is_read_and_each_gradient_written_once() -> None:
    *operands, mask = operands_of(50, torch.bfloat16)
    interpreter.traffic.loaded = interpreter.traffic.stored = 0
    value_loss_in_triton(*operands, mask, torch.tensor(1.0), 0.2, block=BLOCK)
    programs, chosen = 7, int(mask.sum())
    assert interpreter.traffic.loaded == 3 * 2 * chosen + 50 + 4 * programs
    assert interpreter.traffic.stored == 4 * 50 + 4 * 4 * programs


def test_the_operator_on_cuda_is_the_kernel() -> None:
    operands = (*operands_of(20, torch.float32), torch.tensor(2.0), 0.2)
    found, expected = _value_loss_on_cuda(*operands), value_loss_in_triton(*operands)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
