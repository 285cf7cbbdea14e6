"""Which cores the programs of each process get, what is refused, and what is not run twice."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlef.config import ConfigError, ExecutorConfig
from rlef.execution import (
    LearnedOrders,
    ResultCache,
    SparingExecutor,
    Submission,
    open_executor,
    share_of_cores,
)
from rlef_sandbox import Checker, Command, Executor, Job, Limits, Result, Test, Tokens, Verdict


@given(data=st.data(), available=st.sets(st.integers(0, 300), min_size=1, max_size=64))
def test_the_processes_of_a_machine_share_the_budget_without_rest_and_without_overlap(
    data: st.DataObject, available: set[int]
) -> None:
    cores = data.draw(st.integers(1, len(available)))
    processes = data.draw(st.integers(1, cores))
    settings = ExecutorConfig(cores=cores)
    shares = [
        share_of_cores(settings, available, processes=processes, index=index) for index in range(processes)
    ]
    assert all(shares)
    assert [core for share in shares for core in share or ()] == sorted(available)[-cores:]
    sizes = {len(share or ()) for share in shares}
    assert max(sizes) - min(sizes) <= 1


def test_without_a_budget_no_core_is_kept_apart() -> None:
    assert share_of_cores(ExecutorConfig(), {0, 1}, processes=2, index=0) is None


@pytest.mark.parametrize(
    ("cores", "message"),
    [
        (9, r"executor.cores = 9, but a process may use 8 of this machine's cores; lower it"),
        (3, r"executor.cores = 3 cannot be shared by 4 processes of one machine; raise it to 4"),
    ],
)
def test_a_budget_that_cannot_be_given_or_shared_is_refused(cores: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        share_of_cores(ExecutorConfig(cores=cores), range(8), processes=4, index=0)


def test_a_process_opens_a_worker_for_each_core_of_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    available = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(available)))
    monkeypatch.setenv("LOCAL_RANK", "0")
    with open_executor(ExecutorConfig(cores=len(available))) as executor:
        assert [os.sched_getaffinity(pid) for pid in executor.worker_pids()] == [{available[0]}]
    with open_executor(ExecutorConfig(cores=len(available), workers=2)) as executor:
        assert [os.sched_getaffinity(pid) for pid in executor.worker_pids()] == [{available[0]}] * 2


ECHO = Job("print(input())", [Test("1", "1"), Test("2", "2")])
WAITS = Job("import time; time.sleep(9)", [Test("", "")], limits=Limits(cpu_s=1.0, wall_s=0.2))


@pytest.fixture(scope="module")
def plain() -> Iterator[Executor]:
    with Executor(workers=1) as executor:
        yield executor


@pytest.fixture
def sparing() -> Iterator[SparingExecutor]:
    with SparingExecutor(workers=1, cache_bytes=1 << 20) as executor:
        yield executor


def failing_on(failing: set[int], count: int = 5) -> Job:
    """A program that is wrong on some of the tests 0, 1, ..."""
    program = f"n = int(input()); print(n + (n in {sorted(failing)}))"
    tests = [Test(f"{number}\n", f"{number}\n") for number in range(count)]
    return Job(program, tests, stop_at_first_failure=True)


def is_solved(results: list[Result]) -> bool:
    return all(result.verdict is Verdict.PASSED for result in results)


def num_run(results: list[Result]) -> int:
    return sum(result.verdict is not Verdict.SKIPPED for result in results)


def failed(index: int, count: int = 5) -> list[Result]:
    """What a job gives whose only test that was run is one that failed."""
    (one,) = [result_of("wrong_output")]
    return [one if number == index else replace(one, verdict=Verdict.SKIPPED) for number in range(count)]


def result_of(verdict: str, stdout: str = "") -> Result:
    return Result(
        verdict=Verdict(verdict),
        exit_code=0,
        signal=None,
        stdout=stdout,
        stderr="",
        stdout_truncated=False,
        stderr_truncated=False,
        cpu_s=0.001,
        wall_s=0.001,
        peak_memory_bytes=0,
    )


@settings(max_examples=15)
@given(programs=st.lists(st.sets(st.integers(0, 4), max_size=5), min_size=1, max_size=6))
def test_no_learned_order_changes_whether_a_program_is_solved(
    plain: Executor, programs: list[set[int]]
) -> None:
    jobs = [failing_on(failing) for failing in programs]
    expected = [is_solved(results) for results in plain.run_many(jobs)]
    with SparingExecutor(workers=1) as executor:
        found = [executor.run_many([job])[0] for job in jobs]
    assert [is_solved(results) for results in found] == expected
    for failing, results in zip(programs, found, strict=True):
        wrong = [number for number in range(5) if results[number].verdict is Verdict.WRONG_OUTPUT]
        assert set(wrong) <= failing
        assert len(wrong) == bool(failing)


def test_a_test_that_failed_before_is_run_first(sparing: SparingExecutor) -> None:
    assert num_run(sparing.run_many([failing_on({3})])[0]) == 4
    assert num_run(sparing.run_many([failing_on({3, 4})])[0]) == 1


def test_of_equal_failures_the_cheaper_test_comes_first() -> None:
    wrong, orders = Submission(failing_on(set(), 2)), LearnedOrders()
    dear = replace(result_of("wrong_output"), cpu_s=1.0)
    orders.learn(wrong, [dear, result_of("wrong_output")])
    assert orders.order_of(wrong) == [1, 0]


def test_orders_are_forgotten_where_there_are_too_many() -> None:
    orders = LearnedOrders(most_tests=7)
    old, new = Submission(failing_on(set(), 5)), Submission(failing_on(set(), 3))
    orders.learn(old, failed(4))
    assert orders.order_of(old)[0] == 4
    orders.learn(new, failed(2, 3))
    assert (orders.order_of(old)[0], orders.order_of(new)[0]) == (0, 2)


def test_an_equal_program_is_not_run_again(sparing: SparingExecutor) -> None:
    twice = Job("import time\nprint(time.time_ns())", [Test("", "")], judge="any")
    ((first,),) = sparing.run_many([twice])
    sparing.take_tally()
    assert sparing.run_many([twice, ECHO, twice])[0::2] == [[first], [first]]
    tally = sparing.take_tally()
    assert (tally.programs, tally.recalled, tally.recalled_s) == (1, 2, 2 * first.cpu_s)
    assert sparing.take_tally().recalled == 0


def test_of_equal_programs_that_are_submitted_together_one_is_run(sparing: SparingExecutor) -> None:
    sparing.take_tally()

    async def each_alone() -> list[list[list[Result]]]:
        return list(await asyncio.gather(*(sparing.run_many_async([ECHO]) for _ in range(3))))

    assert all(is_solved(results) for (results,) in asyncio.run(each_alone()))
    again = replace(ECHO, judge="exact")
    assert all(map(is_solved, sparing.run_many([again, again])))
    tally = sparing.take_tally()
    assert (tally.programs, tally.recalled) == (2, 3)


def test_what_the_wall_clock_ended_is_run_again(sparing: SparingExecutor) -> None:
    sparing.take_tally()
    together = sparing.run_many([WAITS, WAITS])
    assert [results[0].stopped_by for results in together] == ["wall_limit"] * 2
    assert asyncio.run(sparing.run_many_async([WAITS]))[0][0].stopped_by == "wall_limit"
    tally = sparing.take_tally()
    assert (tally.programs, tally.recalled) == (3, 0)


@pytest.mark.parametrize(
    "other",
    [
        replace(ECHO, program="print(input() )"),
        replace(ECHO, tests=[Test("1", "1"), Test("2", "3")]),
        replace(ECHO, tests=[Test("1", "1"), Test(b"2", "2")]),
        replace(ECHO, tests=[Test("11", "2"), Test("", "2")]),
        replace(ECHO, limits=Limits(cpu_s=1.0)),
        replace(ECHO, judge=Tokens(absolute=0.5)),
        replace(ECHO, judge=Checker(program="def check(*_): return True")),
        replace(ECHO, stop_at_first_failure=True),
    ],
)
def test_a_job_that_differs_in_anything_is_another(other: Job) -> None:
    cache = ResultCache(1 << 20)
    key = cache.key_of(Submission(ECHO))
    assert cache.key_of(Submission(replace(ECHO))) == key
    assert cache.key_of(Submission(other)) != key


class Text(str):
    """Counts how often it is read as bytes from Python."""

    num_reads = 0

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        Text.num_reads += 1
        return super().encode(encoding, errors)


def test_tests_are_read_once_to_find_results_and_order_and_to_learn(sparing: SparingExecutor) -> None:
    together, alone = (
        Job(program, [Test(Text("1"), Text("1"))], stop_at_first_failure=True)
        for program in ("print(1)", "print(2)")
    )
    Text.num_reads = 0
    assert is_solved(sparing.run_many([together])[0])
    assert Text.num_reads == 2
    assert not is_solved(asyncio.run(sparing.run_many_async([alone]))[0])
    assert Text.num_reads == 4


def test_commands_are_not_kept_and_nothing_is_without_room() -> None:
    command = Job(Command(["/bin/cat"]), ECHO.tests)
    assert ResultCache(1 << 20).key_of(Submission(command)) is None
    assert ResultCache(0).key_of(Submission(ECHO)) is None


def test_the_results_that_were_used_least_lately_make_room() -> None:
    cache, results = ResultCache(3000), [result_of("passed", "x" * 200)]
    for key in (b"a", b"b"):
        cache.keep(key, results)
    assert cache.recall(b"a") == results
    cache.keep(b"c", results)
    assert [cache.recall(key) for key in (b"a", b"b", b"c")] == [results, None, results]
