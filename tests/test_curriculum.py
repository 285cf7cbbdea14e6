"""Problems that are left out for a while, compared with a twin that sees the whole history at once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlef.config import Config, ConfigError, PPOConfig, ProblemsConfig, RolloutConfig
from rlef.curriculum import Curriculum, Progress
from rlef.hidden_conventions import generate
from rlef.problems import Cursor
from rlef.records import Problem

PROBLEMS = list(generate("train", seed=0, size=7))
STEPS = 8

# Whether a problem is solved at its n-th visit.
Nature = Callable[[str, int], bool]


def config_of(*, episodes: int = 3, staleness: int = 0, **settings: int) -> Config:
    return Config(
        problems=ProblemsConfig(**settings),
        rollout=RolloutConfig(episodes_per_step=episodes, max_staleness=staleness),
        ppo=PPOConfig(updates_per_step=1),
    )


def cursor(problems: Sequence[Problem] = PROBLEMS) -> Cursor:
    return Cursor(list(problems), seed=4)


def solved_of(problems: Sequence[Problem], nature: Nature, visits: Counter[str]) -> list[bool]:
    solved = []
    for problem in problems:
        solved.append(nature(problem.id, visits[problem.id]))
        visits[problem.id] += 1
    return solved


def played(config: Config, nature: Nature, *, steps: int = STEPS) -> list[list[str]]:
    """The ids of each step, with outcomes recorded as they come."""
    curriculum = Curriculum(cursor(), config, step=0, progress=None)
    visits: Counter[str] = Counter()
    taken = []
    for step in range(steps):
        problems = curriculum.problems_of(step)
        taken.append([problem.id for problem in problems])
        curriculum.record(solved_of(problems, nature, visits))
    return taken


def twin(config: Config, nature: Nature) -> list[list[str]]:
    """The rule as docs/problems.md has it, problem by problem."""
    settings, staleness = config.problems, config.rollout.max_staleness
    endless, place = cursor(), 0
    visits: Counter[str] = Counter()
    last_round: dict[str, int] = {}  # in which it is left out
    history: dict[str, list[bool]] = {problem.id: [] for problem in PROBLEMS}
    steps: list[list[str]] = []
    outcomes: list[list[tuple[str, bool]]] = []
    for step in range(STEPS):
        steps.append([])
        while len(steps[step]) < config.rollout.episodes_per_step:
            (problem,) = endless.take(1)
            if last_round.get(problem.id, -1) < place // len(PROBLEMS):
                steps[step].append(problem.id)
            place += 1
        outcomes.append([])
        for name in steps[step]:
            outcomes[step].append((name, nature(name, visits[name])))
            visits[name] += 1
        for name, solved in outcomes[step - staleness] if step >= staleness else []:
            history[name].append(solved)
            limit = settings.skip_after_solved if solved else settings.skip_after_unsolved
            if limit and history[name][-limit:] == [solved] * limit:
                last_round[name] = (place - 1) // len(PROBLEMS) + settings.skip_rounds
    return steps


natures = st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=7, max_size=7).map(
    lambda table: (
        lambda name, visit: (row := table[[problem.id for problem in PROBLEMS].index(name)])[visit % len(row)]
    )
)
configs = st.builds(
    config_of,
    episodes=st.integers(1, 9),
    staleness=st.integers(0, 3),
    skip_after_solved=st.integers(0, 3),
    skip_after_unsolved=st.integers(0, 3),
    skip_rounds=st.integers(1, 3),
)


@given(configs, natures)
def test_what_is_left_out_is_what_the_history_says(config: Config, nature: Nature) -> None:
    assert played(config, nature) == twin(config, nature)


@given(st.integers(1, 9), st.integers(0, 3), natures)
def test_with_nothing_left_out_the_order_is_that_of_the_cursor(
    episodes: int, staleness: int, nature: Nature
) -> None:
    plain = cursor()
    expected = [[problem.id for problem in plain.take(episodes)] for _ in range(STEPS)]
    assert played(config_of(episodes=episodes, staleness=staleness), nature) == expected


@given(configs, natures, st.integers(1, STEPS - 1))
def test_a_run_that_is_resumed_takes_what_it_would_have_taken(
    config: Config, nature: Nature, stop: int
) -> None:
    """Through the JSON of a checkpoint, with the next steps begun before it or not."""
    whole, visits = played(config, nature), Counter[str]()
    curriculum, saved = Curriculum(cursor(), config, step=0, progress=None), ""
    for step in range(stop):
        progress = curriculum.record(solved_of(curriculum.problems_of(step), nature, visits))
        saved = json.dumps(asdict(progress))
        curriculum.problems_of(step + 1 + config.rollout.max_staleness)
    resumed = Curriculum(cursor(), config, step=stop, progress=Progress(**json.loads(saved)))
    for step in range(stop, STEPS):
        problems = resumed.problems_of(step)
        assert [problem.id for problem in problems] == whole[step]
        resumed.record(solved_of(problems, nature, visits))


def test_a_solved_problem_is_left_out_for_so_many_rounds_and_then_visited_again() -> None:
    config = config_of(episodes=7, skip_after_solved=2, skip_rounds=2)
    steps = played(config, lambda name, _: name == PROBLEMS[0].id, steps=6)
    taken = [name for step in steps for name in step]
    others = [problem.id for problem in PROBLEMS[1:]]
    assert taken[:14].count(PROBLEMS[0].id) == 2
    assert taken[14 : 14 + 12].count(PROBLEMS[0].id) == 0  # two rounds of six
    assert sorted(taken[26 : 26 + 7]) == sorted([PROBLEMS[0].id, *others])


def test_problems_that_are_all_left_out_come_back_when_their_rounds_are_over() -> None:
    config = config_of(episodes=7, skip_after_unsolved=1, skip_rounds=3)
    steps = played(config, lambda *_: False, steps=3)
    assert all(sorted(step) == sorted(problem.id for problem in PROBLEMS) for step in steps)


def test_the_metrics_count_what_is_visited_and_what_is_not_and_why() -> None:
    config = config_of(episodes=7, skip_after_solved=1, skip_after_unsolved=1)
    curriculum = Curriculum(cursor(), config, step=0, progress=None)
    solved = [problem.id in {PROBLEMS[0].id, PROBLEMS[1].id} for problem in curriculum.problems_of(0)]
    assert curriculum.record(solved).metrics() == {
        "problems/active": 0.0,
        "problems/skipped_solved": 2.0,
        "problems/skipped_unsolved": 5.0,
    }


def test_a_checkpoint_of_other_problems_is_refused() -> None:
    config = config_of(skip_after_solved=1, staleness=1)
    progress = Curriculum(cursor(), config, step=0, progress=None).record([True] * 3)
    (lost,) = {name for names in progress.chosen for name in names[:1]}
    fewer = [problem for problem in PROBLEMS if problem.id != lost]
    with pytest.raises(
        ConfigError,
        match=rf"^problems\.train holds 6 problems, and the checkpoint is of 7, with '{lost}' among them; ",
    ):
        Curriculum(cursor(fewer), config, step=1, progress=progress)
