"""Figures of an evaluation's whole matrix: budgets x turn limits x kinds of feedback (PAPER sections 5, 6).

Every response counts as a sample, so a budget of k responses pays for k // t dialogs of up to t turns. One
dialog of the largest turn limit holds those of the smaller ones as its beginnings (`transcripts.within`), so
all limits are measured on the same dialogs, and differences between limits are not those of two draws.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlef.analysis import (
    Repairs,
    edit_size,
    identical_resubmission_rate,
    mean,
    outcomes_by_turn,
    repair_rate,
    repairs_by_outcome,
    tallies,
    transitions,
)
from rlef.config import Config, ConfigError, EvaluationConfig, FeedbackKind
from rlef.solve_rate import Estimate, Tally, estimate_n_at_k, rollouts_within
from rlef.transcripts import Transcript, within


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Dialogs that are sampled in one way; one file of transcripts."""

    feedback: FeedbackKind
    temperature: float
    top_p: float
    turns: int  # the largest turn limit
    rollouts: int  # per problem

    @property
    def name(self) -> str:
        return f"{self.feedback}-temperature-{self.temperature:g}-top-p-{self.top_p:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The figures of one kind of feedback, one way to draw and one turn limit.

    A rate over nothing is None.
    """

    feedback: FeedbackKind
    temperature: float
    top_p: float
    turn_limit: int
    problems: int
    rollouts_per_problem: int
    solve_rates: dict[str, Estimate]  # by name, such as 1@3, 10@100 and pass@100
    repair_rate: float | None
    repairs: dict[str, Repairs]  # by the outcome of the first response
    identical_resubmission_rate: float | None
    edit_size: float | None  # 1 - chrF between the programs of consecutive turns
    outcomes: tuple[dict[str, int], ...]  # [turns] how often each TurnOutcome
    transitions: dict[str, dict[str, int]]  # outcome of a turn -> outcome of the next -> how often
    mean_turns: float
    cut_response_rate: float  # responses that reached the longest length
    response_tokens_per_solve: float | None  # tokens of all responses over the dialogs that solve
    prompt_tokens_per_solve: float | None  # tokens read before each response, those of earlier turns again
    seconds_per_solve: float | None  # wall clock, execution included


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A solve rate of a cell: n submissions from `samples` dialogs."""

    name: str
    n: int
    samples: int


def at_its_extremes(config: Config) -> Config:
    """The settings with the most turns and the least temperature above 0 of the matrix: what checks that know
    one of each must look at, and what a sampler must hold."""
    evaluation = config.evaluation
    warm = [budget.temperature for budget in evaluation.budgets if budget.temperature]
    extremes = {"turns": max(evaluation.turn_limits), "temperature": min(warm, default=0.0)}
    return config.model_copy(update={"evaluation": evaluation.model_copy(update=extremes)})


def check_matrix() -> None:
    """Raises ConfigError where a figure could not be computed, before anything is sampled."""
    if importlib.util.find_spec("sacrebleu") is None:
        raise ConfigError("edit sizes need sacrebleu, which is not installed: pip install 'rlef[eval]'")


def draws_of(evaluation: EvaluationConfig) -> list[Draw]:
    """What must be sampled for the matrix: per problem `rollouts_per_problem` dialogs, or as many as the
    largest budget takes if those are more."""
    ways = dict.fromkeys((budget.temperature, budget.top_p) for budget in evaluation.budgets)
    return [
        Draw(
            feedback=feedback,
            temperature=temperature,
            top_p=top_p,
            turns=max(evaluation.turn_limits),
            rollouts=max(
                evaluation.rollouts_per_problem,
                *(
                    rate.samples
                    for limit in evaluation.turn_limits
                    for rate in rates_of(evaluation, temperature, top_p, limit)
                ),
            ),
        )
        for temperature, top_p in ways
        for feedback in evaluation.feedback
    ]


def rates_of(evaluation: EvaluationConfig, temperature: float, top_p: float, limit: int) -> list[Rate]:
    """The solve rates that are defined at a turn limit: one dialog's, and n@k and pass@k of each budget that
    is drawn so and pays for a dialog."""
    rates = {f"1@{limit}": Rate(name=f"1@{limit}", n=1, samples=1)}
    for budget in evaluation.budgets:
        samples = rollouts_within(budget.k, turns=limit)
        if (budget.temperature, budget.top_p) == (temperature, top_p) and samples:
            for name, n in ((f"{budget.n}@{budget.k}", budget.n), (f"pass@{budget.k}", samples)):
                rates[name] = Rate(name=name, n=n, samples=samples)
    return list(rates.values())


def measure(
    drawn: Mapping[Draw, Sequence[Transcript]], evaluation: EvaluationConfig, *, seed: int
) -> list[Cell]:
    """All cells, in the order of the draws and the turn limits. Every problem has `Draw.rollouts`
    transcripts."""
    return [
        _measure_cell(draw, transcripts, limit, evaluation, seed=seed)
        for draw, transcripts in drawn.items()
        for limit in evaluation.turn_limits
    ]


def _measure_cell(
    draw: Draw, transcripts: Sequence[Transcript], limit: int, evaluation: EvaluationConfig, *, seed: int
) -> Cell:
    dialogs = [within(transcript, turns=limit) for transcript in transcripts]
    tallied = tallies(dialogs)
    solves = sum(dialog.solved for dialog in dialogs)
    turns = [turn for dialog in dialogs for turn in dialog.turns]
    return Cell(
        feedback=draw.feedback,
        temperature=draw.temperature,
        top_p=draw.top_p,
        turn_limit=limit,
        problems=len(tallied),
        rollouts_per_problem=draw.rollouts,
        solve_rates={
            rate.name: _estimate(tallied, rate, evaluation.bootstrap_samples, seed)
            for rate in rates_of(evaluation, draw.temperature, draw.top_p, limit)
        },
        repair_rate=repair_rate(dialogs),
        repairs=repairs_by_outcome(dialogs),
        identical_resubmission_rate=identical_resubmission_rate(dialogs),
        edit_size=edit_size(dialogs),
        outcomes=outcomes_by_turn(dialogs),
        transitions=transitions(dialogs),
        mean_turns=len(turns) / len(dialogs),
        cut_response_rate=mean([turn.finish_reason == "length" for turn in turns]),
        response_tokens_per_solve=_per_solve([turn.response_tokens for turn in turns], solves),
        prompt_tokens_per_solve=_per_solve([turn.prompt_tokens for turn in turns], solves),
        seconds_per_solve=_per_solve([turn.seconds for turn in turns], solves),
    )


def _estimate(tallied: Sequence[Tally], rate: Rate, resamples: int, seed: int) -> Estimate:
    """Over each problem's dialogs, as in the paper; over problems where one has no spread of its own."""
    has_spread = min(tally.samples for tally in tallied) > rate.samples
    return estimate_n_at_k(
        tallied,
        n=rate.n,
        k=rate.samples,
        resamples=resamples,
        generator=np.random.default_rng(seed),
        resample="rollouts" if has_spread else "problems",
    )


def _per_solve(spent: Sequence[float | None], solves: int) -> float | None:
    """None where nothing was solved, or a server did not count."""
    known = [value for value in spent if value is not None]
    return sum(known) / solves if solves and len(known) == len(spent) else None
