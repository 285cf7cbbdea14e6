"""The machine code of the Triton kernels, compiled ahead of time for targets that need not be here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest

if find_spec("triton") is None and os.environ.get("CI") != "true":
    pytest.skip("triton is not installed: pip install triton", allow_module_level=True)

import triton

from bench.configurations import configurations
from bench.kernels import read_baseline
from bench.machine_code import TARGETS, compiled, faults, report, worse
from tests.kernels.tritons import ROOT, with_triton

CONFIGURATIONS = {configuration.name: configuration for configuration in configurations()}


EACH = [(name, target) for name, each in CONFIGURATIONS.items() for target in each.targets]


@pytest.mark.parametrize(("name", "target"), EACH)
def test_the_machine_code_has_no_fault_and_is_no_worse_than_the_baseline(name: str, target: str) -> None:
    found = report(CONFIGURATIONS[name], target)
    assert not list(faults(CONFIGURATIONS[name], found, target))
    assert not list(worse(found, read_baseline()[f"{name} {target}"])), (
        "python bench/kernels.py --aot --accept writes a new baseline: say in the commit what it gains"
    )


def test_the_baseline_holds_every_kernel_and_no_other() -> None:
    assert set(read_baseline()) == {f"{name} {target}" for name, target in EACH}


@pytest.mark.parametrize("kernel", ["statistics", "gradient"])
def test_lengths_of_one_compile(kernel: str) -> None:
    """Triton compiles an argument that is 1 into the kernel."""
    configuration = CONFIGURATIONS[f"{kernel} bf16 entropy rows"]
    ones = dict.fromkeys({"vocab", "stride_row", "num_tokens", "num_rows"} & set(configuration.arguments), 1)
    compiled(
        replace(configuration, constants={**configuration.constants, **ones}, divisible=frozenset()), "sm_90"
    )


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("linear bf16 entropy descriptors", "sm_100"),
        ("linear bf16 entropy", "sm_80"),
        ("linear gradient bf16 entropy", "sm_90"),
    ],
)
def test_products_with_lengths_of_one_compile(name: str, target: str) -> None:
    configuration = CONFIGURATIONS[name]
    lengths = {"num_tokens", "vocab", "hidden_size", "num_segments", "stride_hidden", "stride_weight"}
    ones = dict.fromkeys(lengths & set(configuration.arguments), 1)
    compiled(
        replace(configuration, constants={**configuration.constants, **ones}, divisible=frozenset()), target
    )


def test_what_is_worse_is_named() -> None:
    accepted = read_baseline()["gradient bf16 entropy sm_90"]
    changes = {
        "registers": 255,
        "spills": 1,
        "shared": 64,
        "loaded": 4.0,
        "stored": 2.1,
        "pipe_over_dram": 0.71,
    }
    for field, value in {**changes, "wide": 0.5}.items():
        (message,) = worse(replace(accepted, **{field: value}), accepted)
        assert message == f"{field}: {value}, was {getattr(accepted, field)}"
    assert not list(worse(replace(accepted, registers=1), accepted))


def test_what_no_kernel_may_do_is_refused_whatever_the_baseline_says() -> None:
    configuration = CONFIGURATIONS["gradient bf16 entropy"]
    good = read_baseline()["gradient bf16 entropy sm_90"]
    assert not list(faults(configuration, good, "sm_90"))
    bad = replace(good, spills=3, loaded=4.0, stored=2.03, wide=0.5, pipe_over_dram=0.71)
    assert list(faults(configuration, bad, "sm_90")) == [
        "3 spills; there must be none",
        "loads 4.0 bytes per element; 2 are enough",
        "stores 2.03 bytes per element; 2 are enough",
        "only 50% of the accesses are 128 bits wide",
        "the issue pipe takes 0.71 of DRAM's time, above 0.7",
    ]


def test_a_matrix_product_without_its_instructions_or_with_a_long_end_is_refused() -> None:
    configuration = CONFIGURATIONS["linear bf16 entropy descriptors"]
    good = read_baseline()["linear bf16 entropy descriptors sm_100"]
    assert not list(faults(configuration, good, "sm_100"))
    bad = replace(good, products=0, copies=0, after_loop=0.061, pipe="special")
    assert list(faults(configuration, bad, "sm_100")) == [
        "no matrix instruction in the loop",
        "no bulk copy to shared memory in the loop",
        "after the loop the special pipe takes 0.061 of its clocks, above 0.06",
    ]
    messages = list(worse(replace(good, products=1, copies=1, after_loop=1.0), good))
    assert [message.split(":")[0] for message in messages] == ["after_loop", "products", "copies"]


def test_the_reader_sees_that_special_functions_alone_would_take_longer_on_sm_100() -> None:
    """Every power by them, none by multiplications."""
    configuration = CONFIGURATIONS["linear bf16 descriptors"]
    settings = dict(configuration.settings(TARGETS["sm_100"]))
    slow = replace(configuration, settings=lambda _: settings | {"POLYNOMIAL": 0})
    found = report(slow, "sm_100")
    assert found.pipe == "special"
    assert list(faults(slow, found, "sm_100"))


def test_the_reader_sees_accesses_that_are_narrow() -> None:
    """Those of a gradient whose rows lie otherwise than the rows of the logits."""
    odd = CONFIGURATIONS["gradient bf16 entropy odd"]
    found = report(replace(odd, constants={**odd.constants, "TOGETHER": False}), "sm_90")
    assert found.wide == round(2 / (2 + 16), 3)  # of 2 loads and 16 stores


def test_every_configuration_compiles_with_the_newer_triton_too_and_has_no_fault() -> None:
    """Registers are its own, so that it is held to no baseline."""
    process = subprocess.run(
        [sys.executable, "bench/kernels.py", "--aot", "--targets", "sm_90"],
        env=with_triton("newer"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    assert found["triton"] != triton.__version__
    assert set(found["reports"]) == {f"{name} sm_90" for name, target in EACH if target == "sm_90"}
