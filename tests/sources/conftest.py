"""One executor for each file of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rlef_sandbox import Executor


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(workers=1) as executor:
        yield executor
