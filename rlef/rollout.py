"""Episodes: sample a response, execute it on the public tests, feed the failures back, try again (PAPER
section 1)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NotRequired, TypedDict

import torch.distributed as dist

from rlef import dialects, judging, prompts
from rlef.config import FeedbackKind, RolloutConfig
from rlef.judging import job_of
from rlef.ports import Request, Response, SamplingParams, StreamingSampler
from rlef.prompts import Dialog
from rlef.records import Episode, Problem, Turn, TurnOutcome
from rlef.unrelated import Place, UnrelatedFeedback
from rlef_sandbox import Executor, Job, Result, Tally, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """Episodes in the order of the problems, and what it cost to collect them."""

    episodes: list[Episode]
    tests_run: int
    sampling_s: float
    executing_s: float
    tally: Tally  # of the executor, since the collection before


class CollectSettings(TypedDict):
    """What `collect` needs besides the problems."""

    sampler: StreamingSampler
    executor: Executor
    dialog: Dialog
    settings: RolloutConfig
    params: SamplingParams
    turns: int
    feedback: FeedbackKind
    unrelated: NotRequired[UnrelatedFeedback | None]


@dataclass(slots=True, eq=False)
class Attempt:
    """An episode under way."""

    problem: Problem
    number: int
    token_ids: list[int]
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    solved: bool = False

    def observe(self, token_ids: Sequence[int]) -> None:
        self.token_ids += token_ids
        self.sampled += [False] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids)
        self.versions += [-1] * len(token_ids)

    def respond(self, response: Response) -> None:
        self.token_ids += response.token_ids
        self.sampled += [True] * len(response.token_ids)
        self.logprobs += response.logprobs
        self.versions += response.versions

    def add_turn(self, response: Response, code: str | None, results: Sequence[Result]) -> None:
        """What came of the response that was given last."""
        self.turns.append(
            Turn(
                start=len(self.token_ids) - len(response.token_ids),
                end=len(self.token_ids),
                finish_reason=response.finish_reason,
                code=code,
                outcome=prompts.turn_outcome(code, results),
                public_results=tuple(results),
            )
        )

    def public_job(self, code: str) -> Job:
        return judging.public_job(self.problem, code)

    def private_job(self) -> Job:
        """Of the last code, up to the first failure."""
        code = self.turns[-1].code or ""
        return job_of(self.problem, code, self.problem.private_tests, stop_at_first_failure=True)

    def judge(self, results: Sequence[Result]) -> int:
        """How many private tests were run."""
        self.solved = all(result.verdict is Verdict.PASSED for result in results)
        return sum(result.verdict is not Verdict.SKIPPED for result in results)

    @property
    def passed_public(self) -> bool:
        return self.turns[-1].outcome is TurnOutcome.PASSED

    @property
    def place(self) -> Place:
        return Place(problem_id=self.problem.id, number=self.number, turn=len(self.turns))

    def episode(self) -> Episode:
        return Episode(
            problem_id=self.problem.id,
            number=self.number,
            token_ids=self.token_ids,
            sampled=self.sampled,
            logprobs=self.logprobs,
            versions=self.versions,
            turns=tuple(self.turns),
            solved=self.solved,
        )


def collect(
    problems: Sequence[Problem],
    *,
    numbers: Sequence[int],
    sampler: StreamingSampler,
    executor: Executor,
    dialog: Dialog,
    settings: RolloutConfig,
    params: SamplingParams,
    turns: int,
    feedback: FeedbackKind,
    unrelated: UnrelatedFeedback | None = None,
) -> Collection:
    """One episode per problem; `numbers` key their random streams.

    Random feedback is that of `unrelated`, or without it what other episodes of the same turn were told.

    An episode ends when all public tests pass or `turns` responses are given; its last code is then judged on
    all tests. A failure of the sandbox itself is raised (`SandboxFault`), never scored.
    """
    attempts = [begin(problem, number, dialog) for problem, number in zip(problems, numbers, strict=True)]
    sampling_s, executing_s, tests_run = 0.0, 0.0, 0
    live = attempts
    for turn in range(turns):
        started = time.monotonic()
        requests = [Request(stream=attempt.number, token_ids=attempt.token_ids) for attempt in live]
        responses = sampler.generate(requests, params)
        sampled = time.monotonic()
        for attempt, response in zip(live, responses, strict=True):
            attempt.respond(response)
        all_results = _run_public_tests(live, responses, dialog, executor)
        tests_run += sum(len(results) for results in all_results)
        executed = time.monotonic()
        executing_s += executed - sampled
        sampling_s += sampled - started
        charge(live, executed - started)
        live = [attempt for attempt in live if not attempt.passed_public]
        if turn == turns - 1 or not live:
            break
        texts = feedback_messages(
            live, feedback, settings, unrelated=unrelated, seed=params.seed, executor=executor
        )
        for attempt, text in zip(live, texts, strict=True):
            attempt.observe(dialog.close(attempt.token_ids))
            attempt.observe(dialog.feedback(text, stub=attempt.problem.stub))
    started = time.monotonic()
    tests_run += judge_attempts([attempt for attempt in attempts if attempt.passed_public], executor)
    executing_s += time.monotonic() - started
    return Collection(
        episodes=[attempt.episode() for attempt in attempts],
        tests_run=tests_run,
        sampling_s=sampling_s,
        executing_s=executing_s,
        tally=executor.take_tally(),
    )


def share_out(own: Collection) -> Collection:
    """Collective: each process brings the episodes of every world_size-th problem, and all get all."""
    world_size = dist.get_world_size()
    if world_size == 1:
        return own
    shares: list[Any] = [None] * world_size
    dist.all_gather_object(shares, own)
    return interleaved(shares)


def interleaved(shares: Sequence[Collection]) -> Collection:
    """The whole of what n processes bring, of which each has the episodes of every n-th problem."""
    episodes: list[Any] = [None] * sum(len(share.episodes) for share in shares)
    for index, share in enumerate(shares):
        episodes[index :: len(shares)] = share.episodes
    return Collection(
        episodes=episodes,
        tests_run=sum(share.tests_run for share in shares),
        sampling_s=max(share.sampling_s for share in shares),
        executing_s=max(share.executing_s for share in shares),
        tally=Tally.of_all(share.tally for share in shares),
    )


def begin(problem: Problem, number: int, dialog: Dialog) -> Attempt:
    attempt = Attempt(problem, number, [])
    attempt.observe(dialog.prompt(problem.statement, stub=problem.stub))
    return attempt


def _run_public_tests(
    attempts: Sequence[Attempt], responses: Sequence[Response], dialog: Dialog, executor: Executor
) -> list[list[Result]]:
    """Append a turn to every attempt. A response without code runs nothing."""
    codes = [
        prompts.extract_code(dialog.decode(response.token_ids), stub=attempt.problem.stub)
        for attempt, response in zip(attempts, responses, strict=True)
    ]
    jobs = [
        attempt.public_job(code) for attempt, code in zip(attempts, codes, strict=True) if code is not None
    ]
    executed = iter(executor.run_many(jobs))
    all_results = [next(executed) if code is not None else [] for code in codes]
    for attempt, response, code, results in zip(attempts, responses, codes, all_results, strict=True):
        attempt.add_turn(response, code, results)
    return all_results


def feedback_messages(
    attempts: Sequence[Attempt],
    feedback: FeedbackKind,
    settings: RolloutConfig,
    *,
    unrelated: UnrelatedFeedback | None,
    seed: int,
    executor: Executor,
) -> list[str]:
    """The feedback that each failed attempt is shown."""
    if feedback == "none":
        return [prompts.untold_text()] * len(attempts)
    if feedback == "random" and unrelated is not None:
        return unrelated.messages([attempt.place for attempt in attempts], seed=seed, executor=executor)
    true = [true_message(attempt, settings) for attempt in attempts]
    if feedback == "true":
        return true
    return [_unrelated_message(index, attempts, true) for index in range(len(attempts))]


def true_message(attempt: Attempt, settings: RolloutConfig) -> str:
    turn = attempt.turns[-1]
    return dialects.message_after(
        attempt.problem, turn.code, turn.public_results, max_test_characters=settings.max_test_characters
    )


def _unrelated_message(index: int, attempts: Sequence[Attempt], messages: Sequence[str]) -> str:
    """What execution said about a wrong program for another problem of this collection.

    The neighbour that it is taken from is keyed by the episode's number. Where no other problem failed in
    this turn, only the failure is told.
    """
    count = len(attempts)
    offset = 1 + attempts[index].number % max(1, count - 1)
    for step in range(count):
        other = (index + offset + step) % count
        if attempts[other].problem.id != attempts[index].problem.id:
            return messages[other]
    return prompts.untold_text()


def judge_attempts(attempts: Sequence[Attempt], executor: Executor) -> int:
    """Run the private tests of attempts whose public tests pass, up to the first failure; how many were
    run."""
    started = time.monotonic()
    all_results = executor.run_many([attempt.private_job() for attempt in attempts])
    charge(attempts, time.monotonic() - started)
    return sum(attempt.judge(results) for attempt, results in zip(attempts, all_results, strict=True))


def charge(attempts: Sequence[Attempt], seconds: float) -> None:
    """Share wall-clock time out to the turns that these attempts have taken last."""
    for attempt in attempts:
        turn = attempt.turns[-1]
        attempt.turns[-1] = replace(turn, seconds=turn.seconds + seconds / len(attempts))
