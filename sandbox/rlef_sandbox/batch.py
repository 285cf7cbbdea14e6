"""Jobs under way, and their results as they come."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Iterator

from rlef_sandbox import _core
from rlef_sandbox.records import Result, SandboxFault, StoppedBy, Verdict


class Batch(Iterator[tuple[int, list[Result]]], AsyncIterator[tuple[int, list[Result]]]):
    """Pairs (index of a job, results of its tests), each once, in the order in which jobs finish.

    Take them with `for` or, in asyncio, with `async for`; one thread or task at a time. The jobs run whether
    or not anybody waits. `cancel()` ends what is not finished, and so does letting go of the batch. When the
    sandbox fails, the next step raises SandboxFault.
    """

    def __init__(self, core: _core.Batch) -> None:
        self._core = core
        self._owner = os.getpid()
        self._taken: deque[tuple[int, list[Result]]] = deque()

    def __next__(self) -> tuple[int, list[Result]]:
        while self._must_wait():
            self._core.wait(for_all=False)
        if self._taken:
            return self._taken.popleft()
        raise StopIteration

    async def __anext__(self) -> tuple[int, list[Result]]:
        while self._must_wait():
            await _readable(self._core.fileno())
        if self._taken:
            return self._taken.popleft()
        raise StopAsyncIteration

    def cancel(self) -> None:
        """End the programs that wait or run. What is finished can still be taken; then the batch ends."""
        self._core.cancel()

    def _must_wait(self) -> bool:
        """Whether nothing can be given now, but more will come."""
        if self._taken:
            return False
        must_be_of_this_process(self._owner)
        over = self._core.is_over()  # asked before taking: what finishes in between is not lost
        for index, outcomes in self._core.take():
            self._taken.append((index, [_result(*outcome) for outcome in outcomes]))
        return not self._taken and not over


def must_be_of_this_process(owner: int) -> None:
    """A fork has neither the supervisor's thread nor the workers: it would wait for ever."""
    if os.getpid() != owner:
        raise SandboxFault("this executor belongs to the process before the fork: make one here")


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    news = asyncio.Event()
    loop.add_reader(descriptor, news.set)
    try:
        await news.wait()
    finally:
        loop.remove_reader(descriptor)


def _result(
    verdict: str,
    exit_code: int | None,
    signal: int | None,
    stdout: str,
    stderr: str,
    stdout_truncated: bool,
    stderr_truncated: bool,
    cpu_s: float,
    wall_s: float,
    peak_memory_bytes: int,
    stopped_by: StoppedBy | None,
    files: dict[str, bytes],
) -> Result:
    return Result(
        verdict=Verdict(verdict),
        exit_code=exit_code,
        signal=signal,
        stdout=stdout,
        stderr=stderr,
        stdout_truncated=stdout_truncated,
        stderr_truncated=stderr_truncated,
        cpu_s=cpu_s,
        wall_s=wall_s,
        peak_memory_bytes=peak_memory_bytes,
        stopped_by=stopped_by,
        files=files,
    )
