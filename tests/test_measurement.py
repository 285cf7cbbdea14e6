from __future__ import annotations

from collections.abc import Sequence

import pytest

from rlef.analysis import Repairs
from rlef.config import Budget, Config, EvaluationConfig, FeedbackKind
from rlef.measurement import Cell, Draw, at_its_extremes, draws_of, measure, rates_of
from rlef.transcripts import Transcript
from tests.evaluation_examples import PASSED, RAISED, WRONG, transcript

ONE_AT_THREE = Budget(n=1, k=3, temperature=0.2, top_p=0.95)
ONE = Budget(n=1, k=1, temperature=0.2, top_p=0.95)


def evaluation(
    *budgets: Budget,
    limits: tuple[int, ...] = (1, 3),
    feedback: tuple[FeedbackKind, ...] = ("true",),
    rollouts: int = 4,
) -> EvaluationConfig:
    return EvaluationConfig(
        budgets=budgets or (ONE_AT_THREE,),
        turn_limits=limits,
        feedback=feedback,
        rollouts_per_problem=rollouts,
        bootstrap_samples=20,
    )


def cells(transcripts: Sequence[Transcript], settings: EvaluationConfig) -> dict[int, Cell]:
    """By turn limit, of the only way to draw."""
    (draw,) = draws_of(settings)
    return {cell.turn_limit: cell for cell in measure({draw: transcripts}, settings, seed=1)}


def test_budgets_that_are_drawn_alike_share_their_dialogs_which_are_as_many_as_the_largest_takes() -> None:
    hot = Budget(n=10, k=100, temperature=1.0, top_p=0.95)
    settings = evaluation(
        ONE_AT_THREE,
        hot,
        hot.model_copy(update={"n": 1, "k": 10}),
        limits=(3, 5),
        feedback=("true", "none"),
        rollouts=20,
    )
    assert draws_of(settings) == [
        Draw(feedback="true", temperature=0.2, top_p=0.95, turns=5, rollouts=20),
        Draw(feedback="none", temperature=0.2, top_p=0.95, turns=5, rollouts=20),
        Draw(feedback="true", temperature=1.0, top_p=0.95, turns=5, rollouts=33),
        Draw(feedback="none", temperature=1.0, top_p=0.95, turns=5, rollouts=33),
    ]


def test_the_papers_budgets_take_so_many_dialogs() -> None:
    settings = EvaluationConfig()
    cold = {
        limit: [(rate.name, rate.samples) for rate in rates_of(settings, 0.2, 0.95, limit)]
        for limit in (1, 3, 5)
    }
    assert cold == {
        1: [("1@1", 1), ("1@3", 3), ("pass@3", 3)],
        3: [("1@3", 1), ("pass@3", 1)],
        5: [("1@5", 1)],  # three responses do not pay for a dialog of five
    }
    hot = {rate.name: (rate.n, rate.samples) for rate in rates_of(settings, 1.0, 0.95, 3)}
    assert hot == {"1@3": (1, 1), "10@100": (10, 33), "pass@100": (33, 33)}


def test_every_limit_is_measured_on_the_beginnings_of_the_same_dialogs() -> None:
    dialogs = [
        transcript(WRONG, WRONG, PASSED, solved=True),
        transcript(PASSED, solved=True),
        transcript(RAISED, PASSED),
        transcript(WRONG, RAISED, WRONG),
    ]
    found = cells(dialogs, evaluation(limits=(1, 2, 3)))
    assert {limit: cell.solve_rates[f"1@{limit}"].value for limit, cell in found.items()} == {
        1: 0.25,
        2: 0.25,
        3: 0.5,
    }
    assert [cell.mean_turns for cell in found.values()] == [1.0, 1.75, 2.25]
    assert found[1].transitions == {}
    assert found[3].repairs == {
        "exception": Repairs(failed=1, repaired=0),
        "wrong_output": Repairs(failed=2, repaired=1),
    }
    assert [cell.repair_rate for cell in found.values()] == [0.0, 0.0, pytest.approx(1 / 3)]


def test_three_first_responses_are_chosen_from_by_the_public_tests() -> None:
    """Of four dialogs two pass at once, of which one solves: of three first responses two or one do."""
    dialogs = [
        transcript(PASSED, solved=True),
        transcript(PASSED),
        transcript(WRONG, PASSED),
        transcript(WRONG),
    ]
    rates = cells(dialogs, evaluation(limits=(1,)))[1].solve_rates
    assert rates["1@3"].value == pytest.approx(0.5)  # 2 of 4 choices hold both, and 1 each alone
    assert rates["pass@3"].value == pytest.approx(0.75)
    assert rates["1@1"].value == pytest.approx(0.25)


def test_costs_are_of_all_dialogs_over_those_that_solve() -> None:
    dialogs = [transcript(WRONG, PASSED, solved=True), transcript(WRONG, WRONG, WRONG)]
    first, whole = cells(dialogs, evaluation(ONE, limits=(1, 3), rollouts=2)).values()
    assert (first.response_tokens_per_solve, first.seconds_per_solve) == (None, None)  # nothing is solved
    assert (whole.response_tokens_per_solve, whole.prompt_tokens_per_solve) == (10.0, 100.0)
    assert whole.seconds_per_solve == 2.5


def test_seconds_at_a_lower_limit_are_of_the_turns_up_to_it() -> None:
    dialogs = [transcript(PASSED, solved=True), transcript(WRONG, PASSED, solved=True)]
    first, whole = cells(dialogs, evaluation(ONE, limits=(1, 3), rollouts=2)).values()
    assert (first.seconds_per_solve, whole.seconds_per_solve) == (1.0, 0.75)


def test_a_server_that_does_not_count_leaves_costs_unknown() -> None:
    dialogs = [transcript(PASSED, solved=True, tokens=None), transcript(PASSED, solved=True)]
    (cell,) = cells(dialogs, evaluation(ONE, limits=(1,), rollouts=2)).values()
    assert (cell.response_tokens_per_solve, cell.prompt_tokens_per_solve) == (None, None)


def test_the_same_figure_has_the_same_interval() -> None:
    dialogs = [transcript(PASSED, solved=place % 3 == 0, problem=f"p{place % 2}") for place in range(8)]
    rates = cells(dialogs, evaluation(limits=(3,)))[3].solve_rates
    assert rates["1@3"] == rates["pass@3"]
    assert rates["1@3"].low < rates["1@3"].value < rates["1@3"].high


def test_checks_look_at_the_longest_dialogs_and_the_least_warm_ones() -> None:
    budgets = [ONE.model_copy(update={"temperature": temperature}) for temperature in (0.0, 0.7, 0.3)]
    config = at_its_extremes(Config(evaluation=evaluation(*budgets, limits=(1, 7, 3))))
    assert (config.evaluation.turns, config.evaluation.temperature) == (7, 0.3)
    cold = at_its_extremes(Config(evaluation=evaluation(budgets[0])))
    assert cold.evaluation.temperature == 0.0
