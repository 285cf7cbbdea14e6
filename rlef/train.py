"""The loop: problems -> episodes -> learning step -> new weights for the sampler, again and again; then the
report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlef import problems as sources
from rlef.arithmetic import check_context
from rlef.bridge import LearnersEnd
from rlef.checkpoint import CheckpointStore
from rlef.config import Config, ConfigError
from rlef.curriculum import Progress, skips
from rlef.evaluate import (
    dialog_examples,
    episode_metrics,
    evaluate,
    run_summary,
    summarise,
    write_summary,
)
from rlef.families import read_shape
from rlef.faults import Pace, SkippedTooOftenError, Watch, not_finite
from rlef.job import Job, join, within
from rlef.launch import torchrun_agent
from rlef.learner import Learner
from rlef.megatron_policy import build_networks, leave
from rlef.own_rollouts import OwnRollouts
from rlef.ports import Networks
from rlef.pretrained import StoredWeights, model_folder
from rlef.prompts import Dialog
from rlef.records import Episode, StepStats
from rlef.report import DIALOGS_FILE, SUMMARY_FILE, save_dialogs, write_report
from rlef.rollout import Collection
from rlef.run_folder import RunFolder, only_one_run, open_run_folder
from rlef.sampling import Colocated, Disaggregated, Rollouts
from rlef.sampling_process import sample
from rlef.stopping import StopRequest
from rlef.telemetry import BETWEEN_STEPS, Telemetry
from rlef.words import Words

_EVALUATION, _CHECKPOINT = BETWEEN_STEPS


def train(config: Config, folder: RunFolder) -> int:
    """Train as `config` says; every process of the job calls this. Returns the exit status."""
    job = join(config.parallel, engine_ranks=config.engine_ranks)
    if job.only_samples:
        return sample(config, job)
    with ExitStack() as stack:
        run = Run(config, folder, stack, job)
        step = run.resume()
        if step == 0 and not run.is_to_stop():
            run.evaluate("start")
        while step < config.run.steps and not run.is_to_stop():
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
            run.finish_saving()
            run.telemetry.note(
                f"stopped and saved after step {step} of {config.run.steps}; --resume auto continues"
            )
        else:
            run.finish_saving()  # before a summary says that the run is over
            run.evaluate("final")
        run.rollouts.end()
    return 0


def train_under_torchrun(config: Config, resume: str) -> int:
    """`train`, started by torchrun, perhaps again: rank 0 opens the run's folder, and the others follow."""
    with ExitStack() as stack:
        with Watch(config).phase("starting or stopping"):
            job = join(config.parallel, engine_ranks=config.engine_ranks)
            meeting = within(job.store, "run")
            meeting.set(f"agent {job.rank}", torchrun_agent())
            if job.rank == 0:
                agents = {meeting.get(f"agent {rank}").decode() for rank in range(job.processes)}
                meeting.set("folder", json.dumps(_open(config, resume, agents, stack)))
            opened = json.loads(meeting.get("folder"))
        if "error" in opened:
            raise ConfigError(opened["error"])
        checkpoint = Path(opened["checkpoint"]) if opened["checkpoint"] else None
        return (
            0
            if opened["is_finished"]
            else train(config, RunFolder(path=Path(opened["path"]), checkpoint=checkpoint))
        )


def _open(config: Config, resume: str, agents: set[str], stack: ExitStack) -> dict[str, Any]:
    """The run's folder, or why there is none, for all processes to read."""
    try:
        stack.enter_context(only_one_run(config))
        folder, note = open_run_folder(config, resume=resume, launchers=agents)
    except ConfigError as error:
        return {"error": str(error)}
    if note:
        print(note, flush=True)
    return {
        "path": str(folder.path),
        "checkpoint": str(folder.checkpoint) if folder.checkpoint else None,
        "is_finished": folder.is_finished,
    }


class Run:
    """The parts of a run, built once, and what is done with several of them at a time."""

    def __init__(self, config: Config, folder: RunFolder, stack: ExitStack, job: Job) -> None:
        self._config = config
        self._folder = folder
        words = None
        if job.is_disaggregated:
            words = stack.enter_context(Words(job, silence_s=config.parallel.silence_s))
        self._watch = Watch(config)
        if words is not None:
            self._watch = Watch(config, tell=words.enter, silent=words.silent)
        stack.enter_context(self._watch.phase("starting or stopping"))
        self._stopping = stack.enter_context(StopRequest())
        self._started = time.monotonic()
        model = model_folder(config.model.path)
        shape, weights = read_shape(model), StoredWeights(model)
        check_context(config, shape.max_position_embeddings)
        self.dialog = Dialog.read(model, config.rollout)
        self.networks: Networks = build_networks(
            shape,
            weights,
            parallel=config.parallel,
            optimizer=config.optimizer,
            has_value=config.ppo.has_value,
        )
        stack.callback(leave)
        self.rollouts: Rollouts
        if words is None:
            place = self.networks.parallel
            own = OwnRollouts(config, stack, job=job, index=place.rank, of=place.world_size)
            self.rollouts = Colocated(own, self._watch)
        else:
            bridge = LearnersEnd(job, config, words, self.networks.parallel)
            self.rollouts = Disaggregated(bridge, self._watch, records=skips(config.problems))
        self.learner = Learner(
            self.networks,
            ppo=config.ppo,
            rewards=config.rewards,
            group_size=config.rollout.rollouts_per_problem,
            max_skipped_updates=config.run.max_skipped_updates,
        )
        self._pace = Pace(self.networks.parallel.device) if self.networks.parallel.world_size > 1 else None
        self._origin = 0  # where in the training problems step 0 began
        self._progress: Progress | None = None  # in them, where outcomes decide on them
        self._eval_problems = sources.load(config, "eval")
        self._store = CheckpointStore.of_run(folder.checkpoints, config, self.networks.parallel)
        stack.callback(self._store.close)
        if words is not None:
            stack.push(words)  # samplers hear of a fault before this process waits for its checkpoint
        self._stack = stack

    def resume(self) -> int:
        """Take up the newest checkpoint, or the one that the user named. Steps completed."""
        named = self._folder.checkpoint
        with self._watch.phase("loading a checkpoint"):
            checkpoint = self._store.load(named) if named else self._store.load_latest()
        step = 0
        under_way: Sequence[str] = ()
        if checkpoint is not None:
            step = checkpoint.step
            for name, network in self.networks.trained().items():
                network.load_state_dict(checkpoint.states[name])
            self._origin = checkpoint.shared["cursor"] - step * self._config.rollout.problems_per_step
            self._started -= checkpoint.shared["seconds"]
            if "curriculum" in checkpoint.shared:
                self._progress = Progress(**checkpoint.shared["curriculum"])
            under_way = checkpoint.rollouts
            self.rollouts.push(self.networks.policy, step)
        self.telemetry = self._stack.enter_context(
            Telemetry(
                self._folder.path,
                name=self._config.run.name,
                total_steps=self._config.run.steps,
                completed_steps=step,
                rank=self.networks.parallel.rank,
            )
        )
        self.rollouts.start(step, self._origin, under_way, self._progress)
        return step

    def is_to_stop(self) -> bool:
        """Whether the user wants the run to save and leave; all processes agree."""
        with self._watch.phase("agreeing whether to go on"):
            return self._stopping.agreed(others=self.rollouts.want_to_stop())

    def save(self, step: int) -> None:
        """Sampling draws from (seed, episode, position) alone, so there is no random state to keep."""
        with self._watch.phase(f"saving step {step}"), self.telemetry.timer.phase(_CHECKPOINT):
            states = {name: network.state_dict() for name, network in self.networks.trained().items()}
            rollouts = self.rollouts.save()
            shared: dict[str, Any] = {"cursor": self._position(step), "seconds": self._seconds()}
            if self._progress is not None:
                shared["curriculum"] = asdict(self._progress)
            self._store.save(step, states, shared, rollouts)

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is whole."""
        with self._watch.phase("saving"), self.telemetry.timer.phase(_CHECKPOINT):
            self._store.finish()

    def collect(self, step: int) -> Collection:
        """The episodes of a step, on all processes."""
        with self.telemetry.timer.phase("waiting"):
            collection = self.rollouts.collect(step)
            self._progress = self.rollouts.record(collection.episodes)
            return collection

    def push(self, step: int) -> None:
        """Give the samplers the weights after `step` steps, as that version."""
        with self._watch.phase(f"publishing the weights of step {step}"):
            self.rollouts.push(self.networks.policy, step)

    def learn(self, episodes: Sequence[Episode], step: int) -> dict[str, float]:
        train_policy = step >= self._config.ppo.value_warmup_steps
        with self._watch.phase(f"learning step {step + 1}"), self.telemetry.timer.phase("learning"):
            try:
                return self.learner.step(episodes, train_policy=train_policy)
            except SkippedTooOftenError as error:
                raise not_finite(error, step=step + 1, checkpoint=self._store.finish()) from error

    def pace(self) -> dict[str, float]:
        """The process that others wait for most in this step, which is named if it is slow."""
        if self.rollouts.slow_sampler:
            self.telemetry.note(self.rollouts.slow_sampler)
        if self._pace is None:
            return {}
        with self._watch.phase("comparing what a step took"):
            found = self._pace.compare(self.rollouts.own_s | {"scoring": self.learner.scoring_s})
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
        progress = {} if self._progress is None else self._progress.metrics()
        return (
            episode_metrics(collection.episodes, self._config.rewards)
            | progress
            | {
                "staleness": sum(ages) / len(ages),
                "staleness_max": float(max(ages)),
                "tests_run": float(collection.tests_run),
                "seconds/sampling": collection.sampling_s,
                "seconds/executing": collection.executing_s,
                "executor/restarts": float(collection.tally.restarts),
                "executor/retries": float(collection.tally.retries),
                "executor/longest_s": collection.tally.longest_s,
                "executor/alone_s": collection.tally.alone_s,
                "executor/cache_hits": float(collection.tally.recalled),
                "executor/cache_saved_s": collection.tally.recalled_s,
            }
        )

    def evaluate(self, phase: str) -> None:
        """Evaluate on the held-out problems; rank 0 writes `summary.json` and, at the end, the report."""
        config, path = self._config, self._folder.path
        with self._watch.phase(f"evaluating ({phase})"), self.telemetry.timer.phase(_EVALUATION):
            evaluation = evaluate(self._eval_problems, rollouts=self.rollouts.evaluate, config=config)
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

    def _position(self, step: int) -> int:
        return self._origin + step * self._config.rollout.problems_per_step

    def _seconds(self) -> float:
        return time.monotonic() - self._started


def _headline(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {figures[name]:.3f}" for name in figures["intervals"])
