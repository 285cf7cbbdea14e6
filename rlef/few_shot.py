"""Example dialogs that stand before a problem's own dialog: the file that holds them.

One JSON object a line: `problem_id`, and `messages` as chat servers take them, each with `role` and
`content`. They begin with the user and end with the assistant, in turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rlef.config import ConfigError
from rlef.files import write_text


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ExampleMessage(_Row):
    role: Literal["user", "assistant"]
    content: str


class ExampleDialog(_Row):
    """One dialog, whose problem must not be among those that it is shown for."""

    problem_id: Annotated[str, Field(min_length=1)]
    messages: Annotated[tuple[ExampleMessage, ...], Field(strict=False, min_length=2)]

    @model_validator(mode="after")
    def _check_turns(self) -> Self:
        expected = [("user", "assistant")[place % 2] for place in range(len(self.messages))]
        if len(expected) % 2 or [message.role for message in self.messages] != expected:
            raise ValueError("messages must be of user and assistant in turns, and end with the assistant")
        return self


def read_examples(path: str) -> list[ExampleDialog]:
    """Those of a file; none for an empty path.

    Raises:
        ConfigError: the file cannot be read, holds no dialog, or a line is not one.
    """
    if not path:
        return []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"rollout.few_shot: {path!r} cannot be read ({error}); name a JSONL file") from None
    examples: list[ExampleDialog] = []
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        try:
            examples.append(ExampleDialog.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "line"
            raise ConfigError(f"rollout.few_shot: {path}, line {number}: {field}: {first['msg']}") from None
    if not examples:
        raise ConfigError(f"rollout.few_shot: {path} holds no dialog; put one JSON object on each line")
    return examples


def write_examples(path: Path, examples: Sequence[ExampleDialog]) -> None:
    """As a whole or not at all."""
    write_text(path, "".join(example.model_dump_json() + "\n" for example in examples))


def require_other_problems(examples: Sequence[ExampleDialog], problem_ids: Sequence[str]) -> None:
    """An example of a problem that is asked for would be its solution.

    Raises:
        ConfigError: there is one.
    """
    asked = set(problem_ids)
    for example in examples:
        if example.problem_id in asked:
            raise ConfigError(
                f"rollout.few_shot: the example of problem {example.problem_id!r} would be shown for that "
                "problem itself; make examples from other problems"
            )
