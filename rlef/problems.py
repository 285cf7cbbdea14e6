"""Problem sources: JSONL files and the embedded source, and the resumable order in which training takes
problems.

A JSONL file holds one problem per line: an object with these fields and no others.

| field | type | |
|---|---|---|
| `id` | string | unique in the file |
| `statement` | string | what the policy is shown |
| `public_tests` | array of `{"input": string, "expected_output": string}`, at least one | give feedback |
| `private_tests` | the same, at least one | give the reward |
| `time_limit_s` | number > 0, default 10 | CPU seconds per test |
| `memory_limit_bytes` | integer > 0, default 10^9 | per test |
| `source` | string | where it comes from |
| `solutions` | array of strings, optional | reference programs |
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlef import hidden_conventions
from rlef.config import Config, ConfigError, ExecutorConfig
from rlef.files import replacing
from rlef.records import Problem, text_input
from rlef_sandbox import Test

Part = Literal["train", "eval"]

_EMBEDDED_PREFIX = "hidden_conventions:"


class _TestRow(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    input: str
    expected_output: str


class _ProblemRow(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    id: Annotated[str, Field(min_length=1)]
    statement: Annotated[str, Field(min_length=1)]
    public_tests: Annotated[list[_TestRow], Field(min_length=1)]
    private_tests: Annotated[list[_TestRow], Field(min_length=1)]
    time_limit_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    memory_limit_bytes: Annotated[int, Field(gt=0)] | None = None
    source: Annotated[str, Field(min_length=1)]
    solutions: list[str] = []


def load(config: Config, part: Part) -> list[Problem]:
    """All problems of `problems.train` or `problems.eval`: of a JSONL file, or as many of the embedded source
    as the settings say. A `ConfigError` names the setting."""
    setting = f"problems.{part}"
    source: str = getattr(config.problems, part)
    if source.startswith(_EMBEDDED_PREFIX):
        split = source.removeprefix(_EMBEDDED_PREFIX)
        if split not in hidden_conventions.SPLITS:
            raise ConfigError(
                f"{setting}: {source!r} is not a split of the embedded source; use one of "
                + ", ".join(_EMBEDDED_PREFIX + name for name in hidden_conventions.SPLITS)
            )
        size: int = getattr(config.problems, f"{part}_size")
        return list(hidden_conventions.generate(split, seed=config.problems.seed, size=size))
    path = Path(source)
    if not path.is_file():
        raise ConfigError(
            f"{setting}: there is no file {source!r}; give a JSONL file or hidden_conventions:train"
        )
    problems = list(read_jsonl(path, defaults=config.executor))
    if not problems:
        raise ConfigError(f"{setting}: {path} holds no problem; put one JSON object on each line")
    return problems


def check(config: Config) -> None:
    """Raises what `load` would, without making the problems of the embedded source."""
    one_each = config.problems.model_copy(update={"train_size": 1, "eval_size": 1})
    for part in get_args(Part):
        load(config.model_copy(update={"problems": one_each}), part)


def read_jsonl(path: Path, *, defaults: ExecutorConfig) -> Iterator[Problem]:
    """Problems of a JSONL file in order; a bad line is a `ConfigError` with its number and field."""
    line_of_id: dict[str, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = _row(line, f"{path}, line {number}")
            if row.id in line_of_id:
                raise ConfigError(
                    f"{path}, line {number}: id {row.id!r} was used on line {line_of_id[row.id]}; "
                    "give each its own"
                )
            line_of_id[row.id] = number
            yield Problem(
                id=row.id,
                statement=row.statement,
                public_tests=_tests(row.public_tests),
                private_tests=_tests(row.private_tests),
                time_limit_s=row.time_limit_s or defaults.default_time_limit_s,
                memory_limit_bytes=row.memory_limit_bytes or defaults.default_memory_limit_bytes,
                source=row.source,
                solutions=tuple(row.solutions),
            )


def write_jsonl(path: Path, problems: Iterator[Problem]) -> None:
    """The inverse of `read_jsonl`. The file is whole or not there."""
    with replacing(path) as writing, writing.open("w", encoding="utf-8") as file:
        for problem in problems:
            row = {
                "id": problem.id,
                "statement": problem.statement,
                "public_tests": _test_rows(problem.public_tests),
                "private_tests": _test_rows(problem.private_tests),
                "time_limit_s": problem.time_limit_s,
                "memory_limit_bytes": problem.memory_limit_bytes,
                "source": problem.source,
                "solutions": list(problem.solutions),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


@dataclass(slots=True)
class Cursor:
    """Walks through problems for ever, in a new order each round; `position` is all there is to save."""

    problems: list[Problem]
    seed: int
    position: int = 0

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems."""
        taken: list[Problem] = []
        while len(taken) < count:
            round_number, offset = divmod(self.position, len(self.problems))
            order = list(range(len(self.problems)))
            Random(f"{self.seed}/{round_number}").shuffle(order)
            chunk = order[offset : offset + count - len(taken)]
            taken += [self.problems[index] for index in chunk]
            self.position += len(chunk)
        return taken


def _row(line: bytes, place: str) -> _ProblemRow:
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{place}: not JSON ({error}); each line must be one JSON object in UTF-8"
        ) from None
    if not isinstance(fields, dict):
        raise ConfigError(
            f"{place}: a JSON {type(fields).__name__}, not an object; each line must be one JSON object"
        )
    try:
        return _ProblemRow.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{place}: field {field!r}: {first['msg']}") from None


def _tests(rows: list[_TestRow]) -> tuple[Test, ...]:
    return tuple(Test(row.input, row.expected_output) for row in rows)


def _test_rows(tests: tuple[Test, ...]) -> list[dict[str, str]]:
    return [{"input": text_input(test), "expected_output": test.expected_output} for test in tests]
