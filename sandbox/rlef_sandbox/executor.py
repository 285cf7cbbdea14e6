"""The executor: a pool of isolated workers that run programs on tests."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import TracebackType

from rlef_sandbox.records import Job, Judge, Limits, Result, Test


class Executor:
    """Runs programs on tests in isolated processes. Threads may share one."""

    def __init__(
        self,
        *,
        workers: int | None = None,
        limits: Limits | None = None,
        allow_missing: Collection[str] = (),
    ) -> None:
        raise NotImplementedError

    def run(
        self,
        program: str,
        tests: Sequence[Test],
        *,
        stop_at_first_failure: bool = False,
        limits: Limits | None = None,
        judge: Judge = "code_contests",
    ) -> list[Result]:
        raise NotImplementedError

    def run_many(self, jobs: Sequence[Job]) -> list[list[Result]]:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Executor:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
