"""Weights that are needed now and then: kept in host memory, and on the device only while they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class HostWeights:
    """Keeps the parameters of a frozen module in host memory, pinned where the device is a GPU."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        """Moves them there; afterwards nothing of them is on `device`."""
        assert not any(parameter.requires_grad for parameter in module.parameters()), "it must be frozen"
        self._device = device
        self._places = [
            (owner, name) for owner in module.modules() for name, _ in owner.named_parameters(recurse=False)
        ]
        for owner, name in self._places:
            host = getattr(owner, name).data.cpu()
            setattr(owner, name, _frozen(host.pin_memory() if device.type == "cuda" else host))

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Within, the module's parameters are copies on the device, which are dropped at the end."""
        kept = [getattr(owner, name) for owner, name in self._places]
        try:
            for (owner, name), host in zip(self._places, kept, strict=True):
                setattr(owner, name, _frozen(host.data.to(self._device, non_blocking=True, copy=True)))
            yield
        finally:
            for (owner, name), host in zip(self._places, kept, strict=True):
                setattr(owner, name, host)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
