"""Random feedback as the paper has it: what execution says about an incorrect solution of an unrelated
problem (PAPER section 6).

Which one is a function of the seed, the episode and the turn, so it does not depend on what else is sampled
at the same time. A problem set without incorrect solutions leaves `rollout.feedback_messages` its own way.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from rlef import dialects, judging
from rlef.config import Config, ConfigError, RolloutConfig
from rlef.records import Problem
from rlef_sandbox import Executor, Verdict

LEAST_PROBLEMS = 2  # with incorrect solutions: one may be the problem at hand


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """In which dialog a message is wanted."""

    problem_id: str
    number: int  # of the episode
    turn: int  # how many responses there are


class UnrelatedFeedback:
    """Messages about incorrect solutions. Each program runs once in a process."""

    def __init__(self, problems: Sequence[Problem], settings: RolloutConfig) -> None:
        """Of those `problems` that ship incorrect solutions: `LEAST_PROBLEMS` at least."""
        self._problems = with_incorrect_solutions(problems)
        assert len(self._problems) >= LEAST_PROBLEMS
        self._settings = settings
        self._messages: dict[tuple[int, int], str] = {}  # by problem and solution; empty if it passes

    def messages(self, places: Sequence[Place], *, seed: int, executor: Executor) -> list[str]:
        """A message for each place. Not to be called where an event loop runs.

        Raises what `message` does.
        """

        async def all_messages() -> list[str]:
            return await asyncio.gather(
                *(self.message(place, seed=seed, executor=executor) for place in places)
            )

        return asyncio.run(all_messages())

    async def message(self, place: Place, *, seed: int, executor: Executor) -> str:
        """What the first program said that fails its public tests, from the drawn one on.

        Raises:
            ConfigError: none of them fails any public test.
            SandboxFault: the sandbox itself failed.
        """
        drawn = hashlib.sha256(f"unrelated/{seed}/{place.number}/{place.turn}".encode()).digest()
        first_problem, first_solution = int.from_bytes(drawn[:8]), int.from_bytes(drawn[8:16])
        for problem_step in range(len(self._problems)):
            index = (first_problem + problem_step) % len(self._problems)
            problem = self._problems[index]
            if problem.id == place.problem_id:
                continue
            count = len(problem.incorrect_solutions)
            for solution_step in range(count):
                solution = (first_solution + solution_step) % count
                if message := await self._message_about(index, solution, executor):
                    return message
        raise ConfigError(
            f"feedback 'random': none of the incorrect solutions of {len(self._problems)} problems fails a "
            "public test, so there is nothing to tell; take them out of the file"
        )

    async def _message_about(self, index: int, solution: int, executor: Executor) -> str:
        if (known := self._messages.get((index, solution))) is not None:
            return known
        problem = self._problems[index]
        code = problem.incorrect_solutions[solution]
        (results,) = await executor.run_many_async([judging.public_job(problem, code)])
        message = ""
        if any(result.verdict is not Verdict.PASSED for result in results):
            message = dialects.message_after(
                problem, code, results, max_test_characters=self._settings.max_test_characters
            )
        self._messages[index, solution] = message
        return message


def with_incorrect_solutions(problems: Sequence[Problem]) -> list[Problem]:
    return [problem for problem in problems if problem.incorrect_solutions]


def unrelated_feedback(problems: Sequence[Problem], settings: RolloutConfig) -> UnrelatedFeedback | None:
    """None where too few problems ship incorrect solutions."""
    has_enough = len(with_incorrect_solutions(problems)) >= LEAST_PROBLEMS
    return UnrelatedFeedback(problems, settings) if has_enough else None


def kind_of_random_feedback(problems: Sequence[Problem]) -> str:
    """What random feedback about these problems is, in words for who reads figures."""
    if len(with_incorrect_solutions(problems)) >= LEAST_PROBLEMS:
        return "incorrect solutions of other problems"
    return "other dialogs of the same batch"


def check_random_feedback(config: Config, problems: Sequence[Problem]) -> None:
    """Raises ConfigError where random feedback of training needs incorrect solutions that are not there."""
    rollout, found = config.rollout, len(with_incorrect_solutions(problems))
    if rollout.feedback == "random" and (rollout.overlap or rollout.max_staleness) and found < LEAST_PROBLEMS:
        raise ConfigError(
            f"rollout.feedback = 'random': {found} problems of problems.train = {config.problems.train!r} "
            f"have incorrect_solutions; with less than {LEAST_PROBLEMS} it tells what other programs of the "
            "same turn were told, which needs rollout.overlap = false and rollout.max_staleness = 0"
        )
