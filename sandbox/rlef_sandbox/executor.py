"""The executor: a pool of isolated workers that run programs on tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import TracebackType

from rlef_sandbox import _core
from rlef_sandbox.batch import Batch, must_be_of_this_process
from rlef_sandbox.records import (
    Call,
    Checker,
    Command,
    Job,
    Judge,
    Limits,
    Result,
    SandboxFault,
    Tally,
    Test,
    Verdict,
    is_number,
)
from rlef_sandbox.workers import start_workers


class Executor:
    """Runs programs on tests, each test in a process of its own. Threads may share one; forks may not.

    `workers` is how many programs run at once (default: one per core that this process may use). `limits`
    holds for jobs that bring none. `allow_missing` names isolation layers that may be absent: without it a
    machine that lacks one is refused. `readable` are paths that a `Command` may read besides the system's.
    `memory_cgroup` is a cgroup's folder that this process may write: below it the kernel ends programs at
    their memory limit, and counts what no process of theirs holds. `check_memory_cgroup` finds one.
    `cores` are the numbers of those that workers and programs may use (default: all that this thread may use,
    and then `workers` counts those). `patience_s` is how long after a test's wall limit a worker that does
    not answer, because it is stopped or starved, is waited for; then its program gets another worker.

    Raises ValueError for bad arguments, SandboxFault when the workers cannot be started or isolated.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        limits: Limits | None = None,
        allow_missing: Collection[str] = (),
        readable: Collection[str] = (),
        memory_cgroup: str | None = None,
        cores: Collection[int] | None = None,
        patience_s: float = 60.0,
    ) -> None:
        if cores is not None and not (cores and set(cores) <= os.sched_getaffinity(0)):
            raise ValueError(
                f"cores is {cores!r}: give some of those that this thread may use, {os.sched_getaffinity(0)}"
            )
        if not (is_number(patience_s) and 0 < patience_s <= 86_400):
            raise ValueError(f"patience_s is {patience_s!r}: give a number of seconds in (0, 86400]")
        if workers is None:
            workers = len(set(cores or os.sched_getaffinity(0)))
        if isinstance(workers, bool) or not isinstance(workers, int) or not 1 <= workers <= _MOST_WORKERS:
            raise ValueError(f"workers is {workers!r}: give a whole number from 1 to {_MOST_WORKERS}")
        if memory_cgroup is not None and not Path(memory_cgroup).is_absolute():
            raise ValueError(f"memory_cgroup is {memory_cgroup!r}: give a cgroup's folder, from the root on")
        self._limits = limits or Limits()
        self._owner = os.getpid()
        self._built: dict[str, Mapping[str, bytes]] = {}  # outputs of the builds of checkers, by their text
        self._building = Lock()
        self._supervisor = start_workers(
            workers,
            allow_missing=allow_missing,
            readable=readable,
            memory_cgroup=memory_cgroup,
            cores=cores,
            patience_s=patience_s,
        )
        try:
            self._try_out()
        except BaseException:
            self.close()
            raise

    def run(
        self,
        program: str | Command,
        tests: Sequence[Test] | Sequence[Call],
        *,
        stop_at_first_failure: bool = False,
        limits: Limits | None = None,
        judge: Judge | None = None,
        function: str = "",
    ) -> list[Result]:
        """Run one program; results in the order of `tests`. See `Job` and `run_many`."""
        job = Job(
            program,
            tests,
            limits=limits,
            stop_at_first_failure=stop_at_first_failure,
            judge=judge,
            function=function,
        )
        return self.run_many([job])[0]

    def run_many(self, jobs: Sequence[Job]) -> list[list[Result]]:
        """Run programs side by side; per job, results in the order of its tests.

        With `stop_at_first_failure` the tests after the first failure are `skipped`. The interpreter's lock
        is released meanwhile, and signals (Ctrl-C) are answered.

        Raises ValueError for an unknown judge, SandboxFault when the sandbox itself failed repeatedly or is
        closed.
        """
        core = self._submit(jobs)
        core.wait(for_all=True)
        results = dict(Batch(core))
        return [results[index] for index in range(len(jobs))]

    def build(self, command: Command, *, limits: Limits | None = None) -> Result:
        """Run a compiler: once, without input, and pass whatever it prints if it ends well.

        It may start processes, as compilers do. What it makes is in `files` of the result, as far as
        `command.outputs` names it. Raises as `run` does.
        """
        [[result]] = self.run_many([_build_job(command, limits or _BUILD_LIMITS)])
        return result

    def build_checkers(self, checkers: Sequence[Checker]) -> list[Result]:
        """Build now, side by side, what jobs with these checkers would build first.

        Results are those of `build`. What could not be built is tried again by the next job that needs it.
        Raises as `run` does, and ValueError for a checker that has nothing to build.
        """
        builds = [checker.build for checker in checkers if checker.build is not None]
        if len(builds) < len(checkers):
            raise ValueError("checkers: give those that have a build")
        results = [result for [result] in self.run_many([_build_job(b, _BUILD_LIMITS) for b in builds])]
        for build, result in zip(builds, results, strict=True):
            if result.verdict is Verdict.PASSED and len(result.files) == len(build.outputs):
                self._built[repr(build)] = result.files
        return results

    async def run_async(
        self,
        program: str | Command,
        tests: Sequence[Test] | Sequence[Call],
        *,
        stop_at_first_failure: bool = False,
        limits: Limits | None = None,
        judge: Judge | None = None,
        function: str = "",
    ) -> list[Result]:
        """`run` for asyncio. Cancelling the task ends the program."""
        job = Job(
            program,
            tests,
            limits=limits,
            stop_at_first_failure=stop_at_first_failure,
            judge=judge,
            function=function,
        )
        return (await self.run_many_async([job]))[0]

    async def run_many_async(self, jobs: Sequence[Job]) -> list[list[Result]]:
        """`run_many` for asyncio. Cancelling the task ends the programs."""
        batch = self.as_completed(jobs)
        try:
            results = dict([pair async for pair in batch])
        finally:
            batch.cancel()
        return [results[index] for index in range(len(jobs))]

    def as_completed(self, jobs: Sequence[Job]) -> Batch:
        """Start the jobs, and iterate over what they give as they finish, with `for` or `async for`.

        Raises as `run_many` does, the fault at the step of the iteration that meets it.
        """
        return Batch(self._submit(jobs))

    def _submit(self, jobs: Sequence[Job]) -> _core.Batch:
        must_be_of_this_process(self._owner)
        return self._supervisor.submit([self._with_built_checker(job) for job in jobs], self._limits)

    def _with_built_checker(self, job: Job) -> Job:
        checker = job.judge
        if not isinstance(checker, Checker) or checker.build is None:
            return job
        assert isinstance(checker.program, Command)
        key = repr(checker.build)
        with self._building:  # threads that need the same one wait for the first
            if key not in self._built:
                [result] = self.build_checkers([checker])
                if key not in self._built:
                    raise SandboxFault(f"the checker cannot be built: {_ending_of_build(result)}")
            built = self._built[key]
        program = replace(checker.program, files={**checker.program.files, **built})
        return replace(job, judge=Checker(program=program, limits=checker.limits))

    def _try_out(self) -> None:
        """An honest program must run, libraries included, before any verdict of this machine counts."""
        [result] = self.run(_HONEST_PROGRAM, [Test("7", "7")], limits=Limits())
        if result.verdict is not Verdict.PASSED:
            said = result.stderr.strip().rpartition("\n")[2] or f"signal {result.signal}"
            raise SandboxFault(
                f"honest programs fail in this sandbox ({result.verdict.value}: {said}): can every user read "
                f"{sys.base_prefix}?"
            )

    def restarts(self) -> int:
        """How many workers have been replaced because they died or could not be started."""
        must_be_of_this_process(self._owner)
        return self._supervisor.restarts()

    def take_tally(self) -> Tally:
        """What there was since it was last asked for, or since the start."""
        must_be_of_this_process(self._owner)
        return Tally(*self._supervisor.take_tally())

    def worker_pids(self) -> list[int]:
        """The worker processes that live now."""
        must_be_of_this_process(self._owner)
        return self._supervisor.worker_pids()

    def close(self) -> None:
        """End the workers and all that they run. Calls under way raise SandboxFault."""
        self._supervisor.close()

    def __enter__(self) -> Executor:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _build_job(command: Command, limits: Limits) -> Job:
    return Job(replace(command, may_fork=True), [Test("", "")], limits=limits, judge="any")


def _ending_of_build(result: Result) -> str:
    if result.verdict is Verdict.PASSED:
        return f"its build left {', '.join(result.files) or 'nothing'}"
    return f"{result.verdict.value}: {result.stderr.strip()}"


_MOST_WORKERS = 1024
_BUILD_LIMITS = Limits(cpu_s=60.0, file_bytes=256 << 20, memory_bytes=2 << 30, open_files=256)
_HONEST_PROGRAM = "import decimal, json\nprint(decimal.Decimal(input()))"
