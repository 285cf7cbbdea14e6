"""The share of a run's episodes that this process makes, wherever they are learned from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from rlef import problems as sources
from rlef.asynchronous import AsynchronousRollouts
from rlef.config import Config, FeedbackKind
from rlef.curriculum import Curriculum, Progress, skips
from rlef.engine_group import Calls, LeadingSampler
from rlef.execution import open_executor
from rlef.families import read_shape
from rlef.faults import doing
from rlef.job import Job
from rlef.ports import SamplingParams, StreamingSampler
from rlef.pretrained import StoredWeights, model_folder
from rlef.prompts import Dialog
from rlef.records import ModelShape, Problem
from rlef.rollout import Collection, CollectSettings
from rlef.rollout import collect as collect_in_lockstep
from rlef.samplers import build_sampler
from rlef.streaming import collect_overlapped
from rlef.unrelated import UnrelatedFeedback, unrelated_feedback
from rlef.validators import require_validators


class EvaluationSettings(TypedDict):
    """What an evaluation samples with."""

    params: SamplingParams
    turns: int
    feedback: FeedbackKind


class OwnRollouts:
    """The share of the episodes that this process makes: those of every `of`-th problem."""

    def __init__(
        self,
        config: Config,
        stack: ExitStack,
        *,
        job: Job,
        index: int,
        of: int,
        calls: Calls | None = None,
    ) -> None:
        """With the weights of `model.path`, as version 0. `stack` ends what is begun here.

        With `calls` this process leads the others of its sampler's engine.
        """
        self._config = config
        self._index, self._of = index, of
        self.is_first = index == 0
        self._sampler, self.shape, self._dialog = load_sampler(config, stack, job)
        if calls is not None:
            self._sampler = LeadingSampler(self._sampler, calls)
            stack.callback(calls.close)
        problems = sources.load(config, "train")
        self._cursor = sources.training_cursor(problems, config)
        self._origin = 0  # where in the problems step 0 began
        self._curriculum: Curriculum | None = None  # where outcomes decide on problems, from `start` on
        self._eval_problems = sources.load(config, "eval")
        self._unrelated = unrelated_feedback(problems, config.rollout)
        self._unrelated_held_out = unrelated_feedback(self._eval_problems, config.rollout)
        self._executor = stack.enter_context(open_executor(config.executor, ranks=job.engine_ranks))
        require_validators([*problems, *self._eval_problems], self._executor)
        self._asynchronous: AsynchronousRollouts | None = None  # until `start`
        self._device = job.device
        self._stack = stack

    def start(self, step: int, origin: int, saved: Sequence[str], progress: Progress | None) -> None:
        """`saved` may hold episodes of others.

        Raises ConfigError: `progress` is of other problems.
        """
        self._origin = origin
        if skips(self._config.problems):
            self._curriculum = Curriculum(self._cursor, self._config, step=step, progress=progress)
        if self._config.rollout.max_staleness > 0:
            self._asynchronous = AsynchronousRollouts(
                self._training_settings(),
                problems_of=self._share,
                steps=self._config.run.steps,
                max_staleness=self._config.rollout.max_staleness,
                device=self._device,
            )
            self._stack.callback(self._asynchronous.close)
            self._asynchronous.start(step, saved)

    def collect(self, step: int) -> Collection:
        rollout = self._config.rollout
        problems, numbers = self._share(step)
        with doing(f"episodes: {len(numbers)}, rollout.slots: {rollout.slots}"):
            if self._asynchronous is not None:
                return self._asynchronous.take(step)
            collect = collect_overlapped if rollout.overlap else collect_in_lockstep
            return collect(problems, numbers=numbers, **self._training_settings())

    def record(self, solved: Sequence[bool]) -> Progress | None:
        """Of all episodes, not of this process's alone. None where outcomes decide on nothing."""
        return None if self._curriculum is None else self._curriculum.record(solved)

    def evaluate(
        self,
        problems: Sequence[Problem],
        *,
        numbers: Sequence[int],
        **settings: Unpack[EvaluationSettings],
    ) -> Collection:
        """This process's share. Meanwhile training episodes wait."""
        unrelated = self._unrelated_held_out
        overlap = self._config.rollout.overlap and (settings["feedback"] != "random" or unrelated is not None)
        with nullcontext() if self._asynchronous is None else self._asynchronous.paused():
            return (collect_overlapped if overlap else collect_in_lockstep)(
                problems[self._index :: self._of],
                numbers=numbers[self._index :: self._of],
                **self._settings(**settings, unrelated=unrelated),
            )

    def evaluate_held_out(
        self, *, numbers: Sequence[int], **settings: Unpack[EvaluationSettings]
    ) -> Collection:
        """`evaluate`, of the held-out problems, each as many times as there are numbers for it."""
        each = len(numbers) // len(self._eval_problems)
        problems = [problem for problem in self._eval_problems for _ in range(each)]
        return self.evaluate(problems, numbers=numbers, **settings)

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        (self._asynchronous or self._sampler).push(weights, version=version)

    def save(self) -> str:
        if self._asynchronous is None:
            return ""
        with self._asynchronous.paused():
            return self._asynchronous.save()

    def _share(self, step: int) -> tuple[Sequence[Problem], Sequence[int]]:
        """This process's problems of a training step, and the numbers of their episodes."""
        rollout = self._config.rollout
        count, each = rollout.episodes_per_step, rollout.rollouts_per_problem
        numbers = range(step * count, (step + 1) * count)
        if self._curriculum is not None:
            chosen = self._curriculum.problems_of(step)
        else:
            self._cursor.position = self._origin + step * rollout.problems_per_step
            chosen = self._cursor.take(rollout.problems_per_step)
        problems = [problem for problem in chosen for _ in range(each)]
        return problems[self._index :: self._of], numbers[self._index :: self._of]

    def _training_settings(self) -> CollectSettings:
        rollout = self._config.rollout
        params = SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_tokens=rollout.max_response_tokens,
            seed=self._config.run.seed,
        )
        return self._settings(params, rollout.turns, rollout.feedback, self._unrelated)

    def _settings(
        self,
        params: SamplingParams,
        turns: int,
        feedback: FeedbackKind,
        unrelated: UnrelatedFeedback | None,
    ) -> CollectSettings:
        return CollectSettings(
            sampler=self._sampler,
            executor=self._executor,
            dialog=self._dialog,
            settings=self._config.rollout,
            params=params,
            turns=turns,
            feedback=feedback,
            unrelated=unrelated,
        )


def load_sampler(config: Config, stack: ExitStack, job: Job) -> tuple[StreamingSampler, ModelShape, Dialog]:
    """This process's sampler, or its part of one, with the weights of `model.path` as version 0."""
    folder = model_folder(config.model.path)
    shape, dialog = read_shape(folder), Dialog.read(folder, config.rollout)
    sampler = build_sampler(config, folder, shape, end_token_id=dialog.end_token_id, device=job.device)
    stack.callback(sampler.close)
    dtype = getattr(torch, config.parallel.dtype)  # in which the networks have them, and push them later
    rounded = ((name, whole.to(dtype)) for name, whole in StoredWeights(folder).tensors())
    sampler.push(rounded, version=0)
    return sampler, shape, dialog
