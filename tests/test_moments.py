"""What a checkpoint needs of an optimiser, and how one is made that goes on from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlef.moments import MOMENTS, set_steps, steps_made


class ByGroup(torch.optim.Optimizer):
    """AdamW as the fused ones of Apex and Transformer Engine keep it: steps are counted by group."""

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                for moment in MOMENTS:
                    state.setdefault(moment, torch.zeros_like(parameter))
                first, second = group["betas"]
                state["exp_avg"].lerp_(parameter.grad, 1 - first)
                state["exp_avg_sq"].lerp_(parameter.grad.square(), 1 - second)
                mean = state["exp_avg"] / (1 - first ** group["step"])
                root = (state["exp_avg_sq"] / (1 - second ** group["step"])).sqrt()
                parameter -= group["lr"] * mean / (root + group["eps"])


def step(weights: list[Tensor], optimizer: torch.optim.Optimizer, target: float) -> None:
    optimizer.zero_grad()
    sum((weight - target).square().sum() for weight in weights).backward()  # type: ignore[union-attr]
    optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, ByGroup])
@pytest.mark.parametrize("steps", [0, 3])
def test_an_optimizer_goes_on_from_its_weights_moments_and_number_of_steps(kind: Any, steps: int) -> None:
    weights = [torch.ones(2, 3, requires_grad=True), torch.zeros(2, requires_grad=True)]
    optimizer = kind(weights, lr=0.1)
    for number in range(steps):
        step(weights, optimizer, target=float(number))
    assert steps_made(optimizer) == steps

    others = [weight.detach().clone().requires_grad_() for weight in weights]
    resumed = kind(others, lr=0.1)
    step(others, resumed, target=-9.0)  # what it was before does not matter
    with torch.no_grad():
        for other, weight in zip(others, weights, strict=True):
            other.copy_(weight)
    set_steps(resumed, steps)
    assert steps_made(resumed) == steps
    for other, weight in zip(others, weights, strict=True):
        for moment in MOMENTS if steps else ():
            assert not resumed.state[other][moment].any()
            resumed.state[other][moment].copy_(optimizer.state[weight][moment])
    for network, its_optimizer in ((weights, optimizer), (others, resumed)):
        step(network, its_optimizer, target=5.0)
    assert all(torch.equal(other, weight) for other, weight in zip(others, weights, strict=True))
