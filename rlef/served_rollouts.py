"""Dialogs with a model behind a server: `rollout.collect` for messages instead of token ids.

The messages are those that our own policies get. Not every server goes on from the
beginning of an answer, so the stub of a problem stands in its statement, and the answer is to hold it. Limits
in tokens (`rollout.max_prompt_tokens`, `rollout.max_feedback_tokens`) do not apply, since only the server has
the tokenizer.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlef import prompts
from rlef.chat_server import ChatMessage, ChatServer, Reply
from rlef.config import FeedbackKind, RolloutConfig
from rlef.ports import Response, SamplingParams
from rlef.records import Problem
from rlef.rollout import Attempt, charge, feedback_messages, judge_attempts
from rlef.transcripts import Transcript, TranscriptTurn
from rlef.unrelated import UnrelatedFeedback
from rlef_sandbox import Executor


@dataclass(slots=True, eq=False)
class _Served:
    """A dialog under way. The attempt has turns but no token ids: those are the server's own affair."""

    attempt: Attempt
    messages: list[ChatMessage]
    replies: list[Reply] = field(default_factory=list)

    def transcript(self) -> Transcript:
        return Transcript(
            problem_id=self.attempt.problem.id,
            number=self.attempt.number,
            turns=tuple(
                TranscriptTurn(
                    response=reply.text,
                    code=turn.code,
                    outcome=turn.outcome,
                    finish_reason=reply.finish_reason,
                    prompt_tokens=reply.prompt_tokens,
                    response_tokens=reply.response_tokens,
                    seconds=turn.seconds,
                )
                for turn, reply in zip(self.attempt.turns, self.replies, strict=True)
            ),
            solved=self.attempt.solved,
        )


def collect_served(
    problems: Sequence[Problem],
    *,
    numbers: Sequence[int],
    server: ChatServer,
    executor: Executor,
    settings: RolloutConfig,
    params: SamplingParams,
    turns: int,
    feedback: FeedbackKind,
    unrelated: UnrelatedFeedback | None = None,
) -> list[Transcript]:
    """One dialog per problem, in their order; `numbers` and the turn key the seed of each request.

    A failure of the server (`ServerFault`) or of the sandbox (`SandboxFault`) is raised, never scored.
    """
    dialogs = [
        _Served(
            Attempt(problem, number, []),
            [ChatMessage(role="user", content=_request(problem))],
        )
        for problem, number in zip(problems, numbers, strict=True)
    ]
    live = dialogs
    for turn in range(turns):
        started = time.monotonic()
        replies = server.replies(
            [dialog.messages for dialog in live],
            params,
            seeds=[_seed(params.seed, dialog.attempt.number, turn) for dialog in live],
        )
        _execute(live, replies, executor)
        charge([dialog.attempt for dialog in live], time.monotonic() - started)
        live = [dialog for dialog in live if not dialog.attempt.passed_public]
        if turn == turns - 1 or not live:
            break
        texts = feedback_messages(
            [dialog.attempt for dialog in live],
            feedback,
            settings,
            unrelated=unrelated,
            seed=params.seed,
            executor=executor,
        )
        for dialog, text in zip(live, texts, strict=True):
            dialog.messages.append(ChatMessage(role="assistant", content=dialog.replies[-1].text))
            dialog.messages.append(ChatMessage(role="user", content=text))
    judge_attempts([dialog.attempt for dialog in dialogs if dialog.attempt.passed_public], executor)
    return [dialog.transcript() for dialog in dialogs]


def _request(problem: Problem) -> str:
    return prompts.prompt_text(prompts.with_stub(problem.statement, problem.stub))


def _execute(dialogs: Sequence[_Served], replies: Sequence[Reply], executor: Executor) -> None:
    """Append a turn to every dialog. A reply without code runs nothing."""
    codes = [prompts.extract_code(reply.text) for reply in replies]
    executed = iter(
        executor.run_many(
            [
                dialog.attempt.public_job(code)
                for dialog, code in zip(dialogs, codes, strict=True)
                if code is not None
            ]
        )
    )
    for dialog, reply, code in zip(dialogs, replies, codes, strict=True):
        untold = Response(token_ids=[], logprobs=[], versions=[], finish_reason=reply.finish_reason)
        dialog.attempt.add_turn(untold, code, next(executed) if code is not None else [])
        dialog.replies.append(reply)


def _seed(seed: int, number: int, turn: int) -> int:
    """Of one request, in the 31 bits that every server takes."""
    digest = hashlib.sha256(f"{seed}/{number}/{turn}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1
