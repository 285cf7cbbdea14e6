"""HumanEval+ and MBPP+ as evalplus publishes them: HumanEvalPlus.jsonl.gz and MbppPlus.jsonl.gz.

Fields, as evalplus/data reads them: `task_id`, `prompt`, `entry_point`, `canonical_solution` (which follows
the prompt), `base_input` and `plus_input` (lists of argument lists), and `atol`. The base inputs are the
public tests and the plus inputs the private ones, as in the paper. What the function should return is what
the canonical solution returns, which runs in the sandbox.

Values are compared as evalplus/eval does: equal ones, and where `atol` is given or the value is of floats,
near ones. Its exceptions for single tasks are here too (`_DEMANDS`, `_ALTERNATIVES`). JSON has no tuples,
sets or complex numbers; evalplus/data/mbpp.py says which arguments of MBPP+ are some, and `_SHAPES` here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rlef.judging import CHECKER_LIMITS
from rlef.records import Expression, Problem
from rlef.sources.common import (
    Choices,
    Fields,
    Reason,
    UnusableProblemError,
    list_field,
    require_tests,
    text_field,
)
from rlef.sources.human_eval import completion_request, prelude_of, stub_of
from rlef.sources.references import values_within_limits
from rlef_sandbox import Checker, Executor, Judge, Tokens

_FLOAT_TOLERANCE, _RELATIVE_TOLERANCE = 1e-6, 1e-7


def problem_of_row(row: Fields, choices: Choices, executor: Executor | None) -> Problem:
    assert executor is not None
    task_id, prompt = text_field(row, "task_id"), text_field(row, "prompt")
    entry_point, is_mbpp = text_field(row, "entry_point"), text_field(row, "task_id").startswith("Mbpp/")
    base, plus = (_arguments(row, name, is_mbpp) for name in ("base_input", "plus_input"))
    require_tests(base, plus)
    problem = Problem(
        id=task_id,
        statement=_statement(prompt, entry_point) if is_mbpp else completion_request(prompt),
        public_tests=_expressions(row, base, is_mbpp),
        private_tests=_expressions(row, plus, is_mbpp),
        time_limit_s=choices.defaults.default_time_limit_s,
        memory_limit_bytes=choices.defaults.default_memory_limit_bytes,
        source="mbpp_plus" if is_mbpp else "human_eval_plus",
        solutions=(prompt + text_field(row, "canonical_solution"),),
        function=entry_point,
        prelude="" if is_mbpp else prelude_of(prompt, entry_point),
        starter_code="" if is_mbpp else prompt,
        dialect="evalplus",
        stub="" if is_mbpp else stub_of(prompt),
    )
    return _with_expected(problem, row, [*base, *plus], is_mbpp, choices, executor)


def _statement(prompt: str, entry_point: str) -> str:
    """MBPP's prompt is a docstring with the task and one of its assertions, which names the function."""
    return f"{prompt.strip().strip(chr(34)).strip()}\n\nThe function's name is `{entry_point}`.\n"


def _arguments(row: Fields, name: str, is_mbpp: bool) -> list[list[Any]]:
    inputs = list_field(row, name) if row.get(name) not in (None, "", {}) else []
    if not all(isinstance(arguments, list) for arguments in inputs):
        raise UnusableProblemError(Reason.INVALID, f"field {name!r} holds what is no list of arguments")
    if not is_mbpp:
        return inputs
    number = text_field(row, "task_id").removeprefix("Mbpp/")
    shape = _SHAPE_OF_TASK.get(int(number) if number.isdecimal() else -1, _as_they_are)
    try:
        return [shape(arguments) for arguments in inputs]
    except (TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise UnusableProblemError(
            Reason.INVALID, f"field {name!r} has not the shape of its task ({error})"
        ) from None


def _expressions(row: Fields, inputs: list[list[Any]], is_mbpp: bool) -> tuple[Expression, ...]:
    """Calls, without what they should give."""
    function = text_field(row, "entry_point")
    demand = _DEMANDS.get((is_mbpp, function), "{call}")
    return tuple(
        Expression(
            demand.format(
                call=_call(function, arguments), arguments=_code(arguments), tolerance=_tolerance(row)
            ),
            "None",
        )
        for arguments in inputs
    )


def _with_expected(
    problem: Problem,
    row: Fields,
    inputs: list[list[Any]],
    is_mbpp: bool,
    choices: Choices,
    executor: Executor,
) -> Problem:
    tests = [*problem.public_tests, *problem.private_tests]
    calls = [test.code for test in tests if isinstance(test, Expression)]
    values = values_within_limits(problem, problem.solutions[0], calls, choices, executor)
    alternative = _ALTERNATIVES.get(problem.function) if is_mbpp else None
    told: list[list[Expression]] = [[], []]  # public and private ones
    for index, (call, value) in enumerate(zip(calls, values, strict=True)):
        if value is not None:
            expected = f"({value}, {_alternative(alternative, inputs[index])})" if alternative else value
            told[index >= len(problem.public_tests)].append(Expression(call, expected))
    public, private = told
    if not public or not private:
        raise UnusableProblemError(Reason.REFERENCE_FAILS, "within the limits on too few inputs")
    kept = [value for value in values if value is not None]
    return replace(
        problem,
        public_tests=tuple(public),
        private_tests=tuple(private),
        judge=_EITHER if alternative else _judge(row, kept),
        flags=("tests_left_out",) if len(kept) < len(values) else (),
    )


def _judge(row: Fields, expected: list[str]) -> Judge | None:
    tolerance = _tolerance(row)
    if tolerance == 0 and any(_is_of_floats(value) for value in expected):
        tolerance = _FLOAT_TOLERANCE
    return Tokens(absolute=tolerance, relative=_RELATIVE_TOLERANCE) if tolerance else None


def _tolerance(row: Fields) -> float:
    tolerance = row.get("atol", 0)
    if not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
        raise UnusableProblemError(Reason.INVALID, f"field 'atol' is {tolerance!r}, not a tolerance")
    return float(tolerance)


def _is_of_floats(literal: str) -> bool:
    """A float, or a list or tuple of nothing else, by its text."""
    items = literal.strip("[]()").rstrip(",").split(", ")
    return all(item.lstrip("-") == "1e999" or _is_float(item) for item in items)


def _is_float(item: str) -> bool:
    try:
        float(item)
    except ValueError:
        return False
    return not item.lstrip("-").isdecimal()


def _call(function: str, arguments: list[Any]) -> str:
    return f"{function}({', '.join(_code(argument) for argument in arguments)})"


def _code(value: Any) -> str:
    """Python for a value. Raises UnusableProblemError for what is nested too deep or too large a number."""
    try:
        return _code_of(value)
    except (RecursionError, ValueError) as error:
        raise UnusableProblemError(Reason.INVALID, f"an input that cannot be written ({error})") from None


def _code_of(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_code_of(key)}: {_code_of(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple, set)):
        items = ", ".join(_code_of(item) for item in value)
        if isinstance(value, list):
            return f"[{items}]"
        if isinstance(value, tuple):
            return f"({items},)" if len(value) == 1 else f"({items})"
        return f"{{{items}}}" if value else "set()"
    return repr(value)


def _alternative(second: Callable[[Any], Any] | Callable[[Any, Any], Any], arguments: list[Any]) -> str:
    try:
        return _code(second(*arguments))
    except (TypeError, ValueError, OverflowError):  # it is not defined for these
        return "()"


def _digit_distance(first: int, second: int) -> int:
    width = max(len(str(first)), len(str(second)))
    pairs = zip(str(first).zfill(width), str(second).zfill(width), strict=True)
    return sum(abs(int(one) - int(other)) for one, other in pairs)


def _pyramid_surface(base: float, height: float) -> int:
    return round(base**2 + 2 * base * math.sqrt((base / 2) ** 2 + height**2))


# Tasks whose value is not what is compared: evalplus/eval/__init__.py, by (whether of MBPP+, function).
_AS_A_SET = "set({call})"
_IS_SOMETHING = "(lambda value: value if isinstance(value, bool) else value is not None)({call})"
_DEMANDS: dict[tuple[bool, str], str] = {
    (False, "find_zero"): (
        "(lambda root, factors: abs(sum(factor * root**power for power, factor in enumerate(factors)))"
        " <= {tolerance})({call}, *{arguments})"
    ),
    (True, "are_equivalent"): "({call}, True)[1]",  # any answer is right
    **dict.fromkeys(
        ((True, name) for name in ("check_str", "text_match_three", "text_starta_endb")), _IS_SOMETHING
    ),
    **dict.fromkeys(
        (
            (True, name)
            for name in (
                "similar_elements",
                "find_char_long",
                "common_in_nested_lists",
                "extract_singly",
                "larg_nnum",
                "intersection_array",
                "find_dissimilar",
                "Diff",
            )
        ),
        _AS_A_SET,
    ),
}

# Tasks of MBPP+ with a second right answer, by function.
_ALTERNATIVES: dict[str, Callable[[Any], Any] | Callable[[Any, Any], Any]] = {
    "sum_div": lambda _number: 0,
    "surface_Area": _pyramid_surface,
    "digit_distance_nums": _digit_distance,
}
_EITHER = Checker(
    program="""
import ast


def check(input, expected_output, output):
    return ast.literal_eval(output) in ast.literal_eval(expected_output)
""",
    limits=CHECKER_LIMITS,
)

Arguments = list[Any]


def _as_they_are(arguments: Arguments) -> Arguments:
    return arguments


def _tuples(arguments: Arguments) -> Arguments:
    return [tuple(argument) for argument in arguments]


def _lists_of_tuples(arguments: Arguments) -> Arguments:
    return [[tuple(item) for item in argument] for argument in arguments]


def _tuples_of_tuples(arguments: Arguments) -> Arguments:
    return [tuple(tuple(item) for item in argument) for argument in arguments]


def _list_of_tuples_first(arguments: Arguments) -> Arguments:
    return [[tuple(item) for item in arguments[0]], *arguments[1:]]


def _tuple_first(arguments: Arguments) -> Arguments:
    return [tuple(arguments[0]), *arguments[1:]]


def _tuple_second(arguments: Arguments) -> Arguments:
    return [arguments[0], tuple(arguments[1]), *arguments[2:]]


def _list_of_sets(arguments: Arguments) -> Arguments:
    return [[set(item) if isinstance(item, list) and item else {} for item in arguments[0]]]


def _tuple_with_tuples(arguments: Arguments) -> Arguments:
    return [tuple(tuple(item) if isinstance(item, list) else item for item in arguments[0])]


def _dictionary_of_tuples(arguments: Arguments) -> Arguments:
    return [{key: tuple(value) for key, value in arguments[0].items()}, *arguments[1:]]


def _complex(arguments: Arguments) -> Arguments:
    return [complex(arguments[0])]


def _float_and_complex(arguments: Arguments) -> Arguments:
    return [float(arguments[0]), complex(arguments[1])]


def _tuples_all_through(arguments: Arguments) -> Arguments:
    def through(value: Any) -> Any:
        return tuple(through(item) for item in value) if isinstance(value, list) else value

    return [through(argument) for argument in arguments]


_SHAPES: tuple[tuple[Callable[[Arguments], Arguments], tuple[int, ...]], ...] = (
    (_tuples, (2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630)),
    (_tuples, (726, 740, 744, 809)),
    (_lists_of_tuples, (63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780)),
    (_list_of_tuples_first, (75, 413, 444, 753)),
    (_tuple_second, (106, 750)),
    (_list_of_sets, (115,)),
    (_float_and_complex, (124,)),
    (_tuple_first, (250, 307, 405, 446, 617, 720, 763, 808)),
    (_complex, (252,)),
    (_tuples_of_tuples, (259, 401, 445)),
    (_tuple_with_tuples, (278,)),
    (_dictionary_of_tuples, (722,)),
    (_tuples_all_through, (580, 615, 791)),
)
_SHAPE_OF_TASK = {number: shape for shape, numbers in _SHAPES for number in numbers}
