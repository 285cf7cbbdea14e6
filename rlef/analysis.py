"""What became of dialogs turn by turn: error classes, repairs, repetitions, edits (PAPER section 6).

Pure: from what execution said to figures. The functions take anything that has turns, be it token by token
(an `Episode`) or as text (a `Transcript`). A rate over nothing, such as the repair rate where no first
response failed, is None.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Protocol

from rlef.records import TurnOutcome
from rlef.solve_rate import Tally


class ExecutedTurn(Protocol):
    """One response, and what its public tests said."""

    @property
    def code(self) -> str | None: ...

    @property
    def outcome(self) -> TurnOutcome: ...


class Attempted(Protocol):
    """A dialog that has ended."""

    @property
    def problem_id(self) -> str: ...

    @property
    def turns(self) -> Sequence[ExecutedTurn]: ...

    @property
    def solved(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Repairs:
    """Of the dialogs whose first response failed in one way, how many were solved in the end."""

    failed: int
    repaired: int

    @property
    def rate(self) -> float:
        return self.repaired / self.failed


def tallies(dialogs: Sequence[Attempted], *, first_only: bool = False) -> list[Tally]:
    """One tally per problem, in the order in which problems first occur: of whole dialogs, or of their first
    responses alone.

    Raises:
        ValueError: there are no dialogs.
    """
    if not dialogs:
        raise ValueError("there are no episodes to evaluate: give at least one problem")
    by_problem: dict[str, list[Attempted]] = {}
    for dialog in dialogs:
        by_problem.setdefault(dialog.problem_id, []).append(dialog)
    counted: list[Tally] = []
    for group in by_problem.values():
        # A first response that passes publicly ends its dialog, so the others' first responses are no
        # candidates.
        candidates = [dialog for dialog in group if not first_only or len(dialog.turns) == 1]
        counted.append(
            Tally(
                samples=len(group),
                passed_public=sum(_passed_public(dialog) for dialog in candidates),
                solved=sum(dialog.solved for dialog in candidates),
            )
        )
    return counted


def repair_rate(dialogs: Sequence[Attempted]) -> float | None:
    """Of the dialogs whose first response fails publicly, those that are solved in the end."""
    failed_first = [dialog for dialog in dialogs if dialog.turns[0].outcome is not TurnOutcome.PASSED]
    return mean([dialog.solved for dialog in failed_first]) if failed_first else None


def repairs_by_outcome(dialogs: Sequence[Attempted]) -> dict[str, Repairs]:
    """The repair rate by how the first response failed; only outcomes that occurred."""
    return {
        outcome.value: Repairs(failed=len(group), repaired=sum(dialog.solved for dialog in group))
        for outcome in TurnOutcome
        if outcome is not TurnOutcome.PASSED
        and (group := [dialog for dialog in dialogs if dialog.turns[0].outcome is outcome])
    }


def identical_resubmission_rate(dialogs: Sequence[Attempted]) -> float | None:
    """Of the responses after a first one, those whose code equals that of the one before.

    Twice no code is not a resubmission.
    """
    pairs = _consecutive_turns(dialogs)
    if not pairs:
        return None
    return mean([later.code is not None and later.code == earlier.code for earlier, later in pairs])


def edit_size(dialogs: Sequence[Attempted]) -> float | None:
    """Mean of 1 - chrF between the programs of consecutive turns, from 0 (equal) to 1; sacrebleu's chrF with
    its defaults, the later program against the earlier one.

    Pairs in which a response has no program are left out.
    """
    sizes = [
        _edit_size(earlier.code, later.code)
        for earlier, later in _consecutive_turns(dialogs)
        if earlier.code is not None and later.code is not None
    ]
    return mean(sizes) if sizes else None


def outcomes_by_turn(dialogs: Sequence[Attempted]) -> tuple[dict[str, int], ...]:
    """How often each outcome, turn by turn. A dialog that has ended counts in no later turn."""
    longest = max(len(dialog.turns) for dialog in dialogs)
    counts = [
        Counter(dialog.turns[place].outcome for dialog in dialogs if place < len(dialog.turns))
        for place in range(longest)
    ]
    return tuple({outcome.value: count[outcome] for outcome in TurnOutcome} for count in counts)


def transitions(dialogs: Sequence[Attempted]) -> dict[str, dict[str, int]]:
    """How often one outcome was followed by another; only pairs that occurred."""
    counts = Counter((earlier.outcome, later.outcome) for earlier, later in _consecutive_turns(dialogs))
    table: dict[str, dict[str, int]] = {}
    for earlier, later in itertools.product(TurnOutcome, TurnOutcome):
        if counts[earlier, later]:
            table.setdefault(earlier.value, {})[later.value] = counts[earlier, later]
    return table


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _passed_public(dialog: Attempted) -> bool:
    return dialog.turns[-1].outcome is TurnOutcome.PASSED


def _consecutive_turns(dialogs: Sequence[Attempted]) -> list[tuple[ExecutedTurn, ExecutedTurn]]:
    return [pair for dialog in dialogs for pair in itertools.pairwise(dialog.turns)]


@lru_cache(maxsize=1 << 18)  # one rollout is looked at under several turn limits
def _edit_size(earlier: str, later: str) -> float:
    if earlier == later:  # chrF is 0 where there is nothing to compare, as in two empty programs
        return 0.0
    return 1.0 - float(_chrf().sentence_score(later, [earlier]).score) / 100.0


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()
