"""Examples for `rollout.few_shot`: dialogs of an evaluation that feedback led to a solution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rlef import problems as sources
from rlef import prompts
from rlef.config import Config, ConfigError, RolloutConfig
from rlef.evaluation_folder import Ended, problems_digest, read_ended
from rlef.execution import open_executor
from rlef.few_shot import ExampleDialog, ExampleMessage
from rlef.ports import Response
from rlef.records import Problem
from rlef.rollout import Attempt, true_message
from rlef.transcripts import Transcript
from rlef_sandbox import Executor


def examples_from(config: Config, folder: Path, *, count: int) -> list[ExampleDialog]:
    """The first `count` dialogs of the evaluation in `folder` that were solved in two turns or more.

    They are of as many problems, which `problems.eval` must name as the evaluation did. Transcripts do not
    keep what was told, so the programs run again; a dialog whose program now has another outcome is passed
    over.

    Raises:
        ConfigError: the problems are not those of the evaluation or have stubs, or there are too few such
            dialogs.
    """
    ended = read_ended(folder)
    problems = sources.load(config, "eval")
    if ended.identity.get("problems") != problems_digest(problems):
        raise ConfigError(
            f"problems.eval = {config.problems.eval!r} does not name the problems that {folder} evaluated; "
            "set it as for that evaluation"
        )
    begun = [problem.id for problem in problems if problem.stub]
    if begun:
        raise ConfigError(
            f"problems.eval: the answer to {begun[0]!r} is begun by a stub, which an example cannot show; "
            "take examples from problems without"
        )
    with open_executor(config.executor) as executor:
        made = _made(ended, problems, config.rollout, executor)
        examples = [example for _, example in zip(range(count), made, strict=False)]
    if len(examples) < count:
        raise ConfigError(
            f"{folder} has such dialogs of {len(examples)} problems, fewer than {count}: ask for fewer, or "
            "evaluate more problems or rollouts"
        )
    return examples


def _made(
    ended: Ended, problems: Sequence[Problem], settings: RolloutConfig, executor: Executor
) -> Iterator[ExampleDialog]:
    by_id = {problem.id: problem for problem in problems}
    used: set[str] = set()
    for draw, transcripts in ended.drawn.items():
        if draw.feedback != "true":
            continue
        for transcript in transcripts:
            if transcript.problem_id in used or not _is_telling(transcript):
                continue
            example = _example(transcript, by_id[transcript.problem_id], settings, executor)
            if example is not None:
                used.add(transcript.problem_id)
                yield example


def _is_telling(transcript: Transcript) -> bool:
    """Solved after feedback, and no response of it was cut off."""
    is_whole = all(turn.finish_reason == "stop" for turn in transcript.turns)
    return transcript.solved and len(transcript.turns) >= 2 and is_whole


def _example(
    transcript: Transcript, problem: Problem, settings: RolloutConfig, executor: Executor
) -> ExampleDialog | None:
    attempt = Attempt(problem, transcript.number, [])
    text = prompts.prompt_text(problem.statement)
    messages: list[ExampleMessage] = []
    for turn in transcript.turns:
        messages.append(ExampleMessage(role="user", content=text))
        messages.append(ExampleMessage(role="assistant", content=turn.response))
        results = [] if turn.code is None else executor.run_many([attempt.public_job(turn.code)])[0]
        unread = Response(token_ids=[], logprobs=[], versions=[], finish_reason=turn.finish_reason)
        attempt.add_turn(unread, turn.code, results)
        if attempt.turns[-1].outcome is not turn.outcome:
            return None
        text = true_message(attempt, settings)
    return ExampleDialog(problem_id=problem.id, messages=tuple(messages))
