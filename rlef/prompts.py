"""The dialog: text to token ids and back. Templates, code extraction, feedback and truncation.

PAPER section 1 fixes what is said and when; the words are ours. Token ids are appended and never re-
tokenised: the prompt, each response and each feedback message are encoded once, on their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from rlef.config import ConfigError, RolloutConfig
from rlef.judging import shown
from rlef.records import ProblemTest, TurnOutcome
from rlef_sandbox import Result, Verdict

FORMAT_REQUEST = "\nPut your program between ```python and ``` and use backticks for nothing else."
FEEDBACK_OPENING = "Your code failed these tests:"
NO_CODE_FEEDBACK = "No program could be found in your answer."
UNTOLD_FEEDBACK = "Your code failed."
TRY_AGAIN = "\nGive it another try."
INPUT_HEADING = "\n- input:\n"
EXPECTED_HEADING = "\nexpected output:\n"
OUTPUT_HEADING = "\nyour output:\n"
TRACE_HEADING = "\nit raised:\n"
TIMEOUT_REMARK = "\nit took too long."
MEMORY_REMARK = "\nit ran out of memory."
OUTPUT_LIMIT_REMARK = "\nit printed too much."
SECURITY_REMARK = "\nit tried something that is not allowed."
ENDED_EARLY_REMARK = "\nit ended before the test did."
CUT_MARK = "..."
FENCE_OPEN = "```python\n"
FENCE_CLOSE = "```"

TEMPLATE_TEXTS = (
    FORMAT_REQUEST,
    FEEDBACK_OPENING,
    NO_CODE_FEEDBACK,
    UNTOLD_FEEDBACK,
    TRY_AGAIN,
    INPUT_HEADING,
    EXPECTED_HEADING,
    OUTPUT_HEADING,
    TRACE_HEADING,
    TIMEOUT_REMARK,
    MEMORY_REMARK,
    OUTPUT_LIMIT_REMARK,
    SECURITY_REMARK,
    FENCE_OPEN,
    FENCE_CLOSE,
)

_PYTHON_BLOCK = re.compile(r"```(?:python|py)[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_ANY_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)

_OUTCOME_OF_VERDICT = {
    Verdict.WRONG_OUTPUT: TurnOutcome.WRONG_OUTPUT,
    Verdict.EXCEPTION: TurnOutcome.EXCEPTION,
    Verdict.TIMEOUT: TurnOutcome.TIMEOUT,
    Verdict.OUT_OF_MEMORY: TurnOutcome.OUT_OF_MEMORY,
    Verdict.OUTPUT_LIMIT: TurnOutcome.OUTPUT_LIMIT,
    Verdict.SYNTAX_ERROR: TurnOutcome.SYNTAX_ERROR,
    Verdict.SECURITY: TurnOutcome.SECURITY,
}
REMARKS = {
    Verdict.TIMEOUT: TIMEOUT_REMARK,
    Verdict.OUT_OF_MEMORY: MEMORY_REMARK,
    Verdict.OUTPUT_LIMIT: OUTPUT_LIMIT_REMARK,
    Verdict.SECURITY: SECURITY_REMARK,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedTest:
    """What feedback tells about one failing public test."""

    test: ProblemTest
    result: Result


def extract_code(response: str, *, stub: str = "") -> str | None:
    """The first block marked python or py, else the first fenced block, else None (PAPER section 1).

    A response that goes on from a stub is code up to the first fence: there is always some.
    """
    if stub:
        return stub + response.partition(FENCE_CLOSE)[0]
    match = _PYTHON_BLOCK.search(response) or _ANY_BLOCK.search(response)
    return match.group(1) if match else None


def turn_outcome(code: str | None, results: Sequence[Result]) -> TurnOutcome:
    """One word for a turn: passed, or the verdict of the first failing public test."""
    if code is None:
        return TurnOutcome.NO_CODE
    for result in results:
        if result.verdict is not Verdict.PASSED:
            return _OUTCOME_OF_VERDICT[result.verdict]
    return TurnOutcome.PASSED


def begun_text(stub: str) -> str:
    """The beginning of each response to a problem with this stub."""
    return FENCE_OPEN + stub if stub else ""


def prompt_text(statement: str) -> str:
    """The first user message."""
    return statement + FORMAT_REQUEST


def with_stub(statement: str, stub: str) -> str:
    """A statement that says what the program should begin with, for answers that are not begun with it."""
    if stub.strip() in statement:
        return statement
    return f"{statement.rstrip()}\n\nBegin your program with this:\n\n{stub.rstrip()}\n"


def feedback_text(failed: Sequence[FailedTest], *, max_test_characters: int) -> str:
    """The user message after a failed turn: one bullet per failing public test."""
    bullets = [_bullet(item, max_test_characters) for item in failed]
    return "".join([FEEDBACK_OPENING, *bullets, TRY_AGAIN, FORMAT_REQUEST])


def no_code_text() -> str:
    """The user message after a response in which no program could be found."""
    return NO_CODE_FEEDBACK + TRY_AGAIN + FORMAT_REQUEST


def untold_text() -> str:
    """The user message of the no-feedback ablation: that it failed, and nothing else."""
    return UNTOLD_FEEDBACK + TRY_AGAIN + FORMAT_REQUEST


def shorten_trace(trace: str, *, max_characters: int) -> str:
    """A traceback within `max_characters`: its first line and as many of its last lines as fit."""
    trace = trace.strip("\n")
    if len(trace) <= max_characters:
        return trace
    first, *rest = trace.split("\n")
    kept: list[str] = []
    room = max_characters - len(first) - len(CUT_MARK) - 2
    for line in reversed(rest):
        if len(line) + 1 > room:
            break
        room -= len(line) + 1
        kept.insert(0, line)
    if not kept:
        return CUT_MARK + trace[-(max_characters - len(CUT_MARK)) :]
    return "\n".join([first, CUT_MARK, *kept])


def _bullet(item: FailedTest, max_characters: int) -> str:
    test, verdict = shown(item.test, item.result), item.result.verdict
    pieces = [INPUT_HEADING, cut(test.input, max_characters)]
    if verdict in REMARKS:
        pieces.append(REMARKS[verdict])
    elif verdict is Verdict.WRONG_OUTPUT and test.expected is None:
        pieces.append(ENDED_EARLY_REMARK)
    elif verdict is Verdict.WRONG_OUTPUT:
        assert test.expected is not None
        pieces += [EXPECTED_HEADING, cut(test.expected, max_characters)]
        pieces += [OUTPUT_HEADING, cut(test.output, max_characters)]
    else:
        pieces += [TRACE_HEADING, shorten_trace(item.result.stderr, max_characters=max_characters)]
    return "".join(pieces)


def cut(text: str, max_characters: int) -> str:
    """The beginning of a text, marked where it was longer; without the line ends at its end."""
    text = text.rstrip("\n")
    return text if len(text) <= max_characters else text[:max_characters] + CUT_MARK


_MARKERS = ("user", "assistant", "end")
_FIRST = "first"


def _read_markers(file: Path) -> dict[str, str]:
    try:
        markers = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"model.path: {file} is not JSON ({error})") from None
    if not isinstance(markers, dict) or set(markers) - {_FIRST} != set(_MARKERS):
        raise ConfigError(
            f"model.path: {file} must name a marker each for {', '.join(_MARKERS)}, and nothing else but "
            f"{_FIRST}"
        )
    return markers


class Dialog:
    """A tokenizer with its role markers: builds the token ids of a dialog, piece by piece.

    `user` stands before a message of the user, `assistant` between it and the response, and the token `end`
    ends the response. `first` takes the place of `user` at the start, where a system message may belong. Each
    but `end` is a token, or a text with special tokens in it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: RolloutConfig,
        *,
        user: str,
        assistant: str,
        end: str,
        first: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        tokenizer.encode_special_tokens = False
        self._user_ids = self._marker(user)
        self._first_ids = self._user_ids if first is None else self._marker(first)
        self._assistant_ids = self._marker(assistant)
        self.end_token_id = self._token(end)
        tokenizer.encode_special_tokens = (
            True  # a statement or an output that spells a role marker stays text
        )
        self._cut_ids = self._encode(CUT_MARK)
        self._check_room()

    @classmethod
    def read(cls, folder: Path, settings: RolloutConfig) -> Dialog:
        """From `tokenizer.json` and `dialog.json` (the role markers) of a model folder."""
        try:
            tokenizer_text = (folder / "tokenizer.json").read_text(encoding="utf-8")
            markers = _read_markers(folder / "dialog.json")
        except FileNotFoundError as error:
            raise ConfigError(
                f"model.path: {error.filename} is missing; "
                "a model folder needs tokenizer.json and dialog.json"
            ) from None
        try:
            tokenizer = Tokenizer.from_str(tokenizer_text)
        except Exception as error:  # noqa: BLE001  the library raises nothing more exact
            raise ConfigError(
                f"model.path: {folder / 'tokenizer.json'} cannot be read ({error}); copy it again"
            ) from None
        return cls(tokenizer, settings, **markers)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Every token that the tokenizer can give must have its row in the model's embedding."""
        tokens = self._tokenizer.get_vocab_size()
        if tokens > vocab_size:
            raise ConfigError(
                f"model.path: tokenizer.json has {tokens} tokens, but config.json says vocab_size = "
                f"{vocab_size}; "
                "use the tokenizer that belongs to the model"
            )

    def prompt(self, statement: str, *, stub: str = "") -> list[int]:
        """Token ids of the first message and of the stub, cut on the left to `max_prompt_tokens`."""
        begun = self._begun(stub)
        room = self._room(self._first_ids, self._settings.max_prompt_tokens) - len(begun)
        return [*self._first_ids, *self._encode(prompt_text(statement))[-room:], *self._assistant_ids, *begun]

    def feedback(self, text: str, *, stub: str = "") -> list[int]:
        """Token ids of a feedback message, cut on the right, and marked, and of the stub with which the next
        response begins: `max_feedback_tokens` in all."""
        ids, begun = self._encode(text), self._begun(stub)
        room = self._room(self._user_ids, self._settings.max_feedback_tokens) - len(begun)
        if len(ids) > room:
            ids = ids[: room - len(self._cut_ids)] + self._cut_ids
        return [*self._user_ids, *ids, *self._assistant_ids, *begun]

    def check_stub(self, stub: str, problem_id: str) -> None:
        """Raises ConfigError where a stub leaves no room for the messages before it."""
        for name, opening in self._openings().items():
            tokens, least = getattr(self._settings, name), len(self._cut_ids) + 1
            if (room := self._room(opening, tokens) - len(self._begun(stub))) < least:
                raise ConfigError(
                    f"rollout.{name} = {tokens} leaves no room before the stub of problem {problem_id!r}; "
                    f"use at least {tokens - room + least}, or problems.dialect=code_contests without stubs"
                )

    def close(self, response_ids: Sequence[int]) -> list[int]:
        """What must be appended so that the response ends with the end-of-turn token."""
        return [] if response_ids and response_ids[-1] == self.end_token_id else [self.end_token_id]

    def told(self, observed: Sequence[int], *, stub: str = "") -> str:
        """Text of the message in what stands before a response, without the markers around it and the stub.

        `observed` begins as the dialog does, or where the response before it ended, be it whole or cut off.
        """
        ids = list(observed)
        beginnings = (self._first_ids, self._user_ids, [self.end_token_id, *self._user_ids])
        opening = max(len(marker) for marker in beginnings if ids[: len(marker)] == marker)
        return self.decode(ids[opening : len(ids) - len(self._assistant_ids) - len(self._begun(stub))])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a response, without the end-of-turn token."""
        text: str = self._tokenizer.decode(
            [i for i in token_ids if i != self.end_token_id], skip_special_tokens=False
        )
        return text

    def response(self, text: str) -> list[int]:
        """Token ids of a whole response that ends its turn (for supervised dialogs)."""
        return [*self._encode(text), self.end_token_id]

    def _room(self, opening: Sequence[int], max_tokens: int) -> int:
        """Tokens that are left for a message between its markers."""
        return max_tokens - len(opening) - len(self._assistant_ids)

    def _begun(self, stub: str) -> list[int]:
        """What the policy finds written at the beginning of its response."""
        return self._encode(begun_text(stub))

    def _openings(self) -> dict[str, list[int]]:
        return {"max_prompt_tokens": self._first_ids, "max_feedback_tokens": self._user_ids}

    def _check_room(self) -> None:
        for name, opening in self._openings().items():
            tokens, least = getattr(self._settings, name), len(self._cut_ids) + 1
            if (room := self._room(opening, tokens)) < least:
                raise ConfigError(
                    f"rollout.{name} = {tokens} leaves no room between the model's role markers, which take "
                    f"{tokens - room} tokens; use at least {tokens - room + least}"
                )

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _marker(self, marker: str) -> list[int]:
        """A token, or a text with special tokens, without which a message could spell it."""
        if (token_id := self._tokenizer.token_to_id(marker)) is not None:
            return [int(token_id)]
        special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        ids = self._encode(marker)
        return ids if special.intersection(ids) else [self._token(marker)]

    def _token(self, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ConfigError(f"dialog.json: the tokenizer has no token {token!r}; name one that it has")
        return int(token_id)
