"""Episodes whose programs run while others still decode.

Each episode is a coroutine that reads like the paper: respond, execute, feed back, respond again. One event
loop carries them all and steps the sampler while anything waits for it. What an episode is does not depend on
the order in which others finish, but for rounding: which rows decode together depends on the clock.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Unpack

from pydantic import ConfigDict, TypeAdapter

from rlef import prompts
from rlef.config import FeedbackKind, RolloutConfig
from rlef.ports import UNFINISHED, Request, Response, SamplingParams, StreamingSampler
from rlef.prompts import Dialog
from rlef.records import Episode, Problem, Turn
from rlef.rollout import Attempt, Collection, CollectSettings, begin, true_message
from rlef.unrelated import UnrelatedFeedback
from rlef_sandbox import Executor, Job, Result


@dataclass(slots=True, kw_only=True)
class SavedEpisode:
    """An episode under way, or done, with all that is needed to go on with it."""

    __pydantic_config__ = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    number: int
    token_ids: list[int]
    sampled: list[bool]
    logprobs: list[float]
    versions: list[int]
    turns: list[Turn]
    solved: bool
    is_done: bool
    response: Response | None  # the beginning of one, or one whose program has not run


SAVED_EPISODES = TypeAdapter(list[SavedEpisode])


def merged(saved: Iterable[str]) -> str:
    """What several processes saved, as one saved it."""
    return json.dumps([episode for each in saved for episode in json.loads(each)])


@dataclass(slots=True, eq=False)
class _UnderWay:
    """An episode, and its response while that is sampled and executed."""

    attempt: Attempt
    response: Response | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    is_done: bool = False


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
        feedback: FeedbackKind,
        unrelated: UnrelatedFeedback | None,
    ) -> None:
        self._sampler = sampler
        self._executor = executor
        self._dialog = dialog
        self._settings = settings
        self._params = params
        self._turns = turns
        self._feedback = feedback
        self._unrelated = unrelated
        self._under_way: dict[int, _UnderWay] = {}
        self._sampling: set[int] = set()  # numbers whose response is not whole
        self._wanted = asyncio.Event()
        self._is_paused = False
        self.tests_run = 0
        self.sampling_s = 0.0
        self.waiting_s = 0.0  # in which nothing could be sampled, since every episode's programs ran

    async def episode(self, problem: Problem, number: int, saved: SavedEpisode | None = None) -> Episode:
        """One problem, from its prompt, or from where it was saved, to the verdict of its private tests.

        Raises SandboxFault when the sandbox itself fails: that is never scored.
        """
        if saved is None:
            under_way = _UnderWay(begin(problem, number, self._dialog))
        else:
            under_way = _taken_up(problem, saved)
        self._under_way[number] = under_way
        attempt = under_way.attempt
        while not self._is_over(attempt):
            await self._take_turn(under_way)
            if not self._is_over(attempt):
                text = await self._message(attempt)
                attempt.observe(self._dialog.close(attempt.token_ids))
                attempt.observe(self._dialog.feedback(text, stub=problem.stub))
        if attempt.passed_public and not under_way.is_done:
            results = await self._execute(attempt.private_job())
            self.tests_run += attempt.judge(results)
        under_way.is_done = True
        return attempt.episode()

    async def sample(self) -> None:
        """Step the sampler, for ever, as long as episodes wait for it."""
        while True:
            while not self._sampling or self._is_paused:
                await self._wait()
            started = time.monotonic()
            for number, response in self._sampler.step():
                self._add(number, response)
            self.sampling_s += time.monotonic() - started
            await asyncio.sleep(0)  # let programs that have finished go on

    def pause(self) -> None:
        """Take back what the sampler has begun, so that it is free for others. Programs run on."""
        self._is_paused = True
        for number, response in self._sampler.abort():
            self._add(number, response)

    def resume(self) -> None:
        """Go on where `pause` stopped, with whatever weights the sampler has now."""
        self._is_paused = False
        for number in sorted(self._sampling):
            self._submit(self._under_way[number])
        self._wanted.set()

    def state_of(self, number: int) -> str:
        """What an episode waits for. May be asked from any thread."""
        under_way = self._under_way.get(number)
        if under_way is None:
            return "not begun"
        if under_way.is_done:
            return "done"
        return "sampling" if number in self._sampling else "executing"

    def forget(self, numbers: Sequence[int]) -> None:
        """Drop episodes that are done, which nobody will ask to save again."""
        for number in numbers:
            del self._under_way[number]

    def saved(self) -> list[SavedEpisode]:
        """All that are not forgotten. Pause first: what the sampler holds is not seen."""
        return [
            SavedEpisode(
                number=number,
                token_ids=list(each.attempt.token_ids),
                sampled=list(each.attempt.sampled),
                logprobs=list(each.attempt.logprobs),
                versions=list(each.attempt.versions),
                turns=list(each.attempt.turns),
                solved=each.attempt.solved,
                is_done=each.is_done,
                response=each.response,
            )
            for number, each in sorted(self._under_way.items())
        ]

    def _is_over(self, attempt: Attempt) -> bool:
        """No response follows those that there are."""
        return bool(attempt.turns) and (attempt.passed_public or len(attempt.turns) == self._turns)

    async def _take_turn(self, under_way: _UnderWay) -> None:
        attempt, response = under_way.attempt, await self._respond(under_way)
        code = prompts.extract_code(self._dialog.decode(response.token_ids), stub=attempt.problem.stub)
        results = [] if code is None else await self._execute(attempt.public_job(code))
        self.tests_run += len(results)
        under_way.response = None
        attempt.respond(response)
        attempt.add_turn(response, code, results)

    async def _message(self, attempt: Attempt) -> str:
        if self._feedback == "none":
            return prompts.untold_text()
        if self._unrelated is not None and self._feedback == "random":
            return await self._unrelated.message(
                attempt.place, seed=self._params.seed, executor=self._executor
            )
        return true_message(attempt, self._settings)

    async def _respond(self, under_way: _UnderWay) -> Response:
        """The whole response, of which the beginning may be there."""
        if under_way.response is None or under_way.response.finish_reason == UNFINISHED:
            under_way.arrived.clear()
            self._sampling.add(under_way.attempt.number)
            if not self._is_paused:
                self._submit(under_way)
            self._wanted.set()
            await under_way.arrived.wait()
        assert under_way.response is not None
        return under_way.response

    def _submit(self, under_way: _UnderWay) -> None:
        attempt = under_way.attempt
        begun = under_way.response.token_ids if under_way.response else []
        request = Request(
            stream=attempt.number, token_ids=[*attempt.token_ids, *begun], num_sampled=len(begun)
        )
        self._sampler.submit(request, self._params)

    def _add(self, number: int, piece: Response) -> None:
        under_way = self._under_way[number]
        begun = under_way.response
        under_way.response = piece if begun is None else _joined(begun, piece)
        if piece.finish_reason != UNFINISHED:
            self._sampling.remove(number)
            under_way.arrived.set()

    async def _execute(self, job: Job) -> list[Result]:
        (results,) = await self._executor.run_many_async([job])
        return results

    async def _wait(self) -> None:
        self._wanted.clear()
        started = time.monotonic()
        try:
            await self._wanted.wait()
        finally:  # in the end it is cancelled
            self.waiting_s += time.monotonic() - started


def _taken_up(problem: Problem, saved: SavedEpisode) -> _UnderWay:
    attempt = Attempt(
        problem=problem,
        number=saved.number,
        token_ids=saved.token_ids,
        sampled=saved.sampled,
        logprobs=saved.logprobs,
        versions=saved.versions,
        turns=saved.turns,
        solved=saved.solved,
    )
    return _UnderWay(attempt, response=saved.response, is_done=saved.is_done)


def _joined(begun: Response, piece: Response) -> Response:
    return Response(
        token_ids=begun.token_ids + piece.token_ids,
        logprobs=begun.logprobs + piece.logprobs,
        versions=begun.versions + piece.versions,
        finish_reason=piece.finish_reason,
    )


def collect_overlapped(
    problems: Sequence[Problem], *, numbers: Sequence[int], **settings: Unpack[CollectSettings]
) -> Collection:
    """`rollout.collect`, but no episode waits for another's program.

    Raises:
        ValueError: `feedback` is "random" and there is no `unrelated`: it would need the programs of other
            episodes at the same turn.
    """
    return asyncio.run(_collect(problems, numbers, settings))


def episodes_of(settings: CollectSettings) -> Episodes:
    """Raises ValueError if `feedback` is "random" and there is no `unrelated`."""
    unrelated = settings.get("unrelated")
    if settings["feedback"] == "random" and unrelated is None:
        raise ValueError("feedback 'random' needs other episodes at the same turn; collect in lockstep")
    return Episodes(
        sampler=settings["sampler"],
        executor=settings["executor"],
        dialog=settings["dialog"],
        settings=settings["settings"],
        params=settings["params"],
        turns=settings["turns"],
        feedback=settings["feedback"],
        unrelated=unrelated,
    )


async def _collect(
    problems: Sequence[Problem], numbers: Sequence[int], settings: CollectSettings
) -> Collection:
    made = episodes_of(settings)
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
        tally=settings["executor"].take_tally(),
    )
