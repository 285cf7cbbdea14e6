"""The Triton kernels on a GPU, at the tiles that ship, against the torch code on the same machine's CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlef_kernels import logprobs_from_logits

if not torch.cuda.is_available():
    pytest.skip("no GPU: torch.cuda.is_available() is False", allow_module_level=True)


def run(logits: Tensor, targets: Tensor, rows: Tensor | None, *, entropy: bool) -> tuple[Tensor, Tensor]:
    """Values, and the gradient of a sum in which each has a weight of its own; on the CPU."""
    logits = logits.detach().requires_grad_()
    found = logprobs_from_logits(logits, targets, rows=rows, temperature=0.7, want_entropy=entropy)
    parts = [part for part in (found.logprobs, found.logsumexp, found.entropy) if part is not None]
    values = torch.stack(parts)
    weights = torch.linspace(-1, 2, values.numel(), device=values.device).view(values.shape)
    (gradient,) = torch.autograd.grad((weights * values).sum(), logits)
    return values.detach().cpu(), gradient.cpu()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 400, 8191, 8192, 8193, 32_000, 50_257])
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_a_gpu_gives_what_a_cpu_gives(dtype: torch.dtype, vocab: int, with_rows: bool, entropy: bool) -> None:
    random = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(5, vocab, generator=random)).to(dtype)
    rows = torch.tensor([0, 2, 3]) if with_rows else None
    targets = torch.randint(0, vocab, (3 if with_rows else 5,), generator=random)
    values, gradient = run(
        logits.cuda(), targets.cuda(), None if rows is None else rows.cuda(), entropy=entropy
    )
    expected_values, expected_gradient = run(logits, targets, rows, entropy=entropy)
    single = torch.finfo(torch.float32 if dtype != torch.float64 else dtype).eps
    torch.testing.assert_close(values, expected_values, rtol=40 * single, atol=160 * single)
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=max(2 * torch.finfo(dtype).eps, 160 * single), atol=160 * single
    )


def test_rows_further_than_int32_are_found_on_a_gpu() -> None:
    tokens, vocab = 70_000, 32_000
    if torch.cuda.mem_get_info()[0] < 3 * 2 * tokens * vocab:
        pytest.skip("the GPU has too little free memory for three times 4.5 GB")
    logits = torch.zeros(tokens, vocab, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    found = logprobs_from_logits(logits, torch.zeros(tokens, dtype=torch.int64, device="cuda"))
    torch.testing.assert_close(found.logsumexp, torch.full((tokens,), vocab, device="cuda").log())
    (gradient,) = torch.autograd.grad(found.logprobs.sum(), logits)
    torch.testing.assert_close(gradient[-1], gradient[0])
    assert gradient[-1, 0] > 0.99
