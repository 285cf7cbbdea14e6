"""Assertions that remember the values of their sides. This file runs in the sandbox too, as text behind the
program (`judging.py`), so it needs the standard library alone.

`assert f(2) == 6` becomes

    rlef_none = rlef_1 = []
    try:
        assert (rlef_1 := f(2)) == 6
    except AssertionError as rlef_error:
        rlef_error.__dict__.setdefault("rlef_failed", ("assert f(2) == 6", rlef_none, ("f(2)", rlef_1)))
        raise

so each side is evaluated once, in its order and only if Python would, and the assertion fails when it would.
"""

from __future__ import annotations

import ast
import builtins
import re
from types import TracebackType
from typing import Any

VALUES_MARK = "rlef: an assertion failed"
TEST_FILE = "test.py"  # by which the frames of tests are known

_MAX_CHARACTERS = 512  # of a value's text
_MAX_LABEL_CHARACTERS = 200
_CUT_MARK = "..."
# Functions whose arguments say more than their value does.
_WRAPPER = re.compile(
    "abs|all|any|bool|float|frozenset|int|isclose|isinstance|len|list|max|min|repr|round|set|sorted|str|sum"
    r"|tuple|type|math\.(fabs|isclose)|(np|numpy)\.(allclose|array_equal|isclose)"
)
_BUILTINS = frozenset(dir(builtins))


def remembering(code: str) -> ast.Module:
    """The tests in `code`, whose assertions remember what feedback can show.

    Raises:
        SyntaxError, ValueError: as `compile` does.
        RecursionError, MemoryError: it is nested too deep.
    """
    tree = _Remembering().visit(ast.parse(code, TEST_FILE))
    assert isinstance(tree, ast.Module)
    return tree


class _Remembering(ast.NodeTransformer):
    def __init__(self) -> None:
        self._sides: dict[str, str] = {}  # the text of each side by its name, in the assertion at hand
        self._count = 0

    def visit_Assert(self, node: ast.Assert) -> ast.Assert | list[ast.stmt]:
        self._sides = {}
        source = ast.unparse(node)
        node.test = self._watched(node.test)
        if not self._sides:
            return node
        pairs = ", ".join(f"({text!r}, {name})" for name, text in self._sides.items())
        around = ast.parse(
            f"rlef_none = {' = '.join(self._sides)} = []\n"
            "try:\n    pass\n"
            "except AssertionError as rlef_error:\n"
            f"    rlef_error.__dict__.setdefault('rlef_failed', ({source!r}, rlef_none, {pairs}))\n"
            "    raise\n"
        ).body
        for statement in around:
            for inner in ast.walk(statement):
                if isinstance(inner, (ast.stmt, ast.expr, ast.ExceptHandler)):
                    ast.copy_location(inner, node)
        attempt = around[1]
        assert isinstance(attempt, ast.Try)
        attempt.body = [node]
        return around

    def _watched(self, node: ast.expr) -> ast.expr:
        """The expression, with names for those of its parts that a reader wants to know."""
        if isinstance(node, ast.Compare):
            node.left = self._watched(node.left)
            node.comparators = [self._watched(side) for side in node.comparators]
        elif isinstance(node, ast.BoolOp):
            node.values = [self._watched(side) for side in node.values]
        elif isinstance(node, ast.UnaryOp):
            node.operand = self._watched(node.operand)
        elif isinstance(node, ast.BinOp):
            node.left, node.right = self._watched(node.left), self._watched(node.right)
        elif isinstance(node, ast.Starred):
            node.value = self._watched(node.value)
        elif isinstance(node, ast.Call) and _WRAPPER.fullmatch(ast.unparse(node.func)):
            node.args = [self._watched(side) for side in node.args]
            for keyword in node.keywords:
                keyword.value = self._watched(keyword.value)
        elif not _tells_itself(node):
            return self._named(node)
        return node

    def _named(self, node: ast.expr) -> ast.expr:
        self._count += 1
        name = f"rlef_{self._count}"
        self._sides[name] = ast.unparse(node)
        target = ast.copy_location(ast.Name(name, ast.Store()), node)
        return ast.copy_location(ast.NamedExpr(target, node), node)


def _tells_itself(node: ast.expr) -> bool:
    """Whether its text says what it is, or its value would say nothing."""
    if isinstance(node, (ast.Constant, ast.Lambda, ast.GeneratorExp, ast.NamedExpr)):
        return True
    if isinstance(node, ast.Name):
        return node.id in _BUILTINS
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return False
    return True


def told_failure(error: BaseException, frames: TracebackType | None) -> str:
    """What a failed assertion of a test remembers, below a mark: its text, then a line for each side.

    Nothing where no side was remembered, or the program itself raised.
    """
    failed = error.__dict__.get("rlef_failed")
    while frames is not None and frames.tb_next is not None:
        frames = frames.tb_next
    if failed is None or frames is None or frames.tb_frame.f_code.co_filename != TEST_FILE:
        return ""
    source, none, *sides = failed
    lines = [VALUES_MARK, source]
    for text, value in sides:
        if value is not none:
            label = text if len(text) <= _MAX_LABEL_CHARACTERS else text[:_MAX_LABEL_CHARACTERS] + _CUT_MARK
            lines.append(f"{label} is {text_of(value)}")
    return "\n".join(dict.fromkeys(lines))


def text_of(value: Any, room: int = _MAX_CHARACTERS) -> str:
    """One line, about `room` characters of `repr(value)` at most, in a time that goes with `room`."""
    kind = type(value)
    if room <= 0:
        return _CUT_MARK
    if kind is int and value.bit_length() > 3 * room:
        return f"an integer of {value.bit_length()} bits"
    if kind in (str, bytes) and len(value) > room:
        return repr(value[:room]) + _CUT_MARK
    if kind in (list, tuple, set, frozenset, dict) and value:
        return _text_of_items(value, room)
    try:
        text = " ".join(repr(value).splitlines())
    except (Exception, SystemExit):  # noqa: BLE001  it is the program's own
        return f"<{kind.__name__}>"
    return text if len(text) <= room else text[:room] + _CUT_MARK


def _text_of_items(value: Any, room: int) -> str:
    kind, parts, left = type(value), [], room - 2
    for item in value:
        if left <= 0:
            parts.append(_CUT_MARK)
            break
        text = text_of(item, left)
        if kind is dict:
            text += ": " + text_of(value[item], left - len(text))
        parts.append(text)
        left -= len(text) + 2
    inside = ", ".join(parts)
    if kind is list:
        return f"[{inside}]"
    if kind is tuple:
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return f"frozenset({{{inside}}})" if kind is frozenset else f"{{{inside}}}"
