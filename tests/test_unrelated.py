"""Random feedback from incorrect solutions of other problems, with the real executor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from rlef.config import Config, ConfigError, ProblemsConfig, RolloutConfig
from rlef.hidden_conventions import generate
from rlef.pretrained import model_folder
from rlef.prompts import Dialog
from rlef.records import Problem
from rlef.rollout import collect
from rlef.streaming import collect_overlapped
from rlef.unrelated import (
    Place,
    UnrelatedFeedback,
    check_random_feedback,
    kind_of_random_feedback,
    unrelated_feedback,
)
from rlef_sandbox import Executor, Test
from tests.test_rollout import DOUBLE, PARAMS, PLUS_TWO, SETTINGS, Script, problem


def telling(name: str, *numbers: int) -> Problem:
    """Of its incorrect solutions each prints a number; 7 is right in public."""
    return Problem(
        id=name,
        statement="Print seven.",
        public_tests=(Test(name, "7\n"),),
        private_tests=(Test("", "8\n"),),
        time_limit_s=2.0,
        memory_limit_bytes=1 << 28,
        source="test",
        incorrect_solutions=tuple(f"print({number})" for number in numbers),
    )


def place(problem_id: str, number: int = 0, turn: int = 1) -> Place:
    return Place(problem_id=problem_id, number=number, turn=turn)


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(workers=1) as executor:
        yield executor


def told(
    executor: Executor, problems: Sequence[Problem], places: Sequence[Place], seed: int = 0
) -> list[str]:
    return UnrelatedFeedback(problems, SETTINGS).messages(places, seed=seed, executor=executor)


def test_a_message_is_that_of_another_problems_wrong_program_on_its_public_tests(executor: Executor) -> None:
    problems = [telling("own", 1, 2), telling("other", 3)]
    messages = told(executor, problems, [place("own", number) for number in range(20)])
    assert len(set(messages)) == 1
    assert "- input:\nother\nexpected output:\n7\nyour output:\n3\n" in messages[0]


def test_which_program_depends_on_seed_episode_and_turn_alone(executor: Executor) -> None:
    problems = [telling(f"p{index}", 10 * index, 10 * index + 1) for index in range(8)]
    places = [place("p0", number, turn) for number in range(8) for turn in (1, 2)]
    messages = told(executor, problems, places)
    assert len(set(messages)) > 5
    assert told(executor, problems, places[::-1]) == messages[::-1]
    assert told(executor, problems, places, seed=1) != messages


def test_a_program_that_passes_its_public_tests_tells_nothing_and_is_passed_over(executor: Executor) -> None:
    problems = [telling("own", 1), telling("right", 7, 7), telling("other", 7, 5, 7)]
    for message in told(executor, problems, [place("own", number) for number in range(9)]):
        assert "- input:\nother\nexpected output:\n7\nyour output:\n5\n" in message


def test_a_set_whose_wrong_programs_all_pass_in_public_is_an_error(executor: Executor) -> None:
    with pytest.raises(ConfigError, match="none of the incorrect solutions of 2 problems fails a public"):
        told(executor, [telling("own", 1), telling("right", 7)], [place("own")])


def test_each_program_runs_once() -> None:
    problems = [telling("own", 1), telling("other", 3)]
    unrelated = UnrelatedFeedback(problems, SETTINGS)
    with Executor(workers=1) as executor:
        first = unrelated.messages([place("own")], seed=0, executor=executor)
    assert unrelated.messages([place("own", 5, 2)], seed=0, executor=executor) == first  # that is closed


def test_dialogs_are_the_same_in_lockstep_and_overlapped(executor: Executor) -> None:
    dialog = Dialog.read(model_folder("embedded"), SETTINGS)
    others = [telling(f"p{index}", index, index + 20) for index in range(4)]
    given = [problem(f"double{index}") for index in range(3)]
    lines = [PLUS_TWO, PLUS_TWO, DOUBLE], [PLUS_TWO, DOUBLE], ["no idea", PLUS_TWO, PLUS_TWO]
    both = [
        collector(
            given,
            numbers=range(3),
            sampler=Script(dialog, *lines),
            executor=executor,
            dialog=dialog,
            settings=SETTINGS,
            params=PARAMS,
            turns=3,
            feedback="random",
            unrelated=UnrelatedFeedback(others, SETTINGS),
        ).episodes
        for collector in (collect, collect_overlapped)
    ]
    assert [episode.token_ids for episode in both[0]] == [episode.token_ids for episode in both[1]]
    messages = [
        dialog.told(episode.token_ids[turn.end : later.start])
        for episode in both[0]
        for turn, later in itertools.pairwise(episode.turns)
    ]
    assert len(messages) == 2 + 1 + 2
    assert all(message.startswith("Your code failed these tests:\n- input:\np") for message in messages)


def test_the_embedded_problems_ship_another_reading_that_fails_in_public(executor: Executor) -> None:
    problems = list(generate("heldout", seed=0, size=18))
    places = [place(problem.id, number) for number, problem in enumerate(problems)]
    for message in told(executor, problems, places):
        assert "\nexpected output:\n" in message
        assert "\nyour output:\n" in message


def test_less_than_two_problems_with_wrong_programs_are_too_few() -> None:
    few = [telling("a", 1), telling("b")]
    assert unrelated_feedback(few, SETTINGS) is None
    assert kind_of_random_feedback(few) == "other dialogs of the same batch"
    enough = [*few, telling("c", 2)]
    assert unrelated_feedback(enough, SETTINGS) is not None
    assert kind_of_random_feedback(enough) == "incorrect solutions of other problems"


@pytest.mark.parametrize("setting", [{"overlap": True}, {"max_staleness": 1}])
def test_training_out_of_step_needs_incorrect_solutions_for_random_feedback(setting: dict[str, Any]) -> None:
    config = Config(
        problems=ProblemsConfig(train="p.jsonl"), rollout=RolloutConfig(feedback="random", **setting)
    )
    check_random_feedback(config, [telling("a", 1), telling("b", 2)])
    with pytest.raises(
        ConfigError,
        match=r"1 problems of problems.train = 'p.jsonl' have incorrect_solutions; .* "
        r"rollout.overlap = false and rollout.max_staleness = 0",
    ):
        check_random_feedback(config, [telling("a", 1), telling("b")])
