from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlef.config import Budget, Config, ConfigError, EvaluationConfig, RolloutConfig, RunConfig
from rlef.evaluation_folder import (
    EvaluationFolder,
    figures_of,
    identity_of,
    problems_digest,
    read_ended,
    weights_digest,
)
from rlef.measurement import Draw, draws_of, measure
from rlef.ports import SamplingParams
from rlef.records import Problem
from rlef.transcripts import Transcript
from rlef_sandbox import SandboxFault, Test
from tests.evaluation_examples import PASSED, WRONG, transcript

DRAW = Draw(feedback="true", temperature=1.0, top_p=0.95, turns=3, rollouts=3)
PARAMS = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=5, seed=1)


def problem(name: str, expected: str = "1") -> Problem:
    return Problem(
        id=name,
        statement=f"state {name}",
        public_tests=(Test("", expected),),
        private_tests=(Test("", expected),),
        time_limit_s=1.0,
        memory_limit_bytes=1,
        source="hand",
    )


PROBLEMS = [problem("a"), problem("b")]


class Played:
    """Plays dialogs out of a book, and fails at the first one whose number is `broken`."""

    def __init__(self, broken: int | None = None) -> None:
        self.batches: list[list[int]] = []
        self._broken = broken

    def __call__(
        self,
        problems: Sequence[Problem],
        *,
        numbers: Sequence[int],
        params: object,
        turns: int,
        feedback: str,
    ) -> list[Transcript]:
        if self._broken in numbers:
            raise SandboxFault("the machine is at fault")
        self.batches.append(list(numbers))
        assert (params, turns, feedback) == (PARAMS, DRAW.turns, DRAW.feedback)
        return [
            transcript(WRONG, PASSED, solved=True, problem=problem.id, number=number)
            for problem, number in zip(problems, numbers, strict=True)
        ]


def opened(path: Path) -> EvaluationFolder:
    return EvaluationFolder(path, {"seed": 1})


def complete(folder: EvaluationFolder, play: Played, *, draw: Draw = DRAW) -> list[Transcript]:
    transcripts = folder.read(draw, PROBLEMS)
    folder.complete(draw, PROBLEMS, transcripts, play=play, params=PARAMS, batch=4, note=lambda text: None)
    return transcripts


def test_rounds_over_the_problems_are_sampled_batch_by_batch(tmp_path: Path) -> None:
    play = Played()
    transcripts = complete(opened(tmp_path), play)
    assert play.batches == [[0, 1, 2, 3], [4, 5]]
    assert [found.problem_id for found in transcripts] == ["a", "b"] * 3


def test_what_was_sampled_before_a_fault_is_kept_and_not_sampled_again(tmp_path: Path) -> None:
    with pytest.raises(SandboxFault):
        complete(opened(tmp_path), Played(broken=5))
    again = Played()
    transcripts = complete(opened(tmp_path), again)
    assert again.batches == [[4, 5]]
    assert transcripts == opened(tmp_path).read(DRAW, PROBLEMS)
    finished = Played()
    assert complete(opened(tmp_path), finished) == transcripts
    assert finished.batches == []


def test_more_rollouts_leave_those_before_as_they_are_and_fewer_take_the_first(tmp_path: Path) -> None:
    before = complete(opened(tmp_path), Played())
    more = Draw(feedback="true", temperature=1.0, top_p=0.95, turns=3, rollouts=4)
    again = Played()
    assert complete(opened(tmp_path), again, draw=more)[:6] == before
    assert again.batches == [[6, 7]]
    fewer = Draw(feedback="true", temperature=1.0, top_p=0.95, turns=3, rollouts=1)
    assert opened(tmp_path).read(fewer, PROBLEMS) == before[:2]


def test_dialogs_of_something_else_are_not_gone_on_with(tmp_path: Path) -> None:
    opened(tmp_path)
    with pytest.raises(ConfigError, match="holds dialogs whose seed is 1, not 2: name another folder"):
        EvaluationFolder(tmp_path, {"seed": 2})


def test_a_file_whose_lines_are_out_of_their_order_is_refused(tmp_path: Path) -> None:
    complete(opened(tmp_path), Played())
    (path,) = (tmp_path / "transcripts").glob("*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(reversed(lines)))
    with pytest.raises(ConfigError, match="line 1: number 5 of problem 'b' in the place of number 0 of 'a'"):
        opened(tmp_path).read(DRAW, PROBLEMS)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file cannot be written .*; name another folder"):
        opened(tmp_path / "file")


def test_whatever_a_dialog_depends_on_is_in_the_identity() -> None:
    config = Config()
    identity = identity_of(config, PROBLEMS, weights="w")
    others = [
        identity_of(config, PROBLEMS, weights="v"),
        identity_of(config, [problem("a"), problem("b", "2")], weights="w"),
        identity_of(config.model_copy(update={"run": RunConfig(seed=2)}), PROBLEMS, weights="w"),
        identity_of(
            config.model_copy(update={"rollout": RolloutConfig(max_response_tokens=5)}), PROBLEMS, weights="w"
        ),
        identity_of(
            config.model_copy(update={"evaluation": EvaluationConfig(turn_limits=(2,))}),
            PROBLEMS,
            weights="w",
        ),
        identity_of(config, PROBLEMS, weights=None),
    ]
    assert all(other != identity for other in others)
    assert problems_digest(PROBLEMS) == problems_digest([problem("a"), problem("b")])


def test_weights_that_were_trained_on_have_another_digest(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    before = weights_digest(tmp_path)
    weights.write_bytes(b"two")
    assert weights_digest(tmp_path) != before


def ended(path: Path) -> Config:
    evaluation = EvaluationConfig(
        budgets=(Budget(n=1, k=3, temperature=1.0, top_p=0.95),),
        turn_limits=(1, 3),
        feedback=("true",),
        rollouts_per_problem=3,
        bootstrap_samples=5,
    )
    config = Config(evaluation=evaluation)
    folder = opened(path)
    transcripts = complete(folder, Played())
    cells = measure(dict.fromkeys(draws_of(evaluation), transcripts), evaluation, seed=1)
    folder.write_figures(figures_of(cells, config, {"seed": 1}))
    return config


def test_an_evaluation_that_has_ended_is_read_with_its_settings(tmp_path: Path) -> None:
    config = ended(tmp_path)
    found = read_ended(tmp_path)
    assert found.evaluation == config.evaluation
    assert {draw: len(transcripts) for draw, transcripts in found.drawn.items()} == {DRAW: 6}
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    assert [cell["solve_rates"]["1@3"]["value"] for cell in figures["cells"]] == [0.0, 1.0]


@pytest.mark.parametrize("content", ["{}", '{"evaluation": {}, "identity": {}, "cells": []}', "[]", "{"])
def test_figures_that_are_not_ours_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(ConfigError, match=r"evaluation.json .*evaluate again"):
        read_ended(tmp_path)


def test_a_folder_without_figures_or_with_dialogs_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation.json is missing: name the folder of an evaluation"):
        read_ended(tmp_path)
    ended(tmp_path)
    (path,) = (tmp_path / "transcripts").glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ConfigError, match="jsonl is incomplete; evaluate again into the same folder"):
        read_ended(tmp_path)
