"""Rollouts in a thread of their own: what may begin when, and that no episode is lost or changed by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor

from rlef import asynchronous
from rlef import problems as sources
from rlef.asynchronous import AsynchronousRollouts
from rlef.config import RolloutConfig
from rlef.faults import RunFault
from rlef.ports import Request, SamplingParams
from rlef.pretrained import model_folder, read_pretrained
from rlef.prompts import Dialog
from rlef.records import Episode, Problem
from rlef.rollout import CollectSettings, collect
from rlef.torch_sampler import TorchSampler
from rlef.unrelated import UnrelatedFeedback
from rlef_sandbox import Executor
from tests.small_runs import read_lines, run_here, small_config

PER_STEP = 4
SETTINGS = RolloutConfig(max_response_tokens=64, max_prompt_tokens=256, max_feedback_tokens=128, slots=3)
PARAMS = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=64, seed=5)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return read_pretrained(model_folder("embedded"))[1]


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> list[Problem]:
    return sources.load(small_config(tmp_path_factory.mktemp("problems")), "train")


@pytest.fixture
def settings(weights: dict[str, Tensor]) -> Iterator[CollectSettings]:
    dialog = Dialog.read(model_folder("embedded"), SETTINGS)
    shape, _ = read_pretrained(model_folder("embedded"))
    sampler = TorchSampler(shape, end_token_id=dialog.end_token_id, slots=SETTINGS.slots)
    sampler.push(weights.items(), version=0)
    with Executor(workers=1) as executor:
        yield CollectSettings(
            sampler=sampler,
            executor=executor,
            dialog=dialog,
            settings=SETTINGS,
            params=PARAMS,
            turns=2,
            feedback="true",
        )


def rollouts(
    settings: CollectSettings,
    problems: Sequence[Problem],
    *,
    max_staleness: int,
    steps: int = 4,
    rank: int = 0,
    processes: int = 1,
) -> AsynchronousRollouts:
    def problems_of(step: int) -> tuple[Sequence[Problem], Sequence[int]]:
        numbers = range(step * PER_STEP, (step + 1) * PER_STEP)[rank::processes]
        return [problems[number] for number in numbers], numbers

    return AsynchronousRollouts(
        settings,
        problems_of=problems_of,
        steps=steps,
        max_staleness=max_staleness,
        device=torch.device("cpu"),
    )


def moved(weights: dict[str, Tensor], version: int) -> list[tuple[str, Tensor]]:
    """The same weights a little further on."""
    return [(name, tensor * (1 + version / 50)) for name, tensor in weights.items()]


def in_lockstep(settings: CollectSettings, problems: Sequence[Problem], step: int) -> list[Episode]:
    numbers = range(step * PER_STEP, (step + 1) * PER_STEP)
    return collect([problems[number] for number in numbers], numbers=numbers, **settings).episodes


def assert_alike(found: Sequence[Episode], expected: Sequence[Episode]) -> None:
    """But for rounding: which rows decode together differs."""
    for episode, twin in zip(found, expected, strict=True):
        assert (episode.token_ids, episode.versions) == (twin.token_ids, twin.versions)
        assert [turn.outcome for turn in episode.turns] == [turn.outcome for turn in twin.turns]
        assert (episode.number, episode.solved) == (twin.number, twin.solved)
        assert episode.logprobs == pytest.approx(twin.logprobs, abs=1e-4)


def test_without_staleness_the_run_is_the_synchronous_one(
    settings: CollectSettings, problems: list[Problem], weights: dict[str, Tensor]
) -> None:
    found: list[list[Episode]] = []
    with closing(rollouts(settings, problems, max_staleness=0)) as made:
        made.start(0)
        for step in range(2):
            found.append(made.take(step).episodes)
            made.push(moved(weights, step + 1), version=step + 1)
    settings["sampler"].push(weights.items(), version=0)
    for step in range(2):
        assert_alike(found[step], in_lockstep(settings, problems, step))
        settings["sampler"].push(moved(weights, step + 1), version=step + 1)


def test_no_token_is_older_than_the_staleness_allows_and_none_is_of_the_future(
    settings: CollectSettings, problems: list[Problem], weights: dict[str, Tensor]
) -> None:
    ages: set[int] = set()
    with closing(rollouts(settings, problems, max_staleness=2)) as made:
        made.start(0)
        for step in range(4):
            episodes = made.take(step).episodes
            assert [episode.number for episode in episodes] == list(
                range(step * PER_STEP, (step + 1) * PER_STEP)
            )
            ages |= {step - version for each in episodes for version in each.versions if version >= 0}
            made.push(moved(weights, step + 1), version=step + 1)
    assert ages <= {0, 1, 2}
    assert max(ages) > 0


def test_weights_that_arrive_midway_serve_the_same_episode(
    settings: CollectSettings, problems: list[Problem], weights: dict[str, Tensor]
) -> None:
    """Pushed as often as possible, so that some response is under way."""
    with closing(rollouts(settings, problems, max_staleness=3)) as made:
        made.start(0)
        for version in range(1, 30):
            made.push(weights.items(), version=version)
        episodes = [episode for step in range(4) for episode in made.take(step).episodes]
    mixed = [{version for version in each.versions if version >= 0} for each in episodes]
    assert any(len(versions) > 1 for versions in mixed)
    settings["sampler"].push(weights.items(), version=0)
    expected = [episode for step in range(4) for episode in in_lockstep(settings, problems, step)]
    assert [each.token_ids for each in episodes] == [each.token_ids for each in expected]


def test_while_paused_the_sampler_serves_others_and_the_episodes_go_on_afterwards(
    settings: CollectSettings, problems: list[Problem]
) -> None:
    with closing(rollouts(settings, problems, max_staleness=1)) as made:
        made.start(0)
        with made.paused():
            (response,) = settings["sampler"].generate([Request(stream=0, token_ids=[1, 5])], PARAMS)
        assert response.token_ids
        found = [episode for step in range(2) for episode in made.take(step).episodes]
    assert_alike(found, [episode for step in range(2) for episode in in_lockstep(settings, problems, step)])


@pytest.mark.parametrize("delay_steps", [0, 1])
def test_what_was_saved_under_way_is_what_it_would_have_become(
    settings: CollectSettings, problems: list[Problem], delay_steps: int
) -> None:
    with closing(rollouts(settings, problems, max_staleness=2)) as made:
        made.start(0)
        for step in range(delay_steps):
            made.take(step)
        with made.paused():
            saved = made.save()
    with closing(rollouts(settings, problems, max_staleness=2)) as made:
        made.start(delay_steps, [saved])
        found = [episode for step in range(delay_steps, 2) for episode in made.take(step).episodes]
    assert_alike(
        found,
        [episode for step in range(delay_steps, 2) for episode in in_lockstep(settings, problems, step)],
    )


def test_another_number_of_processes_goes_on_with_what_was_under_way(
    settings: CollectSettings, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All episodes of one step, done by two processes, and then taken by three of them: none is sampled."""
    saved: list[str] = []
    for rank in range(2):
        with closing(rollouts(settings, problems, max_staleness=1, steps=1, rank=rank, processes=2)) as made:
            made.start(0)
            made._in_loop(_all_done(made))
            with made.paused():
                saved.append(made.save())
    expected = in_lockstep(settings, problems, 0)
    monkeypatch.setattr(TorchSampler, "step", lambda self: pytest.fail(f"{self} sampled"))
    found: list[Episode] = []
    for rank in range(3):
        with closing(rollouts(settings, problems, max_staleness=1, steps=1, rank=rank, processes=3)) as made:
            made.start(0, saved)
            found += made.take(0).episodes
    assert_alike(sorted(found, key=lambda episode: episode.number), expected)


def test_episodes_that_are_done_are_saved_and_not_sampled_again(
    settings: CollectSettings, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(rollouts(settings, problems, max_staleness=1, steps=2)) as made:
        made.start(0)
        expected = made.take(0).episodes + made.take(1).episodes
        assert made.save() == "[]"
    with closing(rollouts(settings, problems, max_staleness=1, steps=2)) as made:
        made.start(0)
        made._in_loop(_all_done(made))
        with made.paused():
            saved = made.save()
    monkeypatch.setattr(TorchSampler, "step", lambda self: pytest.fail(f"{self} sampled"))
    with closing(rollouts(settings, problems, max_staleness=1, steps=2)) as made:
        made.start(0, [saved])
        assert_alike(made.take(0).episodes + made.take(1).episodes, expected)


async def _all_done(made: AsynchronousRollouts) -> None:
    for tasks in made._begun.values():
        for task in tasks:
            await task


def test_a_fault_of_the_sampler_is_raised_where_the_episodes_are_awaited(
    settings: CollectSettings, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: TorchSampler) -> list[Any]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(TorchSampler, "step", fail)
    with closing(rollouts(settings, problems, max_staleness=1)) as made:
        made.start(0)
        with pytest.raises(RuntimeError, match="out of memory"):
            made.take(0)


def test_a_sampler_that_hangs_ends_the_wait_with_the_episodes_that_are_missing(
    settings: CollectSettings, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    woken = Event()
    monkeypatch.setattr(TorchSampler, "step", lambda _: woken.wait() and [])
    monkeypatch.setattr(asynchronous, "_CLOSING_S", 0.2)
    settings["settings"] = settings["settings"].model_copy(update={"timeout_s": 1})
    with closing(rollouts(settings, problems, max_staleness=1)) as made:
        made.start(0)
        with pytest.raises(RunFault) as raised:
            made.take(0)
    woken.set()
    assert str(raised.value).startswith(
        "step 1: 4 of 4 episodes are missing after rollout.timeout_s = 1 s "
        "(number and state: 0 sampling, 1 sampling, 2 sampling, 3 sampling)"
    )


def test_random_feedback_from_incorrect_solutions_is_that_in_lockstep(
    settings: CollectSettings, problems: list[Problem]
) -> None:
    settings["feedback"] = "random"
    with pytest.raises(ValueError, match="lockstep"):
        rollouts(settings, problems, max_staleness=1)
    settings["unrelated"] = UnrelatedFeedback(problems, SETTINGS)
    with closing(rollouts(settings, problems, max_staleness=1)) as made:
        made.start(0)
        found = [made.take(step).episodes for step in range(2)]
    assert any(len(episode.turns) == 2 for episode in found[1])
    for step in range(2):
        assert_alike(found[step], in_lockstep(settings, problems, step))


def test_a_run_with_stale_rollouts_goes_on_from_its_checkpoint(tmp_path: Path, random_model: Path) -> None:
    settings = (f"model.path={random_model}", "rollout.max_staleness=1", "checkpoint.every_steps=2")
    run = run_here(tmp_path, "run.steps=3", *settings)
    first = read_lines(run / "metrics.jsonl")
    assert [line["staleness_max"] for line in first] == [0, 1, 1]
    resumed = run_here(tmp_path, "run.steps=5", *settings, resume=str(run / "checkpoints" / "step-000003"))
    lines = read_lines(resumed / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[:3] == first
    assert all(line["staleness_max"] <= 1 for line in lines)
