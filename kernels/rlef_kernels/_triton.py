"""Whether the kernels can be used at all."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec


@cache
def has_triton() -> bool:
    """Asked once: a look at all folders of packages has no place on the way to a launch."""
    return find_spec("triton") is not None
