"""Rollouts of coming steps, made in a thread of their own while the trainer learns.

The episodes of step s may begin once the weights have version s - max_staleness, and are used in the order of
their numbers. So no token that is learned from is older than max_staleness versions, and what is used does
not depend on which episode happens to finish first. Weights that arrive while a response is under way serve
from its next token on. With max_staleness 0 nothing begins before its step: that is the synchronous run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlef.faults import RunFault
from rlef.ports import StreamingSampler
from rlef.records import Episode, Problem
from rlef.rollout import Collection, CollectSettings
from rlef.streaming import SAVED_EPISODES, SavedEpisode, episodes_of

_T = TypeVar("_T")
_NAMED = 5  # missing episodes that an error lists
_CLOSING_S = 10.0  # a sampler that hangs is left to the end of the process


class AsynchronousRollouts:
    """This process's share of the training episodes. Every method is called from one thread, the trainer's.

    `problems_of(step)` gives this process's problems of a step and the numbers of their episodes.
    """

    def __init__(
        self,
        settings: CollectSettings,
        *,
        problems_of: Callable[[int], tuple[Sequence[Problem], Sequence[int]]],
        steps: int,
        max_staleness: int,
        device: torch.device,
    ) -> None:
        """Raises ValueError if the feedback is "random" and there is no `unrelated`."""
        self._sampler: StreamingSampler = settings["sampler"]
        self._executor = settings["executor"]
        self._episodes = episodes_of(settings)
        self._problems_of = problems_of
        self._steps = steps
        self._max_staleness = max_staleness
        self._begun: dict[int, list[asyncio.Task[Episode]]] = {}  # of each step
        self._next_step = 0  # to begin
        self._counted = (0, 0.0, 0.0)  # tests, seconds of sampling and of waiting, until the last step
        self._loop = asyncio.new_event_loop()
        self._device = device
        self._timeout_s = settings["settings"].timeout_s
        self._thread = Thread(target=self._run, name="rollouts", daemon=True)

    def start(self, step: int, saved: Iterable[str] = ()) -> None:
        """Begin the episodes of `step`, and of as many later ones as may be.

        Go on with what all processes of any number got from `save`; this one takes its own episodes of it.
        """
        self._next_step = step
        self._thread.start()
        of_all = [episode for each in saved for episode in SAVED_EPISODES.validate_json(each)]
        self._in_loop(self._start(step, of_all))

    def take(self, step: int) -> Collection:
        """Wait for this process's episodes of a step.

        Raises what ended an episode or the sampler, as SandboxFault; and RunFault, with the episodes that are
        missing, after `rollout.timeout_s`: the limit is this thread's, since a sampler that hangs holds up
        the other.
        """
        numbers = list(self._problems_of(step)[1])
        taken = self._begin_in_loop(self._take(step))
        try:
            episodes = taken.result(self._timeout_s)
        except TimeoutError:
            if taken.done():  # then it is not ours
                raise
            raise RunFault(self._missing(step, numbers)) from None
        made, before = self._episodes, self._counted
        self._counted = (made.tests_run, made.sampling_s, made.waiting_s)
        tests_run, sampling_s, executing_s = (
            now - then for now, then in zip(self._counted, before, strict=True)
        )
        return Collection(
            episodes=episodes,
            tests_run=int(tests_run),
            sampling_s=sampling_s,
            executing_s=executing_s,
            tally=self._executor.take_tally(),
        )

    def push(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give the sampler new weights, between two tokens, and begin what may begin with them."""
        self._in_loop(self._push(named_weights, version))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Meanwhile the sampler is free for others. Programs under way run on."""
        self._in_loop(self._call(self._episodes.pause))
        try:
            yield
        finally:
            self._in_loop(self._call(self._episodes.resume))

    def save(self) -> str:
        """Everything begun and not yet taken, for `start`. Only while paused."""
        saved = self._in_loop(self._call(self._episodes.saved))
        return SAVED_EPISODES.dump_json(saved).decode()

    def close(self) -> None:
        """End everything that is under way."""
        if not self._thread.is_alive():
            return
        try:
            self._begin_in_loop(self._end()).result(_CLOSING_S)
        except TimeoutError:
            return  # the thread is a daemon
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a thread has its own
        self._loop.run_forever()

    def _in_loop(self, action: Coroutine[Any, Any, _T]) -> _T:
        return self._begin_in_loop(action).result()

    def _begin_in_loop(self, action: Coroutine[Any, Any, _T]) -> Future[_T]:
        return asyncio.run_coroutine_threadsafe(action, self._loop)

    def _missing(self, step: int, numbers: Sequence[int]) -> str:
        states = {number: self._episodes.state_of(number) for number in numbers}
        missing = [f"{number} {state}" for number, state in states.items() if state != "done"]
        listed = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        return (
            f"step {step + 1}: {len(missing)} of {len(numbers)} episodes are missing after "
            f"rollout.timeout_s = {self._timeout_s} s (number and state: {listed}): a sampler or a program "
            "hangs, or raise rollout.timeout_s"
        )

    async def _call(self, function: Callable[[], _T]) -> _T:
        return function()

    async def _start(self, version: int, saved: Sequence[SavedEpisode]) -> None:
        self._sampling = asyncio.create_task(self._episodes.sample())
        self._begin(version, {each.number: each for each in saved})

    def _begin(self, version: int, saved: dict[int, SavedEpisode]) -> None:
        while self._next_step < min(version + self._max_staleness + 1, self._steps):
            problems, numbers = self._problems_of(self._next_step)
            self._begun[self._next_step] = [
                asyncio.create_task(self._episodes.episode(problem, number, saved.get(number)))
                for problem, number in zip(problems, numbers, strict=True)
            ]
            self._next_step += 1

    async def _take(self, step: int) -> list[Episode]:
        whole = asyncio.gather(*self._begun[step])
        whole.add_done_callback(_retrieve)
        ended: set[asyncio.Future[Any]] = {whole, self._sampling}
        await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            whole.cancel()
            self._sampling.result()  # raises: else it never ends
        episodes = await whole
        del self._begun[step]
        self._episodes.forget([episode.number for episode in episodes])
        return episodes

    async def _push(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._sampler.push(named_weights, version)
        self._begin(version, {})

    async def _end(self) -> None:
        tasks = [self._sampling, *(task for tasks in self._begun.values() for task in tasks)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._begun.clear()
        self._sampler.abort()


def _retrieve(whole: asyncio.Future[Any]) -> None:
    """What ended the episodes was told by whoever gave them up; asyncio would complain that nobody asked."""
    if not whole.cancelled():
        whole.exception()
