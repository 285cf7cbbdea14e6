"""Episodes that overlap: what goes on while a program runs, and that it changes no episode."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlef import problems as sources
from rlef.config import RolloutConfig
from rlef.ports import Request, Response, SamplingParams
from rlef.pretrained import model_folder, read_pretrained
from rlef.prompts import Dialog
from rlef.records import Episode, Problem
from rlef.rollout import Collection, CollectSettings, collect
from rlef.streaming import Episodes, collect_overlapped
from rlef.torch_sampler import TorchSampler
from rlef_sandbox import Executor, Test
from tests.small_runs import small_config

SETTINGS = RolloutConfig(max_response_tokens=64, max_prompt_tokens=256, max_feedback_tokens=128, slots=4)
PARAMS = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=64, seed=5)


@pytest.fixture(scope="module")
def dialog() -> Dialog:
    return Dialog.read(model_folder("embedded"), SETTINGS)


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(workers=2) as executor:
        yield executor


@pytest.fixture(scope="module")
def sampler(dialog: Dialog) -> TorchSampler:
    shape, weights = read_pretrained(model_folder("embedded"))
    made = TorchSampler(shape, end_token_id=dialog.end_token_id, slots=SETTINGS.slots)
    made.push(weights.items(), version=3)
    return made


def settings(sampler: TorchSampler, executor: Executor, dialog: Dialog) -> CollectSettings:
    return CollectSettings(
        sampler=sampler,
        executor=executor,
        dialog=dialog,
        settings=SETTINGS,
        params=PARAMS,
        turns=3,
        feedback="true",
    )


def test_overlapping_changes_no_episode_but_by_rounding(
    sampler: TorchSampler, executor: Executor, dialog: Dialog, tmp_path: Path
) -> None:
    problems = sources.load(small_config(tmp_path), "train")[:12]
    waits = settings(sampler, executor, dialog)
    expected = collect(problems, numbers=range(12), **waits)
    found = collect_overlapped(problems, numbers=range(12), **waits)
    assert found.tests_run == expected.tests_run
    assert any(len(episode.turns) > 1 for episode in found.episodes)
    for episode, twin in zip(found.episodes, expected.episodes, strict=True):
        assert episode.token_ids == twin.token_ids
        assert [turn.outcome for turn in episode.turns] == [turn.outcome for turn in twin.turns]
        assert (episode.solved, episode.versions) == (twin.solved, twin.versions)
        assert episode.logprobs == pytest.approx(twin.logprobs, abs=1e-4)


def problem(name: str) -> Problem:
    return Problem(
        id=name,
        statement="Print the number.",
        public_tests=(Test("7\n", "7\n"),),
        private_tests=(Test("8\n", "8\n"),),
        time_limit_s=5.0,
        memory_limit_bytes=1 << 28,
        source="test",
    )


class Programs:
    """A sampler that answers at once; stream 0 with a program that sleeps."""

    def __init__(self, dialog: Dialog, *, fault: Exception | None = None) -> None:
        self._dialog = dialog
        self._fault = fault
        self._submitted: list[int] = []
        self.aborted = False

    def submit(self, request: Request, params: SamplingParams) -> None:
        self._submitted.append(request.stream)

    def step(self) -> list[tuple[int, Response]]:
        if self._fault is not None:
            raise self._fault
        streams, self._submitted = self._submitted, []
        return [(stream, self._answer(stream)) for stream in streams]

    def abort(self) -> list[tuple[int, Response]]:
        self.aborted = True
        return []

    def _answer(self, stream: int) -> Response:
        wait = "import time\ntime.sleep(1)\n" if stream == 0 else ""
        ids = self._dialog.response(f"```python\n{wait}print(input())\n```")
        return Response(
            token_ids=ids, logprobs=[0.0] * len(ids), versions=[0] * len(ids), finish_reason="stop"
        )

    def generate(self, requests: object, params: object) -> list[Response]:
        raise NotImplementedError

    def push(self, named_weights: object, version: int) -> None:
        raise NotImplementedError


def test_no_episode_waits_for_the_program_of_another(executor: Executor, dialog: Dialog) -> None:
    made = Episodes(
        sampler=Programs(dialog),
        executor=executor,
        dialog=dialog,
        settings=SETTINGS,
        params=PARAMS,
        turns=1,
        feedback="true",
        unrelated=None,
    )
    done: list[int] = []

    async def note(number: int) -> Episode:
        episode = await made.episode(problem(str(number)), number)
        done.append(number)
        return episode

    async def both() -> list[Episode]:
        sampling = asyncio.create_task(made.sample())
        episodes = await asyncio.gather(note(0), note(1))
        sampling.cancel()
        return episodes

    assert all(episode.solved for episode in asyncio.run(both()))
    assert done == [1, 0]
    assert made.waiting_s > 0.5


def test_a_fault_of_the_sampler_ends_all_episodes_and_is_raised(executor: Executor, dialog: Dialog) -> None:
    broken = Programs(dialog, fault=RuntimeError("out of memory"))

    def run() -> Collection:
        waits = settings(broken, executor, dialog)  # type: ignore[arg-type]
        return collect_overlapped([problem("a"), problem("b")], numbers=[0, 1], **waits)

    with pytest.raises(RuntimeError, match="out of memory"):
        run()
    assert broken.aborted
