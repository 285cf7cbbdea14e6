"""Episodes whose programs run while others still decode.

Each episode is a coroutine that reads like the paper: respond, execute, feed back, respond again. One event
loop carries them all and steps the sampler while anything waits for it. What an episode is does not depend on
the order in which others finish, but for rounding: which rows decode together depends on the clock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Unpack

from rlef import prompts
from rlef.config import RolloutConfig
from rlef.ports import Request, Response, SamplingParams, StreamingSampler
from rlef.prompts import Dialog
from rlef.records import Episode, Problem
from rlef.rollout import Attempt, Collection, CollectSettings, begin, true_message
from rlef_sandbox import Executor


class Episodes:
    """Makes episodes in the event loop that runs `sample`, as many at a time as are awaited."""

    def __init__(
        self,
        *,
        sampler: StreamingSampler,
        executor: Executor,
        dialog: Dialog,
        settings: RolloutConfig,
        params: SamplingParams,
        turns: int,
        tell: bool,  # what failed, or only that something did
    ) -> None:
        self._sampler = sampler
        self._executor = executor
        self._dialog = dialog
        self._settings = settings
        self._params = params
        self._turns = turns
        self._tell = tell
        self._responses: dict[int, asyncio.Future[Response]] = {}
        self._wanted = asyncio.Event()
        self.tests_run = 0
        self.sampling_s = 0.0
        self.waiting_s = 0.0  # in which nothing could be sampled, since every episode's programs ran

    async def episode(self, problem: Problem, number: int) -> Episode:
        """One problem, from its prompt to the verdict of its private tests.

        Raises SandboxFault when the sandbox itself fails: that is never scored.
        """
        attempt = begin(problem, number, self._dialog)
        for turn in range(self._turns):
            await self._respond(attempt)
            if attempt.passed_public or turn == self._turns - 1:
                break
            attempt.observe(self._dialog.close(attempt.token_ids))
            text = true_message(attempt, self._settings) if self._tell else prompts.untold_text()
            attempt.observe(self._dialog.feedback(text))
        if attempt.passed_public:
            (results,) = await self._executor.run_many_async([attempt.private_job()])
            self.tests_run += attempt.judge(results)
        return attempt.episode()

    async def sample(self) -> None:
        """Step the sampler, for ever, as long as episodes wait for it."""
        while True:
            if not self._responses:
                await self._wait()
            started = time.monotonic()
            for stream, response in self._sampler.step():
                self._responses.pop(stream).set_result(response)
            self.sampling_s += time.monotonic() - started
            await asyncio.sleep(0)  # let programs that have finished go on

    async def _wait(self) -> None:
        self._wanted.clear()
        started = time.monotonic()
        try:
            await self._wanted.wait()
        finally:  # in the end it is cancelled
            self.waiting_s += time.monotonic() - started

    async def _respond(self, attempt: Attempt) -> None:
        self._sampler.submit(Request(stream=attempt.number, token_ids=attempt.token_ids), self._params)
        self._responses[attempt.number] = asyncio.get_running_loop().create_future()
        self._wanted.set()
        response = await self._responses[attempt.number]
        attempt.respond(response)
        code = prompts.extract_code(self._dialog.decode(response.token_ids))
        results = [] if code is None else (await self._executor.run_many_async([attempt.public_job(code)]))[0]
        self.tests_run += len(results)
        attempt.add_turn(response, code, results)


def collect_overlapped(
    problems: Sequence[Problem], *, numbers: Sequence[int], **settings: Unpack[CollectSettings]
) -> Collection:
    """`rollout.collect`, but no episode waits for another's program.

    Raises:
        ValueError: `feedback` is "random", which needs the programs of other episodes at the same turn.
    """
    return asyncio.run(_collect(problems, numbers, settings))


async def _collect(
    problems: Sequence[Problem], numbers: Sequence[int], settings: CollectSettings
) -> Collection:
    if settings["feedback"] == "random":
        raise ValueError("feedback 'random' needs other episodes at the same turn; collect in lockstep")
    made = Episodes(
        sampler=settings["sampler"],
        executor=settings["executor"],
        dialog=settings["dialog"],
        settings=settings["settings"],
        params=settings["params"],
        turns=settings["turns"],
        tell=settings["feedback"] == "true",
    )
    try:
        async with asyncio.TaskGroup() as group:
            sampling = group.create_task(made.sample())
            episodes = await asyncio.gather(
                *(
                    group.create_task(made.episode(problem, number))
                    for problem, number in zip(problems, numbers, strict=True)
                )
            )
            sampling.cancel()
    except BaseExceptionGroup as faults:  # the first ended the others
        raise faults.exceptions[0] from None
    finally:
        settings["sampler"].abort()
    return Collection(
        episodes=episodes,
        tests_run=made.tests_run,
        sampling_s=made.sampling_s,
        executing_s=made.waiting_s,
    )
