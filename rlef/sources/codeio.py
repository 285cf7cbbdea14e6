"""Code I/O rows as reasoning-gym ships them in reasoning_gym/data/codeio.jsonl.gz: a reference program and a
generator of its inputs, so that there are as many tests as are asked for.

Fields: `task_description`, `input_output_spec`, `code_sample`, which defines `main_solution`, and
`input_generator`, which defines `generate_inputs(rng)`, that returns a dictionary of keyword arguments. Both
run in the sandbox, where there is the standard library alone: what imports more is set aside. The inputs are
those of the seeds 0, 1, 2 and so on; the first ones are public.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from dataclasses import replace

from rlef.records import Expression, Problem
from rlef.sources.common import (
    Choices,
    Fields,
    Reason,
    UnusableProblemError,
    split_tests,
    text_field,
)
from rlef.sources.references import values_of
from rlef_sandbox import Executor, Tokens

NUM_INPUTS = 6
FUNCTION = "main_solution"
_PRELUDE = "import random\nfrom random import Random"
_TOLERANCE = 1e-6  # of numbers, absolute and relative: programs may round in another order


def problem_of_row(row: Fields, choices: Choices, executor: Executor | None) -> Problem:
    assert executor is not None
    task, reference = text_field(row, "task_description"), text_field(row, "code_sample")
    generator = text_field(row, "input_generator")
    _require_standard_library(f"{reference}\n{generator}")
    problem = Problem(
        id=f"codeio/{hashlib.sha256(reference.encode()).hexdigest()[:12]}",
        statement=f"{task}\n\n{text_field(row, 'input_output_spec')}\n\n"
        f"Write a function `{FUNCTION}` with these inputs as its parameters.\n",
        public_tests=(),
        private_tests=(),
        time_limit_s=choices.defaults.default_time_limit_s,
        memory_limit_bytes=choices.defaults.default_memory_limit_bytes,
        source="codeio",
        solutions=(reference,),
        judge=Tokens(absolute=_TOLERANCE, relative=_TOLERANCE),
        function=FUNCTION,
        prelude=_PRELUDE,
    )
    seeds = [f"generate_inputs(Random({seed}))" for seed in range(NUM_INPUTS)]
    inputs = values_of(problem, f"{reference}\n\n{generator}", seeds, choices, executor)
    calls = list(dict.fromkeys(f"{FUNCTION}(**{arguments})" for arguments in inputs))
    expected = values_of(problem, reference, calls, choices, executor)
    tests = [Expression(call, value) for call, value in zip(calls, expected, strict=True)]
    public, private = split_tests([*tests], choices)
    return replace(problem, public_tests=public, private_tests=private)


def _require_standard_library(program: str) -> None:
    try:
        nodes = list(ast.walk(ast.parse(program)))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnusableProblemError(Reason.INVALID, f"the reference is not Python ({error})") from None
    names = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    if others := sorted({name.split(".")[0] for name in names} - sys.stdlib_module_names):
        raise UnusableProblemError(Reason.UNSUPPORTED, f"the reference imports {', '.join(others)}")
