"""The Triton kernel of `gae`, without a GPU: interpreted on a CPU, and compiled for GPUs that are not here.

Triton decides whether to interpret when it decorates a kernel, so each has a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _triton_is_there() -> None:
    if find_spec("triton") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("triton is not installed: the extra `dev` has it")
        pytest.skip("triton is not installed")


def run(*arguments: str, interpret: bool, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_the_interpreted_kernel_does_what_its_twin_does(tmp_path: Path) -> None:
    tests = str(Path(__file__).with_name("gae_interpreted.py"))
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", tests, interpret=True, cache=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.slow
def test_the_kernel_compiles_for_gpus_that_are_not_here_and_spills_nothing(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("gae_compiled.py"))
    done = run(script, interpret=False, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    usages = json.loads(done.stdout)
    assert len(usages) == 9
    for usage in usages:
        assert usage["STACK"] == usage["LOCAL"] == 0, usage
        assert usage["REG"] * usage["threads"] <= 65536 // 2, f"two programs fit on a multiprocessor: {usage}"
