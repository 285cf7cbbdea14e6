"""The sampling side of a run: where its episodes are made, and how they come to those who learn.

Colocated, every process makes a share of the episodes and all share them out. Disaggregated, processes of
their own do (`sample`), and the learners order and receive. What makes a process's share is the same in both,
`OwnRollouts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from typing import Protocol, TypedDict, Unpack

import torch
from torch import Tensor

from rlef import problems as sources
from rlef.asynchronous import AsynchronousRollouts
from rlef.bridge import LearnersEnd, Order, SamplersEnd
from rlef.config import Config, ConfigError, FeedbackKind
from rlef.curriculum import Curriculum, Progress, skips
from rlef.engine_group import Calls, Follower, LeadingSampler
from rlef.execution import open_executor
from rlef.families import read_shape
from rlef.faults import RunFault, Watch, doing, slowest
from rlef.job import Job, leave
from rlef.ports import Network, SamplingParams, StreamingSampler
from rlef.pretrained import StoredWeights, model_folder
from rlef.prompts import Dialog
from rlef.records import Episode, ModelShape, Problem
from rlef.rollout import Collection, CollectSettings, interleaved, share_out
from rlef.rollout import collect as collect_in_lockstep
from rlef.samplers import build_sampler
from rlef.stopping import StopRequest
from rlef.streaming import collect_overlapped, merged
from rlef.unrelated import UnrelatedFeedback, unrelated_feedback
from rlef.validators import require_validators
from rlef.words import Words


class EvaluationSettings(TypedDict):
    """What an evaluation samples with."""

    params: SamplingParams
    turns: int
    feedback: FeedbackKind


class Rollouts(Protocol):
    """A learner's view of the sampling side. Every method is collective over the learners."""

    own_s: dict[str, float]  # this process's seconds of the last step, by phase
    slow_sampler: str  # the process that only samples and was slow in the last step, in words; empty if none

    def start(self, step: int, origin: int, saved: Sequence[str], progress: Progress | None) -> None:
        """Begin with `step`, whose problems are counted from `origin`; go on with what `save` and `record`
        gave."""
        ...

    def collect(self, step: int) -> Collection:
        """The episodes of a step, in the order of their numbers."""
        ...

    def record(self, episodes: Sequence[Episode]) -> Progress | None:
        """Let what came of the step that was collected last decide on later problems, if it is to."""
        ...

    def evaluate(
        self,
        problems: Sequence[Problem],
        *,
        numbers: Sequence[int],
        **settings: Unpack[EvaluationSettings],
    ) -> Sequence[Episode]:
        """As `ports.Play`."""
        ...

    def push(self, policy: Network, version: int) -> None:
        """Sample with these weights from here on."""
        ...

    def save(self) -> str:
        """What is under way, for `start`."""
        ...

    def want_to_stop(self) -> bool:
        """Whether a process that only samples is known to have been asked to stop."""
        ...

    def end(self) -> None:
        """Nothing is wanted any more."""
        ...


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
        self._sampler, self.shape, self._dialog = _load_sampler(config, stack, job)
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


def _load_sampler(config: Config, stack: ExitStack, job: Job) -> tuple[StreamingSampler, ModelShape, Dialog]:
    """This process's sampler, or its part of one, with the weights of `model.path` as version 0."""
    folder = model_folder(config.model.path)
    shape, dialog = read_shape(folder), Dialog.read(folder, config.rollout)
    sampler = build_sampler(config, folder, shape, end_token_id=dialog.end_token_id, device=job.device)
    stack.callback(sampler.close)
    dtype = getattr(torch, config.parallel.dtype)  # in which the networks have them, and push them later
    rounded = ((name, whole.to(dtype)) for name, whole in StoredWeights(folder).tensors())
    sampler.push(rounded, version=0)
    return sampler, shape, dialog


class Colocated:
    """`Rollouts` where each process makes its share."""

    def __init__(self, own: OwnRollouts, watch: Watch) -> None:
        self._own = own
        self._watch = watch
        self.own_s: dict[str, float] = {}
        self.slow_sampler = ""

    def start(self, step: int, origin: int, saved: Sequence[str], progress: Progress | None) -> None:
        self._own.start(step, origin, saved, progress)

    def collect(self, step: int) -> Collection:
        with self._watch.phase(f"sampling step {step + 1}"):
            own = self._own.collect(step)
        self.own_s = {"sampling": own.sampling_s, "executing": own.executing_s}
        with self._watch.phase(f"sharing the episodes of step {step + 1}"):
            return share_out(own)

    def record(self, episodes: Sequence[Episode]) -> Progress | None:
        return self._own.record([episode.solved for episode in episodes])

    def evaluate(
        self, problems: Sequence[Problem], *, numbers: Sequence[int], **settings: Unpack[EvaluationSettings]
    ) -> Sequence[Episode]:
        return share_out(self._own.evaluate(problems, numbers=numbers, **settings)).episodes

    def push(self, policy: Network, version: int) -> None:
        self._own.push(policy.named_weights(), version)

    def save(self) -> str:
        return self._own.save()

    def want_to_stop(self) -> bool:
        return False

    def end(self) -> None:
        """What this process has begun, it ends itself."""


class Disaggregated:
    """`Rollouts` where other processes make the episodes."""

    def __init__(self, bridge: LearnersEnd, watch: Watch, *, records: bool) -> None:
        """`records`: whether outcomes decide on problems."""
        self._bridge = bridge
        self._watch = watch
        self._records = records
        self.own_s: dict[str, float] = {}
        self.slow_sampler = ""

    def start(self, step: int, origin: int, saved: Sequence[str], progress: Progress | None) -> None:
        self._bridge.tell("start", (list(saved), progress), step=step, origin=origin)

    def collect(self, step: int) -> Collection:
        with self._watch.phase(f"waiting for the episodes of step {step + 1}"):
            shares: Sequence[Collection] = self._bridge.ask("collect", step=step)
        found = slowest(
            {
                "sampling": [share.sampling_s for share in shares],
                "executing": [share.executing_s for share in shares],
            }
        )
        self.slow_sampler = found.told_of(self._bridge.name_of(found.rank)) if found.is_slow else ""
        return interleaved(shares)

    def record(self, episodes: Sequence[Episode]) -> Progress | None:
        """Each sampler chooses for itself; the first one says where they stand."""
        if not self._records:
            return None
        with self._watch.phase("recording outcomes"):
            replies = self._bridge.ask("record", solved=[int(episode.solved) for episode in episodes])
        progress: Progress = replies[0]
        return progress

    def evaluate(
        self, _problems: Sequence[Problem], *, numbers: Sequence[int], **settings: Unpack[EvaluationSettings]
    ) -> Sequence[Episode]:
        """The samplers know the problems: the held-out ones."""
        details = settings | {"params": asdict(settings["params"])}
        first, stop = numbers[0], numbers[-1] + 1
        return interleaved(self._bridge.ask("evaluate", numbers=[first, stop], **details)).episodes

    def push(self, policy: Network, version: int) -> None:
        self._bridge.send_weights(policy.stage_weights(), version=version)

    def save(self) -> str:
        """For all samplers, by rank 0."""
        saved = [each for each in self._bridge.ask("save") if each]
        return merged(saved) if saved and self._bridge.is_first else ""

    def want_to_stop(self) -> bool:
        return self._bridge.samplers_want_to_stop()

    def end(self) -> None:
        self._bridge.tell("end")


def sample(config: Config, job: Job) -> int:
    """What a process does that only samples: carry out the learners' orders. Returns the exit status."""
    with ExitStack() as stack:
        words = stack.enter_context(Words(job, silence_s=config.parallel.silence_s))
        watch = Watch(config, tell=words.enter, silent=words.silent)
        stack.enter_context(watch.phase("starting or stopping"))
        stack.enter_context(StopRequest(on_request=words.ask_to_stop))
        stack.callback(leave)
        calls = Calls(job, config, words) if job.engine_ranks > 1 else None
        if calls is None or calls.leads:
            _lead(config, stack, job, words, watch, calls)
        else:
            _follow(config, stack, job, words, watch, calls)
    return 0


@contextmanager
def _telling_what_is_refused() -> Iterator[None]:
    """Rank 0, which tells what the user must mend, may be ended before it hears of what this process met."""
    try:
        yield
    except ConfigError as error:
        raise RunFault(str(error)) from error


def _lead(
    config: Config, stack: ExitStack, job: Job, words: Words, watch: Watch, calls: Calls | None
) -> None:
    index, of = job.leaders.index(job.rank), len(job.leaders)
    with _telling_what_is_refused():
        own = OwnRollouts(config, stack, job=job, index=index, of=of, calls=calls)
    tell = calls.tell if calls is not None else lambda _: None
    bridge = SamplersEnd(job, config, words, own.shape, on_ready=lambda: tell("ready"))
    with words:  # so that others hear of a fault before this process tidies up
        while (order := bridge.next_order()).kind != "end":
            tell("order")
            with watch.phase(_phase_of(order)):
                _carry_out(order, own, bridge)
            words.enter("waiting for the learners")
        tell("order")
        bridge.ready()
    if calls is not None:
        calls.is_ending = True


def _follow(config: Config, stack: ExitStack, job: Job, words: Words, watch: Watch, calls: Calls) -> None:
    """As `_lead`, with the leader of this process's engine."""
    with _telling_what_is_refused():
        sampler, shape, _ = _load_sampler(config, stack, job)
    bridge = SamplersEnd(job, config, words, shape)
    follower = Follower(sampler, calls, bridge)
    with words:
        there_is_more = calls.receive().name == "order"
        while there_is_more:
            order = bridge.next_order()
            with watch.phase(_phase_of(order)):
                there_is_more = follower.follow(order)


def _carry_out(order: Order, own: OwnRollouts, bridge: SamplersEnd) -> None:
    details = dict(order.details)
    match order.kind:
        case "start":
            saved, progress = bridge.take()
            try:
                own.start(**details, saved=saved, progress=progress)
            except ConfigError as error:  # as of the constructor
                raise RunFault(str(error)) from error
        case "collect":
            bridge.reply(own.collect(**details))
        case "record":
            progress = own.record([bool(each) for each in details["solved"]])
            bridge.reply(progress if own.is_first else None)
        case "load":
            own.push(bridge.weights(details["dtype"]), details["version"])
        case "evaluate":
            params = SamplingParams(**details.pop("params"))
            numbers = range(*details.pop("numbers"))
            bridge.reply(own.evaluate_held_out(numbers=numbers, params=params, **details))
        case "save":
            bridge.reply(own.save())
        case _:
            raise AssertionError(f"no sampler knows the order {order}")


def _phase_of(order: Order) -> str:
    """The name of the phase, of which the first word says what it takes."""
    match order.kind:
        case "collect":
            return f"sampling step {order.details['step'] + 1}"
        case "load":
            return f"loading the weights of step {order.details['version']}"
        case "evaluate":
            return "evaluating"
        case "save":
            return "saving what is under way"
        case "record":
            return "recording outcomes"
        case "end":
            return "starting or stopping"
        case _:
            return "starting the episodes"
