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
from click.testing import CliRunner
from torch import Tensor

from rlef.cli import main
from rlef.learner import Learner
from rlef.pretrained import model_folder, read_pretrained
from rlef.prompts import FEEDBACK_OPENING, NO_CODE_FEEDBACK, UNTOLD_FEEDBACK, Dialog
from rlef.records import Episode
from tests.small_runs import (
    NO_LEARNED_ORDER,
    Command,
    nothing_left_behind,
    read_lines,
    run_file,
    run_here,
    saved,
    small_config,
    untimed,
)

STEPS = 10
LONG = (
    f"run.steps={STEPS}",
    "parallel.processes=2",
    "checkpoint.every_steps=2",
    "checkpoint.keep=10",
    NO_LEARNED_ORDER,
)


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
    truncate(newest_checkpoint(broken) / "rank-00001-0000.safetensors")
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


def counted(run: Path, step: int) -> dict[str, Any]:
    """What a checkpoint holds beside tensors, without the seconds."""
    common: dict[str, Any] = json.loads(
        (run / "checkpoints" / f"step-{step:06d}" / "common.json").read_text()
    )
    del common["shared"]["seconds"]
    return common


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names of tensors that are not equal, bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_weights_and_moments_of_an_uninterrupted_one(story: Story) -> None:
    expected, found = saved(story.whole, STEPS), saved(story.broken, STEPS)
    assert {"policy/weight/model.norm.weight", "value/exp_avg_sq/value_head.weight"} <= expected.keys()
    assert differences(expected, found) == []
    assert counted(story.whole, STEPS) == counted(story.broken, STEPS)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_the_runs_of_the_story_did_learn(story: Story) -> None:
    assert differences(saved(story.whole, 2), saved(story.whole, STEPS)) != []
    assert sum(line["tests_run"] for line in read_lines(story.whole / "metrics.jsonl")) > 0


@pytest.mark.multiprocess
@pytest.mark.slow
def test_each_step_is_logged_once_and_as_if_nothing_had_happened(story: Story) -> None:
    whole, broken = (untimed(run) for run in (story.whole, story.broken))
    assert [line["step"] for line in broken] == list(range(1, STEPS + 1))
    assert broken == whole


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
    told = next(
        line
        for line in story.outputs["interrupted"].splitlines()
        if "rank-00001-0000.safetensors has" in line
    )
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
    one, two = saved(run_here(tmp_path), 2), saved(story.whole, 2)
    assert_learned_alike(one, two, "policy")
    assert_learned_alike(one, two, "value")


def start_of(model: str = "embedded") -> dict[str, Tensor]:
    """The weights of both networks before the first step."""
    shape, named = read_pretrained(model_folder(model))
    of_value = {name: tensor for name, tensor in named.items() if name != "lm_head.weight"}
    of_value["value_head.weight"] = torch.zeros(1, shape.hidden_size)
    policy = {f"policy/weight/{name}": tensor for name, tensor in named.items()}
    return policy | {f"value/weight/{name}": tensor for name, tensor in of_value.items()}


def assert_learned_alike(
    one: dict[str, Tensor], other: dict[str, Tensor], network: str, model: str = "embedded"
) -> None:
    """Equal weights up to rounding, and what was learned is far more than rounding."""
    start = start_of(model)
    moved = 0.0
    for name in (name for name in one if name.startswith(f"{network}/weight/")):
        scale = float(one[name].abs().max())
        assert float((other[name] - one[name]).abs().max()) <= 1e-5 * scale, name
        moved = max(moved, float((one[name] - start[name]).abs().max()) / scale)
    assert moved > 1e-3


@pytest.mark.multiprocess
def test_a_run_goes_on_in_another_layout_and_learns_what_one_process_learns(
    tmp_path: Path, random_model: Path
) -> None:
    """Two tensor parallel processes under torchrun, then one alone."""
    settings = (f"model.path={random_model}", "checkpoint.every_steps=1", "checkpoint.keep=9")
    with nothing_left_behind():
        command = Command(
            [
                *("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlef"),
                *("train", str(run_file(tmp_path)), *settings, "run.steps=1", "run.name=two"),
                *("parallel.tensor=2", "parallel.sequence_parallel=true"),
            ],
            tmp_path / "log",
        )
        assert command.wait() == 0, command.output
    assert command.output.count("1@2, true feedback") == 1
    two = run_here(tmp_path, *settings, "run.name=two", "run.steps=2", resume="auto")
    one = run_here(tmp_path, *settings, "run.steps=2")
    for step in (1, 2):
        assert_learned_alike(saved(one, step), saved(two, step), "policy", str(random_model))
    assert len(list((two / "checkpoints" / "step-000001").glob("rank-0000[01]-*.safetensors"))) == 2
    assert [line["step"] for line in read_lines(two / "metrics.jsonl")] == [1, 2]
    of_two_ranks = str(two / "checkpoints" / "step-000001")
    arguments = ["export", str(two), str(tmp_path / "exported"), "--checkpoint", of_two_ranks]
    exported = CliRunner().invoke(main, arguments)  # by this process alone
    assert exported.exit_code == 0, exported.output
    expected = saved(two, 1)
    _, weights = read_pretrained(tmp_path / "exported")
    assert all(torch.equal(expected[f"policy/weight/{name}"], weight) for name, weight in weights.items())


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
    weights = saved(run, 1)  # without moments: no step was made
    assert differences(weights, start_of(str(random_model))) == []
    assert all(math.isfinite(value) for value in metrics.values() if value is not None)
