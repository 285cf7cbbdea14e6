"""The cluster that bench/overlap.py simulates, against what no schedule can beat."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.simulated_cluster import Cluster, Course, Schedule, disaggregated, least_seconds, simulate
from rlef.config import RolloutConfig
from rlef.pretrained import model_folder
from rlef.prompts import Dialog

PAIR = Cluster(samplers=2, slots=4, episodes=2, steps=3, token_s=0.1, learning_s=1.0, push_s=0.0)


def solved(tokens: int) -> Course:
    """One response, whose program takes no time."""
    return Course(tokens=(tokens,), programs_s=(0.0,), private_s=0.0)


SECOND = [solved(10)] * 6  # each episode takes a second


@pytest.mark.parametrize(
    ("max_staleness", "seconds"),
    [
        (0, 6.0),  # 3 x (a second of sampling, a second of learning)
        (1, 4.0),  # a second of sampling, 3 of learning: the next step's episodes are there when it is over
        (2, 4.0),
    ],
)
def test_with_equal_lengths_the_bound_can_be_counted(max_staleness: int, seconds: float) -> None:
    assert least_seconds(replace(PAIR, max_staleness=max_staleness), SECOND) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("schedule", "max_staleness", "least", "most"),
    [("lockstep", 0, 6.0, None), ("overlap", 0, 6.0, None), ("asynchronous", 1, 4.0, 6.0)],
)
def test_the_real_rollouts_take_what_the_bound_says_and_this_machines_time(
    schedule: Schedule, max_staleness: int, least: float, most: float | None
) -> None:
    dialog = Dialog.read(model_folder("embedded"), RolloutConfig())
    cluster = replace(PAIR, schedule=schedule, max_staleness=max_staleness)
    found = simulate(cluster, SECOND, dialog, scale=1.0)
    assert least <= found.seconds
    assert most is None or found.seconds < most  # what no run without staleness can reach
    assert found.staleness_max == max_staleness


def test_a_rank_waits_for_the_longest_episode_of_all() -> None:
    courses = [solved(10), solved(30)] * 3
    assert least_seconds(PAIR, courses) == pytest.approx(3 * (3 + 1))


def test_what_a_response_takes_is_its_tokens_and_its_programs_turn_by_turn() -> None:
    course = Course(tokens=(10, 20), programs_s=(0.5, 0.25), private_s=2.0)
    assert course.seconds(0.1) == pytest.approx(1 + 0.5 + 2 + 0.25 + 2)


def test_a_rank_decodes_no_more_at_once_than_it_has_slots() -> None:
    """Two episodes of a second, one slot: two seconds a step, which no staleness shortens."""
    single = replace(PAIR, samplers=1, slots=1, steps=2)
    assert least_seconds(single, SECOND) == pytest.approx(2 * (2 + 1))
    assert least_seconds(replace(single, max_staleness=1), SECOND) == pytest.approx(2 + 2 + 1)


def test_ranks_that_only_learn_leave_the_sampling_to_the_others() -> None:
    apart = disaggregated(replace(PAIR, samplers=6), trainers=2)
    assert (apart.samplers, apart.learning_s) == (4, 3.0)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=6, max_size=6),
    learning_s=st.integers(1, 5),
    max_staleness=st.integers(0, 3),
)
def test_staleness_never_costs_time_and_never_saves_more_than_all_the_waiting(
    lengths: list[int], learning_s: int, max_staleness: int
) -> None:
    cluster = replace(PAIR, learning_s=float(learning_s), max_staleness=max_staleness)
    courses = [solved(tokens) for tokens in lengths]
    least = least_seconds(cluster, courses)
    first = 0.1 * max(lengths[:2])
    assert least >= first + cluster.steps * learning_s - 1e-9
    assert least >= least_seconds(replace(cluster, max_staleness=max_staleness + 1), courses) - 1e-9
