"""The Tritons that the kernels are tested with: the environment's, and a newer one that `make test` unpacks.

It lies in build/triton-VERSION. Both have the name `triton`, so that each has processes of its own: whose
PYTHONPATH begins with a Triton's folder has that one.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRITONS = ["of_the_environment", "newer"]


def with_triton(which: str, **variables: str) -> dict[str, str]:
    """The environment of a process in which `import triton` finds the one that is asked for, or skip."""
    folder = newer_triton() if which == "newer" else None
    is_there = find_spec("triton") is not None if which == "of_the_environment" else folder is not None
    if not is_there and os.environ.get("CI") != "true":
        pytest.skip(f"the triton {which} is not installed: make test installs it on Linux on x86-64")
    assert is_there, f"the triton {which} is not installed"
    paths = [str(folder)] if folder is not None else []
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}


def newer_triton() -> Path | None:
    stamps = sorted((ROOT / "build").glob("triton-*/ready"))
    assert len(stamps) <= 1, f"{len(stamps)} tritons lie in build/"
    return stamps[0].parent if stamps else None
