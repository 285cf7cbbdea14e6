"""What the readers share: rows of files, typed fields, and how a problem that cannot be used is told."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

from rlef.config import ConfigError, ExecutorConfig
from rlef.files import naming
from rlef.problems import MAX_TESTS_PER_PROBLEM_BYTES, json_of
from rlef.records import Problem, ProblemFlag, ProblemTest
from rlef_sandbox import Call, Checker, Executor, Test


class Reason(StrEnum):
    """Why a problem is set aside."""

    NO_PUBLIC_TESTS = "no public tests"
    NO_PRIVATE_TESTS = "no private tests"
    INTERACTIVE = "interactive"
    UNSUPPORTED = "unsupported"
    UNREADABLE = "unreadable"
    INVALID = "invalid"
    TOO_LARGE = "too large"
    REFERENCE_FAILS = "reference fails"
    DUPLICATE = "duplicate"


class UnusableProblemError(Exception):
    """One problem cannot be used; the others can."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAside:
    """A problem that is left out: where it stands, what it is called if that is known, and why."""

    place: str
    id: str
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A problem, and where it stands."""

    place: str
    problem: Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a conversion lets its user choose."""

    defaults: ExecutorConfig
    max_test_bytes: int
    public_tests: int  # how many of the first tests are public, where the source does not say which are
    generated_tests: bool  # whether tests that CodeContests generated are private tests too
    solutions: int  # how many of each kind are kept


Fields = dict[str, Any]
Maker = Callable[[Fields, Choices, Executor | None], Problem]

_SEVERAL_ANSWERS = re.compile(
    r"\b(?:any|one) of (?:them|the (?:possible|valid|correct|optimal)|these)\b"
    r"|\b(?:multiple|several|many|more than one) (?:possible |valid |correct |optimal )*"
    r"(?:answers?|solutions?)\b"
    r"|\b(?:print|output|find) any\b",
    re.IGNORECASE,
)
_INTERACTIVE = re.compile(r"\binteractive (?:problem|task)\b|\binteraction protocol\b", re.IGNORECASE)


def problems_in(
    path: Path, make: Maker, choices: Choices, executor: Executor | None
) -> Iterator[Found | SetAside]:
    """The problems of a file of rows, in its order; a bad row is set aside."""
    for place, row in rows_of(path, choices.max_test_bytes * MAX_TESTS_PER_PROBLEM_BYTES):
        if isinstance(row, UnusableProblemError):
            yield SetAside(place=place, id="", reason=row.reason, detail=row.detail)
            continue
        yield made(place, row, make, choices, executor)


def made(
    place: str, row: Fields, make: Maker, choices: Choices, executor: Executor | None
) -> Found | SetAside:
    try:
        return Found(place=place, problem=make(row, choices, executor))
    except UnusableProblemError as error:
        return SetAside(place=place, id=_name_of(row), reason=error.reason, detail=error.detail)


def rows_of(path: Path, most_bytes: int) -> Iterator[tuple[str, Fields | UnusableProblemError]]:
    """The rows of JSON lines, gzipped or not, or of parquet, each with its place, one at a time.

    A row of more than `most_bytes` is passed over without being held in memory, but for what a page of a
    parquet file holds.

    Raises:
        ConfigError: the file is none of these, or is broken as a whole.
    """
    if path.name.endswith(".parquet"):
        yield from _parquet_rows(path, most_bytes)
        return
    if ".riegeli" in path.name:
        raise ConfigError(
            f"{path}: riegeli records, for which no reader is published as a package; fetch the .parquet "
            "files of the same set"
        )
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".json.gz", ".json")):
        raise ConfigError(f"{path}: give JSON lines (.jsonl, .jsonl.gz) or a .parquet file")
    try:
        with naming(path), path.open("rb") as plain:
            file: Any = gzip.GzipFile(fileobj=plain) if path.name.endswith(".gz") else plain
            yield from _json_rows(file, path, most_bytes)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: not a whole gzip file ({error.args[0]}); fetch it again") from None


def _json_rows(
    file: BinaryIO, path: Path, most_bytes: int
) -> Iterator[tuple[str, Fields | UnusableProblemError]]:
    number = 0
    while line := file.readline(most_bytes + 1):
        number += 1
        place = f"{path}, line {number}"
        if len(line) > most_bytes:
            _pass_over_line(file)
            yield place, UnusableProblemError(Reason.TOO_LARGE, f"a line of more than {most_bytes:,} bytes")
        elif line.strip():
            yield place, _json_row(line)


def _pass_over_line(file: BinaryIO) -> None:
    while (piece := file.readline(1 << 20)) and not piece.endswith(b"\n"):
        pass


def _json_row(line: bytes) -> Fields | UnusableProblemError:
    try:
        row = read_json(line)
    except UnusableProblemError as error:
        return error
    if not isinstance(row, dict):
        return UnusableProblemError(Reason.INVALID, f"a JSON {type(row).__name__}, not an object")
    return row


def _parquet_rows(path: Path, most_bytes: int) -> Iterator[tuple[str, Fields | UnusableProblemError]]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(f"{path}: parquet files want pyarrow; pip install 'rlef[data]'") from None
    number = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=1, use_threads=False):
                number += 1
                yield f"{path}, row {number}", _parquet_row(batch, most_bytes)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"{path}: not a whole parquet file (after {number} rows: {error}); fetch it again"
        ) from None


def _parquet_row(batch: Any, most_bytes: int) -> Fields | UnusableProblemError:
    if batch.nbytes > most_bytes:
        return UnusableProblemError(
            Reason.TOO_LARGE, f"{batch.nbytes:,} bytes, more than {most_bytes:,} in one problem"
        )
    try:
        (row,) = batch.to_pylist()
    except UnicodeDecodeError as error:
        return UnusableProblemError(Reason.UNREADABLE, f"a text that is not UTF-8 ({error.reason})")
    return dict(row)


def read_json(text: str | bytes) -> Any:
    """Raises UnusableProblemError for what is no JSON, no UTF-8, or nested too deep."""
    try:
        return json_of(text)
    except ValueError as error:
        said = str(error).split("\n")[0][:200]
        raise UnusableProblemError(Reason.UNREADABLE, f"not JSON ({said})") from None


def text_field(row: Fields, name: str, default: str | None = None) -> str:
    """A field's text; an empty one or none gives `default`, and is unusable where that is None."""
    value = row.get(name)
    if value is None or value == "":
        if default is None:
            raise UnusableProblemError(Reason.INVALID, f"field {name!r} is missing or empty")
        return default
    if not isinstance(value, str):
        raise _wrong_type(name, value, "text")
    return value


def list_field(row: Fields, name: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        raise _wrong_type(name, value, "a list")
    return value


def object_field(row: Fields, name: str) -> Fields:
    value = row.get(name)
    if not isinstance(value, dict):
        raise _wrong_type(name, value, "an object")
    return value


def json_field(row: Fields, name: str, default: Any = None) -> Any:
    """A field that holds JSON as text; as the value itself it is taken too."""
    value = row.get(name)
    if value is None or value == "":
        return default
    return read_json(value) if isinstance(value, str) else value


def texts_of(name: str, values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise _wrong_type(name, values, "a list of texts")
    return values


def _wrong_type(name: str, value: object, wanted: str) -> UnusableProblemError:
    return UnusableProblemError(Reason.INVALID, f"field {name!r} is {type(value).__name__}, not {wanted}")


def _name_of(row: Fields) -> str:
    """For a report: whatever the source may call it."""
    for name in ("task_id", "question_id", "problem_id", "id", "name"):
        if isinstance(row.get(name), (str, int)):
            return str(row[name])
    return ""


def require_tests(public: list[Any], private: list[Any]) -> None:
    if not public:
        raise UnusableProblemError(Reason.NO_PUBLIC_TESTS, "the source gives none")
    if not private:
        raise UnusableProblemError(Reason.NO_PRIVATE_TESTS, "the source gives none")


def require_no_dialog(statement: str) -> None:
    if said := _INTERACTIVE.search(statement):
        raise UnusableProblemError(Reason.INTERACTIVE, f"the statement says {said.group()!r}")


def flags_of(statement: str) -> tuple[ProblemFlag, ...]:
    """By its wording: whether a statement accepts several answers, where the tests name one."""
    return ("several_answers",) if _SEVERAL_ANSWERS.search(statement) else ()


def split_tests(
    tests: list[ProblemTest], choices: Choices
) -> tuple[tuple[ProblemTest, ...], tuple[ProblemTest, ...]]:
    """The first ones are public, where the source does not say which are."""
    public, private = tests[: choices.public_tests], tests[choices.public_tests :]
    require_tests(public, private)
    return tuple(public), tuple(private)


def with_starter(statement: str, starter_code: str) -> str:
    if not starter_code.strip():
        return statement
    return f"{statement.rstrip()}\n\nBegin with this code:\n```python\n{starter_code.rstrip()}\n```\n"


# APPS and those after it wrap the expected value in a list or not, and accept both readings.
_VALUE_OR_FIRST = """
import json


def check(input, expected_output, output):
    value, expected = json.loads(output), json.loads(expected_output)
    return value == expected or (isinstance(expected, list) and len(expected) > 0 and value == expected[0])
"""


def inputs_and_outputs(fields: Fields) -> tuple[list[ProblemTest], str, Checker | None]:
    """The tests, the function and the judge of `{"inputs": [...], "outputs": [...], "fn_name": name}`, as
    hendrycks/apps (eval/testing_util.py) reads it: texts or lists of lines on standard input, or lists of
    arguments where a function is named."""
    inputs, outputs = list_field(fields, "inputs"), list_field(fields, "outputs")
    if len(inputs) != len(outputs):
        raise UnusableProblemError(Reason.INVALID, f"{len(inputs)} inputs and {len(outputs)} outputs")
    function = text_field(fields, "fn_name", "")
    if not function:
        return (
            [Test(_lines(given), _lines(wanted)) for given, wanted in zip(inputs, outputs, strict=True)],
            "",
            None,
        )
    if not all(isinstance(given, list) for given in inputs):
        raise UnusableProblemError(Reason.INVALID, "an input of a function that is no list of arguments")
    tests: list[ProblemTest] = [Call(given, wanted) for given, wanted in zip(inputs, outputs, strict=True)]
    return tests, function, Checker(program=_VALUE_OR_FIRST)


def _lines(value: object) -> str:
    if isinstance(value, list):
        return "\n".join(texts_of("inputs", value))
    if not isinstance(value, str):
        raise _wrong_type("inputs", value, "text or a list of lines")
    return value
