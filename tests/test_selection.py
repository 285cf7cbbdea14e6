"""Problems chosen by how often a model solves them, from evaluations made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rlef.cli import main
from rlef.config import Budget, ConfigError, ExecutorConfig
from rlef.problems import read_jsonl, write_jsonl
from rlef.records import Problem
from rlef.selection import rates_in
from rlef_sandbox import Test
from tests.evaluation_examples import evaluated

NEVER, SOMETIMES, ALWAYS = [False, False], [True, False], [True, True]


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    """Of p0, p1 and p2, in dialogs that pass their public tests on turn 2 if they do."""
    return evaluated(tmp_path / "rates", [NEVER, SOMETIMES, ALWAYS])


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """p0 to p3; the last one was not evaluated."""
    path = tmp_path / "problems.jsonl"
    made = (
        Problem(
            id=f"p{number}",
            statement="Print it.",
            public_tests=(Test("1", "1"),),
            private_tests=(Test("2", "2"),),
            time_limit_s=1.0,
            memory_limit_bytes=1 << 28,
            source="hand",
        )
        for number in range(4)
    )
    write_jsonl(path, made)
    return path


def select(problems: Path, rates: Path, *options: str) -> Result:
    output = str(problems.parent / "selected.jsonl")
    return CliRunner().invoke(
        main, ["problems", "select", str(problems), output, "--rates", str(rates), *options]
    )


def kept(problems: Path) -> dict[str, float | None]:
    selected = problems.parent / "selected.jsonl"
    return {each.id: each.solve_rate for each in read_jsonl(selected, defaults=ExecutorConfig())}


def test_rates_are_shares_of_the_dialogs_with_true_feedback(rates: Path) -> None:
    found = rates_in([rates])
    assert {name: (rate.dialogs, rate.solved, rate.passed_public) for name, rate in found.items()} == {
        "p0": (2, 0, 0),
        "p1": (2, 1, 1),
        "p2": (2, 2, 2),
    }


def test_dialogs_of_several_folders_are_counted_together(rates: Path, tmp_path: Path) -> None:
    other = evaluated(tmp_path / "other", [SOMETIMES, SOMETIMES])
    found = rates_in([rates, other])
    assert [(found[name].dialogs, found[name].solved) for name in ("p0", "p1", "p2")] == [
        (4, 1),
        (4, 2),
        (2, 2),
    ]


def test_with_fewer_turns_what_was_solved_later_is_not_solved(rates: Path) -> None:
    assert {rate.solve_rate for rate in rates_in([rates], turns=1).values()} == {0.0}


def test_problems_that_are_always_or_never_solved_are_dropped_and_counted(
    problems: Path, rates: Path
) -> None:
    report = problems.parent / "report.json"
    options = ("--min-solve-rate", "0.05", "--max-solve-rate", "0.95", "--report", str(report))
    result = select(problems, rates, *options)
    assert result.exit_code == 0, result.output
    assert kept(problems) == {"p1": 0.5, "p3": None}
    assert [line.strip() for line in result.stdout.splitlines()] == [
        "1  dropped, solved too often",
        "1  dropped, solved too seldom",
        "1  kept",
        "1  kept without a rate",
        f"wrote {problems.parent / 'selected.jsonl'}",
    ]
    assert json.loads(report.read_text())["problems"]["p1"] == {
        "dialogs": 2,
        "solved": 1,
        "passed_public": 1,
    }


def test_a_problem_that_was_not_evaluated_is_dropped_if_asked(problems: Path, rates: Path) -> None:
    assert select(problems, rates, "--drop-unknown").exit_code == 0
    assert kept(problems) == {"p0": 0.0, "p1": 0.5, "p2": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--min-solve-rate", "0.6", "--max-solve-rate", "0.9", "--drop-unknown"), "no problem is kept ("),
        (("--min-solve-rate", "0.6", "--max-solve-rate", "0.5"), "--min-solve-rate 0.6 is above "),
        (("--turns", "3"), "--turns 3: the dialogs in {rates} have at most 2; use at most that"),
        (("--temperature", "0.5"), "--temperature 0.5: the dialogs in {rates} are at 1; name one of these"),
    ],
)
def test_what_selects_nothing_or_was_not_drawn_is_refused_and_writes_nothing(
    options: tuple[str, ...], message: str, problems: Path, rates: Path
) -> None:
    result = select(problems, rates, *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("rlef: error: " + message.format(rates=rates))
    assert sorted(path.name for path in problems.parent.iterdir()) == ["problems.jsonl", "rates"]


def test_rates_of_other_problems_are_refused(problems: Path, rates: Path) -> None:
    problems.write_text(problems.read_text().replace('"id": "p', '"id": "q'))
    result = select(problems, rates)
    assert result.stderr == (
        "rlef: error: --rates: no dialog is about one of these problems; evaluate on this file\n"
    )


def test_of_several_temperatures_one_must_be_named(tmp_path: Path) -> None:
    budgets = tuple(Budget(n=1, k=2, temperature=each, top_p=1.0) for each in (0.2, 1.0))
    folder = evaluated(tmp_path / "two", [SOMETIMES], budgets=budgets)
    with pytest.raises(
        ConfigError, match=r"two: with it there are dialogs at the temperatures 0\.2, 1; name one"
    ):
        rates_in([folder])
    assert rates_in([folder], temperature=1.0)["p0"].dialogs == 2


def test_dialogs_of_two_folders_at_different_temperatures_are_not_counted_together(tmp_path: Path) -> None:
    cold, warm = (
        evaluated(
            tmp_path / name, [SOMETIMES], budgets=(Budget(n=1, k=2, temperature=temperature, top_p=1.0),)
        )
        for name, temperature in (("cold", 0.2), ("warm", 1.0))
    )
    with pytest.raises(
        ConfigError, match=r"warm: with it there are dialogs at the temperatures 0\.2, 1; name one"
    ):
        rates_in([cold, warm])


def test_dialogs_without_true_feedback_give_no_rates(tmp_path: Path) -> None:
    folder = evaluated(tmp_path / "none", [SOMETIMES], feedback=("none",))
    with pytest.raises(ConfigError, match=r"none has no dialogs with true feedback; evaluate with it"):
        rates_in([folder])
