"""How a process opens its executor: with its share of the cores that its node gives to programs, and with
what spares it work. The first failure of a program is looked for where programs failed before, and what a
program gave is kept for the next that is the same.

No verdict depends on either, as long as equal programs do equal things: the sandbox gives them equal random
states and hash seeds, but time and addresses differ.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Lock

from rlef.config import ConfigError, ExecutorConfig
from rlef_sandbox import Checker, Executor, Job, Result, Tally, Verdict

REMEMBERED_TESTS = 1 << 20  # of all problems together, 24 bytes each
RESULT_BYTES = 512  # of a kept result, besides its texts
LEAST_TEST_S = 0.001  # what starting a test costs, whatever it runs

# What a test that was never run is expected to do: fail once in ten times, and be told so by one run.
_PRIOR_RUNS, _PRIOR_FAILURES = 1.0, 0.1


def open_executor(settings: ExecutorConfig, *, workers: int | None = None, ranks: int = 1) -> SparingExecutor:
    """With `workers`, or as many as the settings say. It is that of this process and of the next `ranks` - 1.

    Raises ConfigError for a budget that the node cannot give or its processes cannot share, ValueError and
    SandboxFault as `Executor` does.
    """
    available = os.sched_getaffinity(0)
    processes, index = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    cores = share_of_cores(settings, available, processes=processes, index=index, ranks=ranks)
    share = len(cores) if cores else max(1, len(available) * ranks // processes)
    return SparingExecutor(
        workers=workers or settings.workers or share,
        allow_missing=settings.allow_missing,
        memory_cgroup=settings.memory_cgroup or None,
        cores=cores,
        patience_s=settings.patience_s,
        cache_bytes=settings.cache_bytes,
        learn_order=settings.learn_order,
    )


def share_of_cores(
    settings: ExecutorConfig, available: Collection[int], *, processes: int, index: int, ranks: int = 1
) -> list[int] | None:
    """Which cores the programs of one of a node's processes may use, or of `ranks` processes from it on; None
    without a budget: all.

    The budget is the last of the `available` cores. No two processes share a core.
    """
    budget = settings.cores
    if not budget:
        return None
    if budget > len(available):
        raise ConfigError(
            f"executor.cores = {budget}, but a process may use {len(available)} of this machine's cores; "
            "lower it, or 0 to share all"
        )
    if budget < processes:
        raise ConfigError(
            f"executor.cores = {budget} cannot be shared by {processes} processes of one machine; "
            f"raise it to {processes}, or 0 to share all"
        )
    of_node = sorted(available)[-budget:]
    return of_node[index * budget // processes : (index + ranks) * budget // processes]


class SparingExecutor(Executor):
    """An executor that runs less: `run`, `run_many` and their async twins give what `Executor`'s give.

    Where a job stops at its first failure, its tests are run in the order that has stopped such jobs
    soonest, if `learn_order`: which of them are `skipped` then depends on what was run before, and that one
    fails does not. Results of Python programs are kept, at most `cache_bytes` of them (0: none), and of equal
    jobs that are submitted together one is run.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        allow_missing: Collection[str] = (),
        memory_cgroup: str | None = None,
        cores: Collection[int] | None = None,
        patience_s: float = 60.0,
        cache_bytes: int = 0,
        learn_order: bool = True,
    ) -> None:
        self._orders = LearnedOrders() if learn_order else None
        self._cache = ResultCache(cache_bytes)
        self._under_way: dict[tuple[asyncio.AbstractEventLoop, bytes], asyncio.Event] = {}
        super().__init__(
            workers=workers,
            allow_missing=allow_missing,
            memory_cgroup=memory_cgroup,
            cores=cores,
            patience_s=patience_s,
        )

    def run_many(self, jobs: Sequence[Job]) -> list[list[Result]]:
        submissions = [Submission(job) for job in jobs]
        keys = [self._cache.key_of(submission) for submission in submissions]
        found = [self._cache.recall(key) for key in keys]
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        missing = [index for index, results in enumerate(found) if results is None]
        leaders = [index for index in missing if keys[index] is None or first[keys[index]] == index]
        for index, results in zip(leaders, self._run_now([submissions[i] for i in leaders]), strict=True):
            found[index] = results
            self._cache.keep(keys[index], results)
        followers = [index for index in missing if found[index] is None]
        for index in followers:
            found[index] = self._cache.recall(keys[index])
        again = [index for index in followers if found[index] is None]  # what must not be shared
        for index, results in zip(again, self._run_now([submissions[i] for i in again]), strict=True):
            found[index] = results
        return [results for results in found if results is not None]

    async def run_many_async(self, jobs: Sequence[Job]) -> list[list[Result]]:
        tasks = [asyncio.ensure_future(self._run_one(Submission(job))) for job in jobs]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    def take_tally(self) -> Tally:
        recalled, recalled_s = self._cache.take_counts()
        return replace(super().take_tally(), recalled=recalled, recalled_s=recalled_s)

    def _run_now(self, submissions: Sequence[Submission]) -> list[list[Result]]:
        orders = [self._order_of(submission) for submission in submissions]
        jobs = [_ordered(each.job, order) for each, order in zip(submissions, orders, strict=True)]
        ran = super().run_many(jobs)
        return [self._learn(*each) for each in zip(submissions, orders, ran, strict=True)]

    async def _run_one(self, submission: Submission) -> list[Result]:
        key = self._cache.key_of(submission)
        place = (asyncio.get_running_loop(), key or b"")
        if key and (earlier := self._under_way.get(place)):
            await earlier.wait()
        if (found := self._cache.recall(key)) is not None:
            return found
        is_first = key is not None and place not in self._under_way
        if is_first:
            self._under_way[place] = asyncio.Event()
        try:
            order = self._order_of(submission)
            (ran,) = await super().run_many_async([_ordered(submission.job, order)])
            results = self._learn(submission, order, ran)
            self._cache.keep(key, results)
        finally:
            if is_first:
                self._under_way.pop(place).set()
        return results

    def _order_of(self, submission: Submission) -> list[int]:
        if self._orders is None or not submission.job.stop_at_first_failure:
            return list(range(len(submission.job.tests)))
        return self._orders.order_of(submission)

    def _learn(self, submission: Submission, order: Sequence[int], ran: Sequence[Result]) -> list[Result]:
        """The results in the order of the job's tests."""
        results = [result for _, result in sorted(zip(order, ran, strict=True), key=lambda pair: pair[0])]
        if self._orders is not None and submission.job.stop_at_first_failure:
            self._orders.learn(submission, results)
        return results


def _ordered(job: Job, order: Sequence[int]) -> Job:
    tests = [job.tests[index] for index in order]
    return replace(job, tests=tests)  # type: ignore[arg-type]  # of one kind, as the job's are


@dataclass(frozen=True)
class Submission:
    """A job, and a key of its tests, which may be many megabytes: made once, when it is first asked for."""

    job: Job

    @cached_property
    def tests_key(self) -> bytes:
        return _digest([part for test in self.job.tests for part in (test.input, test.expected_output)])


class LearnedOrders:
    """In which order tests stop a wrong program soonest: those that fail most often for what they cost first.

    Each set of tests has its own counts; those that were used least lately are forgotten.
    """

    def __init__(self, most_tests: int = REMEMBERED_TESTS) -> None:
        self._most_tests = most_tests
        self._num_tests = 0
        self._counts: OrderedDict[bytes, array[float]] = OrderedDict()  # runs, failures, seconds of each test
        self._lock = Lock()

    def order_of(self, submission: Submission) -> list[int]:
        key = submission.tests_key
        with self._lock:
            counts = self._counts.get(key, array("d"))
            numbers = list(range(len(submission.job.tests)))
            return sorted(numbers, key=lambda index: -_worth(counts, index)) if counts else numbers

    def learn(self, submission: Submission, results: Sequence[Result]) -> None:
        key = submission.tests_key
        with self._lock:
            if key not in self._counts:
                self._counts[key] = array("d", bytes(24 * len(results)))
                self._num_tests += len(results)
            self._counts.move_to_end(key)
            counts = self._counts[key]
            for index, result in enumerate(results):
                if result.verdict is not Verdict.SKIPPED:
                    counts[3 * index] += 1
                    counts[3 * index + 1] += result.verdict is not Verdict.PASSED
                    counts[3 * index + 2] += result.cpu_s
            while self._num_tests > self._most_tests:
                _, forgotten = self._counts.popitem(last=False)
                self._num_tests -= len(forgotten) // 3


def _worth(counts: array[float], index: int) -> float:
    """Failures to expect of a test for a second of running it."""
    runs, failures, seconds = counts[3 * index : 3 * index + 3]
    rate = (failures + _PRIOR_FAILURES) / (runs + _PRIOR_RUNS)
    return rate / max(LEAST_TEST_S, seconds / runs if runs else 0.0)


class ResultCache:
    """What Python programs gave, by all that it follows from. The least lately used makes room."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._kept: OrderedDict[bytes, list[Result]] = OrderedDict()
        self._recalled = 0
        self._recalled_s = 0.0
        self._lock = Lock()

    def key_of(self, submission: Submission) -> bytes | None:
        """None for what is not kept."""
        job = submission.job
        is_python = isinstance(job.program, str) and not (
            isinstance(job.judge, Checker) and not isinstance(job.judge.program, str)
        )
        if not self._most_bytes or not is_python:
            return None
        settings = (job.program, job.function, job.limits, job.judge, job.stop_at_first_failure)
        return _digest([repr(settings), submission.tests_key])

    def recall(self, key: bytes | None) -> list[Result] | None:
        with self._lock:
            if key is None or key not in self._kept:
                return None
            self._kept.move_to_end(key)
            results = self._kept[key]
            self._recalled += 1
            self._recalled_s += sum(result.cpu_s for result in results)
            return list(results)

    def keep(self, key: bytes | None, results: Sequence[Result]) -> None:
        """Unless the machine had a part in it: a wall clock that ran out, or memory that was measured."""
        if key is None or any(result.stopped_by in ("wall_limit", "memory_limit") for result in results):
            return
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = list(results)
            self._bytes += _size(results)
            while self._bytes > self._most_bytes:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= _size(dropped)

    def take_counts(self) -> tuple[int, float]:
        """How many programs were recalled since it was last asked for, and the CPU seconds they had taken."""
        with self._lock:
            counts = self._recalled, self._recalled_s
            self._recalled, self._recalled_s = 0, 0.0
            return counts


def _size(results: Sequence[Result]) -> int:
    return sum(RESULT_BYTES + 4 * (len(result.stdout) + len(result.stderr)) for result in results)


def _digest(parts: Sequence[str | bytes]) -> bytes:
    """Of texts and where each ends."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(f"{type(part).__name__} {len(data)}:".encode())
        digest.update(data)
    return digest.digest()
