"""A cluster of ranks that sleep where engines would work: rlef's own rollouts, with injected latencies.

What is real: `AsynchronousRollouts`, `streaming.Episodes` and `rollout.collect`, with a thread and an event
loop for each rank, dialogs, prompts and feedback. What stands in: a sampler whose decoding steps are sleeps,
an executor whose programs are sleeps, and a learner that sleeps. How long each takes is drawn before the run,
so `least_seconds` can say from the draws alone what no schedule can beat.

Seconds in a `Cluster` are those of the cluster; `scale` of one passes here. A scale of 0 leaves what this
machine itself adds.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from threading import Event
from typing import Any, Literal, TypeVar, cast

import torch

from rlef.asynchronous import AsynchronousRollouts
from rlef.config import RolloutConfig
from rlef.ports import Request, Response, SamplingParams
from rlef.prompts import Dialog
from rlef.records import Episode, Problem
from rlef.rollout import Collection, CollectSettings, collect
from rlef.streaming import collect_overlapped
from rlef_sandbox import Executor, Job, Result, Tally, Test, Verdict

_T = TypeVar("_T")

Schedule = Literal["lockstep", "overlap", "asynchronous"]

_PARAMS = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=1024, seed=0)
_PROBLEM = Problem(
    id="any",
    statement="Print the number.",
    public_tests=(Test("7\n", "7\n"),),
    private_tests=(Test("8\n", "8\n"),),
    time_limit_s=10.0,
    memory_limit_bytes=1 << 30,
    source="simulated",
)
_AWAKE = 6  # short decoding steps after an event: the event loop hands it on in several turns
_SHORTEST_S = 0.005  # of this machine: shorter ones would be too many for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What is simulated. Every sampling rank takes its share of each step's episodes."""

    samplers: int  # ranks that sample
    slots: int  # episodes that each decodes at once, all in the time of one
    episodes: int  # of a step, on all ranks
    steps: int
    token_s: float  # of one decoding step
    learning_s: float  # of a step's updates, on all trainers
    push_s: float  # of new weights, for which trainers and samplers wait
    schedule: Schedule = "asynchronous"
    max_staleness: int = 0  # where the schedule is asynchronous

    def numbers(self, rank: int, step: int) -> range:
        """Of the episodes of a step that a rank makes."""
        return range(step * self.episodes + rank, (step + 1) * self.episodes, self.samplers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What one episode will take: of each turn the tokens and the seconds of the public tests."""

    tokens: tuple[int, ...]
    programs_s: tuple[float, ...]
    private_s: float | None  # None: the last program fails its public tests

    def seconds(self, token_s: float) -> float:
        """If it never waits for a slot."""
        return sum(self.tokens) * token_s + sum(self.programs_s) + (self.private_s or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """From what courses are drawn: lengths and programs with heavy tails, and stragglers."""

    turns: int = 3
    passes: float = 0.3  # of the programs, their public tests
    median_tokens: float = 250.0
    most_tokens: int = 1024
    tokens_spread: float = 0.7  # standard deviation of the logarithm
    median_program_s: float = 0.5
    program_spread: float = 1.0
    most_program_s: float = 10.0
    stragglers: float = 0.005  # of the programs, that take the most seconds

    def course(self, seed: int, number: int) -> Course:
        draw = Random(f"{seed} {number}")
        tokens, programs = [], []
        for _ in range(self.turns):
            drawn = self.median_tokens * draw.lognormvariate(0.0, self.tokens_spread)
            tokens.append(min(self.most_tokens, 1 + int(drawn)))
            programs.append(self._program_s(draw))
            if draw.random() < self.passes:
                return Course(
                    tokens=tuple(tokens), programs_s=tuple(programs), private_s=self._program_s(draw)
                )
        return Course(tokens=tuple(tokens), programs_s=tuple(programs), private_s=None)

    def _program_s(self, draw: Random) -> float:
        if draw.random() < self.stragglers:
            return self.most_program_s
        return min(self.most_program_s, self.median_program_s * draw.lognormvariate(0.0, self.program_spread))


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What a simulation took, in seconds of this machine."""

    seconds: float  # from the start to the last push
    own_waiting_s: float  # until a rank's own episodes were there, mean over ranks
    staleness_max: int


def simulate(cluster: Cluster, courses: Sequence[Course], dialog: Dialog, *, scale: float) -> Simulated:
    """Run the steps of a cluster here; `courses` are those of the episodes 0, 1, ..."""
    ranks = [_Rank(cluster, rank, courses, dialog, scale) for rank in range(cluster.samplers)]
    own_waiting_s, staleness_max = 0.0, 0
    with ThreadPoolExecutor(cluster.samplers) as trainers:
        started = time.monotonic()
        list(trainers.map(_Rank.start, ranks))
        for step in range(cluster.steps):
            own = list(trainers.map(partial(_Rank.take, step=step), ranks))  # all wait for the last
            own_waiting_s += sum(seconds for seconds, _ in own) / len(own)
            staleness_max = max(staleness_max, *(staleness for _, staleness in own))
            time.sleep(scale * cluster.learning_s)
            list(trainers.map(partial(_Rank.push, version=step + 1), ranks))
        seconds = time.monotonic() - started
        list(trainers.map(_Rank.close, ranks))
    return Simulated(seconds=seconds, own_waiting_s=own_waiting_s, staleness_max=staleness_max)


def least_seconds(cluster: Cluster, courses: Sequence[Course]) -> float:
    """What no schedule can beat that keeps the bound on staleness, in seconds of the cluster.

    An episode of step s begins once version s - max_staleness is there. Step s is learned when

    1. the trainers have pushed version s,
    2. the longest of its episodes is over, and
    3. each rank has decoded its tokens of this step and of those before, counted from any step that was yet
       to begin, with no more than `slots` at once.
    """
    pushed = [0.0]  # when there are weights of each version
    for step in range(cluster.steps):
        begun = [pushed[max(0, earlier - cluster.max_staleness)] for earlier in range(step + 1)]
        ready = 0.0
        for rank in range(cluster.samplers):
            longest = max(courses[n].seconds(cluster.token_s) for n in cluster.numbers(rank, step))
            ready = max(ready, begun[step] + longest)
            decoding_s = 0.0
            for earlier in reversed(range(step + 1)):
                tokens = sum(sum(courses[n].tokens) for n in cluster.numbers(rank, earlier))
                decoding_s += tokens * cluster.token_s / cluster.slots
                ready = max(ready, begun[earlier] + decoding_s)
        learned = max(pushed[step], ready) + cluster.learning_s
        pushed.append(learned + cluster.push_s)
    return pushed[-1]


class _Rank:
    """One process of the cluster: its rollouts, and the thread of its trainer, which calls this."""

    def __init__(
        self, cluster: Cluster, rank: int, courses: Sequence[Course], dialog: Dialog, scale: float
    ) -> None:
        self._cluster = cluster
        self._rank = rank
        self._sampler = _Sampler(cluster, courses, dialog, scale)
        self._settings = CollectSettings(
            sampler=self._sampler,
            executor=cast("Executor", _Executor(courses, self._sampler, scale)),
            dialog=dialog,
            settings=RolloutConfig(),
            params=_PARAMS,
            turns=max(len(course.tokens) for course in courses),
            feedback="true",
        )
        self._asynchronous: AsynchronousRollouts | None = None
        if cluster.schedule == "asynchronous":
            self._asynchronous = _Rollouts(
                self._settings,
                problems_of=self._problems_of,
                steps=cluster.steps,
                max_staleness=cluster.max_staleness,
                device=torch.device("cpu"),
            )

    def start(self) -> None:
        if self._asynchronous is not None:
            self._asynchronous.start(0)

    def take(self, step: int) -> tuple[float, int]:
        """Seconds until this rank's episodes of a step are there, and the largest staleness in them."""
        asked = time.monotonic()
        self._sampler.is_awaited = True
        episodes = self._collect(step).episodes
        self._sampler.is_awaited = False
        assert [episode.number for episode in episodes] == list(self._cluster.numbers(self._rank, step))
        return time.monotonic() - asked, max(map(partial(_staleness, step), episodes))

    def push(self, version: int) -> None:
        (self._asynchronous or self._sampler).push([], version)

    def close(self) -> None:
        if self._asynchronous is not None:
            self._asynchronous.close()

    def _collect(self, step: int) -> Collection:
        if self._asynchronous is not None:
            return self._asynchronous.take(step)
        problems, numbers = self._problems_of(step)
        function = collect if self._cluster.schedule == "lockstep" else collect_overlapped
        return function(problems, numbers=numbers, **self._settings)

    def _problems_of(self, step: int) -> tuple[Sequence[Problem], Sequence[int]]:
        numbers = self._cluster.numbers(self._rank, step)
        return [_PROBLEM] * len(numbers), numbers


class _Rollouts(AsynchronousRollouts):
    """Whose trainer is heard between two tokens, though many are slept through at once."""

    def _begin_in_loop(self, action: Coroutine[Any, Any, _T]) -> Future[_T]:
        begun = super()._begin_in_loop(action)
        cast("_Sampler", self._sampler).wake()
        return begun


def _staleness(step: int, episode: Episode) -> int:
    return step - min(version for version in episode.versions if version >= 0)


class _Sampler:
    """Decodes by sleeping. Each response is a small program that says which one it is.

    Decoding steps between which nothing can happen are slept through at once: hundreds of ranks that wake for
    each token would measure this machine instead.
    """

    def __init__(self, cluster: Cluster, courses: Sequence[Course], dialog: Dialog, scale: float) -> None:
        self._slots = cluster.slots
        self._token_s = scale * cluster.token_s
        self._shortest_s = max(self._token_s, _SHORTEST_S) if scale else 0.0
        self._push_s = scale * cluster.push_s
        self._courses = courses
        self._dialog = dialog
        self._turns: dict[int, int] = {}  # of each stream, so far
        self._queue: deque[int] = deque()
        self._ends: dict[int, float] = {}  # of the responses under way
        self._versions: dict[int, int] = {}
        self._version = 0
        self._called = Event()
        self._awake = 0
        self.is_awaited = False  # the trainer waits for episodes
        self.programs: set[float] = set()  # when those under way end

    def submit(self, request: Request, params: SamplingParams) -> None:  # noqa: ARG002
        self._queue.append(request.stream)

    def step(self) -> list[tuple[int, Response]]:
        while self._queue and len(self._ends) < self._slots:
            self._admit(self._queue.popleft())
        self._sleep()
        now = time.monotonic()
        finished = [stream for stream, end in self._ends.items() if end <= now]
        return [(stream, self._respond(stream)) for stream in finished]

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        for request in requests:
            self.submit(request, params)
        responses: dict[int, Response] = {}
        while len(responses) < len(requests):
            responses |= self.step()
        return [responses[request.stream] for request in requests]

    def push(self, named_weights: Iterable[tuple[str, Any]], version: int) -> None:  # noqa: ARG002
        """Meanwhile nothing is decoded."""
        time.sleep(self._push_s)
        self._ends = {stream: end + self._push_s for stream, end in self._ends.items()}
        self._version = version
        self._awake = _AWAKE  # the trainer is to hear that it is done

    def abort(self) -> list[tuple[int, Response]]:
        assert not self._ends, "a simulated run ends when everything is taken"
        return []

    def close(self) -> None: ...

    def wake(self) -> None:
        """Somebody wants the thread that decodes: the next steps are short. From any thread."""
        self._called.set()

    def _admit(self, stream: int) -> None:
        turn = self._turns[stream] = self._turns.get(stream, 0) + 1
        tokens = self._courses[stream].tokens[turn - 1]
        self._ends[stream] = time.monotonic() + tokens * self._token_s
        self._versions[stream] = self._version

    def _sleep(self) -> None:
        if self._called.is_set():
            self._called.clear()
            self._awake = _AWAKE
        if self._awake:
            self._awake -= 1
            time.sleep(self._shortest_s)
            return
        due = min([*self._ends.values(), *self.programs])
        self._called.wait(max(self._shortest_s, due - time.monotonic()))

    def _respond(self, stream: int) -> Response:
        del self._ends[stream]
        ids = self._dialog.response(f"```python\n# {stream} {self._turns[stream] - 1}\n```")
        return Response(
            token_ids=ids,
            logprobs=[0.0] * len(ids),
            finish_reason="stop",
            versions=[self._versions.pop(stream)] * len(ids),
        )


class _Executor:
    """Runs programs by sleeping, as many at once as there are."""

    def __init__(self, courses: Sequence[Course], sampler: _Sampler, scale: float) -> None:
        self._courses = courses
        self._sampler = sampler
        self._scale = scale

    def run_many(self, jobs: Sequence[Job]) -> list[list[Result]]:
        outcomes = [self._outcome(job) for job in jobs]
        time.sleep(max((seconds for seconds, _ in outcomes), default=0.0))
        return [[_result(verdict)] for _, verdict in outcomes]

    async def run_many_async(self, jobs: Sequence[Job]) -> list[list[Result]]:
        outcomes = [self._outcome(job) for job in jobs]
        seconds = max(seconds for seconds, _ in outcomes)
        end = time.monotonic() + seconds
        self._sampler.programs.add(end)
        await asyncio.sleep(seconds)
        self._sampler.programs.discard(end)
        if self._sampler.is_awaited:
            self._sampler.wake()
        return [[_result(verdict)] for _, verdict in outcomes]

    def take_tally(self) -> Tally:
        return Tally()

    def _outcome(self, job: Job) -> tuple[float, Verdict]:
        """Seconds of this machine, and what the tests will say."""
        named = re.fullmatch(r"# (\d+) (\d+)\n", cast("str", job.program))
        assert named, job.program
        course, turn = self._courses[int(named[1])], int(named[2])
        if job.stop_at_first_failure:  # so are the private tests run
            assert course.private_s is not None
            return self._scale * course.private_s, Verdict.PASSED
        passes = course.private_s is not None and turn == len(course.tokens) - 1
        return self._scale * course.programs_s[turn], Verdict.PASSED if passes else Verdict.WRONG_OUTPUT


def _result(verdict: Verdict) -> Result:
    return Result(
        verdict=verdict,
        exit_code=0,
        signal=None,
        stdout="",
        stderr="",
        stdout_truncated=False,
        stderr_truncated=False,
        cpu_s=0.0,
        wall_s=0.0,
        peak_memory_bytes=0,
    )


def disaggregated(cluster: Cluster, *, trainers: int) -> Cluster:
    """The same ranks, of which `trainers` learn, which takes longer in proportion; the others sample."""
    return replace(
        cluster,
        samplers=cluster.samplers - trainers,
        learning_s=cluster.learning_s * cluster.samplers / trainers,
    )
