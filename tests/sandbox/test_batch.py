"""Results as they come, asyncio, and cancelling."""

from __future__ import annotations

import asyncio
import select
import time

import pytest

from rlef_sandbox import Executor, Job, Limits, SandboxFault, Test, Verdict
from tests.sandbox.processes import descendants, wait_until

ECHO = Job("print(input())", [Test("1", "1")])
SLOW = Job("import time; time.sleep(1)", [Test("", "")])
ENDLESS = Job("while True: pass", [Test("", "")], limits=Limits(cpu_s=60))


def is_idle(executor: Executor) -> bool:
    return not any(descendants(worker) for worker in executor.worker_pids())


def test_results_come_as_the_jobs_finish_each_once():
    with Executor(workers=2) as pair:
        order = [index for index, _ in pair.as_completed([SLOW, ECHO, ECHO, Job("", [])])]

    assert sorted(order) == [0, 1, 2, 3]
    assert order[-1] == 0


def test_a_result_of_the_iteration_is_that_of_run_many(executor: Executor):
    jobs = [ECHO, Job("1/0", [Test("", "")] * 2), Job("(", [Test("", "")])]

    found = {index: [result.verdict for result in of_job] for index, of_job in executor.as_completed(jobs)}

    assert [found[index] for index in range(3)] == [
        [result.verdict for result in of_job] for of_job in executor.run_many(jobs)
    ]


def test_jobs_run_while_nobody_waits(executor: Executor):
    batch = executor.as_completed([SLOW])
    wait_until(lambda: not is_idle(executor))
    wait_until(lambda: is_idle(executor))

    [(_, [result])] = batch
    assert result.verdict is Verdict.PASSED


@pytest.mark.parametrize("letting_go", ["cancel", "drop"])
def test_what_is_not_finished_ends_with_its_batch(letting_go):
    with Executor(workers=1) as single:
        batch = single.as_completed([ECHO, ENDLESS, ECHO])
        assert next(batch)[0] == 0
        wait_until(lambda: not is_idle(single))
        if letting_go == "cancel":
            batch.cancel()
            assert list(batch) == []
        del batch

        wait_until(lambda: is_idle(single))
        assert single.run_many([ECHO])[0][0].verdict is Verdict.PASSED


def test_cancelling_one_batch_leaves_the_others_alone(executor: Executor):
    before, after = executor.as_completed([ECHO, ENDLESS]), executor.as_completed([ECHO])
    next(before)
    before.cancel()
    [(_, [result])] = after  # the only worker has come to it, so what was before is over

    assert result.verdict is Verdict.PASSED
    assert list(before) == []


def test_what_had_finished_before_it_was_cancelled_can_still_be_taken(executor: Executor):
    batch = executor.as_completed([ECHO, ENDLESS])
    select.select([batch._core.fileno()], [], [], 30)
    batch.cancel()

    assert [index for index, _ in batch] == [0]


def test_the_event_loop_runs_on_while_programs_do(executor: Executor):
    async def count_beside_a_program() -> int:
        counted = 0

        async def count() -> None:
            nonlocal counted
            while True:
                await asyncio.sleep(0.01)
                counted += 1

        counting = asyncio.create_task(count())
        [result] = await executor.run_async(SLOW.program, SLOW.tests)
        counting.cancel()
        assert result.verdict is Verdict.PASSED
        return counted

    assert asyncio.run(count_beside_a_program()) > 10


def test_many_tasks_share_an_executor(executor: Executor):
    async def all_at_once() -> list[str]:
        tasks = [executor.run_async("print(input())", [Test(str(i), str(i))]) for i in range(20)]
        return [results[0].stdout for results in await asyncio.gather(*tasks)]

    assert asyncio.run(all_at_once()) == [f"{i}\n" for i in range(20)]


def test_asynchronous_iteration_gives_each_job_once(executor: Executor):
    async def collect() -> list[int]:
        return [index async for index, _ in executor.as_completed([ECHO] * 5)]

    assert sorted(asyncio.run(collect())) == [0, 1, 2, 3, 4]


def test_run_many_async_keeps_the_order_of_the_jobs():
    jobs = [Job(f"import time; time.sleep({(4 - i) / 10}); print({i})", [Test("", "")]) for i in range(4)]
    with Executor(workers=4) as four:
        results = asyncio.run(four.run_many_async(jobs))

    assert [result.stdout for [result] in results] == ["0\n", "1\n", "2\n", "3\n"]


def test_cancelling_a_task_ends_its_programs():
    with Executor(workers=1) as single:

        async def give_up() -> None:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(single.run_many_async([ENDLESS, ENDLESS]), timeout=0.5)

        asyncio.run(give_up())

        wait_until(lambda: is_idle(single))
        started = time.monotonic()
        assert single.run_many([ECHO])[0][0].verdict is Verdict.PASSED
        assert time.monotonic() - started < 30  # the second endless one was not begun


def test_a_fault_reaches_every_way_of_waiting():
    single = Executor(workers=1)
    batch, other = single.as_completed([ENDLESS]), single.as_completed([ENDLESS])
    single.close()

    async def wait() -> None:
        async for _ in other:
            pass

    with pytest.raises(SandboxFault, match="the executor was closed"):
        next(batch)
    with pytest.raises(SandboxFault, match="the executor was closed"):
        asyncio.run(wait())
    with pytest.raises(SandboxFault, match="the executor is closed"):
        asyncio.run(single.run_many_async([ECHO]))


def test_an_empty_batch_is_over_at_once(executor: Executor):
    assert list(executor.as_completed([])) == []
    assert asyncio.run(executor.run_many_async([])) == []
