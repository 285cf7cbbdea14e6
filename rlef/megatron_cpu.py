"""What lets megatron-core run on gloo and CPU, and the reason for each piece. Inert where CUDA is available.

Nothing in `torch` is changed. In a few modules of megatron-core the *name* `torch` is bound to a stand-in
that passes everything through, except that "cuda" means the CPU: all that it changes could only raise on a
machine without CUDA. Two functions are replaced, those for the state of CUDA's random numbers, and while an
optimiser is built, parameters name their type as on CUDA. What else a CPU needs is a setting in
`megatron_model`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

REASONS = {
    # _ParamAndGradBuffer allocates the gradients on `torch.cuda.current_device()`
    "megatron.core.distributed.param_and_grad_buffer": "gradient buffers",
    # FP32Optimizer keeps its loss scale of 1 in `torch.tensor(..., device='cuda')`
    "megatron.core.optimizer.optimizer": "loss scale",
    # each schedule counts tokens in `torch.zeros([], device="cuda")`
    "megatron.core.pipeline_parallel.schedules": "token count",
    # with variable_seq_lengths, shapes and activations are received on `torch.cuda.current_device()`, and
    # `torch.cuda.synchronize()` follows
    "megatron.core.pipeline_parallel.p2p_communication": "receive buffers",
    # with sequence parallelism, a linear layer's input gradient is received on `torch.cuda.current_device()`,
    "megatron.core.tensor_parallel.layers": "scattered gradients",
    # as is what is gathered or scattered between layers,
    "megatron.core.tensor_parallel.mappings": "gathered and scattered activations",
    # and GlobalMemoryBuffer, in which layers gather their inputs, is there too
    "megatron.core.utils": "gathered inputs",
}
"""Module of megatron-core whose name `torch` is rebound -> what in it names a CUDA device."""

GENERATOR = "megatron.core.tensor_parallel.random"
"""Where recomputation saves and restores the state of CUDA's random numbers. There is none: without CUDA the
one function raises, and torch keeps each call of the other until CUDA is there, that is for ever."""

_FACTORIES = ("empty", "full", "tensor", "zeros")


class _CudaOnCPU:
    """`torch.cuda` with the CPU as its device."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def synchronize(self, device: object = None) -> None:
        """Gloo has returned when the data is there."""


class _TorchOnCPU:
    """`torch`, but a tensor asked for on "cuda" is made on the CPU."""

    cuda = _CudaOnCPU()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(torch, name)
        return _on_cpu(attribute) if name in _FACTORIES else attribute


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*arguments: Any, **settings: Any) -> torch.Tensor:
        if settings.get("device") == "cuda":
            settings["device"] = "cpu"
        return factory(*arguments, **settings)

    return make


def _no_state(*_: object, **_settings: object) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _set_no_state(*_: object, **_settings: object) -> None:
    pass


@contextmanager
def type_names_of_cuda(parameters: Iterable[Any]) -> Iterator[None]:
    """Within, `parameter.type()` is the name that its type has on CUDA. Where CUDA is available, as always.

    The distributed optimiser, and that of bf16 weights, know fp32 and bf16 by these names alone, and refuse
    others.
    """
    renamed = [] if torch.cuda.is_available() else list(parameters)
    for parameter in renamed:
        parameter.type = partial(str.replace, parameter.type(), "torch.", "torch.cuda.", 1)
    try:
        yield
    finally:
        for parameter in renamed:
            del parameter.type


def install() -> None:
    """Bind the stand-in in each module of `REASONS`, and replace the functions of `GENERATOR`.

    Where CUDA is available, do nothing.
    """
    if torch.cuda.is_available():
        return
    for name in REASONS:
        module: Any = importlib.import_module(name)
        module.torch = _TorchOnCPU()
    generator = importlib.import_module(GENERATOR)
    for function, replacement in (("_get_cuda_rng_state", _no_state), ("_set_cuda_rng_state", _set_no_state)):
        setattr(generator, function, replacement)
