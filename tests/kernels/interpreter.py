"""Triton's interpreter, with what it gets wrong put right or refused, and its memory watched.

`TRITON_INTERPRET=1` must stand in the environment before the kernels are imported: tests that use this file
run in a process of their own, which `test_interpreted.py` starts. On import this file replaces methods of the
interpreter, because it

- computes with bfloat16 on the bits of its 16-bit integers: here that is an error, so a kernel must convert
  to single precision first, as it should anyway;
- converts bfloat16 by hand, truncating where hardware rounds to nearest even: here torch converts;
- rounds the product of a fused multiplication and addition too: here only the sum;
- multiplies matrices of bfloat16 by those bits: here their exact products are summed in single precision;
- copies every tensor on itself after a launch, which a sparse one would not survive: on a CPU there is
  nothing to bring back;
- reads and writes wherever a pointer points: here each access must lie in a tensor of the launch. `traffic`
  counts their bytes;
- replaces the functions of Triton's language anew at each call within a kernel: here once a launch, which
  takes most of the time away;
- in triton 3.7, though not in 3.9, answers NaN for the greater of a number and NaN, where hardware answers
  the number: a kernel that reports NaN in the interpreter could hide it on a GPU.

Both versions have been tried, and no other: each names its methods as it likes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

VERSION = ".".join(triton.__version__.split(".")[:2])
assert VERSION in ("3.7", "3.9"), (
    f"what the interpreter of triton {VERSION} gets wrong has not been looked at"
)
assert os.environ.get("TRITON_INTERPRET") == "1", "kernels that are not interpreted cannot be watched"


@dataclass(slots=True)
class Traffic:
    """Bytes that the lanes of all programs moved since it was last made 0; masked lanes move nothing."""

    loaded: int = 0
    stored: int = 0


traffic = Traffic()
_tensors: list[tuple[int, int]] = []  # first and last address of each tensor of the launch

_binary, _unary, _cast = (
    InterpreterBuilder.binary_op,
    InterpreterBuilder.unary_op,
    InterpreterBuilder.cast_impl,
)
_dot = InterpreterBuilder.create_dot
_load, _store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
_arguments = GridExecutor._init_args_hst
_launch, _replace_language = GridExecutor.__call__, interpreter._patch_lang
_replaced: set[str] = set()  # modules of the language, by this launch


def _refuse_bfloat16(*operands: Any) -> None:
    if any(operand.dtype.scalar == tl.bfloat16 for operand in operands):
        raise TypeError("the interpreter cannot compute in bfloat16; convert to float32 first")


def _binary_op(self: Any, left: Any, right: Any, operation: Any) -> Any:
    _refuse_bfloat16(left, right)
    return _binary(self, left, right, operation)


def _unary_op(self: Any, operand: Any, operation: Any) -> Any:
    _refuse_bfloat16(operand)
    return _unary(self, operand, operation)


def _cast_op(self: Any, source: Any, kind: Any) -> Any:
    before, after = source.dtype.scalar, kind.scalar
    if before == after or tl.bfloat16 not in (before, after):
        return _cast(self, source, kind)
    if after == tl.float32:
        bits = torch.from_numpy(np.array(source.data).view(np.int16))
        return TensorHandle(bits.view(torch.bfloat16).float().numpy(), after)
    if before == tl.float32:
        rounded = torch.from_numpy(np.array(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), after)
    raise TypeError(f"the interpreter cannot convert {before} to {after}; convert to float32 first")


def _fused_op(self: Any, left: Any, right: Any, added: Any) -> Any:
    exact = left.data.astype(np.float64) * right.data + added.data
    return TensorHandle(exact.astype(added.data.dtype), added.dtype.scalar)


def _dot_op(self: Any, left: Any, right: Any, *others: Any) -> Any:
    left, right = (
        _cast_op(self, operand, tl.float32) if operand.dtype.scalar == tl.bfloat16 else operand
        for operand in (left, right)
    )
    return _dot(self, left, right, *others)


def _bytes_of(pointers: Any, mask: Any) -> int:
    """Of the lanes that are not masked, all within a tensor."""
    size = pointers.get_element_ty().primitive_bitwidth // 8
    addresses, alive = np.broadcast_arrays(pointers.data, mask.data)
    outside = alive.astype(bool)
    total = int(outside.sum()) * size
    for first, last in _tensors:
        outside = outside & ~((addresses >= first) & (addresses + np.uint64(size) <= last))
    if outside.any():
        raise IndexError(f"{int(outside.sum())} lanes reach outside of every tensor of the launch")
    return total


def _watched_load(self: Any, pointers: Any, mask: Any, *settings: Any, **named: Any) -> Any:
    traffic.loaded += _bytes_of(pointers, mask)
    return _load(self, pointers, mask, *settings, **named)


def _watched_store(self: Any, pointers: Any, value: Any, mask: Any, *settings: Any, **named: Any) -> Any:
    traffic.stored += _bytes_of(pointers, mask)
    return _store(self, pointers, value, mask, *settings, **named)


def _watched_arguments(self: Any, arguments: Any, settings: Any) -> Any:
    _tensors.clear()
    for argument in arguments:
        tensor = argument.base if isinstance(argument, TensorDescriptor) else argument
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            reach = (
                sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            )
            _tensors.append((tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()))
    return _arguments(self, arguments, settings)


def _replacing_launch(self: Any, *arguments: Any, **settings: Any) -> Any:
    _replaced.clear()
    return _launch(self, *arguments, **settings)


def _replace_language_once(function: Any) -> Any:
    seen = {
        each.__name__
        for each in (tl, tl.core)
        if any(each is value for value in function.__globals__.values())
    }
    if seen <= _replaced:
        return SimpleNamespace(restore=lambda: None)
    _replaced.update(seen)
    return _replace_language(function)


assert not hasattr(interpreter, "_watched_by_rlef")
interpreter._watched_by_rlef = True
InterpreterBuilder.binary_op = _binary_op
InterpreterBuilder.unary_op = _unary_op
InterpreterBuilder.cast_impl = _cast_op
InterpreterBuilder.create_fp_to_fp = lambda self, source, kind, _rounding: _cast_op(self, source, kind)
InterpreterBuilder.create_fma = _fused_op
InterpreterBuilder.create_dot = _dot_op
InterpreterBuilder.create_masked_load = _watched_load
InterpreterBuilder.create_masked_store = _watched_store
interpreter._patch_lang = _replace_language_once
GridExecutor.__call__ = _replacing_launch
GridExecutor._init_args_hst = _watched_arguments
GridExecutor._restore_args_dev = lambda self, *arguments: None
if VERSION == "3.7":
    InterpreterBuilder.create_maxnumf = lambda self, left, right: _binary_op(self, left, right, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, left, right: _binary_op(self, left, right, np.fmin)
