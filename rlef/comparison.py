"""Two evaluations of the same problems: what one model solves and the other does not, figure by figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from rlef.analysis import tallies
from rlef.config import ConfigError, FeedbackKind
from rlef.evaluation_folder import Ended, read_ended
from rlef.measurement import rates_of
from rlef.solve_rate import Estimate, Tally, mean_n_at_k, paired_difference
from rlef.transcripts import within


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One solve rate of two evaluations, the second minus the first."""

    feedback: FeedbackKind
    temperature: float
    top_p: float
    turn_limit: int
    name: str  # such as 1@3
    first: float
    second: float
    difference: Estimate  # 95 % by a paired bootstrap over problems
    only_first: int  # problems of which some dialog solves in the first evaluation and none in the second
    only_second: int


# What must be equal, or figures of one name would be of different things.
_COMPARED = ("budgets", "turn_limits", "feedback", "rollouts_per_problem")


def compare_evaluations(first: Path, second: Path) -> list[Difference]:
    """Every solve rate of two folders of `rlef eval --episodes`.

    Raises:
        ConfigError: one has not ended, or the two are of different problems or budgets.
    """
    before, after = read_ended(first), read_ended(second)
    _check_comparable(before, after)
    evaluation, seed = before.evaluation, before.identity["seed"]
    differences: list[Difference] = []
    for draw, transcripts in before.drawn.items():
        for limit in evaluation.turn_limits:
            pair = [
                tallies([within(transcript, turns=limit) for transcript in each])
                for each in (transcripts, after.drawn[draw])
            ]
            for rate in rates_of(evaluation, draw.temperature, draw.top_p, limit):
                values = [mean_n_at_k(tallied, n=rate.n, k=rate.samples) for tallied in pair]
                differences.append(
                    Difference(
                        feedback=draw.feedback,
                        temperature=draw.temperature,
                        top_p=draw.top_p,
                        turn_limit=limit,
                        name=rate.name,
                        first=values[0],
                        second=values[1],
                        difference=paired_difference(
                            *pair,
                            n=rate.n,
                            k=rate.samples,
                            resamples=evaluation.bootstrap_samples,
                            generator=np.random.default_rng(seed),
                        ),
                        only_first=_solved_alone(*pair),
                        only_second=_solved_alone(*reversed(pair)),
                    )
                )
    return differences


def comparison_table(differences: Sequence[Difference]) -> Table:
    """For the terminal."""
    table = Table(caption="B minus A; 95 % intervals in brackets", box=None, padding=(0, 1))
    for heading in ("feedback", "temperature", "turns", "figure"):
        table.add_column(heading, no_wrap=True)
    for heading in ("A", "B", "difference", "only A solves", "only B solves"):
        table.add_column(heading, justify="right")
    for row in differences:
        found = row.difference
        table.add_row(
            row.feedback,
            f"{row.temperature:g}",
            str(row.turn_limit),
            row.name,
            f"{100 * row.first:.1f}",
            f"{100 * row.second:.1f}",
            f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]",
            str(row.only_first),
            str(row.only_second),
        )
    return table


def _check_comparable(first: Ended, second: Ended) -> None:
    if first.identity["problems"] != second.identity["problems"]:
        raise ConfigError(
            f"{first.path} and {second.path} are of different problems: evaluate both with the same "
            "problems.eval"
        )
    for name in _COMPARED:
        here, there = getattr(first.evaluation, name), getattr(second.evaluation, name)
        if here != there:
            raise ConfigError(
                f"evaluation.{name} is {here} in {first.path} and {there} in {second.path}: "
                "evaluate both with the same"
            )


def _solved_alone(these: Sequence[Tally], those: Sequence[Tally]) -> int:
    return sum(this.solved > 0 and that.solved == 0 for this, that in zip(these, those, strict=True))
