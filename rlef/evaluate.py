"""What a policy can do, and how much of it is owed to execution feedback (PAPER sections 5 and 6).

Four conditions are evaluated on the same problems: dialogs with true feedback, with the feedback of an
unrelated program, with none but "it failed", and single responses. Every response counts as a sample, so all
four are compared at one budget of `turns` responses:

- *1@turns of dialogs*: the expectation that one dialog of up to `turns` responses solves its problem.
  Passing the public tests ends a dialog, so only its last response can pass them. The last code is the one
  candidate, and it is submitted if it passes publicly. A dialog that ends early is counted as if it had spent
  its whole budget.
- *1@turns of single responses*: of `turns` independent responses, one of those that pass the public tests is
  submitted.
- *1@1*: a dialog's first response alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlef.analysis import (
    identical_resubmission_rate,
    mean,
    outcomes_by_turn,
    repair_rate,
    tallies,
    transitions,
)
from rlef.config import Config, FeedbackKind, RewardConfig
from rlef.files import write_text
from rlef.ports import Play, SamplingParams
from rlef.prompts import Dialog, begun_text
from rlef.records import Episode, Problem
from rlef.report import DialogExample, Message
from rlef.rewards import turn_rewards
from rlef.solve_rate import Estimate, Resample, estimate_n_at_k
from rlef.unrelated import kind_of_random_feedback

SINGLE_TURN = "single_turn"
_FEEDBACK: Mapping[str, FeedbackKind] = {
    "true_feedback": "true",
    "random_feedback": "random",
    "no_feedback": "none",
    SINGLE_TURN: "none",
}
CONDITIONS = tuple(_FEEDBACK)
SEED_OFFSET = 1_000_003  # evaluation must not draw the numbers that training draws
_BROWSED = ("true_feedback", "random_feedback")  # conditions whose dialogs go into the report


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """The figures of one condition. A rate over nothing (no failed first turn, no second turn) is None."""

    condition: str
    turns: int  # the budget of responses
    problems: int
    episodes: int
    one_at_one: Estimate
    one_at_budget: Estimate  # 1@turns
    mean_reward: float  # of an episode, without the KL term
    repair_rate: float | None  # failed publicly on turn 1 and solved later, of those that failed on turn 1
    identical_resubmission_rate: float | None  # later responses that repeat the code of the one before
    mean_response_tokens: float
    outcomes: tuple[dict[str, int], ...]  # [turns] how often each TurnOutcome
    transitions: dict[str, dict[str, int]]  # outcome of a turn -> outcome of the next -> how often


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All conditions of one policy, and some of its dialogs to look at."""

    reports: dict[str, EvaluationReport]  # by condition
    samples: dict[str, tuple[Episode, ...]]  # by condition; of evenly spaced problems, not chosen by outcome
    random_feedback: str  # what it was, in words
    seconds: float


def evaluate(
    problems: Sequence[Problem],
    *,
    rollouts: Play[Episode],
    config: Config,
    samples: int = 24,
) -> Evaluation:
    """Run the four conditions.

    The three kinds of dialog share their random numbers: their first turns are equal, and what differs
    afterwards is the feedback's doing. Two evaluations of one run share them too, so that before and after
    are compared on the same draws and show the same samples. Single responses are as many per dialog as it
    has turns: the budget is the same everywhere.
    """
    started = time.monotonic()
    settings, turns = config.evaluation, config.evaluation.turns
    seed = config.run.seed + SEED_OFFSET
    params = SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_tokens=config.rollout.max_response_tokens,
        seed=seed,
    )
    dialogs = len(problems) * settings.rollouts_per_problem
    reports: dict[str, EvaluationReport] = {}
    sampled: dict[str, tuple[Episode, ...]] = {}
    for index, (condition, feedback) in enumerate(_FEEDBACK.items()):
        is_single = condition == SINGLE_TURN
        per_problem = settings.rollouts_per_problem * (turns if is_single else 1)
        first = dialogs if is_single else 0
        attempted = [problem for problem in problems for _ in range(per_problem)]
        episodes = rollouts(
            attempted,
            numbers=range(first, first + len(attempted)),
            params=params,
            turns=1 if is_single else turns,
            feedback=feedback,
        )
        reports[condition] = report_on(
            episodes,
            condition=condition,
            turns=turns,
            rewards=config.rewards,
            resamples=settings.bootstrap_samples,
            generator=np.random.default_rng([seed, index]),
        )
        firsts = episodes[::per_problem]
        sampled[condition] = tuple(firsts[place] for place in _evenly_spaced(len(problems), samples))
    return Evaluation(
        reports=reports,
        samples=sampled,
        random_feedback=kind_of_random_feedback(problems),
        seconds=time.monotonic() - started,
    )


def report_on(
    episodes: Sequence[Episode],
    *,
    condition: str,
    turns: int,
    rewards: RewardConfig,
    resamples: int,
    generator: np.random.Generator,
) -> EvaluationReport:
    """The figures of one condition's episodes.

    Intervals are over the rollouts of each problem; where a problem has but one, and so no spread of its own,
    they are over problems and rollouts.

    Raises:
        ValueError: there are no episodes, or a problem has fewer single responses than the budget.
    """
    first_responses = tallies(episodes, first_only=True)
    whole = tallies(episodes)
    budget_samples = turns if condition == SINGLE_TURN else 1
    resample: Resample = "problems" if min(tally.samples for tally in whole) == budget_samples else "rollouts"
    one_at_one, one_at_budget = (
        estimate_n_at_k(tallied, n=1, k=k, resamples=resamples, generator=generator, resample=resample)
        for tallied, k in ((first_responses, 1), (whole, budget_samples))
    )
    return EvaluationReport(
        condition=condition,
        turns=turns,
        problems=len(whole),
        episodes=len(episodes),
        one_at_one=one_at_one,
        one_at_budget=one_at_budget,
        mean_reward=mean_reward(episodes, rewards),
        repair_rate=repair_rate(episodes),
        identical_resubmission_rate=identical_resubmission_rate(episodes),
        mean_response_tokens=mean_response_tokens(episodes),
        outcomes=outcomes_by_turn(episodes),
        transitions=transitions(episodes),
    )


def episode_metrics(episodes: Sequence[Episode], rewards: RewardConfig) -> dict[str, float]:
    """What a training step's own episodes say, under the names that `telemetry` documents."""
    repaired, repeated = repair_rate(episodes), identical_resubmission_rate(episodes)
    return {
        "solve_rate": mean([episode.solved for episode in episodes]),
        "first_turn_solve_rate": mean([episode.solved and len(episode.turns) == 1 for episode in episodes]),
        "reward": mean_reward(episodes, rewards),
        "turns": mean([len(episode.turns) for episode in episodes]),
        "response_tokens": mean_response_tokens(episodes),
        "sampled_tokens": float(sum(sum(episode.sampled) for episode in episodes)),
        **({} if repaired is None else {"repair_rate": repaired}),
        **({} if repeated is None else {"identical_resubmission_rate": repeated}),
    }


def mean_reward(episodes: Sequence[Episode], rewards: RewardConfig) -> float:
    """Reward of an episode, its turns added up, without the KL term."""
    return mean([sum(turn_rewards(episode, rewards)) for episode in episodes])


def mean_response_tokens(episodes: Sequence[Episode]) -> float:
    return mean([turn.end - turn.start for episode in episodes for turn in episode.turns])


def dialog_examples(
    evaluation: Evaluation, problems: Sequence[Problem], *, phase: str, dialog: Dialog
) -> list[DialogExample]:
    """The sampled dialogs as text, for the report's browser. `phase` is "start" or "final"."""
    by_id = {problem.id: problem for problem in problems}
    return [
        DialogExample(
            problem_id=episode.problem_id,
            phase=phase,
            condition=condition,
            statement=by_id[episode.problem_id].statement,
            messages=_messages(episode, dialog, by_id[episode.problem_id].stub),
            solved=episode.solved,
        )
        for condition in _BROWSED
        for episode in evaluation.samples[condition]
    ]


def summarise(evaluation: Evaluation) -> dict[str, Any]:
    """One phase of `summary.json`: the headline figures, their intervals, and every condition's report."""
    reports = evaluation.reports
    dialogs = reports["true_feedback"]
    budget = f"1@{dialogs.turns}"
    estimates = {
        "1@1": dialogs.one_at_one,
        budget: dialogs.one_at_budget,
        f"single_turn_{budget}": reports[SINGLE_TURN].one_at_budget,
        f"random_feedback_{budget}": reports["random_feedback"].one_at_budget,
        f"no_feedback_{budget}": reports["no_feedback"].one_at_budget,
    }
    return {
        **{name: estimate.value for name, estimate in estimates.items()},
        "repair_rate": dialogs.repair_rate,
        "identical_resubmission_rate": dialogs.identical_resubmission_rate,
        "mean_reward": dialogs.mean_reward,
        "mean_response_tokens": dialogs.mean_response_tokens,
        "problems": dialogs.problems,
        "rollouts_per_problem": dialogs.episodes // dialogs.problems,
        "intervals": {name: [estimate.low, estimate.high] for name, estimate in estimates.items()},
        "random_feedback": evaluation.random_feedback,
        "seconds": evaluation.seconds,
        "conditions": {condition: asdict(report) for condition, report in reports.items()},
    }


def run_summary(
    *, start: Mapping[str, Any], final: Mapping[str, Any] | None, seed: int, steps: int, seconds: float
) -> dict[str, Any]:
    """`summary.json`. A run writes it without a `final` after its first evaluation, to resume from."""
    return {
        "start": dict(start),
        "final": None if final is None else dict(final),
        "seed": seed,
        "steps": steps,
        "seconds": seconds,
        "versions": {name: _version(name) for name in ("rlef", "torch", "megatron-core")},
        "hardware": _hardware(),
    }


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """As a whole or not at all."""
    write_text(path, json.dumps(summary, indent=1, allow_nan=False) + "\n")


def _evenly_spaced(total: int, count: int) -> list[int]:
    count = min(total, count)
    return [place * total // count for place in range(count)]


def _messages(episode: Episode, dialog: Dialog, stub: str) -> tuple[Message, ...]:
    """Prompt, response, feedback, response, ...: what lies between two responses is a user message."""
    messages: list[Message] = []
    told_until = 0
    for turn in episode.turns:
        text = dialog.told(episode.token_ids[told_until : turn.start], stub=stub)
        messages.append(Message(role="user", text=text, outcome=None))
        answer = begun_text(stub) + dialog.decode(episode.token_ids[turn.start : turn.end])
        messages.append(Message(role="assistant", text=answer, outcome=turn.outcome.value))
        told_until = turn.end
    return tuple(messages)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hardware() -> str:
    """The processors that this process may use, and the accelerators that torch sees."""
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    parts = [f"{len(os.sched_getaffinity(0))} x {names[0] if names else 'unnamed CPU'}"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join(parts)


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
