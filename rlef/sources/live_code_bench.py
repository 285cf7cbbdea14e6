"""LiveCodeBench as livecodebench/code_generation_lite publishes it: test*.jsonl, or the same rows as parquet.

Fields, as lcb_runner/benchmarks/code_generation.py reads them: `question_title`, `question_content`,
`platform`, `question_id`, `contest_id`, `contest_date`, `starter_code`, `difficulty`, and as texts of JSON
`public_test_cases` and `metadata` (`func_name`). A test is `{"input", "output", "testtype"}`; where that is
`functional`, each line of the input is one argument as JSON, and the output is the value as JSON.

`private_test_cases` is JSON too or, to keep the file small, the base64 of the zlib of a pickle of the JSON's
text. No unpickler runs: the only pickles that are read are those of one text (`text_of_pickle`).
"""

from __future__ import annotations

import base64
import binascii
import pickletools
import zlib
from typing import Any

from rlef.judging import CHECKER_LIMITS
from rlef.problems import MAX_TESTS_PER_PROBLEM_BYTES
from rlef.records import Problem, ProblemTest
from rlef.sources.common import (
    Choices,
    Fields,
    Reason,
    UnusableProblemError,
    flags_of,
    json_field,
    read_json,
    require_tests,
    text_field,
    with_starter,
)
from rlef_sandbox import Call, Checker, Executor, Judge, Test

# What answers on LeetCode take for granted, as far as importing it costs nothing in the sandbox. The builtins
# come last: `pow` is theirs again.
_MODULES = (
    "typing", "string", "re", "collections", "heapq", "bisect", "copy", "math", "itertools", "functools",
    "operator", "builtins",
)  # fmt: skip
PRELUDE = "\n".join(f"from {module} import *" for module in _MODULES)

_PICKLE_CODES = frozenset({"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP"})
_TEXT_CODES = frozenset({"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"})

# lcb_runner/evaluation/testing_util.py: lines without their blanks, equal or of equal decimal numbers.
_LINES = Checker(
    program="""
from decimal import Decimal, InvalidOperation


def numbers(line):
    try:
        return [Decimal(token) for token in line.split()]
    except InvalidOperation:
        return None


def check(input, expected_output, output):
    texts = output, expected_output
    lines, expected = ([line.strip() for line in text.strip().split("\\n")] for text in texts)
    return len(lines) == len(expected) and all(
        line == wanted or (numbers(line) is not None and numbers(line) == numbers(wanted))
        for line, wanted in zip(lines, expected)
    )
""",
    limits=CHECKER_LIMITS,
)


def problem_of_row(row: Fields, choices: Choices, _executor: Executor | None) -> Problem:
    statement, starter = text_field(row, "question_content"), text_field(row, "starter_code", "")
    metadata = json_field(row, "metadata", {})
    if not isinstance(metadata, dict):
        raise UnusableProblemError(Reason.INVALID, "field 'metadata' is no JSON object")
    function = text_field(metadata, "func_name", "")
    public = _tests("public_test_cases", json_field(row, "public_test_cases", []), function)
    private = _tests("private_test_cases", _private_tests(row, choices), function)
    require_tests(public, private)
    judge: Judge | None = None if function else _LINES
    return Problem(
        id=text_field(row, "question_id"),
        statement=with_starter(statement, starter),
        public_tests=tuple(public),
        private_tests=tuple(private),
        time_limit_s=choices.defaults.default_time_limit_s,
        memory_limit_bytes=choices.defaults.default_memory_limit_bytes,
        source=f"live_code_bench/{text_field(row, 'platform', 'unknown')}",
        judge=judge,
        function=function,
        prelude=PRELUDE if function else "",
        starter_code=starter,
        flags=flags_of(statement),
        difficulty=text_field(row, "difficulty", ""),
    )


def _private_tests(row: Fields, choices: Choices) -> Any:
    text = text_field(row, "private_test_cases", "[]")
    if text.lstrip().startswith("["):
        return read_json(text)
    most = choices.max_test_bytes * MAX_TESTS_PER_PROBLEM_BYTES
    try:
        packed = base64.b64decode(text, validate=True)
        unpacking = zlib.decompressobj()
        pickled = unpacking.decompress(packed, most)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise UnusableProblemError(
            Reason.UNREADABLE, f"field 'private_test_cases' is not base64 of zlib ({error})"
        ) from None
    if unpacking.unconsumed_tail:
        raise UnusableProblemError(
            Reason.TOO_LARGE, f"field 'private_test_cases' unpacks to more than {most:,} bytes"
        )
    return read_json(text_of_pickle(pickled))


def text_of_pickle(pickled: bytes) -> str:
    """The text of a pickle that holds one and nothing else; its codes are read, and nothing is executed.

    Raises:
        UnusableProblemError: it holds anything else.
    """
    texts: list[str] = []
    try:
        for code, argument, _ in pickletools.genops(pickled):
            if code.name in _TEXT_CODES:
                texts.append(str(argument))
            elif code.name not in _PICKLE_CODES:
                raise UnusableProblemError(
                    Reason.UNREADABLE,
                    f"field 'private_test_cases' is a pickle with {code.name}, not of one text",
                )
    except ValueError as error:
        raise UnusableProblemError(
            Reason.UNREADABLE, f"field 'private_test_cases' is a broken pickle ({str(error)[:100]})"
        ) from None
    if len(texts) != 1:
        raise UnusableProblemError(
            Reason.UNREADABLE, f"field 'private_test_cases' is a pickle of {len(texts)} texts, not of one"
        )
    return texts[0]


def _tests(name: str, rows: Any, function: str) -> list[ProblemTest]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UnusableProblemError(Reason.INVALID, f"field {name!r} is no JSON list of tests")
    kinds = {text_field(row, "testtype") for row in rows}
    if kinds - {"functional" if function else "stdin"}:
        raise UnusableProblemError(
            Reason.INVALID,
            f"field {name!r} has tests of type {', '.join(sorted(kinds))}, and metadata.func_name is "
            f"{function!r}",
        )
    tests = [(_text(name, row, "input"), _text(name, row, "output")) for row in rows]
    if not function:
        return [Test(given, wanted) for given, wanted in tests]
    return [
        Call([read_json(line) for line in given.split("\n")], read_json(wanted)) for given, wanted in tests
    ]


def _text(name: str, row: Fields, side: str) -> str:
    value = row.get(side)
    if not isinstance(value, str):
        raise UnusableProblemError(
            Reason.INVALID, f"field '{name}.{side}' is {type(value).__name__}, not text"
        )
    return value
