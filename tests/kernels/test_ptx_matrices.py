"""Products of matrices as Triton compiles them for sm_80: asynchronous copies, `ldmatrix`, tensor cores.

The kernel is not one of ours: it holds the simulator to what a compiler, not its author, takes the layouts of
fragments to be.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch

if find_spec("triton") is None and os.environ.get("CI") != "true":
    pytest.skip("triton is not installed: pip install triton", allow_module_level=True)

import triton
import triton.language as tl
from triton.compiler import ASTSource

from bench.machine_code import TARGETS
from tests.kernels.ptx import rounding
from tests.kernels.ptx.deletions import excuse, needless, waits_of
from tests.kernels.ptx.faults import InFlight
from tests.kernels.ptx.machine import launch
from tests.kernels.ptx.program import Program, parse

ROWS, COLUMNS, DEPTH = 64, 32, 32  # of a tile
TRIPS = 4


@triton.jit
def _product_kernel(
    out_ptr,  # [ROWS, COLUMNS]
    left_ptr,  # [ROWS, depth]
    right_ptr,  # [depth, COLUMNS]
    depth,
    stride_of_depth,
    stride_of_column,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
):
    row, column, inner = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    left = left_ptr + row[:, None] * depth + inner[None, :]
    right = right_ptr + inner[:, None] * stride_of_depth + column[None, :] * stride_of_column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in tl.range(0, depth, DEPTH):
        total = tl.dot(tl.load(left), tl.load(right), total)
        left += DEPTH
        right += DEPTH * stride_of_depth
    tl.store(out_ptr + row[:, None] * COLUMNS + column[None, :], total)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@cache
def product_of(element: str, *, transposed: bool) -> Program:
    sizes = {"ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": DEPTH}
    stride = "stride_of_depth" if transposed else "stride_of_column"
    constants = {**sizes, stride: 1}
    names = _product_kernel.arg_names
    kinds = {"out_ptr": "*fp32", "left_ptr": f"*{element}", "right_ptr": f"*{element}"}
    source = ASTSource(
        fn=_product_kernel,
        signature={name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name not in constants
        },
    )
    compiled = triton.compile(source, target=TARGETS["sm_80"], options={"num_warps": 4, "num_stages": 3})
    return parse(compiled.asm["ptx"], int(compiled.metadata.shared))


def run_product(program: Program, element: str, *, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel says, and what float64 says."""
    random, dtype = torch.Generator().manual_seed(0), DTYPES[element]
    left = torch.randn(ROWS, TRIPS * DEPTH, generator=random).to(dtype)
    right = torch.randn(TRIPS * DEPTH, COLUMNS, generator=random).to(dtype)
    if transposed:
        right = right.T.contiguous().T
    out = torch.full((ROWS, COLUMNS), torch.nan)
    stride = right.stride(1) if transposed else right.stride(0)
    launch(program, (1,), [out, left, right, left.shape[1], stride])
    if element == "fp32":
        left, right = as_tf32(left), as_tf32(right)
    return out.double(), left.double() @ right.double()


def as_tf32(matrix: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(rounding.of_tf32(matrix.numpy().view(np.uint32)))


EACH_PRODUCT = pytest.mark.parametrize(
    ("element", "transposed"), [(element, transposed) for element in DTYPES for transposed in (False, True)]
)


def check(program: Program, element: str, *, transposed: bool) -> None:
    """Single precision is cut down to tf32; sums are rounded towards zero."""
    found, expected = run_product(program, element, transposed=transposed)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=5e-5)


@EACH_PRODUCT
def test_a_product_is_what_it_should_be(element: str, transposed: bool) -> None:
    program = product_of(element, transposed=transposed)
    for opcode in (("mma",), ("ldmatrix",), ("cp", "async")):
        assert program.places(*opcode)
    check(program, element, transposed=transposed)


@EACH_PRODUCT
def test_no_barrier_and_no_wait_can_be_left_out_but_those_with_an_excuse(
    element: str, transposed: bool
) -> None:
    program = product_of(element, transposed=transposed)
    assert {program.instructions[place].opcode[0] for place in waits_of(program)} == {"bar", "cp"}
    assert not needless(program, lambda less: check(less, element, transposed=transposed))


@EACH_PRODUCT
def test_most_have_no_excuse(element: str, transposed: bool) -> None:
    program = product_of(element, transposed=transposed)
    places = waits_of(program)
    excused = [place for place in places if excuse(program, place)]
    assert len(places) - len(excused) >= 6


def test_a_wait_that_is_left_out_is_found_by_the_copy_that_is_still_under_way() -> None:
    program = product_of("bf16", transposed=False)
    last = program.places("cp", "async", "wait_group")[-1]
    with pytest.raises(InFlight):
        run_product(program.without(last), "bf16", transposed=False)
