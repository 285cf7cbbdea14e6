"""The loop: problems -> episodes -> learning step -> new weights for the sampler, again and again; then the
report."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

from rlef import problems as sources
from rlef.asynchronous import AsynchronousRollouts
from rlef.checkpoint import CheckpointStore
from rlef.config import Config, ConfigError, FeedbackKind, check_context
from rlef.evaluate import (
    dialog_examples,
    episode_metrics,
    evaluate,
    run_summary,
    summarise,
    write_summary,
)
from rlef.execution import open_executor
from rlef.families import read_shape
from rlef.faults import Pace, SkippedTooOftenError, Watch, doing, not_finite
from rlef.launch import torchrun_agent
from rlef.learner import Learner
from rlef.megatron_policy import build_networks, initialize, leave
from rlef.ports import Networks, SamplingParams
from rlef.pretrained import StoredWeights, model_folder
from rlef.problems import Cursor
from rlef.prompts import Dialog
from rlef.records import Episode, Problem, StepStats
from rlef.report import DIALOGS_FILE, SUMMARY_FILE, save_dialogs, write_report
from rlef.rollout import Collection, CollectSettings, share_out
from rlef.rollout import collect as collect_in_lockstep
from rlef.run_folder import RunFolder, only_one_run, open_run_folder
from rlef.samplers import build_sampler
from rlef.streaming import collect_overlapped
from rlef.telemetry import BETWEEN_STEPS, Telemetry

_EVALUATION, _CHECKPOINT = BETWEEN_STEPS
_SAME_SIGNAL_S = 3.0  # within which one request to stop may arrive several times


def train(config: Config, folder: RunFolder) -> int:
    """Train as `config` says; every process of the job calls this. Returns the exit status."""
    with ExitStack() as stack:
        watch = Watch(config)
        stack.enter_context(watch.phase("starting or stopping"))
        stopping = stack.enter_context(_StopRequest())
        run = Run(config, folder, stack, watch)
        step = run.resume()
        if step == 0 and not stopping.agreed():
            run.evaluate("start")
        while step < config.run.steps and not stopping.agreed():
            collection = run.collect(step)
            learned = run.learn(collection.episodes, step)
            metrics = run.metrics(collection, step) | learned | run.pace()
            step += 1
            run.push(step)
            run.record(StepStats(step=step, metrics=metrics))
            if step % config.checkpoint.every_steps == 0 or step == config.run.steps:
                run.save(step)
            if config.evaluation.every_steps and step % config.evaluation.every_steps == 0:
                run.evaluate("interim")
        if step < config.run.steps:
            run.save(step)
            run.telemetry.note(
                f"stopped and saved after step {step} of {config.run.steps}; --resume auto continues"
            )
            return 0
        run.evaluate("final")
    return 0


def train_under_torchrun(config: Config, resume: str) -> int:
    """`train`, started by torchrun, perhaps again: rank 0 opens the run's folder, and the others follow."""
    with Watch(config).phase("starting or stopping"):
        initialize(config.parallel)
        agents: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(agents, torchrun_agent())
    with ExitStack() as stack:
        opened: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                stack.enter_context(only_one_run(config))
                opened[0] = open_run_folder(config, resume=resume, launchers=set(agents))
            except ConfigError as error:
                opened[0] = error
        dist.broadcast_object_list(opened, src=0)
        if isinstance(opened[0], ConfigError):
            raise opened[0]
        folder, note = opened[0]
        if note and dist.get_rank() == 0:
            print(note, flush=True)
        return 0 if folder.is_finished else train(config, folder)


class Run:
    """The parts of a run, built once, and what is done with several of them at a time."""

    def __init__(self, config: Config, folder: RunFolder, stack: ExitStack, watch: Watch) -> None:
        self._config = config
        self._folder = folder
        self._watch = watch
        self._started = time.monotonic()
        model = model_folder(config.model.path)
        shape, weights = read_shape(model), StoredWeights(model)
        check_context(config, shape.max_position_embeddings)
        self.dialog = Dialog.read(model, config.rollout)
        self.networks: Networks = build_networks(
            shape, weights, parallel=config.parallel, optimizer=config.optimizer
        )
        stack.callback(leave)
        self.sampler = build_sampler(
            config,
            model_folder(config.model.path),
            shape,
            end_token_id=self.dialog.end_token_id,
            device=self.networks.parallel.device,
        )
        stack.callback(self.sampler.close)
        self.sampler.push(weights.tensors(), version=0)
        self.learner = Learner(
            self.networks,
            ppo=config.ppo,
            rewards=config.rewards,
            max_skipped_updates=config.run.max_skipped_updates,
        )
        self._pace = Pace(self.networks.parallel.device) if self.networks.parallel.world_size > 1 else None
        self._own_s: dict[str, float] = {}  # of this process in the step's phases
        self._checkpoint: Path | None = None  # the last one
        self._problems = sources.load(config, "train")
        self._origin = 0  # where in them step 0 began
        self._eval_problems = sources.load(config, "eval")
        self._executor = stack.enter_context(open_executor(config.executor))
        self._store = CheckpointStore.of_run(folder.checkpoints, config, self.networks.parallel)
        self._stack = stack
        self._asynchronous: AsynchronousRollouts | None = None
        if config.rollout.max_staleness > 0:
            self._asynchronous = AsynchronousRollouts(
                self._training_settings(),
                problems_of=self._share,
                steps=config.run.steps,
                max_staleness=config.rollout.max_staleness,
                device=self.networks.parallel.device,
            )

    def resume(self) -> int:
        """Take up the newest checkpoint, or the one that the user named. Steps completed."""
        named = self._folder.checkpoint
        checkpoint = self._store.load(named) if named else self._store.load_latest()
        step = 0
        if checkpoint is not None:
            step, self._checkpoint = checkpoint.step, checkpoint.path
            self.networks.policy.load_state_dict(checkpoint.rank_state["policy"])
            self.networks.value.load_state_dict(checkpoint.rank_state["value"])
            self._origin = checkpoint.shared["cursor"] - step * self._config.rollout.episodes_per_step
            self._started -= checkpoint.shared["seconds"]
            self.sampler.push(self.networks.policy.named_weights(), version=step)
        self.telemetry = self._stack.enter_context(
            Telemetry(
                self._folder.path,
                name=self._config.run.name,
                total_steps=self._config.run.steps,
                completed_steps=step,
                rank=self.networks.parallel.rank,
            )
        )
        if self._asynchronous is not None:
            self._asynchronous.start(step, checkpoint.rank_state.get("rollouts") if checkpoint else None)
            self._stack.callback(self._asynchronous.close)
        return step

    def save(self, step: int) -> None:
        """Sampling draws from (seed, episode, position) alone, so there is no random state to keep."""
        with (
            self._watch.phase(f"saving step {step}"),
            self.telemetry.timer.phase(_CHECKPOINT),
            self._sampler_to_itself(),
        ):
            rank_state: dict[str, Any] = {
                "policy": dict(self.networks.policy.state_dict()),
                "value": dict(self.networks.value.state_dict()),
            }
            if self._asynchronous is not None:
                rank_state["rollouts"] = self._asynchronous.save()
            shared = {"cursor": self._position(step), "seconds": self._seconds()}
            self._checkpoint = self._store.save(step, rank_state, shared)

    def collect(self, step: int) -> Collection:
        """The episodes of a step, on all processes."""
        with self.telemetry.timer.phase("waiting"):
            with self._watch.phase(f"sampling step {step + 1}"):
                own = self._collect_own(step)
            self._own_s = {"sampling": own.sampling_s, "executing": own.executing_s}
            with self._watch.phase(f"sharing the episodes of step {step + 1}"):
                return share_out(own)

    def _collect_own(self, step: int) -> Collection:
        rollout = self._config.rollout
        problems, numbers = self._share(step)
        with doing(f"episodes: {len(numbers)}, rollout.slots: {rollout.slots}"):
            if self._asynchronous is not None:
                return self._asynchronous.take(step)
            collect = collect_overlapped if rollout.overlap else collect_in_lockstep
            return collect(problems, numbers=numbers, **self._training_settings())

    def push(self, step: int) -> None:
        """Give the samplers the weights after `step` steps, as that version."""
        with self._watch.phase(f"publishing the weights of step {step}"):
            weights = self.networks.policy.named_weights()
            (self._asynchronous or self.sampler).push(weights, version=step)

    def learn(self, episodes: Sequence[Episode], step: int) -> dict[str, float]:
        train_policy = step >= self._config.ppo.value_warmup_steps
        with self._watch.phase(f"learning step {step + 1}"), self.telemetry.timer.phase("learning"):
            try:
                return self.learner.step(episodes, train_policy=train_policy)
            except SkippedTooOftenError as error:
                raise not_finite(error, step=step + 1, checkpoint=self._checkpoint) from error

    def pace(self) -> dict[str, float]:
        """The process that others wait for most in this step, which is named if it is slow."""
        if self._pace is None:
            return {}
        found = self._pace.compare(self._own_s | {"scoring": self.learner.scoring_s})
        if found.is_slow:
            self.telemetry.note(self._pace.describe(found))
        return {"slowest_rank": float(found.rank), "slowest_rank_ratio": found.ratio}

    def record(self, stats: StepStats) -> None:
        with self._watch.phase(f"recording step {stats.step}"):
            self.telemetry.step(stats)

    def metrics(self, collection: Collection, step: int) -> dict[str, float]:
        """Of a step that began with the weights of version `step`."""
        ages = [
            step - version
            for episode in collection.episodes
            for version, sampled in zip(episode.versions, episode.sampled, strict=True)
            if sampled
        ]
        return episode_metrics(collection.episodes, self._config.rewards) | {
            "staleness": sum(ages) / len(ages),
            "staleness_max": float(max(ages)),
            "tests_run": float(collection.tests_run),
            "seconds/sampling": collection.sampling_s,
            "seconds/executing": collection.executing_s,
            "executor/restarts": float(collection.tally.restarts),
            "executor/retries": float(collection.tally.retries),
            "executor/longest_s": collection.tally.longest_s,
            "executor/alone_s": collection.tally.alone_s,
        }

    def evaluate(self, phase: str) -> None:
        """Evaluate on the held-out problems; rank 0 writes `summary.json` and, at the end, the report."""
        config, path = self._config, self._folder.path
        with (
            self._watch.phase(f"evaluating ({phase})"),
            self.telemetry.timer.phase(_EVALUATION),
            self._sampler_to_itself(),
        ):
            evaluation = evaluate(
                self._eval_problems,
                rollouts=self._evaluation_episodes,
                config=config,
            )
        if self.networks.parallel.rank != 0:
            return
        figures = summarise(evaluation)
        if phase == "interim":
            self.telemetry.note(f"held out: {_headline(figures)}")
            return
        examples = dialog_examples(evaluation, self._eval_problems, phase=phase, dialog=self.dialog)
        save_dialogs(path / DIALOGS_FILE, phase, examples)
        start = (
            figures
            if phase == "start"
            else json.loads((path / SUMMARY_FILE).read_text(encoding="utf-8"))["start"]
        )
        summary = run_summary(
            start=start,
            final=figures if phase == "final" else None,
            seed=config.run.seed,
            steps=config.run.steps,
            seconds=self._seconds(),
        )
        write_summary(path / SUMMARY_FILE, summary)
        if phase == "final":
            write_report(path)

    def _evaluation_episodes(
        self,
        problems: Sequence[Problem],
        *,
        numbers: Sequence[int],
        params: SamplingParams,
        turns: int,
        feedback: FeedbackKind,
    ) -> list[Episode]:
        """This process samples every world_size-th of them, and all get all."""
        rank, world_size = self.networks.parallel.rank, self.networks.parallel.world_size
        overlap = self._config.rollout.overlap and feedback != "random"
        own = (collect_overlapped if overlap else collect_in_lockstep)(
            problems[rank::world_size],
            numbers=numbers[rank::world_size],
            **self._settings(params, turns, feedback),
        )
        return share_out(own).episodes

    def _share(self, step: int) -> tuple[Sequence[Problem], Sequence[int]]:
        """This process's problems of a training step, and the numbers of their episodes."""
        count = self._config.rollout.episodes_per_step
        cursor = Cursor(self._problems, seed=self._config.run.seed, position=self._position(step))
        rank, world_size = self.networks.parallel.rank, self.networks.parallel.world_size
        return cursor.take(count)[rank::world_size], range(step * count, (step + 1) * count)[rank::world_size]

    def _position(self, step: int) -> int:
        return self._origin + step * self._config.rollout.episodes_per_step

    def _training_settings(self) -> CollectSettings:
        rollout = self._config.rollout
        params = SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_tokens=rollout.max_response_tokens,
            seed=self._config.run.seed,
        )
        return self._settings(params, rollout.turns, rollout.feedback)

    def _settings(self, params: SamplingParams, turns: int, feedback: FeedbackKind) -> CollectSettings:
        return CollectSettings(
            sampler=self.sampler,
            executor=self._executor,
            dialog=self.dialog,
            settings=self._config.rollout,
            params=params,
            turns=turns,
            feedback=feedback,
        )

    def _sampler_to_itself(self) -> AbstractContextManager[None]:
        """While the trainer uses the sampler, or saves what is in it, training episodes wait."""
        return nullcontext() if self._asynchronous is None else self._asynchronous.paused()

    def _seconds(self) -> float:
        return time.monotonic() - self._started


class _StopRequest:
    """SIGINT and SIGTERM ask the run to save and leave after the step under way; all processes must agree."""

    def __enter__(self) -> Self:
        self._asked: dict[int, float] = {}
        self._previous = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        asked = torch.tensor(int(bool(self._asked)))
        if torch.cuda.is_available():
            asked = asked.cuda()
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        # By number: a terminal's Ctrl-C arrives beside the launcher's SIGTERM. And a scheduler signals this
        # process and its launcher, which passes the same signal on.
        if time.monotonic() - self._asked.setdefault(number, time.monotonic()) > _SAME_SIGNAL_S:
            signal.signal(number, signal.SIG_DFL)  # a second time: the user will not wait
            os.kill(os.getpid(), number)


def _headline(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {figures[name]:.3f}" for name in figures["intervals"])
