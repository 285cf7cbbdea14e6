"""Problems that are left out for a while, because what comes of them no longer changes.

One filter between the cursor and the steps. A problem that was solved in its last `skip_after_solved` visits,
or in none of its last `skip_after_unsolved`, is passed over for `skip_rounds` rounds and then visited again,
since policies change. What step s takes depends on the outcomes of the steps up to s - 1 - max_staleness,
which are known when it may begin, and on no later ones: so it does not matter when a process hears of what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlef.config import Config, ConfigError, ProblemsConfig
from rlef.problems import Cursor
from rlef.records import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands in its problems before a step. As it is, it is JSON."""

    problems: int  # in the file
    position: int  # of the cursor, behind what is chosen
    chosen: list[list[str]]  # ids of the problems of that step, and of those after it that are chosen
    streaks: dict[str, int]  # by id: visits in a row that ended alike; below 0 if they did not solve it
    skipped_until: dict[str, int]  # by id: the last round in which it is left out

    def metrics(self) -> dict[str, float]:
        """How many problems are visited at present, and how many are not, and why."""
        now = self.position // self.problems
        skipped = [self.streaks[name] for name, last in self.skipped_until.items() if last >= now]
        solved = sum(streak > 0 for streak in skipped)
        return {
            "problems/active": float(self.problems - len(skipped)),
            "problems/skipped_solved": float(solved),
            "problems/skipped_unsolved": float(len(skipped) - solved),
        }


def skips(settings: ProblemsConfig) -> bool:
    """Whether what comes of problems decides on which are visited."""
    return settings.skip_after_solved > 0 or settings.skip_after_unsolved > 0


class Curriculum:
    """The problems of each step, from `step` on."""

    def __init__(self, cursor: Cursor, config: Config, *, step: int, progress: Progress | None) -> None:
        """`progress` is what `record` gave for the step before; None: nothing has been visited.

        Raises:
            ConfigError: it is of other problems.
        """
        self._cursor = cursor
        self._settings = config.problems
        self._episodes_per_step = config.rollout.episodes_per_step
        self._max_staleness = config.rollout.max_staleness
        self._step = step  # of which nothing is recorded
        self._chosen: list[list[Problem]] = []  # of that step and those after it
        self._streaks: dict[str, int] = {}
        self._skipped_until: dict[str, int] = {}
        if progress is not None:
            self._go_on(progress)

    def _go_on(self, progress: Progress) -> None:
        by_id = {problem.id: problem for problem in self._cursor.problems}
        missing = [name for names in progress.chosen for name in names if name not in by_id]
        if missing or progress.problems != len(by_id):
            raise ConfigError(
                f"problems.train holds {len(by_id)} problems, and the checkpoint is of {progress.problems}"
                + (f", with {missing[0]!r} among them" if missing else "")
                + "; give the file that the run was started with, or start anew with --resume never"
            )
        self._cursor.position = progress.position
        self._chosen = [[by_id[name] for name in names] for names in progress.chosen]
        self._streaks = dict(progress.streaks)
        self._skipped_until = dict(progress.skipped_until)

    def problems_of(self, step: int) -> Sequence[Problem]:
        """At most `max_staleness` steps after the last one that is recorded."""
        assert self._step <= step <= self._step + self._max_staleness, "outcomes decide on later steps"
        while len(self._chosen) <= step - self._step:
            self._chosen.append(self._choose())
        return self._chosen[step - self._step]

    def record(self, solved: Sequence[bool]) -> Progress:
        """What came of the problems of the earliest step that is not recorded, in their order."""
        self.problems_of(self._step + self._max_staleness)  # which these outcomes must not decide on
        for problem, is_solved in zip(self._chosen.pop(0), solved, strict=True):
            self._count(problem.id, is_solved)
        self._step += 1
        return Progress(
            problems=len(self._cursor.problems),
            position=self._cursor.position,
            chosen=[[problem.id for problem in problems] for problems in self._chosen],
            streaks=dict(self._streaks),
            skipped_until=dict(self._skipped_until),
        )

    def _choose(self) -> list[Problem]:
        """The next problems that are not left out. It ends, since no problem is for ever."""
        chosen: list[Problem] = []
        while len(chosen) < self._episodes_per_step:
            now = self._cursor.round
            (problem,) = self._cursor.take(1)
            if self._skipped_until.get(problem.id, -1) < now:
                chosen.append(problem)
        return chosen

    def _count(self, name: str, is_solved: bool) -> None:
        sign = 1 if is_solved else -1
        streak = self._streaks.get(name, 0)
        self._streaks[name] = streak + sign if streak * sign > 0 else sign
        limit = self._settings.skip_after_solved if is_solved else self._settings.skip_after_unsolved
        if limit and abs(self._streaks[name]) >= limit:
            under_way = (self._cursor.position - 1) // len(self._cursor.problems)
            self._skipped_until[name] = under_way + self._settings.skip_rounds
