import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from rlef.config import Config, EvaluationConfig, FeedbackKind, RewardConfig, RolloutConfig, RunConfig
from rlef.evaluate import (
    CONDITIONS,
    EvaluationReport,
    dialog_examples,
    episode_metrics,
    evaluate,
    report_on,
    run_summary,
    summarise,
    write_summary,
)
from rlef.ports import SamplingParams
from rlef.prompts import Dialog
from rlef.records import Episode, Problem, Turn
from rlef.report import Message
from tests.evaluation_examples import NO_CODE, PASSED, WRONG, episode


def report(episodes: Sequence[Episode], *, condition: str = "true_feedback") -> EvaluationReport:
    return report_on(
        episodes,
        condition=condition,
        turns=3,
        rewards=RewardConfig(),
        resamples=50,
        generator=np.random.default_rng(0),
    )


def problem(name: str) -> Problem:
    return Problem(
        id=name,
        statement=f"state {name}",
        public_tests=(),
        private_tests=(),
        time_limit_s=1.0,
        memory_limit_bytes=1,
        source="hand",
    )


class Recorded:
    """Rollouts out of a book: dialogs are solved on turn 2 with true feedback, and never otherwise."""

    def __init__(self) -> None:
        self.calls: list[tuple[FeedbackKind, int, list[str], list[int], SamplingParams]] = []

    def __call__(
        self,
        problems: Sequence[Problem],
        *,
        numbers: Sequence[int],
        params: SamplingParams,
        turns: int,
        feedback: FeedbackKind,
    ) -> list[Episode]:
        self.calls.append((feedback, turns, [problem.id for problem in problems], list(numbers), params))
        outcomes = [WRONG] if turns == 1 else [WRONG, PASSED] if feedback == "true" else [WRONG] * turns
        return [
            episode(*outcomes, solved=outcomes[-1] is PASSED, problem=problem.id, number=number)
            for problem, number in zip(problems, numbers, strict=True)
        ]


def evaluate_recorded(
    names: Sequence[str], rollouts: Recorded, *, rollouts_per_problem: int = 2, samples: int = 2
):
    return evaluate(
        [problem(name) for name in names],
        rollouts=rollouts,
        config=Config(
            run=RunConfig(seed=7),
            rollout=RolloutConfig(max_response_tokens=5),
            evaluation=EvaluationConfig(rollouts_per_problem=rollouts_per_problem, bootstrap_samples=10),
        ),
        samples=samples,
    )


def test_one_at_one_counts_only_what_the_first_response_solved() -> None:
    solved_at_once, solved_later = episode(PASSED, solved=True), episode(WRONG, PASSED, solved=True)
    figures = report([solved_at_once, solved_later, episode(WRONG, WRONG, WRONG), episode(PASSED)])
    assert figures.one_at_one.value == 0.25
    assert figures.one_at_budget.value == 0.5


def test_single_responses_share_one_budget_and_the_public_tests_choose_among_them() -> None:
    solving, failing = episode(PASSED, solved=True), episode(WRONG)
    figures = report([solving, failing, failing], condition="single_turn")
    assert figures.one_at_one.value == pytest.approx(1 / 3)
    assert figures.one_at_budget.value == 1.0


def test_problems_weigh_the_same_however_often_they_were_attempted() -> None:
    solved = [episode(PASSED, solved=True, problem="a")]
    failed = [episode(WRONG, WRONG, WRONG, problem="b") for _ in range(3)]
    assert report([*solved, *failed]).one_at_budget.value == 0.5


def test_problems_are_resampled_where_each_was_attempted_once() -> None:
    figures = report([episode(PASSED, solved=True, problem="a"), episode(WRONG, WRONG, WRONG, problem="b")])
    assert (figures.one_at_budget.low, figures.one_at_budget.high) == (0.0, 1.0)


def test_no_episodes_are_refused() -> None:
    with pytest.raises(ValueError, match="there are no episodes to evaluate: give at least one problem"):
        report([])


def test_reward_and_length_are_means_over_episodes_and_responses() -> None:
    episodes = [episode(PASSED, solved=True), episode(NO_CODE, WRONG, codes=[None, "a"])]
    metrics = episode_metrics(episodes, RewardConfig())
    assert metrics["reward"] == pytest.approx((1.0 + (-0.2 - 1.0)) / 2)
    assert metrics["response_tokens"] == 2.0
    assert metrics["sampled_tokens"] == 6.0
    assert metrics["solve_rate"] == metrics["first_turn_solve_rate"] == 0.5


def test_dialogs_share_their_random_numbers_and_single_responses_have_their_own() -> None:
    rollouts = Recorded()
    evaluate_recorded(["a", "b"], rollouts)
    dialogs, singles = rollouts.calls[:3], rollouts.calls[3]
    assert [(feedback, turns) for feedback, turns, *_ in dialogs] == [("true", 3), ("random", 3), ("none", 3)]
    for _, _, names, numbers, _ in dialogs:
        assert (names, numbers) == (["a", "a", "b", "b"], [0, 1, 2, 3])
    _, turns, names, numbers, params = singles
    assert (turns, names, numbers) == (1, ["a"] * 6 + ["b"] * 6, list(range(4, 16)))
    not_the_seed_of_training = 1_000_010
    assert params == SamplingParams(temperature=0.2, top_p=0.95, max_tokens=5, seed=not_the_seed_of_training)


def test_the_conditions_are_told_apart() -> None:
    evaluation = evaluate_recorded(["a", "b"], Recorded())
    assert tuple(evaluation.reports) == CONDITIONS
    rates = [evaluation.reports[condition].one_at_budget.value for condition in CONDITIONS]
    assert rates == [1.0, 0.0, 0.0, 0.0]


def test_samples_are_the_first_rollouts_of_evenly_spaced_problems() -> None:
    evaluation = evaluate_recorded(["a", "b", "c", "d", "e"], Recorded(), samples=2)
    for condition in CONDITIONS:
        assert [sample.problem_id for sample in evaluation.samples[condition]] == ["a", "c"]
    assert [sample.number for sample in evaluation.samples["true_feedback"]] == [0, 4]


def test_the_summary_names_each_figure_by_condition_and_budget(tmp_path: Path) -> None:
    figures = summarise(evaluate_recorded(["a"], Recorded()))
    write_summary(
        tmp_path / "run" / "summary.json",
        run_summary(start=figures, final=figures, seed=7, steps=5, seconds=1.5),
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for phase in ("start", "final"):
        names = ("1@1", "1@3", "single_turn_1@3", "random_feedback_1@3", "no_feedback_1@3")
        assert [summary[phase][name] for name in names] == [0.0, 1.0, 0.0, 0.0, 0.0]
        assert summary[phase]["intervals"]["1@3"] == [1.0, 1.0]
        assert summary[phase]["repair_rate"] == 1.0
        assert summary[phase]["identical_resubmission_rate"] == 0.0
    assert (summary["seed"], summary["steps"], summary["seconds"]) == (7, 5, 1.5)
    assert set(summary["versions"]) == {"rlef", "torch", "megatron-core"}
    assert summary["hardware"][0].isdigit()


def test_a_sampled_dialog_reads_as_prompt_response_feedback_response() -> None:
    words = ["<user>", "<bot>", "<end>", "add", "one", "print", "failed", "again", "..."]
    tokenizer = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="...")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<user>", "<bot>", "<end>"])
    dialog = Dialog(tokenizer, RolloutConfig(), user="<user>", assistant="<bot>", end="<end>")
    user, bot, end, add, one, printed, failed, again, _ = range(9)
    unfinished = [user, add, one, bot, printed, printed]  # the first response was cut off: rollouts close it
    told = [end, user, failed, again, bot, printed, end]
    attempt = Episode(
        problem_id="a",
        number=0,
        token_ids=unfinished + told,
        sampled=[False] * 13,
        logprobs=[0.0] * 13,
        versions=[0] * 13,
        turns=(
            Turn(start=4, end=6, finish_reason="length", code=None, outcome=NO_CODE, public_results=()),
            Turn(start=11, end=13, finish_reason="stop", code="print", outcome=PASSED, public_results=()),
        ),
        solved=True,
    )

    def rollouts(problems: Sequence[Problem], *, turns: int, **_: object) -> list[Episode]:
        return [attempt if turns == 3 else episode(WRONG, problem="a") for _ in problems]

    evaluation = evaluate(
        [problem("a")],
        rollouts=rollouts,
        config=Config(evaluation=EvaluationConfig(rollouts_per_problem=1, bootstrap_samples=1)),
    )
    true, random = dialog_examples(evaluation, [problem("a")], phase="start", dialog=dialog)
    assert (true.condition, random.condition) == ("true_feedback", "random_feedback")
    assert (true.problem_id, true.phase, true.statement, true.solved) == ("a", "start", "state a", True)
    assert true.messages == (
        Message(role="user", text="add one", outcome=None),
        Message(role="assistant", text="print print", outcome="no_code"),
        Message(role="user", text="failed again", outcome=None),
        Message(role="assistant", text="print", outcome="passed"),
    )
