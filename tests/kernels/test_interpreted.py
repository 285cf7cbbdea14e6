"""The Triton kernels in the interpreters of two Tritons, each file of tests in a process of its own: the
interpreter is chosen when a kernel is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.tritons import ROOT, TRITONS, with_triton

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("interpreted_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("which", TRITONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_equal_their_slow_twins(name: str, which: str) -> None:
    """In the newer Triton with fewer examples of each property."""
    profile = "few" if which == "newer" else "suite"
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/{name}.py"],
        env=with_triton(which, TRITON_INTERPRET="1", RLEF_HYPOTHESIS_PROFILE=profile),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert " passed" in process.stdout
    assert "skipped" not in process.stdout, process.stdout


def test_the_newer_triton_is_the_one_that_a_process_gets() -> None:
    environment = with_triton("newer")
    code = "import triton; print(triton.__version__, triton.__file__)"
    version, place = subprocess.check_output(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, text=True
    ).split()
    assert Path(place).parents[1].name == f"triton-{version}"
