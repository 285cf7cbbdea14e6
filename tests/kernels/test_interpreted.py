"""The Triton kernels in Triton's interpreter. It is chosen when a kernel is imported, so each file of tests
has a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


NAMES = sorted(path.stem for path in HERE.glob("interpreted_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_equal_their_slow_twins(name: str) -> None:
    if find_spec("triton") is None and os.environ.get("CI") != "true":
        pytest.skip("triton is not installed: pip install triton")
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(HERE / f"{name}.py"),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert " passed" in process.stdout
    assert "skipped" not in process.stdout, process.stdout
