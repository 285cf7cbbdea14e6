"""`rlef problems select`: problems by how often a model solves them in evaluations that have ended."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rlef.config import ConfigError
from rlef.evaluation_folder import Ended, read_ended
from rlef.measurement import Draw
from rlef.records import Problem, TurnOutcome
from rlef.transcripts import Transcript, within


@dataclass(slots=True, kw_only=True)
class ProblemRate:
    """What came of a problem's dialogs."""

    dialogs: int = 0
    solved: int = 0
    passed_public: int = 0  # their last program passed the public tests

    @property
    def solve_rate(self) -> float:
        return self.solved / self.dialogs


@dataclass(slots=True, kw_only=True)
class Selection:
    """Which problems are kept, and how many are not and why. It is filled while problems pass through."""

    rates: Mapping[str, ProblemRate]
    min_solve_rate: float
    max_solve_rate: float
    drops_unknown: bool
    counts: Counter[str] = field(default_factory=Counter)

    def of(self, problems: Iterable[Problem]) -> Iterator[Problem]:
        """Those that are kept, each with its solve rate if it is known.

        Raises ConfigError at the end, if none is kept or none was evaluated.
        """
        for problem in problems:
            rate = self.rates.get(problem.id)
            verdict = self._verdict(rate)
            self.counts[verdict] += 1
            if verdict.startswith("kept"):
                yield problem if rate is None else replace(problem, solve_rate=rate.solve_rate)
        told = ", ".join(f"{verdict}: {count}" for verdict, count in sorted(self.counts.items()))
        if not any(verdict.startswith("kept") for verdict in self.counts):
            raise ConfigError(f"no problem is kept ({told}); widen the range of solve rates")
        if set(self.counts) == {"kept without a rate"}:
            raise ConfigError("--rates: no dialog is about one of these problems; evaluate on this file")

    def _verdict(self, rate: ProblemRate | None) -> str:
        if rate is None:
            return "dropped, not evaluated" if self.drops_unknown else "kept without a rate"
        if rate.solve_rate < self.min_solve_rate:
            return "dropped, solved too seldom"
        return "dropped, solved too often" if rate.solve_rate > self.max_solve_rate else "kept"


def rates_in(
    folders: Sequence[Path], *, temperature: float | None = None, turns: int | None = None
) -> dict[str, ProblemRate]:
    """By problem id, over all dialogs with true feedback of evaluations that have ended.

    Raises:
        ConfigError: a folder is not one of these, or has no such dialogs, or they are of several temperatures
            and none is named.
    """
    rates: dict[str, ProblemRate] = defaultdict(ProblemRate)
    temperatures: set[float] = set()
    for folder in folders:
        ended = read_ended(folder)
        draws = _draws_of(ended, temperature)
        temperatures.update(draw.temperature for draw in draws)
        if len(temperatures) > 1:
            found = ", ".join(f"{each:g}" for each in sorted(temperatures))
            raise ConfigError(
                f"--rates {folder}: with it there are dialogs at the temperatures {found}; name one of them "
                "by --temperature"
            )
        for draw in draws:
            if turns is not None and turns > draw.turns:
                raise ConfigError(
                    f"--turns {turns}: the dialogs in {folder} have at most {draw.turns}; use at most that"
                )
            for transcript in ended.drawn[draw]:
                _count(rates[transcript.problem_id], within(transcript, turns=turns or draw.turns))
    return dict(rates)


def _draws_of(ended: Ended, temperature: float | None) -> list[Draw]:
    """The dialogs whose outcomes are those of training: with true feedback."""
    draws = [draw for draw in ended.drawn if draw.feedback == "true"]
    if not draws:
        raise ConfigError(f"{ended.path} has no dialogs with true feedback; evaluate with it")
    chosen = [draw for draw in draws if temperature in (None, draw.temperature)]
    if not chosen:
        found = ", ".join(sorted({f"{draw.temperature:g}" for draw in draws}))
        raise ConfigError(
            f"--temperature {temperature:g}: the dialogs in {ended.path} are at {found}; name one of these"
        )
    return chosen


def _count(rate: ProblemRate, transcript: Transcript) -> None:
    rate.dialogs += 1
    rate.solved += transcript.solved
    rate.passed_public += transcript.turns[-1].outcome is TurnOutcome.PASSED
