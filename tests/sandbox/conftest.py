from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from rlef_sandbox import Executor, Judge, Limits, Result, Test, check_memory_cgroup
from tests.sandbox.processes import wait_until

RunOnce = Callable[..., Result]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may read. Those of pytest are closed again whenever another pytest starts."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.fixture(scope="package")
def usable_memory_cgroup() -> Path:
    """Skips where there is none, in CI too: no setting of a container gives one, only its host can."""
    report = check_memory_cgroup()
    if report.folder is None:
        pytest.skip(f"this machine gives no memory cgroup: {report.reason}")
    return Path(report.folder)


@pytest.fixture
def memory_cgroup(usable_memory_cgroup: Path) -> Iterator[Path]:
    """A memory cgroup of the test's own."""
    folder = usable_memory_cgroup / f"tests-of-rlef-{os.getpid()}"
    folder.mkdir()
    if not (folder / "memory.limit_in_bytes").exists():
        (folder / "cgroup.subtree_control").write_text("+memory")
    try:
        yield folder
    finally:
        if folder.exists():
            wait_until(lambda: not (folder / "cgroup.procs").read_text())
            for left in folder.glob("rlef-*"):
                left.rmdir()
            folder.rmdir()


@pytest.fixture(scope="package")
def executor() -> Iterator[Executor]:
    with Executor(workers=1) as shared:
        yield shared


@pytest.fixture
def run(executor: Executor) -> RunOnce:
    """Run a program on one test, under limits that a test suite can wait for."""

    def run_once(
        program: str,
        stdin: str | bytes = "",
        expected: str = "",
        *,
        limits: Limits | None = None,
        judge: Judge = "exact",
    ) -> Result:
        limits = limits or Limits(cpu_s=2.0, wall_s=4.0, memory_bytes=256 << 20, output_bytes=1 << 20)
        return executor.run(program, [Test(stdin, expected)], limits=limits, judge=judge)[0]

    return run_once
