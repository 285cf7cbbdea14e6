"""The Triton kernels of the policy loss on a GPU, at the tiles that ship, against the torch code on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlef_kernels import PolicyMetrics, ppo_policy_loss, ppo_policy_loss_from_logits

if not torch.cuda.is_available():
    pytest.skip("no GPU: torch.cuda.is_available() is False", allow_module_level=True)

TOKENS = 6
SETTINGS: dict[str, Any] = {"clip_ratio": (0.2, 0.3), "behaviour_correction": True, "dual_clip": 3.0}
SETTINGS |= {"kl_coef": 0.1, "kl_estimator": "k3"}


def data(vocab: int) -> tuple[Tensor, ...]:
    """Targets, four numbers of each token, a mask and weights."""
    random = torch.Generator().manual_seed(vocab)
    targets = torch.randint(0, vocab, (TOKENS,), generator=random)
    numbers = torch.randn(4, TOKENS, generator=random)
    return targets, *numbers, torch.tensor([True, True, False, True, True, True]), torch.rand(TOKENS)


def from_logits(
    device: str, logits: Tensor, tensors: tuple[Tensor, ...], rows: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor, PolicyMetrics]:
    targets, old, behaviour, advantages, reference, mask, weights = (each.to(device) for each in tensors)
    held = logits.to(device, copy=True).requires_grad_()
    loss, metrics = ppo_policy_loss_from_logits(
        *(held, targets, old, behaviour, advantages, mask),
        **SETTINGS,
        normaliser=torch.tensor(4.0, device=device),
        rows=None if rows is None else rows.to(device),
        weights=weights,
        reference_logprobs=reference,
        **options,
    )
    (2 * loss).backward()
    assert held.grad is not None
    return loss.detach().cpu(), held.grad.cpu(), metrics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 400, 8191, 8192, 8193, 32_000, 50_257])
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_gpu_gives_what_a_cpu_gives_from_logits(
    dtype: torch.dtype, vocab: int, with_rows: bool, entropy_coef: float, in_place: bool
) -> None:
    rows = torch.tensor([0, 2, 3, 5, 6, 8]) if with_rows else None
    random = torch.Generator().manual_seed(vocab)
    logits = torch.randn(9 if with_rows else TOKENS, vocab, generator=random).to(dtype)
    tensors = data(vocab)
    found = from_logits("cuda", logits, tensors, rows, entropy_coef=entropy_coef, in_place=in_place)
    expected = from_logits("cpu", logits, tensors, rows, entropy_coef=entropy_coef)
    torch.testing.assert_close(found[0], expected[0], rtol=2e-5, atol=2e-5)
    rtol = max(2 * torch.finfo(dtype).eps, 5e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=rtol, atol=2e-5 * float(expected[1].abs().max()))
    for name in ("tokens", "clipped", "approximate_kl", "behaviour_weight", "reference_kl", "ratio_max"):
        torch.testing.assert_close(
            getattr(found[2], name).cpu(), getattr(expected[2], name), rtol=1e-4, atol=1e-4
        )


def test_a_gpu_gives_the_same_bits_again() -> None:
    logits, tensors = torch.randn(TOKENS, 32_000).bfloat16(), data(32_000)
    first, second = (from_logits("cuda", logits, tensors, None, entropy_coef=0.1) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("tokens", [0, 1, 255, 256, 257, 3000])
def test_a_gpu_gives_what_a_cpu_gives_from_logprobs(tokens: int) -> None:
    logprobs, old, behaviour, advantages, entropy = torch.randn(
        5, tokens, generator=torch.Generator().manual_seed(tokens)
    ).unbind()
    mask = torch.arange(tokens) % 3 != 0
    results = []
    for device in ("cuda", "cpu"):
        leaves = [each.to(device).requires_grad_() for each in (logprobs, entropy)]
        loss, metrics = ppo_policy_loss(
            *(leaves[0], *(each.to(device) for each in (old, behaviour, advantages, mask))),
            **SETTINGS | {"kl_coef": 0.0},
            normaliser=3.0,
            entropy=leaves[1],
            entropy_coef=0.1,
        )
        loss.backward()
        results.append([loss.detach(), metrics.ratio_max, metrics.clipped, *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-5)
