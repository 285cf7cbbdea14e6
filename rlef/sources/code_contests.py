"""CodeContests as deepmind/code_contests on the Hugging Face hub publishes it: parquet, one problem a row.

Fields and numbers are those of contest_problem.proto in google-deepmind/code_contests; repeated messages are
structs of lists there: `public_tests` is `{"input": [...], "output": [...]}`. What the proto leaves unset is
null, 0 or an empty text.

The original files are riegeli records. No package of PyPI reads them (`pip download riegeli` finds none):
google/riegeli has to be built with bazel. They are refused, and the parquet files hold the same problems.
"""

from __future__ import annotations

from typing import Any

from rlef.records import Problem
from rlef.sources.common import (
    Choices,
    Fields,
    Reason,
    UnusableProblemError,
    flags_of,
    list_field,
    object_field,
    require_no_dialog,
    require_tests,
    text_field,
    texts_of,
)
from rlef_sandbox import Executor, Test

SOURCES = {1: "codechef", 2: "codeforces", 3: "hackerearth", 4: "codejam", 6: "atcoder", 7: "aizu"}
DIFFICULTIES = {1: "easy", 2: "medium", 3: "hard", 4: "harder", 5: "hardest", 6: "external"}
DIFFICULTIES |= {number: chr(ord("A") + number - 7) for number in range(7, 18)}
DIFFICULTIES |= {number: chr(ord("L") + number - 19) for number in range(19, 30)}  # 18 is not used
PYTHON3 = 3


def problem_of_row(row: Fields, choices: Choices, _executor: Executor | None) -> Problem:
    statement = text_field(row, "description")
    require_no_dialog(statement)
    for name, usual in (("input_file", "stdin"), ("output_file", "stdout")):
        if (file := text_field(row, name, usual)) != usual:
            raise UnusableProblemError(Reason.UNSUPPORTED, f"field {name!r}: programs must use {file!r}")
    public, private = _tests(row, "public_tests"), _tests(row, "private_tests")
    require_tests(public, private)
    if choices.generated_tests:
        private += _tests(row, "generated_tests")
    number = row.get("source")
    return Problem(
        id=text_field(row, "name"),
        statement=statement,
        public_tests=tuple(public),
        private_tests=tuple(private),
        time_limit_s=_seconds(row.get("time_limit")) or choices.defaults.default_time_limit_s,
        memory_limit_bytes=_whole(row, "memory_limit_bytes") or choices.defaults.default_memory_limit_bytes,
        source=f"code_contests/{SOURCES.get(number, 'unknown')}",  # type: ignore[arg-type]
        solutions=_programs(row, "solutions", choices.solutions),
        incorrect_solutions=_programs(row, "incorrect_solutions", choices.solutions),
        flags=flags_of(statement),
        difficulty=DIFFICULTIES.get(_whole(row, "difficulty"), ""),
        rating=_whole(row, "cf_rating") or None,
    )


def _tests(row: Fields, name: str) -> list[Test]:
    if row.get(name) is None:
        return []
    tests = object_field(row, name)
    inputs, outputs = (texts_of(f"{name}.{side}", list_field(tests, side)) for side in ("input", "output"))
    if len(inputs) != len(outputs):
        raise UnusableProblemError(
            Reason.INVALID, f"field {name!r}: {len(inputs)} inputs and {len(outputs)} outputs"
        )
    return [Test(given, wanted) for given, wanted in zip(inputs, outputs, strict=True)]


def _programs(row: Fields, name: str, most: int) -> tuple[str, ...]:
    """Those in Python 3."""
    if row.get(name) is None:
        return ()
    programs = object_field(row, name)
    languages, texts = list_field(programs, "language"), texts_of(name, list_field(programs, "solution"))
    python = [text for language, text in zip(languages, texts, strict=False) if language == PYTHON3]
    return tuple(python[:most])


def _seconds(duration: Any) -> float:
    """A protobuf duration; 0 where there is none."""
    if duration is None:
        return 0.0
    if not isinstance(duration, dict):
        raise UnusableProblemError(Reason.INVALID, "field 'time_limit' is no duration")
    return _whole(duration, "seconds") + _whole(duration, "nanos") / 1e9


def _whole(row: Fields, name: str) -> int:
    """A whole number; 0, which the proto means by no value, where there is none."""
    value = row.get(name)
    if value is None:
        return 0
    if not isinstance(value, int) or value < 0:
        raise UnusableProblemError(Reason.INVALID, f"field {name!r} is {value!r}, not a whole number from 0")
    return value
