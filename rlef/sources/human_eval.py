"""HumanEval as openai/human-eval publishes it: HumanEval.jsonl.gz, with `task_id`, `prompt` (a stub with its
docstring), `canonical_solution` (the body), `test` (which defines `check(candidate)`) and `entry_point`.

There is one set of tests. It is the private test as it stands, and public as its single assertions, where
`check` consists of nothing else, so that feedback can tell which failed; else as a whole, too. For tests that
feedback does not show, take HumanEval+ (`evalplus.py`).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rlef.records import Assertion, Problem
from rlef.sources.common import (
    Choices,
    Fields,
    Reason,
    UnusableProblemError,
    text_field,
)
from rlef_sandbox import Executor


def problem_of_row(row: Fields, choices: Choices, _executor: Executor | None) -> Problem:
    prompt, entry_point = text_field(row, "prompt"), text_field(row, "entry_point")
    test = text_field(row, "test")
    whole = Assertion(f"{test}\n\ncheck({entry_point})\n")
    return Problem(
        id=text_field(row, "task_id"),
        statement=completion_request(prompt),
        public_tests=tuple(_single_assertions(test, entry_point)) or (whole,),
        private_tests=(whole,),
        time_limit_s=choices.defaults.default_time_limit_s,
        memory_limit_bytes=choices.defaults.default_memory_limit_bytes,
        source="human_eval",
        solutions=(prompt + text_field(row, "canonical_solution"),),
        prelude=prelude_of(prompt, entry_point),
        starter_code=prompt,
        dialect="evalplus",
        stub=stub_of(prompt),
    )


def stub_of(prompt: str) -> str:
    return prompt.lstrip("\n")


def completion_request(prompt: str) -> str:
    return f"Write the whole function, its head included:\n\n{prompt.strip()}\n"


def prelude_of(prompt: str, entry_point: str) -> str:
    """What a stub has before its function: imports, and functions that it may call."""
    heads = list(re.finditer(rf"^def {re.escape(entry_point)}\b", prompt, flags=re.MULTILINE))
    return prompt[: heads[-1].start()].strip() if heads else ""


def _single_assertions(test: str, entry_point: str) -> Iterator[Assertion]:
    """The assertions of `check`, about the function by its name. None where `check` does anything else."""
    try:
        tree = ast.parse(test)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnusableProblemError(Reason.INVALID, f"field 'test' is not Python ({error})") from None
    checks = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    others = [node for node in tree.body if node not in checks and not _is_metadata(node)]
    if len(checks) != 1 or others or len(checks[0].args.args) != 1:
        return
    candidate = checks[0].args.args[0].arg
    if not all(isinstance(node, ast.Assert) for node in checks[0].body):
        return
    for node in checks[0].body:
        for name in ast.walk(node):
            if isinstance(name, ast.Name) and name.id == candidate:
                name.id = entry_point
        yield Assertion(ast.unparse(node))


def _is_metadata(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["METADATA"]
