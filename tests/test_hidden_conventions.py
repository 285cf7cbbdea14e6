"""The embedded problem source."""

from __future__ import annotations

import pytest

from rlef.hidden_conventions import (
    MINIMUM_READINGS,
    SPLITS,
    TASKS,
    Task,
    generate,
    problem,
    run_reference,
    split_readings,
    split_wordings,
    task_of,
)
from rlef_sandbox import Executor, Job, Verdict

by_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@by_task
def test_every_statement_has_enough_readings_that_three_guesses_solve_at_most_a_quarter(task: Task) -> None:
    readings = len(set(task.readings()))
    assert readings >= MINIMUM_READINGS
    assert 1 - (1 - 1 / readings) ** 3 <= 0.25


@by_task
def test_the_public_tests_expected_output_tells_all_readings_apart(task: Task) -> None:
    for index in range(TASKS.index(task), 10 * len(TASKS), len(TASKS)):
        (public_test,) = problem("train", seed=3, index=index).public_tests
        outputs = [run_reference(task.program(reading), public_test.input) for reading in task.readings()]
        as_judged = [tuple(output.lower().split()) for output in outputs]
        assert len(set(as_judged)) == len(as_judged)


@by_task
def test_no_reading_and_no_wording_of_a_task_is_in_both_splits(task: Task) -> None:
    readings, wordings = split_readings(task.name), split_wordings(task.name)
    assert not set(readings["train"]) & set(readings["heldout"])
    assert not set(wordings["train"]) & set(wordings["heldout"])
    assert set(readings["train"]) | set(readings["heldout"]) == set(task.readings())
    assert all(readings[split] and wordings[split] for split in SPLITS)


@by_task
def test_training_sees_every_choice_of_every_axis_of_a_task_with_several(task: Task) -> None:
    if len(task.axes) == 1:
        assert len(split_readings(task.name)["heldout"]) == len(task.readings()) // 4
        return
    for place, axis in enumerate(task.axes):
        assert {reading[place] for reading in split_readings(task.name)["train"]} == set(axis.choices)


def test_the_same_seed_gives_the_same_problems_and_another_seed_others() -> None:
    first = list(generate("heldout", seed=5, size=32))
    assert first == list(generate("heldout", seed=5, size=32))
    assert [item.public_tests for item in first] != [
        item.public_tests for item in generate("heldout", seed=6, size=32)
    ]


def test_a_problem_depends_on_its_index_alone_not_on_how_many_are_made() -> None:
    assert list(generate("train", seed=1, size=20))[13] == problem("train", seed=1, index=13)


def test_problem_ids_are_unique_and_name_their_task() -> None:
    problems = list(generate("train", seed=0, size=64))
    assert len({item.id for item in problems}) == 64
    assert task_of(problems[0]) is TASKS[0]


def test_the_held_out_reference_programs_pass_their_tests_in_the_executor() -> None:
    problems = list(generate("heldout", seed=0, size=2 * len(TASKS)))
    with Executor(workers=1) as executor:
        all_results = executor.run_many(
            [Job(item.solutions[0], item.public_tests + item.private_tests) for item in problems]
        )
    assert {result.verdict for results in all_results for result in results} == {Verdict.PASSED}


def test_another_reading_fails_the_public_test_in_the_executor() -> None:
    item = problem("train", seed=0, index=0)
    task = task_of(item)
    wrong = [
        program for reading in task.readings() if (program := task.program(reading)) not in item.solutions
    ]
    with Executor(workers=1) as executor:
        all_results = executor.run_many([Job(program, item.public_tests) for program in wrong])
    assert {result.verdict for results in all_results for result in results} == {Verdict.WRONG_OUTPUT}


def test_an_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="split 'test' is not one of train, heldout"):
        problem("test", seed=0, index=0)
