"""Rows as verl trains on them: parquet with `data_source`, `prompt` (messages), `ability`, `reward_model` and
`extra_info` (verl's documentation, "Prepare Data for Post-Training").

Of a problem of code `reward_model.ground_truth` is the text of a JSON object. Of those that
verl/utils/reward_score knows, `{"inputs", "outputs", "fn_name"}` as in APPS (prime_code, sandbox_fusion) and
`{"functional": assertions}` (coder1) are read, and `{"pytest": ...}` is not. Which tests are public is not
said: the first ones are taken.
"""

from __future__ import annotations

import hashlib
from typing import Any

from rlef.records import Assertion, Problem, ProblemTest
from rlef.sources.common import (
    Choices,
    Fields,
    Reason,
    UnusableProblemError,
    flags_of,
    inputs_and_outputs,
    list_field,
    object_field,
    read_json,
    require_no_dialog,
    split_tests,
    text_field,
)
from rlef.sources.live_code_bench import PRELUDE
from rlef_sandbox import Checker, Executor


def problem_of_row(row: Fields, choices: Choices, _executor: Executor | None) -> Problem:
    statement = _statement(row)
    require_no_dialog(statement)
    truth = read_json(text_field(object_field(row, "reward_model"), "ground_truth"))
    every, function, judge = _tests(truth)
    public, private = split_tests(every, choices)
    return Problem(
        id=_id(row, statement),
        statement=statement,
        public_tests=public,
        private_tests=private,
        time_limit_s=choices.defaults.default_time_limit_s,
        memory_limit_bytes=choices.defaults.default_memory_limit_bytes,
        source=f"verl/{text_field(row, 'data_source')}",
        judge=judge,
        function=function,
        prelude=PRELUDE if function else "",
        flags=flags_of(statement),
    )


def _statement(row: Fields) -> str:
    """What the user says; a system message is about another dialog than ours."""
    messages = list_field(row, "prompt")
    said = [
        text_field(message, "content")
        for message in messages
        if isinstance(message, dict) and message.get("role") == "user"
    ]
    if not said:
        raise UnusableProblemError(Reason.INVALID, "field 'prompt' has no message of a user")
    return "\n\n".join(said)


def _tests(truth: Any) -> tuple[list[ProblemTest], str, Checker | None]:
    if isinstance(truth, dict) and "inputs" in truth:
        return inputs_and_outputs(truth)
    if isinstance(truth, dict) and "functional" in truth:
        lines = [line for line in text_field(truth, "functional").splitlines() if line.strip()]
        if all(line.startswith("assert ") for line in lines):
            return [Assertion(line) for line in lines], "", None
        whole: list[ProblemTest] = [Assertion(text_field(truth, "functional"))]
        return whole, "", None
    names = ", ".join(sorted(truth)) if isinstance(truth, dict) else type(truth).__name__
    raise UnusableProblemError(
        Reason.UNSUPPORTED,
        f"field 'reward_model.ground_truth' has {names}; inputs/outputs or functional is read",
    )


def _id(row: Fields, statement: str) -> str:
    digest = hashlib.sha256(statement.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    information = row.get("extra_info")
    index = information.get("index") if isinstance(information, dict) else None
    return f"{text_field(row, 'data_source')}/{digest if index is None else f'{index}/{digest}'}"
