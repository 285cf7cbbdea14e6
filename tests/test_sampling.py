"""Processes that only sample beside processes that learn: whole runs, in real processes over gloo."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from rlef.config import ConfigError
from rlef.curriculum import Curriculum
from rlef.faults import RunFault
from rlef.job import leave
from rlef.learner import Learner
from rlef.own_rollouts import OwnRollouts
from rlef.problems import load, training_cursor
from rlef.records import Episode
from rlef.rollout import Collection
from rlef.telemetry import Telemetry
from rlef.train import train_under_torchrun
from rlef_sandbox import SandboxFault
from tests.distributed import run_ranks
from tests.small_runs import (
    NO_LEARNED_ORDER,
    Command,
    nothing_left_behind,
    read_lines,
    run_file,
    small_config,
    untimed,
)

STEPS = 3
ONE_SAMPLER = ("parallel.processes=2", "parallel.sampling_processes=1")
SKIPPING = ("problems.train_size=12", "problems.skip_after_solved=1", "problems.skip_after_unsolved=1")


@dataclass(frozen=True)
class Played:
    """A run, and the episodes of each step that this process learned from, if it learned."""

    path: Path
    steps: list[list[Episode]]


def play(folder: Path, name: str, *settings: str, resume: str = "never") -> Played:
    """In this process of a job, or alone in it."""
    learned_from: list[list[Episode]] = []
    learn = Learner.step

    def remember(self: Learner, episodes: Sequence[Episode], **options: Any) -> dict[str, float]:
        learned_from.append(list(episodes))
        return learn(self, episodes, **options)

    own = folder / f"rank-{os.environ.get('RANK', '0')}"  # each process writes its run file
    own.mkdir(exist_ok=True)
    shared = (f"run.output_dir={folder}", f"run.name={name}", f"run.steps={STEPS}", NO_LEARNED_ORDER)
    config = small_config(own, *shared, *settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", remember)
        assert train_under_torchrun(config, resume) == 0
    leave()
    return Played(folder / name, learned_from)


def folder_of_ranks() -> Path:
    return Path(os.environ["RLEF_TEST_FOLDER"])


def as_two() -> dict[str, Any]:
    folder = folder_of_ranks()
    return {
        "fresh": play(folder, "fresh", *ONE_SAMPLER),
        "stale": play(folder, "stale", *ONE_SAMPLER, "rollout.max_staleness=2"),
        "skipping": play_in_two_parts(folder, "skipping", *ONE_SAMPLER, *SKIPPING),
        "skipping, stale": play_in_two_parts(
            folder, "skipping-stale", *ONE_SAMPLER, *SKIPPING, "rollout.max_staleness=1"
        ),
        "stopped": stop_from_the_sampler(folder),
        "fault": break_the_sandbox(folder),
    }


def play_in_two_parts(folder: Path, name: str, *settings: str) -> Played:
    """All steps but the last, and then that one from the checkpoint."""
    first = play(folder, name, *settings, f"run.steps={STEPS - 1}")
    second = play(folder, name, *settings, resume="auto")
    return Played(second.path, first.steps + second.steps)


def stop_from_the_sampler(folder: Path) -> int:
    """How many steps a long run makes after its sampler was asked to stop in the second."""
    collect = OwnRollouts.collect

    def ask(self: OwnRollouts, step: int) -> Collection:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2)  # until the learner must have heard
        return collect(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OwnRollouts, "collect", ask)
        return len(play(folder, "stopped", *ONE_SAMPLER, "run.steps=1000").steps)


def break_the_sandbox(folder: Path) -> tuple[str, bool]:
    """What this process says when the sampler's sandbox fails, and whether another has told it already."""

    def fail(_: OwnRollouts, step: int) -> Collection:
        raise SandboxFault(f"no worker starts in step {step}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OwnRollouts, "collect", fail)
        with pytest.raises(RunFault) as raised:
            play(folder, "fault", *ONE_SAMPLER)
    leave()
    return str(raised.value), raised.value.is_told


def as_three() -> dict[str, Any]:
    folder = folder_of_ranks()
    one = ("parallel.processes=3", "parallel.sampling_processes=1")
    return {
        "tensor": play(folder, "tensor", *one, "parallel.tensor=2"),
        "interleaved": play(
            folder, "interleaved", *one, "parallel.pipeline=2", "parallel.virtual_pipeline=2"
        ),
        "context": play(folder, "context", *one, "parallel.context=2"),
    } | play_with_a_slow_sampler(folder)


def play_with_a_slow_sampler(folder: Path) -> dict[str, Any]:
    """A run of two samplers, the second of which says that it took a minute more, and what the run notes."""
    collect, notes = OwnRollouts.collect, list[str]()

    def slow(self: OwnRollouts, step: int) -> Collection:
        own = collect(self, step)
        return replace(own, sampling_s=own.sampling_s + 60) if os.environ["RANK"] == "2" else own

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OwnRollouts, "collect", slow)
        patch.setattr(Telemetry, "note", lambda _, text: notes.append(text))
        played = play(folder, "samplers", "parallel.processes=3", "parallel.sampling_processes=2")
    return {"samplers": played, "notes": notes}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """The synchronous run, of one process."""
    return play(tmp_path_factory.mktemp("alone"), "alone")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks_of(as_two, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks_of(as_three, 3, tmp_path_factory.mktemp("three"))


def ranks_of(function: Callable[[], Any], ranks: int, folder: Path) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLEF_TEST_FOLDER", str(folder))
        return run_ranks(function, ranks=ranks, folder=folder, timeout_s=1200)


def content(step: Sequence[Episode]) -> list[tuple[Any, ...]]:
    """All that is learned from, and who solved what."""
    return [
        (
            each.number,
            each.problem_id,
            each.token_ids,
            each.sampled,
            each.logprobs,
            each.versions,
            each.solved,
        )
        for each in step
    ]


@pytest.mark.multiprocess
def test_fresh_episodes_of_another_process_are_bit_for_bit_those_of_the_synchronous_run(
    two: list[dict[str, Any]], alone: Played
) -> None:
    fresh = two[0]["fresh"]
    assert [content(step) for step in fresh.steps] == [content(step) for step in alone.steps]
    assert {version for each in fresh.steps[2] for version in each.versions} == {-1, 2}
    assert untimed(fresh.path) == untimed(alone.path)
    assert two[1]["fresh"].steps == []  # the sampler learned nothing


@pytest.mark.multiprocess
def test_the_learners_evaluate_what_the_samplers_make(two: list[dict[str, Any]], alone: Played) -> None:
    found, expected = (
        json.loads((played.path / "summary.json").read_text()) for played in (two[0]["fresh"], alone)
    )
    for phase in ("start", "final"):
        del found[phase]["seconds"], expected[phase]["seconds"]
        assert found[phase] == expected[phase]
    assert (two[0]["fresh"].path / "report.html").exists()


@pytest.mark.multiprocess
@pytest.mark.parametrize("layout", ["tensor", "interleaved", "context", "samplers"])
def test_weights_of_every_layout_reach_the_samplers_and_episodes_come_in_order(
    three: list[dict[str, Any]], alone: Played, layout: str
) -> None:
    """But for rounding: ranks add up in another order, and samplers decode other rows together."""
    played = three[0][layout]
    for found, expected in zip(played.steps, alone.steps, strict=True):
        assert [each.number for each in found] == [each.number for each in expected]
        for episode, twin in zip(found, expected, strict=True):
            assert (episode.token_ids, episode.versions) == (twin.token_ids, twin.versions)
            assert episode.logprobs == pytest.approx(twin.logprobs, abs=1e-4)
    for line, expected_line in zip(untimed(played.path), untimed(alone.path), strict=True):
        assert line == pytest.approx(expected_line, rel=1e-3, abs=1e-4)
    if layout != "samplers":  # both learners learn from the same
        assert [content(step) for step in three[1][layout].steps] == [content(step) for step in played.steps]


@pytest.mark.multiprocess
def test_stale_episodes_of_another_process_keep_the_bound_and_their_versions(
    two: list[dict[str, Any]],
) -> None:
    stale = two[0]["stale"]
    ages = [
        {step - version for each in episodes for version in each.versions if version >= 0}
        for step, episodes in enumerate(stale.steps)
    ]
    assert all(each <= {0, 1, 2} for each in ages)
    assert max(set().union(*ages)) > 0
    numbers = [each.number for episodes in stale.steps for each in episodes]
    assert numbers == list(range(8 * STEPS))


@pytest.mark.multiprocess
def test_problems_are_left_out_and_a_run_resumed_as_where_each_process_does_both(
    two: list[dict[str, Any]], tmp_path: Path
) -> None:
    whole, parted = play(tmp_path, "whole", *SKIPPING), two[0]["skipping"]
    assert [content(step) for step in parted.steps] == [content(step) for step in whole.steps]
    assert untimed(parted.path) == untimed(whole.path)
    assert [line["problems/active"] for line in untimed(whole.path)] != [12.0] * STEPS


@pytest.mark.multiprocess
def test_problems_that_are_begun_early_do_not_depend_on_outcomes_that_come_later(
    two: list[dict[str, Any]],
) -> None:
    config = small_config(two[0]["fresh"].path.parent, *SKIPPING, "rollout.max_staleness=1")
    curriculum = Curriculum(training_cursor(load(config, "train"), config), config, step=0, progress=None)
    for step, episodes in enumerate(two[0]["skipping, stale"].steps):
        expected = [problem.id for problem in curriculum.problems_of(step)]
        assert [episode.problem_id for episode in episodes] == expected
        curriculum.record([episode.solved for episode in episodes])
    assert len(two[0]["skipping, stale"].steps) == STEPS


@pytest.mark.multiprocess
def test_a_sampler_that_is_slow_is_named_after_each_step(three: list[dict[str, Any]]) -> None:
    slow = [note for note in three[0]["notes"] if "is slow" in note]
    assert len(slow) == STEPS
    for note in slow:
        assert re.match(
            rf"rank 2 on {re.escape(socket.gethostname())} is slow: sampling took it [67]\d\.", note
        )


@pytest.mark.multiprocess
def test_a_sampler_that_is_asked_to_stop_stops_the_run_after_the_step_under_way(
    two: list[dict[str, Any]],
) -> None:
    folder = two[0]["fresh"].path.parent / "stopped"
    assert two[0]["stopped"] == 2
    assert (folder / "checkpoints" / "step-000002").is_dir()


@pytest.mark.multiprocess
def test_a_sandbox_that_fails_is_told_once_by_its_own_process(two: list[dict[str, Any]]) -> None:
    line = two[1]["fault"][0]
    assert line.startswith(
        "the sandbox failed while sampling step 1: no worker starts in step 0; see what rlef doctor"
    )
    assert two[1]["fault"] == (line, False)
    assert two[0]["fault"] == (line, True)


@dataclass(frozen=True)
class Story:
    """A run whose sampler hangs, and when it is continued is killed, and when it is continued ends."""

    path: Path
    hung: Command
    killed: Command
    finished: Command


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, random_model: Path) -> Story:
    folder = tmp_path_factory.mktemp("story")
    arguments = ["rlef", "train", str(run_file(folder)), f"model.path={random_model}", *ONE_SAMPLER]
    arguments += ["parallel.silence_s=15", "rollout.max_staleness=1", "checkpoint.every_steps=1"]

    def start(name: str, steps: int) -> Command:
        return Command([*arguments, f"run.steps={steps}"], folder / f"{name}.log")

    with nothing_left_behind():
        hung = start("hung", 1000)
        hung.wait_until_step(1)
        os.kill(hung.ranks()[1], signal.SIGSTOP)
        hung.wait()
    with nothing_left_behind():
        killed = start("killed", 1000)
        killed.wait_until_step(2)
        os.kill(killed.ranks()[1], signal.SIGKILL)
        killed.wait()
    with nothing_left_behind():
        steps = len(read_lines(folder / "small" / "metrics.jsonl")) + 1
        finished = start("finished", steps)
        finished.wait()
    return Story(folder / "small", hung, killed, finished)


def told(command: Command) -> list[str]:
    return [line for line in command.output.splitlines() if line.startswith("rlef: error: ")]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_sampler_that_hangs_is_named_with_its_host_and_since_when(story: Story) -> None:
    host = re.escape(socket.gethostname())
    (line,) = told(story.hung)
    assert re.match(
        rf"rlef: error: rank 0 on {host}: lost rank 1 on {host} \(.+\) while .+: no sign of life since "
        r"\d\d:\d\d:\d\d \(parallel\.silence_s = 15 s\)",
        line,
    )
    assert story.hung.process.returncode == 1
    assert "Traceback" not in story.hung.output


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_sampler_that_is_killed_is_named(story: Story) -> None:
    host = socket.gethostname()
    assert any(
        line.startswith(f"rlef: error: rank 0 on {host}: lost rank 1 on {host} (")
        and ": the process has ended; " in line
        for line in told(story.killed)
    )
    assert story.killed.process.returncode != 0
    assert "Traceback" not in story.killed.output


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_run_goes_on_after_it_lost_its_sampler_with_what_was_under_way(story: Story) -> None:
    assert story.finished.process.returncode == 0, story.finished.output
    lines = read_lines(story.path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) >= 3
    assert all(line["staleness_max"] <= 1 for line in lines)


def test_settings_that_leave_no_learner_or_do_not_divide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^parallel\.sampling_processes = 2 of parallel\.processes = 2 leave"
    ):
        small_config(tmp_path, "parallel.processes=2", "parallel.sampling_processes=2")
    with pytest.raises(
        ConfigError,
        match=r"^parallel\.processes = 4 - parallel\.sampling_processes = 3 is not .* = 2; use 3$",
    ):
        small_config(tmp_path, "parallel.processes=4", "parallel.sampling_processes=1", "parallel.tensor=2")
