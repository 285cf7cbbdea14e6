"""Output validators in C++, as problem packages have them: how one is compiled, and how it judges.

The sandbox compiles it, once in an executor, and calls it as the package format has it: with the names of the
input, of the answer and of a folder for feedback, its flags, and the output on standard input
(https://www.kattis.com/problem-package-format/spec/legacy.html#output-validators).
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Sequence

from rlef.config import ConfigError
from rlef.records import Problem, Validator
from rlef_sandbox import Checker, Command, Executor, Limits, Result, Verdict

SOURCE_ENDINGS = (".cc", ".cpp", ".cxx", ".c++")
HEADER_ENDINGS = (".h", ".hh", ".hpp", ".hxx", ".h++")
# Time and memory are the format's defaults; the rest is room for feedback, which nobody reads.
VALIDATOR_LIMITS = Limits(cpu_s=60.0, memory_bytes=2 << 30, file_bytes=16 << 20)

_COMPILERS, _SEEN_IN_SANDBOX = ("g++", "clang++", "c++"), "/usr/local/bin:/usr/bin:/bin"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,254}")
_MOST_FLAG_BYTES = 1 << 16  # of one argument Linux takes twice as many
_EXECUTABLE = "validator.out"
_CALL = f'./{_EXECUTABLE} "$1" "$3" feedback/ %s < "$2"; test $? -eq 42'  # 0 where it says 42, else 1


def checker_of(validator: Validator) -> Checker:
    """It accepts where the validator says 42. As with a checker in Python that raises, anything else that it
    says is a no, a crash too, so that an odd output ends no run; beyond its limits it is a `SandboxFault`.

    Raises ConfigError: this machine has no compiler.
    """
    sources = [f"./{name}" for name in validator.files if name.endswith(SOURCE_ENDINGS)]
    return Checker(
        program=Command(
            ["/bin/sh", "-c", _CALL % shlex.join(validator.flags), "sh"],
            files={"feedback/empty": ""},
            may_fork=True,
            stack_bytes=VALIDATOR_LIMITS.memory_bytes,  # graphs are walked by recursion
        ),
        limits=VALIDATOR_LIMITS,
        build=Command(
            [compiler(), "-std=gnu++20", "-O2", "-o", _EXECUTABLE, *sources],
            files=validator.files,
            outputs=[_EXECUTABLE],
        ),
    )


def compiler() -> str:
    """The path of a C++ compiler that the sandbox can run. Raises ConfigError if there is none."""
    for name in _COMPILERS:
        if path := shutil.which(name, path=_SEEN_IN_SANDBOX):
            return path
    raise ConfigError(
        f"a validator is written in C++, and there is none of {', '.join(_COMPILERS)} in {_SEEN_IN_SANDBOX}; "
        "install one (Debian and Ubuntu: apt-get install g++)"
    )


def require_usable(validator: Validator, place: str, max_bytes: int) -> None:
    """Raises ConfigError with the place and the field: no sources, names that are none, or too much of it."""
    for name in validator.files:
        if not (_FILE_NAME.fullmatch(name) and name.endswith(SOURCE_ENDINGS + HEADER_ENDINGS)):
            raise ConfigError(
                f"{place}: field 'judge.validator': {name!r} is no name of a C++ file of one folder; give "
                "names like 'validate.cc' and 'validate.h'"
            )
    if not any(name.endswith(SOURCE_ENDINGS) for name in validator.files):
        raise ConfigError(
            f"{place}: field 'judge.validator': nothing to compile; give a file with one of the endings "
            + ", ".join(SOURCE_ENDINGS)
        )
    size = sum(len(text.encode()) for text in validator.files.values())
    if size > max_bytes:
        raise ConfigError(
            f"{place}: field 'judge.validator': {size:,} bytes, and problems.max_test_bytes = {max_bytes:,}; "
            "raise it or take the problem out"
        )
    size = len(shlex.join(validator.flags).encode())
    if size > _MOST_FLAG_BYTES or any("\0" in flag for flag in validator.flags):
        raise ConfigError(
            f"{place}: field 'judge.flags': {size:,} bytes; give at most {_MOST_FLAG_BYTES:,}, and no "
            "NUL among them"
        )


def require_validators(problems: Sequence[Problem], executor: Executor) -> None:
    """Compile those of these problems now, side by side, each once.

    Raises ConfigError: one does not compile, or this machine has no compiler.
    """
    validators = {each.id: each.judge for each in problems if isinstance(each.judge, Validator)}
    first_with = {repr(validator.files): name for name, validator in reversed(validators.items())}
    results = executor.build_checkers([checker_of(validators[name]) for name in first_with.values()])
    for name, result in zip(first_with.values(), results, strict=True):
        if result.verdict is not Verdict.PASSED:
            raise ConfigError(
                f"problem {name!r}: field 'judge.validator': it does not compile here "
                f"({why_not_built(result)}); mend it, or take the problem out of its file"
            )


def why_not_built(result: Result) -> str:
    """In one line: the compiler's first error, or how it ended."""
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    return errors[0][:200] if errors else result.verdict.value
