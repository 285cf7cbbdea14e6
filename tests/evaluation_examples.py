"""Dialogs by hand, for the tests of figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlef.config import Budget, Config, EvaluationConfig
from rlef.evaluation_folder import EvaluationFolder, figures_of
from rlef.measurement import draws_of, measure
from rlef.records import Episode, Turn, TurnOutcome
from rlef.transcripts import Transcript, TranscriptTurn, append_transcripts

PASSED, WRONG, NO_CODE = TurnOutcome.PASSED, TurnOutcome.WRONG_OUTPUT, TurnOutcome.NO_CODE
RAISED = TurnOutcome.EXCEPTION


def episode(
    *outcomes: TurnOutcome,
    solved: bool = False,
    problem: str = "p",
    number: int = 0,
    codes: Sequence[str | None] | None = None,
) -> Episode:
    """A prompt of one token, then responses of two tokens with one token of feedback between them."""
    codes = codes or [f"program {place}" for place in range(len(outcomes))]
    turns = tuple(
        Turn(
            start=1 + 3 * place,
            end=3 + 3 * place,
            finish_reason="stop",
            code=code,
            outcome=outcome,
            public_results=(),
        )
        for place, (outcome, code) in enumerate(zip(outcomes, codes, strict=True))
    )
    length = turns[-1].end
    return Episode(
        problem_id=problem,
        number=number,
        token_ids=list(range(length)),
        sampled=[place % 3 != 0 for place in range(length)],
        logprobs=[0.0] * length,
        versions=[0] * length,
        turns=turns,
        solved=solved,
    )


def transcript(
    *outcomes: TurnOutcome,
    solved: bool = False,
    problem: str = "p",
    number: int = 0,
    codes: Sequence[str | None] | None = None,
    tokens: int | None = 2,
    seconds: float = 0.5,
) -> Transcript:
    """Responses of `tokens` tokens, each after a prompt of ten times as many, and of `seconds`."""
    codes = codes or [f"program {place}" for place in range(len(outcomes))]
    return Transcript(
        problem_id=problem,
        number=number,
        turns=tuple(
            TranscriptTurn(
                response=f"```python\n{code}```",
                code=code,
                outcome=outcome,
                finish_reason="stop",
                prompt_tokens=None if tokens is None else 10 * tokens,
                response_tokens=tokens,
                seconds=seconds,
            )
            for outcome, code in zip(outcomes, codes, strict=True)
        ),
        solved=solved,
    )


def evaluated(
    path: Path, solved: Sequence[Sequence[bool]], *, problems: str = "digest", **settings: Any
) -> Path:
    """An evaluation in which each problem's dialogs were solved so, on turn 2."""
    evaluation = EvaluationConfig(
        **{
            "budgets": (Budget(n=1, k=2, temperature=1.0, top_p=1.0),),
            "turn_limits": (1, 2),
            "feedback": ("true",),
            "rollouts_per_problem": 2,
            "bootstrap_samples": 500,
        }
        | settings
    )
    identity = {"seed": 1, "problems": problems}
    made = EvaluationFolder(path, identity)
    transcripts: list[Transcript] = [
        transcript(WRONG, PASSED, solved=True, problem=f"p{place}")
        if each[rollout]
        else transcript(WRONG, WRONG, problem=f"p{place}")
        for rollout in range(2)
        for place, each in enumerate(solved)
    ]
    drawn = dict.fromkeys(draws_of(evaluation), transcripts)
    for draw in drawn:
        append_transcripts(path / "transcripts" / f"{draw.name}.jsonl", transcripts)
    made.write_figures(
        figures_of(measure(drawn, evaluation, seed=1), Config(evaluation=evaluation), identity)
    )
    return path
