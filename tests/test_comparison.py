from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from rlef.comparison import Difference, compare_evaluations, comparison_table
from rlef.config import Budget, ConfigError
from tests.evaluation_examples import evaluated

BEFORE = [[True, False], [True, True], [False, False], [False, False]]
AFTER = [[False, False], [True, True], [True, True], [True, False]]


def by_name(differences: Sequence[Difference]) -> dict[tuple[int, str], Difference]:
    return {(row.turn_limit, row.name): row for row in differences}


def test_a_difference_is_that_of_the_rates_with_the_problems_that_each_solves_alone(tmp_path: Path) -> None:
    rows = by_name(compare_evaluations(evaluated(tmp_path / "a", BEFORE), evaluated(tmp_path / "b", AFTER)))
    assert set(rows) == {(1, "1@1"), (1, "1@2"), (1, "pass@2"), (2, "1@2"), (2, "pass@2")}
    row = rows[2, "1@2"]
    assert (row.first, row.second, row.difference.value) == (0.375, 0.625, 0.25)
    assert (row.only_first, row.only_second) == (1, 2)
    assert row.difference.low < 0.25 < row.difference.high
    at_once = rows[1, "1@1"]
    assert (at_once.first, at_once.second, at_once.only_first, at_once.only_second) == (0.0, 0.0, 0, 0)


def test_a_comparison_the_other_way_round_has_the_opposite_sign(tmp_path: Path) -> None:
    first, second = evaluated(tmp_path / "a", BEFORE), evaluated(tmp_path / "b", AFTER)
    there, back = (by_name(compare_evaluations(*pair)) for pair in ((first, second), (second, first)))
    for name, row in there.items():
        assert back[name].difference.value == -row.difference.value
        assert back[name].difference.low == pytest.approx(-row.difference.high, abs=0.13)
        assert (back[name].only_first, back[name].only_second) == (row.only_second, row.only_first)


def test_evaluations_of_different_problems_are_not_compared(tmp_path: Path) -> None:
    first, second = evaluated(tmp_path / "a", BEFORE), evaluated(tmp_path / "b", AFTER, problems="others")
    with pytest.raises(
        ConfigError, match=r"a and .*b are of different problems: evaluate both with the same"
    ):
        compare_evaluations(first, second)


def test_evaluations_of_different_budgets_are_not_compared(tmp_path: Path) -> None:
    other = (Budget(n=1, k=2, temperature=0.5, top_p=1.0),)
    first, second = evaluated(tmp_path / "a", BEFORE), evaluated(tmp_path / "b", AFTER, budgets=other)
    with pytest.raises(ConfigError, match=r"evaluation.budgets is .*temperature=1.0.* and .*temperature=0.5"):
        compare_evaluations(first, second)


def test_the_table_has_a_line_for_each_figure(tmp_path: Path) -> None:
    rows = compare_evaluations(evaluated(tmp_path / "a", BEFORE), evaluated(tmp_path / "b", AFTER))
    stream = io.StringIO()
    Console(file=stream, width=140).print(comparison_table(rows))
    lines = [" ".join(line.split()) for line in stream.getvalue().splitlines()]
    assert any(line.startswith("true 1 2 1@2 37.5 62.5 +25.0 [") and line.endswith("] 1 2") for line in lines)
