"""Weights in host memory, moved to a device that is really another one: "meta", which has no memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlef.offload import HostWeights

META = torch.device("meta")


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[1].weight.data = model[1].weight.data.bfloat16()
    return model.requires_grad_(False)


def test_weights_are_on_the_device_within_and_as_they_were_afterwards() -> None:
    model = frozen()
    before = [parameter.clone() for parameter in model.parameters()]
    weights = HostWeights(model, META)
    for _ in range(2):
        with weights.on_device():
            assert {parameter.device for parameter in model.parameters()} == {META}
            assert [parameter.dtype for parameter in model.parameters()] == [each.dtype for each in before]
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))


def test_weights_come_back_when_their_use_fails() -> None:
    model = frozen()
    weights = HostWeights(model, META)
    with pytest.raises(RuntimeError), weights.on_device():
        model(torch.ones(1, 2)).item()
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_weights_that_are_changed_in_between_are_used_changed() -> None:
    model = frozen()
    weights = HostWeights(model, torch.device("cpu"))
    model[0].weight.copy_(torch.ones(3, 2))
    with weights.on_device():
        assert torch.equal(model[0].weight, torch.ones(3, 2))
        model[0].weight.zero_()  # of a copy
    assert torch.equal(model[0].weight, torch.ones(3, 2))


def test_a_module_that_learns_is_refused() -> None:
    with pytest.raises(AssertionError, match="it must be frozen"):
        HostWeights(nn.Linear(1, 1), META)
