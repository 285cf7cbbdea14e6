"""How a program's output is compared with the expected one."""

from __future__ import annotations

from rlef_sandbox import _core
from rlef_sandbox.records import Judge


def outputs_match(expected: str, output: str, *, judge: Judge = "code_contests") -> bool:
    """Whether `output` is accepted where `expected` was asked for.

    "code_contests" is google-deepmind/code_contests' comparison: both are split at blanks and lower-cased;
    equal lists of tokens pass, and so do lists of one length whose tokens are pairwise equal or numbers less
    than 1e-5 apart. Line breaks therefore count as blanks, 007 equals 7, and 10**18 equals 10**18 + 1.

    "exact" wants equal texts, but for blanks at the ends of lines and empty lines at the end.

    "any" accepts everything.

    "tokens" wants equal tokens between blanks, however they are separated; `Tokens` takes tolerances too.
    """
    return _core.outputs_match(expected, output, judge)
