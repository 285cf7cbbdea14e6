"""The Triton kernels of `whitening` in Triton's interpreter. Here the operators for CPU tensors are made of
them: the tests of `test_whitening` hold for them too. Then, what is theirs alone.

pytest does not collect this file by itself: `test_interpreted.py` runs it in a process of its own.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import settings

from rlef_kernels import _whitening_triton as kernels
from rlef_kernels import whitening
from tests.kernels import interpreter, test_whitening

BLOCK = 8

settings.load_profile("few")  # the interpreter is slow

kernels.parts_in_triton = partial(kernels.parts_in_triton, block=BLOCK)  # type: ignore[assignment]
kernels.whitened_in_triton = partial(kernels.whitened_in_triton, block=BLOCK)  # type: ignore[assignment]
torch.library.impl("rlef_kernels::masked_mean", "cpu", whitening._mean_on_cuda)
torch.library.impl("rlef_kernels::masked_moments", "cpu", whitening._moments_on_cuda)
torch.library.impl("rlef_kernels::masked_whiten", "cpu", whitening._whiten_on_cuda)

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # inf - inf

for _name, _test in vars(test_whitening).items():
    if _name.startswith("test_") or _name == "group":
        globals()[_name] = _test


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
def test_parts_are_merged_in_every_type(count: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(count)
    mask = torch.rand(count, generator=random) < 0.6
    values = torch.where(mask, 100 + torch.randn(count, generator=random), torch.nan).to(dtype)
    found = whitening._whiten_on_cuda(values, mask, 1e-8, "")
    expected = whitening._whiten_in_torch(values.double(), mask, 1e-8, "")
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-9)
    moments = whitening._moments_on_cuda(values, mask, "")
    torch.testing.assert_close(moments, whitening._moments_in_torch(values, mask, ""), rtol=1e-12, atol=1e-12)


def test_each_value_is_read_twice_and_written_once() -> None:
    values, mask = torch.ones(50, dtype=torch.bfloat16), torch.arange(50) % 2 == 0
    interpreter.traffic.loaded = interpreter.traffic.stored = 0
    whitening._whiten_on_cuda(values, mask, 1e-8, "")
    programs = 7
    assert interpreter.traffic.loaded == 2 * (25 * 2 + 50) + 2 * 8 * programs
    assert interpreter.traffic.stored == 3 * 8 * programs + 50 * 2
