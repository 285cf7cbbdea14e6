"""Whole runs, in real processes: what happens to them must not show in their weights."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlef.learner import Learner
from rlef.pretrained import model_folder, read_pretrained
from rlef.prompts import FEEDBACK_OPENING, NO_CODE_FEEDBACK, UNTOLD_FEEDBACK, Dialog
from rlef.records import Episode, ModelShape
from rlef.shards import Head, StageWeight, cut_shard, join_shards, stage_weights
from tests.small_runs import (
    Command,
    nothing_left_behind,
    read_lines,
    run_file,
    run_here,
    small_config,
)

STEPS = 10
LONG = (f"run.steps={STEPS}", "parallel.processes=2", "checkpoint.every_steps=2", "checkpoint.keep=10")


@dataclass(frozen=True)
class Story:
    """Two runs of the same settings: one is left in peace."""

    whole: Path
    broken: Path
    statuses: dict[str, int]
    outputs: dict[str, str]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The other is killed, cut, interrupted, and each time continued by the command that started it."""
    folder = tmp_path_factory.mktemp("story")
    settings, whole, broken = run_file(folder), folder / "whole", folder / "broken"
    commands: dict[str, Command] = {}

    def start(event: str, run: Path) -> Command:
        arguments = ["rlef", "train", str(settings), f"run.name={run.name}", *LONG]
        commands[event] = Command(arguments, folder / f"{event}.log")
        return commands[event]

    with nothing_left_behind():
        assert start("left in peace", whole).wait() == 0, commands["left in peace"].output
    with nothing_left_behind():
        command = start("rank killed", broken)
        command.wait_until_step(3)
        os.kill(command.ranks()[1], signal.SIGKILL)
        command.wait()
    with nothing_left_behind():
        command = start("parent killed", broken)
        command.wait_until_step(5)
        command.process.kill()
        command.wait()
    truncate(newest_checkpoint(broken) / "rank-00001.pt")
    with nothing_left_behind():
        command = start("interrupted", broken)
        command.wait_until_step(5)
        command.press_ctrl_c()
        command.wait()
    with nothing_left_behind():
        start("finished", broken).wait()
    return Story(
        whole=whole,
        broken=broken,
        statuses={event: command.process.returncode for event, command in commands.items()},
        outputs={event: command.output for event, command in commands.items()},
    )


def newest_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def saved(run: Path, step: int, rank: int = 0) -> dict[str, Any]:
    path = run / "checkpoints" / f"step-{step:06d}" / f"rank-{rank:05d}.pt"
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two trees of tensors and numbers are not equal, bit for bit."""
    if isinstance(one, Tensor):
        return [] if isinstance(other, Tensor) and torch.equal(one, other) else [place]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{place}: keys"]
        return [found for key in one for found in differences(one[key], other[key], f"{place}/{key}")]
    if isinstance(one, list | tuple):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for number, (a, b) in pairs for found in differences(a, b, f"{place}/{number}")]
    return [] if one == other else [place]


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupted_run_ends_with_the_weights_and_moments_of_an_uninterrupted_one(
    story: Story, rank: int
) -> None:
    expected, found = saved(story.whole, STEPS, rank), saved(story.broken, STEPS, rank)
    assert {"policy", "value"} <= expected.keys()
    assert "exp_avg" in str(expected["policy"]["optimizer"])
    assert differences(expected, found) == []


@pytest.mark.multiprocess
@pytest.mark.slow
def test_the_runs_of_the_story_did_learn(story: Story) -> None:
    assert differences(saved(story.whole, 2), saved(story.whole, STEPS)) != []
    assert sum(line["tests_run"] for line in read_lines(story.whole / "metrics.jsonl")) > 0


@pytest.mark.multiprocess
@pytest.mark.slow
def test_each_step_is_logged_once_and_as_if_nothing_had_happened(story: Story) -> None:
    whole, broken = (untimed(read_lines(run / "metrics.jsonl")) for run in (story.whole, story.broken))
    assert [line["step"] for line in broken] == list(range(1, STEPS + 1))
    assert broken == whole


def untimed(lines: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    def is_time(name: str) -> bool:
        return name.startswith(("seconds", "slowest_rank", "executor/")) or name.endswith("_per_s")

    return [{name: value for name, value in line.items() if not is_time(name)} for line in lines]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_the_final_figures_are_those_of_an_uninterrupted_run(story: Story) -> None:
    whole, broken = (json.loads((run / "summary.json").read_text()) for run in (story.whole, story.broken))
    for phase in ("start", "final"):
        del whole[phase]["seconds"], broken[phase]["seconds"]
        assert whole[phase] == broken[phase]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_killed_rank_ends_the_run_with_its_status(story: Story) -> None:
    assert story.statuses["rank killed"] == 128 + signal.SIGKILL
    assert story.outputs["rank killed"].endswith(
        "rlef: error: a process of the run ended with status 137; "
        "the same command continues from the last checkpoint\n"
    )


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_killed_run_is_continued_and_says_so(story: Story) -> None:
    assert story.outputs["parent killed"].startswith(f"continuing the unfinished run in {story.broken}\n")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_truncated_checkpoint_is_passed_over_and_named(story: Story) -> None:
    told = next(line for line in story.outputs["interrupted"].splitlines() if "rank-00001.pt has" in line)
    assert told.endswith("delete the folder; using the checkpoint before it")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_ctrl_c_saves_and_exits_cleanly(story: Story) -> None:
    output = story.outputs["interrupted"]
    assert story.statuses["interrupted"] == 0, output
    assert "stopped and saved after step " in output
    assert f" of {STEPS}; --resume auto continues" in output
    assert "Traceback" not in output
    assert story.statuses["finished"] == 0, story.outputs["finished"]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_learn_what_one_process_learns(story: Story, tmp_path: Path) -> None:
    run = run_here(tmp_path)
    heads: dict[str, Head] = {"policy": "logits", "value": "value"}
    for network, head in heads.items():
        one, two = saved(run, 2)[network]["weights"], saved(story.whole, 2)[network]["weights"]
        assert_learned_alike(one, two, start_of(head))


def start_of(head: Head, model: str = "embedded") -> dict[str, Tensor]:
    """Megatron's weights of a network before the first step."""
    shape, named = read_pretrained(model_folder(model))
    named["value_head.weight"] = torch.zeros(1, shape.hidden_size)
    return {
        weight.parameter: cut_shard([named[name] for name in weight.names], weight.cut, shape, rank=0, size=1)
        for weight in stage_weights(shape, head, stage=0, stages=1)
    }


def assert_learned_alike(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """Equal weights up to rounding, and what was learned is far more than rounding."""
    moved = 0.0
    for name, expected in one.items():
        scale = float(expected.abs().max())
        assert float((other[name] - expected).abs().max()) <= 1e-5 * scale, name
        moved = max(moved, float((expected - start[name]).abs().max()) / scale)
    assert moved > 1e-3


@pytest.mark.multiprocess
def test_two_tensor_parallel_processes_under_torchrun_learn_what_one_process_learns(
    tmp_path: Path, random_model: Path
) -> None:
    model, one_step = f"model.path={random_model}", "run.steps=1"
    with nothing_left_behind():
        command = Command(
            [
                *("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlef"),
                *("train", str(run_file(tmp_path)), model, one_step, "run.name=two", "parallel.tensor=2"),
            ],
            tmp_path / "log",
        )
        assert command.wait() == 0, command.output
    assert command.output.count("1@2, true feedback") == 1
    run = run_here(tmp_path, model, one_step)
    shape, _ = read_pretrained(random_model)
    shards = [saved(tmp_path / "two", 1, rank)["policy"]["weights"] for rank in (0, 1)]
    one = saved(run, 1)["policy"]["weights"]
    two = {
        weight.parameter: join(weight, shards, shape)
        for weight in stage_weights(shape, "logits", stage=0, stages=1)
    }
    assert_learned_alike(one, two, start_of("logits", str(random_model)))


def join(weight: StageWeight, shards: Sequence[dict[str, Tensor]], shape: ModelShape) -> Tensor:
    """A whole parameter as one process holds it."""
    whole = join_shards([shard[weight.parameter] for shard in shards], weight.cut, shape)
    return cut_shard(whole, weight.cut, shape, rank=0, size=1)


def test_sigterm_saves_and_the_run_exits_cleanly(tmp_path: Path, random_model: Path) -> None:
    run = tmp_path / "small"
    with nothing_left_behind():
        arguments = ("train", str(run_file(tmp_path)), f"model.path={random_model}", "run.steps=10000")
        command = Command(["rlef", *arguments], tmp_path / "log")
        command.wait_until_step(1)
        command.process.terminate()
        assert command.wait() == 0, command.output
    stopped = int(newest_checkpoint(run).name.removeprefix("step-"))
    assert f"stopped and saved after step {stopped} of 10000; --resume auto continues" in command.output
    assert stopped == len(read_lines(run / "metrics.jsonl"))


@dataclass(frozen=True)
class Step:
    episodes: list[Episode]
    metrics: dict[str, float]


def one_step(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Step:
    """The episodes that a run of one step learned from, and what it logged."""
    learned_from: list[Episode] = []
    learn = Learner.step

    def remember(self: Learner, episodes: Sequence[Episode], **settings: Any) -> dict[str, float]:
        learned_from.extend(episodes)
        return learn(self, episodes, **settings)

    monkeypatch.setattr(Learner, "step", remember)
    run = run_here(folder, "run.steps=1", *overrides)
    (metrics,) = read_lines(run / "metrics.jsonl")
    assert json.loads((run / "summary.json").read_text())["final"] is not None
    return Step(learned_from, metrics)


def feedback_of(step: Step, folder: Path) -> list[str]:
    """What the policy was told between its responses."""
    dialog = Dialog.read(model_folder("embedded"), small_config(folder).rollout)
    return [
        dialog.decode(episode.token_ids[before.end : after.start])
        for episode in step.episodes
        for before, after in zip(episode.turns, episode.turns[1:], strict=False)
    ]


def test_a_step_of_dialogs_tells_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = one_step(tmp_path, monkeypatch)
    told = feedback_of(step, tmp_path)
    assert told
    assert all(FEEDBACK_OPENING in text or NO_CODE_FEEDBACK in text for text in told)
    assert any(FEEDBACK_OPENING in text for text in told)


def test_a_step_without_feedback_tells_only_that_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = one_step(tmp_path, monkeypatch, "rollout.feedback=none")
    told = feedback_of(step, tmp_path)
    assert told
    assert all(UNTOLD_FEEDBACK in text for text in told)
    assert not any(FEEDBACK_OPENING in text for text in told)


def test_a_single_turn_step_has_one_response_an_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = one_step(tmp_path, monkeypatch, "rollout.turns=1")
    assert len(step.episodes) == 8
    assert step.metrics["turns"] == 1
    assert step.metrics["policy/skipped_updates"] == 0


@pytest.mark.parametrize("level", ["turn", "token"])
def test_values_are_read_per_turn_or_per_token(
    level: str, tmp_path: Path, random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = one_step(tmp_path, monkeypatch, f"model.path={random_model}", f"ppo.value_level={level}")
    turns = sum(len(episode.turns) for episode in step.episodes)
    tokens = sum(sum(episode.sampled) for episode in step.episodes)
    assert step.metrics["value/values"] * 2 == (turns if level == "turn" else tokens)


def test_a_loss_that_is_not_finite_is_skipped_and_counted(tmp_path: Path, random_model: Path) -> None:
    """A reward beyond float32 makes every return infinite and every advantage NaN."""
    run = run_here(tmp_path, "run.steps=1", f"model.path={random_model}", "rewards.failed=-1e39")
    (metrics,) = read_lines(run / "metrics.jsonl")
    assert metrics["policy/skipped_updates"] == 2
    assert metrics["value/skipped_updates"] == 2
    weights = saved(run, 1)["policy"]["weights"]
    assert differences(weights, start_of("logits", str(random_model))) == []
    assert all(math.isfinite(value) for value in metrics.values() if value is not None)
