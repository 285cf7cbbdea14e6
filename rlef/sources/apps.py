"""APPS and TACO: `question`, and as texts of JSON `solutions` and `input_output`, which is
`{"inputs": [...], "outputs": [...], "fn_name": name}`.

As codeparrot/apps (hendrycks/apps) and BAAI/TACO (FlagOpen/TACO) on the Hugging Face hub publish them: JSON
lines, or parquet. Besides, APPS has `problem_id`, `difficulty`, `url` and `starter_code`; TACO has `name`,
`source`, `time_limit` ("2.0 seconds") and `memory_limit` ("256.0 megabytes"). Neither says which tests are
public: the first ones are taken. Outputs are judged by the paper's rule, not by the many that APPS tries.
"""

from __future__ import annotations

import hashlib
import re

from rlef.records import Problem
from rlef.sources.common import (
    Choices,
    Fields,
    Reason,
    UnusableProblemError,
    flags_of,
    inputs_and_outputs,
    json_field,
    require_no_dialog,
    split_tests,
    text_field,
    texts_of,
    with_starter,
)
from rlef.sources.live_code_bench import PRELUDE
from rlef_sandbox import Executor

_UNITS = {"second": 1.0, "millisecond": 1e-3, "byte": 1.0, "kilobyte": 1e3, "megabyte": 1e6, "gigabyte": 1e9}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+?)s?\s*", re.IGNORECASE)


def problem_of_row(row: Fields, choices: Choices, _executor: Executor | None) -> Problem:
    statement, starter = text_field(row, "question"), text_field(row, "starter_code", "")
    require_no_dialog(statement)
    tests = json_field(row, "input_output", {"inputs": [], "outputs": []})
    if not isinstance(tests, dict):
        raise UnusableProblemError(Reason.INVALID, "field 'input_output' is no JSON object")
    every, function, judge = inputs_and_outputs(tests)
    public, private = split_tests(every, choices)
    solutions = texts_of("solutions", json_field(row, "solutions", []))
    return Problem(
        id=_id(row, statement),
        statement=with_starter(statement, starter),
        public_tests=public,
        private_tests=private,
        time_limit_s=_quantity(row, "time_limit") or choices.defaults.default_time_limit_s,
        memory_limit_bytes=(
            int(_quantity(row, "memory_limit")) or choices.defaults.default_memory_limit_bytes
        ),
        source="apps" if "problem_id" in row else f"taco/{text_field(row, 'source', 'unknown')}",
        solutions=tuple(solutions[: choices.solutions]),
        judge=judge,
        function=function,
        prelude=PRELUDE if function else "",
        starter_code=starter,
        flags=flags_of(statement),
        difficulty=text_field(row, "difficulty", ""),
    )


def _id(row: Fields, statement: str) -> str:
    """TACO has no numbers, and names that come twice."""
    if isinstance(row.get("problem_id"), int):
        return f"apps/{row['problem_id']}"
    digest = hashlib.sha256(statement.encode("utf-8", "surrogatepass")).hexdigest()
    return f"taco/{text_field(row, 'name', 'unnamed')}/{digest[:8]}"


def _quantity(row: Fields, name: str) -> float:
    """Seconds or bytes; 0 where there is none."""
    text = text_field(row, name, "")
    if not text:
        return 0.0
    parts = _QUANTITY.fullmatch(text)
    if not parts or parts[2].lower() not in _UNITS:
        raise UnusableProblemError(Reason.INVALID, f"field {name!r} is {text!r}, not like '2.0 seconds'")
    return float(parts[1]) * _UNITS[parts[2].lower()]
