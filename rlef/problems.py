"""Problem sources: JSONL files and the embedded source, and the resumable order in which training takes
problems. docs/problems.md describes the format of the files.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any, BinaryIO, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from rlef import hidden_conventions
from rlef.config import Config, ConfigError, ExecutorConfig, ProblemsConfig
from rlef.few_shot import read_examples, require_other_problems
from rlef.files import replacing
from rlef.judging import CHECKER_LIMITS
from rlef.prompts import with_stub
from rlef.records import (
    Assertion,
    Expression,
    FeedbackDialect,
    Problem,
    ProblemFlag,
    ProblemTest,
    Validator,
    text_input,
)
from rlef.validators import compiler, require_usable
from rlef_sandbox import Call, Checker, Judge, Test, Tokens

Part = Literal["train", "eval"]

MAX_TESTS_PER_PROBLEM_BYTES = 16  # times `problems.max_test_bytes`: the longest line that is read
MAX_TIME_LIMIT_S = 3600.0
MIN_MEMORY_LIMIT_BYTES, MAX_MEMORY_LIMIT_BYTES = 1 << 20, 1 << 40

_MAX_LITERAL_CHARACTERS = 1 << 20  # reading one takes a hundred times its memory
_EMBEDDED_PREFIX = "hidden_conventions:"


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _TextRow(_Row):
    input: str
    expected_output: str


class _CallRow(_Row):
    arguments: list[Any]
    expected: Any


class _ExpressionRow(_Row):
    expression: str
    expected: str


class _AssertionRow(_Row):
    assertion: str


# Each kind of test by a field that only it has; the tags look like nothing that is the name of a field.
_TAG_OF_FIELD = {"arguments": "<call>", "expression": "<expression>", "assertion": "<assertion>"}
_TEXT_TAG = "<text>"


def _tag_of_test(fields: Any) -> str:
    names = fields if isinstance(fields, dict) else {}
    return next((tag for name, tag in _TAG_OF_FIELD.items() if name in names), _TEXT_TAG)


_TestRow = Annotated[
    Annotated[_TextRow, Tag("<text>")]
    | Annotated[_CallRow, Tag("<call>")]
    | Annotated[_ExpressionRow, Tag("<expression>")]
    | Annotated[_AssertionRow, Tag("<assertion>")],
    Discriminator(_tag_of_test),
]


class _TolerancesRow(_Row):
    absolute: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    relative: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    ignore_case: bool = False


class _CheckerRow(_Row):
    checker: Annotated[str, Field(min_length=1)]


class _ValidatorRow(_Row):
    validator: Annotated[dict[str, str], Field(min_length=1)]
    flags: list[str] = []


def _tag_of_judge(value: Any) -> str:
    if isinstance(value, dict):
        return next((f"<{name}>" for name in ("checker", "validator") if name in value), "<tolerances>")
    return "<name>"


_JudgeRow = Annotated[
    Annotated[Literal["code_contests", "exact", "tokens"], Tag("<name>")]
    | Annotated[_TolerancesRow, Tag("<tolerances>")]
    | Annotated[_CheckerRow, Tag("<checker>")]
    | Annotated[_ValidatorRow, Tag("<validator>")],
    Discriminator(_tag_of_judge),
]


class ProblemRow(_Row):
    """One line of a problem file."""

    id: Annotated[str, Field(min_length=1)]
    statement: Annotated[str, Field(min_length=1)]
    public_tests: Annotated[list[_TestRow], Field(min_length=1)]
    private_tests: Annotated[list[_TestRow], Field(min_length=1)]
    time_limit_s: Annotated[float, Field(gt=0, le=MAX_TIME_LIMIT_S)] | None = None
    memory_limit_bytes: Annotated[int, Field(ge=MIN_MEMORY_LIMIT_BYTES, le=MAX_MEMORY_LIMIT_BYTES)] | None = (
        None
    )
    source: Annotated[str, Field(min_length=1)]
    solutions: list[str] = []
    incorrect_solutions: list[str] = []
    judge: _JudgeRow | None = None
    function: str = ""
    prelude: str = ""
    starter_code: str = ""
    flags: list[ProblemFlag] = []
    difficulty: str = ""
    rating: int | None = None
    solve_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    dialect: FeedbackDialect = "code_contests"
    stub: str = ""


def load(config: Config, part: Part) -> list[Problem]:
    """All problems of `problems.train` or `problems.eval`: of a JSONL file, or as many of the embedded source
    as the settings say. A `ConfigError` names the setting."""
    problems = _load(config, part)
    if part == "eval":
        require_other_problems(read_examples(config.rollout.few_shot), [problem.id for problem in problems])
    return problems


def _load(config: Config, part: Part) -> list[Problem]:
    setting = f"problems.{part}"
    source: str = getattr(config.problems, part)
    if source.startswith(_EMBEDDED_PREFIX):
        split = source.removeprefix(_EMBEDDED_PREFIX)
        if split not in hidden_conventions.SPLITS:
            raise ConfigError(
                f"{setting}: {source!r} is not a split of the embedded source; use one of "
                + ", ".join(_EMBEDDED_PREFIX + name for name in hidden_conventions.SPLITS)
            )
        if part == "train" and config.problems.order == "easy_first":
            raise ConfigError(
                f"problems.order = 'easy_first', and nothing says how hard a problem of {source} is; "
                "set problems.order=shuffled"
            )
        size: int = getattr(config.problems, f"{part}_size")
        return list(hidden_conventions.generate(split, seed=config.problems.seed, size=size))
    path = Path(source)
    if not path.is_file():
        raise ConfigError(
            f"{setting}: there is no file {source!r}; give a JSONL file or hidden_conventions:train"
        )
    problems = list(read_jsonl(path, defaults=config.executor, max_test_bytes=config.problems.max_test_bytes))
    if not problems:
        raise ConfigError(f"{setting}: {path} holds no problem; put one JSON object on each line")
    for problem in problems:
        if "interactive" in problem.flags:
            raise ConfigError(
                f"{setting}: {path}: problem {problem.id!r} has the flag 'interactive', and tests cannot "
                "judge a dialog; take it out of the file"
            )
        if isinstance(problem.judge, Validator):
            _require_compiler(f"{setting}: {path}: problem {problem.id!r}")
    if part == "train" and config.problems.order == "easy_first":
        hardness(problems)
    return problems if config.problems.dialect == "own" else [_without_dialect(each) for each in problems]


def _require_compiler(place: str) -> None:
    try:
        compiler()
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}, or take it out of the file") from None


def _without_dialect(problem: Problem) -> Problem:
    statement = with_stub(problem.statement, problem.stub)
    return replace(problem, dialect="code_contests", stub="", statement=statement)


def check(config: Config) -> dict[Part, list[Problem]]:
    """Raises what `load` would. What it would give, but two problems at most of the embedded source."""
    sizes = {f"{part}_size": min(2, getattr(config.problems, f"{part}_size")) for part in get_args(Part)}
    small = config.model_copy(update={"problems": config.problems.model_copy(update=sizes)})
    return {part: load(small, part) for part in get_args(Part)}


def read_jsonl(
    path: Path,
    *,
    defaults: ExecutorConfig,
    max_test_bytes: int = ProblemsConfig.model_fields["max_test_bytes"].default,
) -> Iterator[Problem]:
    """Problems of a JSONL file in order; a bad line is a `ConfigError` with its number and field."""
    line_of_id: dict[str, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file, path, max_test_bytes), start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            problem = problem_of(_row(line, place), place, defaults=defaults, max_test_bytes=max_test_bytes)
            if problem.id in line_of_id:
                raise ConfigError(
                    f"{place}: id {problem.id!r} was used on line {line_of_id[problem.id]}; give each its own"
                )
            line_of_id[problem.id] = number
            yield problem


def write_jsonl(path: Path, problems: Iterator[Problem]) -> None:
    """The inverse of `read_jsonl`. The file is whole or not there."""
    with replacing(path) as writing, writing.open("w", encoding="utf-8") as file:
        for problem in problems:
            file.write(line_of(problem))


def line_of(problem: Problem) -> str:
    """A problem as a line of a file; what is as it would be without its field is left out.

    Raises:
        UnicodeEncodeError: a text holds half of a surrogate pair, which UTF-8 cannot.
    """
    fields: dict[str, object] = {
        "id": problem.id,
        "statement": problem.statement,
        "public_tests": [_test_fields(test) for test in problem.public_tests],
        "private_tests": [_test_fields(test) for test in problem.private_tests],
        "time_limit_s": problem.time_limit_s,
        "memory_limit_bytes": problem.memory_limit_bytes,
        "source": problem.source,
    }
    optional = {
        "solutions": list(problem.solutions),
        "incorrect_solutions": list(problem.incorrect_solutions),
        "judge": _judge_fields(problem.judge),
        "function": problem.function,
        "prelude": problem.prelude,
        "starter_code": problem.starter_code,
        "flags": list(problem.flags),
        "difficulty": problem.difficulty,
        "rating": problem.rating,
        "solve_rate": problem.solve_rate,
        "dialect": "" if problem.dialect == "code_contests" else problem.dialect,
        "stub": problem.stub,
    }
    fields |= {name: value for name, value in optional.items() if value not in ([], "", None)}
    line = json.dumps(fields, ensure_ascii=False) + "\n"
    line.encode("utf-8")
    return line


@dataclass(slots=True)
class Cursor:
    """Walks through problems for ever, in a new order each round; `position` is all there is to save."""

    problems: list[Problem]
    seed: int
    position: int = 0
    hardness: Sequence[float] = ()  # [problems] sorts each round; those that are equal are shuffled
    _order: tuple[int, list[int]] = (-1, [])  # of the round that was taken from last

    @property
    def round(self) -> int:
        return self.position // len(self.problems)

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems."""
        taken: list[Problem] = []
        while len(taken) < count:
            offset = self.position % len(self.problems)
            chunk = self._order_of(self.round)[offset : offset + count - len(taken)]
            taken += [self.problems[index] for index in chunk]
            self.position += len(chunk)
        return taken

    def _order_of(self, round_number: int) -> list[int]:
        if self._order[0] != round_number:
            order = list(range(len(self.problems)))
            Random(f"{self.seed}/{round_number}").shuffle(order)
            if self.hardness:
                order.sort(key=self.hardness.__getitem__)
            self._order = (round_number, order)
        return self._order[1]


def statement_digest(problem: Problem) -> bytes:
    """Equal for statements that differ in case and blanks alone."""
    words = " ".join(problem.statement.lower().split())
    return hashlib.sha256(words.encode("utf-8")).digest()


def training_cursor(problems: list[Problem], config: Config) -> Cursor:
    """In the order that `problems.order` names."""
    sorts = config.problems.order == "easy_first"
    return Cursor(problems, seed=config.run.seed, hardness=hardness(problems) if sorts else ())


def hardness(problems: Sequence[Problem]) -> list[float]:
    """How hard each problem is, by solve rate if all have one, else by rating if all have that.

    Raises:
        ConfigError: some have neither.
    """
    rates = [problem.solve_rate for problem in problems]
    ratings = [problem.rating for problem in problems]
    without = [problem.id for problem in problems if problem.solve_rate is None]
    if not without:
        return [-rate for rate in rates if rate is not None]
    if None not in ratings:
        return [float(rating) for rating in ratings if rating is not None]
    raise ConfigError(
        f"problems.order = 'easy_first', and {len(without)} of {len(problems)} problems, such as "
        f"{without[0]!r}, have no solve_rate, nor have all a rating; measure them (rlef problems select "
        "--drop-unknown leaves them out), or set problems.order=shuffled"
    )


def _lines(file: BinaryIO, path: Path, max_test_bytes: int) -> Iterator[bytes]:
    """Lines, none of which is held in memory beyond the most that a problem may have."""
    longest = MAX_TESTS_PER_PROBLEM_BYTES * max_test_bytes
    number = 0
    while line := file.readline(longest + 1):
        number += 1
        if len(line) > longest:
            raise ConfigError(
                f"{path}, line {number}: longer than {longest:,} bytes; take the problem out or raise "
                "problems.max_test_bytes"
            )
        yield line


def _row(line: bytes, place: str) -> object:
    try:
        return json_of(line)
    except ValueError as error:
        raise ConfigError(
            f"{place}: not JSON ({error}); each line must be one JSON object in UTF-8"
        ) from None


def json_of(text: bytes | str) -> Any:
    """The value of a JSON text whose texts UTF-8 can hold.

    Raises:
        ValueError: it is none, is nested too deep, or holds half of a surrogate pair.
    """
    escape = b"\\ud" if isinstance(text, bytes) else "\\ud"
    try:
        value = json.loads(text)
        if escape in text.lower():  # type: ignore[operator]  # of one type
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def problem_of(row: object, place: str, *, defaults: ExecutorConfig, max_test_bytes: int) -> Problem:
    """A line of a file, already read as JSON, as a problem that can be judged.

    Raises:
        ConfigError: with the place and the field.
    """
    if not isinstance(row, dict):
        raise ConfigError(
            f"{place}: a JSON {type(row).__name__}, not an object; each line must be one JSON object"
        )
    try:
        fields = ProblemRow.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if not str(part).startswith("<"))
        raise ConfigError(f"{place}: field {field!r}: {first['msg']}") from None
    problem = Problem(
        id=fields.id,
        statement=fields.statement,
        public_tests=tuple(_test(test) for test in fields.public_tests),
        private_tests=tuple(_test(test) for test in fields.private_tests),
        time_limit_s=fields.time_limit_s or defaults.default_time_limit_s,
        memory_limit_bytes=fields.memory_limit_bytes or defaults.default_memory_limit_bytes,
        source=fields.source,
        solutions=tuple(fields.solutions),
        incorrect_solutions=tuple(fields.incorrect_solutions),
        judge=_judge(fields.judge),
        function=fields.function,
        prelude=fields.prelude,
        starter_code=fields.starter_code,
        flags=tuple(fields.flags),
        difficulty=fields.difficulty,
        rating=fields.rating,
        solve_rate=fields.solve_rate,
        dialect=fields.dialect,
        stub=fields.stub,
    )
    require_judgeable(problem, place, max_test_bytes=max_test_bytes)
    return problem


def require_judgeable(problem: Problem, place: str, *, max_test_bytes: int) -> None:
    """What the types of the fields do not say. A `ConfigError` names the place and the field."""
    kinds = {type(test) for test in (*problem.public_tests, *problem.private_tests)}
    if len(kinds) > 1:
        raise ConfigError(
            f"{place}: field 'private_tests': tests of several kinds; use one kind in a problem, in its "
            "public tests too"
        )
    (kind,) = kinds
    needs_function, may_have_function = kind is Call, kind in (Call, Expression)
    if problem.function and not (may_have_function and problem.function.isidentifier()):
        raise ConfigError(
            f"{place}: field 'function': {problem.function!r} is no name, or no test calls it; leave it out"
        )
    if needs_function and not problem.function:
        raise ConfigError(f"{place}: field 'function': missing; name what the tests call")
    if problem.dialect == "evalplus" and kind is Test:
        raise ConfigError(
            f"{place}: field 'dialect': 'evalplus' tells tests as assertions, and these have text for input; "
            "leave it out"
        )
    if "```" in problem.stub:
        raise ConfigError(f"{place}: field 'stub': three backticks would end the code that it begins")
    if isinstance(problem.judge, Validator):
        if kind is not Test:
            raise ConfigError(
                f"{place}: field 'judge.validator': it reads text, and these tests give values; leave it out"
            )
        require_usable(problem.judge, place, max_test_bytes)
    for name in ("public_tests", "private_tests"):
        for index, test in enumerate(getattr(problem, name)):
            _require_usable(test, place, f"{name}.{index}", max_test_bytes)


def _require_usable(test: ProblemTest, place: str, name: str, max_test_bytes: int) -> None:
    size = _size_of(test)
    if size > max_test_bytes:
        raise ConfigError(
            f"{place}: field '{name}': {size:,} bytes, and problems.max_test_bytes = {max_test_bytes:,}; "
            "raise it or take the test out"
        )
    if isinstance(test, Expression) and not is_literal(test.expected):
        raise ConfigError(
            f"{place}: field '{name}.expected': not a literal of Python of at most "
            f"{_MAX_LITERAL_CHARACTERS:,} characters; write a value such as (1, 'a')"
        )
    if isinstance(test, Assertion) and not test.code.strip():
        raise ConfigError(
            f"{place}: field '{name}.assertion': empty; write Python that raises for a wrong program"
        )


def is_literal(text: str) -> bool:
    """Whether Python reads it as a value, which it does not with whole numbers of more than 4,300 digits."""
    if len(text) > _MAX_LITERAL_CHARACTERS:
        return False
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return False
    return True


def _size_of(test: ProblemTest) -> int:
    if isinstance(test, Call):
        return len(json.dumps([test.arguments, test.expected], ensure_ascii=False).encode())
    if isinstance(test, Expression):
        return len(test.code.encode()) + len(test.expected.encode())
    if isinstance(test, Assertion):
        return len(test.code.encode())
    return len(text_input(test).encode()) + len(test.expected_output.encode())


def _test(row: _TextRow | _CallRow | _ExpressionRow | _AssertionRow) -> ProblemTest:
    if isinstance(row, _CallRow):
        return Call(row.arguments, row.expected)
    if isinstance(row, _ExpressionRow):
        return Expression(row.expression, row.expected)
    if isinstance(row, _AssertionRow):
        return Assertion(row.assertion)
    return Test(row.input, row.expected_output)


def _test_fields(test: ProblemTest) -> dict[str, object]:
    if isinstance(test, Call):
        return {"arguments": list(test.arguments), "expected": test.expected}
    if isinstance(test, Expression):
        return {"expression": test.code, "expected": test.expected}
    if isinstance(test, Assertion):
        return {"assertion": test.code}
    return {"input": text_input(test), "expected_output": test.expected_output}


def _judge(row: str | _TolerancesRow | _CheckerRow | _ValidatorRow | None) -> Judge | Validator | None:
    if isinstance(row, _ValidatorRow):
        return Validator(files=row.validator, flags=tuple(row.flags))
    if isinstance(row, _CheckerRow):
        return Checker(program=row.checker, limits=CHECKER_LIMITS)
    if isinstance(row, _TolerancesRow):
        return Tokens(absolute=row.absolute, relative=row.relative, ignore_case=row.ignore_case)
    return row  # type: ignore[return-value]  # one of the three names


def _judge_fields(judge: Judge | Validator | None) -> object:
    if isinstance(judge, Validator):
        flags = {"flags": list(judge.flags)} if judge.flags else {}
        return {"validator": dict(judge.files), **flags}
    if isinstance(judge, Checker):
        return {"checker": judge.program}
    if isinstance(judge, Tokens):
        return {
            "absolute": judge.absolute,
            "relative": judge.relative,
            "ignore_case": judge.ignore_case,
        }
    return judge
