"""The Triton kernels of `linear_ppo_loss` on a GPU, at the tiles that ship, against float64 on a CPU."""

from __future__ import annotations

import pytest
import torch

from rlef_kernels import linear_ppo_loss
from tests.kernels.linear_twin import example, slow_linear_loss, with_gradients

if not torch.cuda.is_available():
    pytest.skip("no GPU: torch.cuda.is_available() is False", allow_module_level=True)

SETTINGS = {"clip_ratio": (0.2, 0.3), "behaviour_correction": True, "normaliser": 64.0, "entropy_coef": 0.1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab", [1, 127, 128, 257, 4096, 5003])
@pytest.mark.parametrize("hidden_size", [1, 72, 256, 300])
@pytest.mark.parametrize("tokens", [1, 129, 300])
def test_a_gpu_gives_what_float64_gives(
    dtype: torch.dtype, vocab: int, hidden_size: int, tokens: int
) -> None:
    arguments = example(tokens, 0, hidden_size=hidden_size, vocab=vocab)
    arguments["weight"] /= hidden_size**0.5
    low = {
        name: (each.to(dtype) if name in ("hidden", "weight") else each).cuda()
        for name, each in arguments.items()
    }
    exact = {
        name: each.cpu().double() if name in ("hidden", "weight") else each.cpu()
        for name, each in low.items()
    }
    loss, metrics, *gradients = with_gradients(
        linear_ppo_loss, low, **SETTINGS, want_entropy=True, chunk_elements=150 * vocab
    )
    expected_loss, expected_metrics, *expected_gradients = with_gradients(slow_linear_loss, exact, **SETTINGS)
    torch.testing.assert_close(loss.cpu().double(), expected_loss, rtol=1e-3, atol=1e-4)
    for name, value in expected_metrics.items():
        torch.testing.assert_close(getattr(metrics, name).cpu().double(), value, rtol=1e-3, atol=1e-3)
    eps = max(torch.finfo(dtype).eps, 1e-4)
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            actual.cpu().double(), expected, rtol=4 * eps, atol=eps * (4 * scale + 0.1)
        )
