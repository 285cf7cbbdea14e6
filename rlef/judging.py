"""Jobs for the executor from a problem and a program, and what a test looks like to a reader.

Tests that are Python (`Expression`, `Assertion`) run where the program was loaded as a module. What a value
should be stays outside that process, so a program that ends early or prints what it likes passes nothing. An
assertion does hold what it compares with, as in the benchmarks that ship assertions: a program that searches
its own process for it can find it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlef import assertions
from rlef.records import Assertion, Expression, Problem, ProblemTest, Validator, text_input
from rlef.validators import checker_of
from rlef_sandbox import Call, Checker, Command, Job, Judge, Limits, Result, Test, Tokens

CHECKER_LIMITS = Limits(cpu_s=60.0, memory_bytes=2 << 30)

# What runs a test in the process of the program has names of its own: the program's may be `list` and
# `compile`. Its frames are no news to a reader of a traceback.
_RUNNER = """
import linecache, sys, traceback

if hasattr(sys, "set_int_max_str_digits"):
    sys.set_int_max_str_digits(0)


def hook(kind, error, frames):
    while frames is not None and frames.tb_frame.f_code.co_filename == "rlef":
        frames = frames.tb_next
    traceback.print_exception(kind, error, frames)


def compiled(code, mode):
    sys.excepthook = hook
    linecache.cache["test.py"] = (len(code), None, code.splitlines(keepends=True), "test.py")
    return compile(code, "test.py", mode)


def execute(code, passed):
    exec(compiled(code, "exec"), PROGRAM)
    return passed


def evaluate(code):
    if FUNCTION and FUNCTION not in PROGRAM and "Solution" in PROGRAM:
        PROGRAM[FUNCTION] = getattr(PROGRAM["Solution"](), FUNCTION)
    return literal(eval(compiled(code, "eval"), PROGRAM))


def literal(value):
    # What ast.literal_eval reads back, infinity as 1e999 and no number as an ellipsis.
    if isinstance(value, float):
        value = float(value)
        return "..." if value != value else repr(value).replace("inf", "1e999")
    if isinstance(value, dict):
        return "{" + ", ".join(literal(key) + ": " + literal(item) for key, item in value.items()) + "}"
    if not isinstance(value, (list, tuple, set, frozenset)):
        return repr(value)
    items = [literal(item) for item in value]
    if isinstance(value, list):
        return "[" + ", ".join(items) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(items) + ("," if len(items) == 1 else "") + ")"
    return "{" + ", ".join(items) + "}" if items else "set()"
"""
# Beside these, `assertions.py` as text.
_TELLING_RUNNER = """

def telling_hook(kind, error, frames):
    try:
        told = told_failure(error, frames)
    except (Exception, SystemExit):
        told = ""
    if told:
        print(told, file=sys.stderr)
    else:
        hook(kind, error, frames)


def execute_and_tell(code, passed):
    test = compiled(code, "exec")
    sys.excepthook = telling_hook
    try:
        test = compile(remembering(code), TEST_FILE, "exec")
    except Exception:
        pass  # nested too deep, or the program has changed what this needs: as it stands, then
    exec(test, PROGRAM)
    return passed
"""
_APPENDED = """

import builtins as rlef_builtins

rlef_names = {"PROGRAM": rlef_builtins.globals(), "FUNCTION": %r}
rlef_builtins.exec(rlef_builtins.compile(%r, "rlef", "exec"), rlef_names)
rlef_run = rlef_names[%r]
"""

# Like the comparison of evalplus and numpy.allclose: equal in Python, or numbers of one shape that are near.
_VALUE_CHECKER = """
import ast, sys

if hasattr(sys, "set_int_max_str_digits"):
    sys.set_int_max_str_digits(100_000)  # reading one takes the square of its digits


def near(value, expected):
    if value == expected:
        return True
    if type(value) is not type(expected):
        return False
    if isinstance(expected, (list, tuple)):
        return len(value) == len(expected) and all(near(*pair) for pair in zip(value, expected))
    if not isinstance(expected, (float, complex)):
        return False
    return abs(value - expected) <= ABSOLUTE + RELATIVE * abs(expected)


def check(input, expected_output, output):
    value, expected = ast.literal_eval(output), ast.literal_eval(expected_output)
    return value == expected or bool(ABSOLUTE or RELATIVE) and near(value, expected)
"""

# Around each checker, which has names of its own. Values travel as JSON texts. What a checker cannot read, or
# raises on, is rejected: the run goes on. Reading a literal takes hundreds of times its length; the longest
# that is expected has a quarter of this limit (`problems.py`).
_GUARD = """
def check(input, expected_output, output):
    import json

    if IS_VALUE and len(output) > 4 << 20:
        return False
    try:
        if IS_VALUE:
            input, expected_output = json.loads(input)[0], json.loads(expected_output)
            output = json.loads(output)
        names = {"__name__": "checker"}
        exec(CHECKER, names)
        return bool(names["check"](input, expected_output, output))
    except (Exception, SystemExit):
        return False
"""


def public_job(problem: Problem, code: str) -> Job:
    """All public tests, so that each can be told of as the problem's dialect does."""
    return job_of(problem, code, problem.public_tests, tell_values=problem.dialect == "evalplus")


def job_of(
    problem: Problem,
    code: str,
    tests: Sequence[ProblemTest],
    *,
    stop_at_first_failure: bool = False,
    tell_values: bool = False,
) -> Job:
    """The problem's prelude and a program on some of its tests, within its limits, judged as it says.

    With `tell_values`, an assertion that fails says which values its sides had (`told_values`); no verdict
    depends on it.
    """
    kind = type(tests[0]) if tests else Test
    assert all(type(test) is kind for test in tests)
    program = f"{problem.prelude}\n{code}" if problem.prelude else code
    function, judge, texts = problem.function, problem.judge, list(tests)
    if kind is Test:
        function = ""
    elif kind is Expression:
        program += _APPENDED % (function, _RUNNER, "evaluate")
        function, judge = "rlef_run", _value_judge(judge)
        texts = [_evaluated(test) for test in tests]
    elif kind is Assertion:
        if tell_values:
            runner = inspect.getsource(assertions) + _RUNNER + _TELLING_RUNNER
            program += _APPENDED % ("", runner, "execute_and_tell")
        else:
            program += _APPENDED % ("", _RUNNER, "execute")
        function, judge = "rlef_run", None
        texts = [_asserted(test) for test in tests]
    if isinstance(judge, Validator):
        judge = checker_of(judge)
    elif isinstance(judge, Checker) and kind in (Test, Call):
        judge = _guarded(judge, is_value=False)
    return Job(
        program,
        texts,  # type: ignore[arg-type]  # of one kind, as asserted
        limits=limits_of(problem),
        stop_at_first_failure=stop_at_first_failure,
        judge=judge,
        function=function,
    )


def limits_of(problem: Problem) -> Limits:
    """The problem's own limits. CPU time decides; the wall clock only stops what waits for ever."""
    return Limits(
        cpu_s=problem.time_limit_s,
        wall_s=max(3 * problem.time_limit_s, problem.time_limit_s + 2),
        memory_bytes=problem.memory_limit_bytes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownTest:
    """A test and what a program answered, as text for a reader: what any dialect of feedback is made of."""

    input: str
    expected: str | None  # None where the test is an assertion, which only passes or raises
    output: str


def shown(test: ProblemTest, result: Result) -> ShownTest:
    """What feedback may tell. Nothing that the executor uses to tell a passed assertion by is in it."""
    if isinstance(test, Assertion):
        return ShownTest(input=test.code, expected=None, output="")
    if isinstance(test, Expression):
        return ShownTest(input=test.code, expected=test.expected, output=_value_text(result.stdout))
    if isinstance(test, Call):
        arguments = ", ".join(json.dumps(argument, ensure_ascii=False) for argument in test.arguments)
        return ShownTest(
            input=arguments,
            expected=json.dumps(test.expected, ensure_ascii=False),
            output=_value_text(result.stdout),
        )
    return ShownTest(input=text_input(test), expected=test.expected_output, output=result.stdout)


def told_values(result: Result) -> tuple[str, ...]:
    """Of a failed assertion that was run with `tell_values`: its text, then a line for each side. Empty where
    something else was raised, or no side was remembered."""
    _, mark, told = result.stderr.rpartition(assertions.VALUES_MARK + "\n")
    return tuple(told.splitlines()) if mark else ()


def _value_text(output: str) -> str:
    """A value that a function returned; the text itself where it is cut off or was printed otherwise."""
    try:
        value = json.loads(output)
    except (ValueError, RecursionError):
        return output
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _evaluated(test: ProblemTest) -> Test:
    assert isinstance(test, Expression)
    return Test(json.dumps([test.code]) + "\n", json.dumps(test.expected))


def _asserted(test: ProblemTest) -> Call:
    assert isinstance(test, Assertion)
    passed = hashlib.sha256(test.code.encode()).hexdigest()
    return Call([test.code, passed], passed)


def _value_judge(judge: Judge | Validator | None) -> Checker:
    """By which values are compared: equal ones, near ones, or those that the problem's checker accepts."""
    assert not isinstance(judge, Validator), "validators judge text, as `require_judgeable` says"
    if isinstance(judge, Checker):
        return _guarded(judge, is_value=True)
    near = judge if isinstance(judge, Tokens) else Tokens()
    constants = f"ABSOLUTE, RELATIVE = {near.absolute!r}, {near.relative!r}\n"
    return _guarded(Checker(program=constants + _VALUE_CHECKER, limits=CHECKER_LIMITS), is_value=True)


def _guarded(judge: Checker, *, is_value: bool) -> Checker:
    assert not isinstance(judge.program, Command), "files of problems hold Python checkers only"
    return replace(judge, program=f"IS_VALUE, CHECKER = {is_value}, {judge.program!r}\n{_GUARD}")
