"""Values of function calls as text: JSON whose tokens stand apart, to be compared one by one.

Used on both sides: for what a function returned, in the worker, and for what it should return, outside.
"""

from __future__ import annotations

import json


def text_of(value: object) -> str:
    """JSON on one line with a blank around every bracket, comma and colon and none inside a string.

    Keys are sorted, tuples are lists, and a float that is a whole number is written as one, so that equal
    values have equal texts. Raises TypeError for a value that JSON does not have.
    """
    return " ".join(_tokens(value))


def _tokens(value: object) -> list[str]:
    if isinstance(value, dict):
        pairs = sorted((_key(key), item) for key, item in value.items())
        return _bracketed("{}", [[key, ":", *_tokens(item)] for key, item in pairs])
    if isinstance(value, (list, tuple)):
        return _bracketed("[]", [_tokens(item) for item in value])
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return [str(int(value))]
    return [json.dumps(value).replace(" ", "\\u0020")]


def _key(key: object) -> str:
    return json.dumps(next(iter(json.loads(json.dumps({key: None}))))).replace(" ", "\\u0020")


def _bracketed(brackets: str, items: list[list[str]]) -> list[str]:
    tokens = [brackets[0]]
    for number, item in enumerate(items):
        tokens += [",", *item] if number else item
    return [*tokens, brackets[1]]
