"""Small programs by hand, so that a fault of the simulator is not taken for a kernel's."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.kernels.ptx.machine import Argument, launch
from tests.kernels.ptx.memory import Traffic
from tests.kernels.ptx.program import Program, parse

_HEADER = """
.version 8.7
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry snippet({parameters})
.reqntid {threads}
{{
    .reg .pred %p<99>;
    .reg .b16 %rs<99>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<99>;
"""


def program(body: str, *, pointers: int = 1, threads: int = 32, shared: int = 0) -> Program:
    """Pointers stand in %rd0, %rd1, ...; %r0 is the thread, and %r1 four times that."""
    parameters = ", ".join(f".param .u64 pointer_{i}" for i in range(pointers))
    loads = "".join(f"ld.param.b64 %rd{i}, [pointer_{i}];\n" for i in range(pointers))
    thread = "mov.u32 %r0, %tid.x;\nshl.b32 %r1, %r0, 2;\n"
    header = _HEADER.format(parameters=parameters, threads=threads)
    return parse(f"{header}{loads}{thread}{_with_addresses(body)}\nret;\n}}", shared)


def _with_addresses(body: str) -> str:
    """`[%rdN + word]` in a body is the word of this thread behind a pointer."""
    return re.sub(
        r"^(.*)\[%rd(\d+) \+ word\](.*)$",
        r"mad.wide.u32 %rd98, %r0, 4, %rd\2;\n\1[%rd98]\3",
        body,
        flags=re.MULTILINE,
    )


def run(
    body: str, *arguments: Argument, threads: int = 32, shared: int = 0, grid: Sequence[int] = (1,)
) -> Traffic:
    return launch(program(body, pointers=len(arguments), threads=threads, shared=shared), grid, arguments)


def result_of(body: str, *, threads: int = 32, shared: int = 0) -> list[int]:
    """What the threads leave in %r9, as signed numbers."""
    out = torch.zeros(threads, dtype=torch.int32)
    run(f"{body}\nst.global.b32 [%rd0 + word], %r9;", out, threads=threads, shared=shared)
    return out.tolist()


def words(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(torch.int32)
