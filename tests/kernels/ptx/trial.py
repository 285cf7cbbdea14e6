"""A launch of one shipped configuration on small inputs, and what must come of it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.configurations import configurations
from bench.machine_code import TARGETS, Configuration, compiled
from tests.kernels.ptx.machine import Argument, launch
from tests.kernels.ptx.program import Program, parse

CONFIGURATIONS = {
    configuration.name: configuration
    for configuration in configurations()
    if "sm_80" in configuration.targets  # what the simulator knows
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Of a tensor that the kernel writes; the reference is computed in float64."""

    values: Tensor
    relative: float = 0.0
    absolute: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    grid: tuple[int, ...]
    arguments: Mapping[str, Argument]  # by their names in the kernel, without those that are compiled away
    expected: Mapping[str, Expected]  # by the same names; every other tensor must stay as it is
    loaded: float | None = None  # bytes of global memory, at most
    stored: int | None = None  # exactly

    def check(self, program: Program, configuration: Configuration) -> None:
        """Run on copies; compare every tensor, and what was moved."""
        arguments = deepcopy(dict(self.arguments))  # at once, so that what shares memory goes on doing so
        traffic = launch(program, self.grid, [arguments[name] for name in _parameters(configuration)])
        for name, found in arguments.items():
            if name in self.expected:
                self._compare(name, found)
            elif isinstance(found, Tensor):
                assert torch.equal(_bytes(found), _bytes(self.arguments[name])), f"{name} was changed"
        if self.loaded is not None:
            assert traffic.loaded <= self.loaded, f"{traffic.loaded} bytes loaded, more than {self.loaded}"
        if self.stored is not None:
            assert traffic.stored == self.stored, f"{traffic.stored} bytes stored, not {self.stored}"

    def _compare(self, name: str, found: Argument) -> None:
        assert isinstance(found, Tensor)
        torch.testing.assert_close(
            found.double(),
            self.expected[name].values.double(),
            rtol=self.expected[name].relative,
            atol=self.expected[name].absolute,
            equal_nan=True,
            msg=lambda message: f"{name}: {message}",
        )


def _parameters(configuration: Configuration) -> list[str]:
    given = configuration.arguments
    return [
        name
        for name in configuration.kernel.arg_names
        if given.get(name) is not None and name not in configuration.constants
    ]


def _bytes(tensor: Argument) -> Tensor:
    assert isinstance(tensor, Tensor)
    return tensor.contiguous().view(-1).view(torch.uint8)


@cache
def program_of(name: str) -> Program:
    """As it is compiled for sm_80."""
    binary, _ = compiled(CONFIGURATIONS[name], "sm_80")
    return parse(binary.asm["ptx"], int(binary.metadata.shared))


def settings_of(configuration: Configuration) -> Mapping[str, Any]:
    return configuration.settings(TARGETS["sm_80"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dtype_of(kind: str | None) -> torch.dtype:
    """Of what a pointer of Triton's type points to."""
    assert kind is not None
    return {
        "*fp64": torch.float64,
        "*fp32": torch.float32,
        "*fp16": torch.float16,
        "*bf16": torch.bfloat16,
        "*i64": torch.int64,
        "*i32": torch.int32,
        "*i8": torch.int8,
        "*u8": torch.uint8,
    }[kind]
