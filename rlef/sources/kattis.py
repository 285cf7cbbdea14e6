"""Problem packages of Kattis and the ICPC: folders with problem.yaml, data/, submissions/, output validators.

Versions `legacy` and `2023-07` of https://www.kattis.com/problem-package-format/spec. Tests are data/sample
(public) and data/secret (private, all groups), each a .in and a .ans. The default validator and its flags
become a judge. A validator in one file of Python becomes a checker, and one in C++ is kept as its sources if
it compiles here; in other languages, and for several of them, for interaction, several passes or flags of
single groups the package is set aside. One with scores is used where the full score takes all tests
(`kattis_scores.py`). Submissions count where they are one file of Python.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlef.config import ConfigError
from rlef.judging import CHECKER_LIMITS
from rlef.records import Problem, Validator, text_input
from rlef.sources.common import (
    Choices,
    Fields,
    Found,
    Reason,
    SetAside,
    UnusableProblemError,
    made,
    require_tests,
)
from rlef.sources.kattis_package import Package, number_of
from rlef.sources.kattis_scores import require_full_score_is_all_tests
from rlef.validators import HEADER_ENDINGS, SOURCE_ENDINGS, checker_of, why_not_built
from rlef_sandbox import Checker, Executor, Judge, SandboxFault, Test, Tokens, Verdict

WRONG_FOLDERS = ("wrong_answer", "time_limit_exceeded", "run_time_error", "rejected", "partially_accepted")

# The default validator where blanks count: split at each change between blanks and words.
_SPACE_SENSITIVE = """
import re


def near(word, expected):
    if (word if CASE_SENSITIVE else word.lower()) == (expected if CASE_SENSITIVE else expected.lower()):
        return True
    if not (ABSOLUTE or RELATIVE):
        return False
    try:
        distance = abs(float(word) - float(expected))
        return distance <= ABSOLUTE or distance <= RELATIVE * abs(float(expected))
    except ValueError:
        return False


def check(input, expected_output, output):
    pieces, expected = (re.findall(r"\\s+|\\S+", text) for text in (output, expected_output))
    pairs = list(zip(pieces, expected))
    return len(pieces) == len(expected) and all(a == b if b.isspace() else near(a, b) for a, b in pairs)
"""

# A validator finds files and arguments as its own process would, and says 42 for yes.
_VALIDATOR = """
def check(input, expected_output, output):
    import builtins, io, sys

    files = {"/input": input, "/answer": expected_output}

    def opened(name, mode="r", *arguments, **settings):
        name = str(name)
        if name not in files and not name.startswith("/feedback/"):
            raise FileNotFoundError(name)
        content = files.get(name, "").encode("utf-8", "surrogateescape")
        if "b" in mode:
            return io.BytesIO(content)
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors="surrogateescape")

    builtins.open = io.open = opened
    sys.argv = ["validator", "/input", "/answer", "/feedback/", *FLAGS]
    sys.stdin = io.TextIOWrapper(
        io.BytesIO(output.encode("utf-8", "surrogateescape")), encoding="utf-8", errors="surrogateescape"
    )
    try:
        exec(compile(VALIDATOR, "validator.py", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        return end.code == 42
    return False
"""


def problems(path: Path, choices: Choices, executor: Executor | None) -> Iterator[Found | SetAside]:
    """Of one package, or of a folder of packages."""
    if not path.is_dir():
        raise ConfigError(f"{path}: give the folder of a problem package, or one that holds such folders")
    packages = [path] if (path / "problem.yaml").is_file() else sorted(path.glob("*/problem.yaml"))
    if not packages:
        raise ConfigError(f"{path}: no problem.yaml here, nor one folder below; give a problem package")
    for package in packages:
        folder = package if package.is_dir() else package.parent
        yield made(str(folder), {"id": folder.name, "folder": folder}, _problem, choices, executor)


def _problem(row: Fields, choices: Choices, executor: Executor | None) -> Problem:
    package = Package(row["folder"], choices.max_test_bytes)
    settings = package.yaml("problem.yaml")
    is_scoring = _is_scoring(settings)
    public, private = package.tests("sample"), package.tests("secret")
    require_tests(public, private)
    if is_scoring:
        require_full_score_is_all_tests(package, settings)
    limits = settings.get("limits") or {}
    if not isinstance(limits, dict):
        raise UnusableProblemError(Reason.INVALID, "problem.yaml: 'limits' is no map")
    return Problem(
        id=row["id"],
        statement=_with_samples(package.statement(), public),
        public_tests=tuple(public),
        private_tests=tuple(private),
        time_limit_s=_time_limit(package, limits) or choices.defaults.default_time_limit_s,
        memory_limit_bytes=(
            int(_number(limits, "memory") * 2**20) or choices.defaults.default_memory_limit_bytes
        ),
        source="kattis",
        solutions=tuple(package.submissions("accepted")[: choices.solutions]),
        incorrect_solutions=tuple(
            [program for folder in WRONG_FOLDERS for program in package.submissions(folder)][
                : choices.solutions
            ]
        ),
        judge=_judge(package, settings, executor),
    )


def _is_scoring(settings: Fields) -> bool:
    """Whether it has scores. Raises UnusableProblemError where tests are not judged one by one, once each."""
    kinds = settings.get("type") or "pass-fail"
    words = kinds.split() if isinstance(kinds, str) else list(kinds) if isinstance(kinds, list) else [kinds]
    words += str(settings.get("validation") or "").split()
    if "interactive" in words:
        raise UnusableProblemError(Reason.INTERACTIVE, "problem.yaml says so")
    if "score" in words:
        raise UnusableProblemError(Reason.UNSUPPORTED, "problem.yaml: an output validator that gives scores")
    for kind in words:
        if kind not in ("pass-fail", "scoring", "default", "custom"):
            raise UnusableProblemError(Reason.UNSUPPORTED, f"problem.yaml: a problem of type {kind!r}")
    return "scoring" in words


def _judge(package: Package, settings: Fields, executor: Executor | None) -> Judge | Validator:
    flags = _flags(package, settings)
    validators = package.validators()
    validation = str(settings.get("validation") or ("custom" if validators else "default"))
    if validation.split(maxsplit=1)[0] == "default":
        return _default_judge(flags)
    if _is_one_program(validators):
        files = {path.name: package.text(path) for path in validators}
        validator = Validator(files=files, flags=tuple(flags))
        _require_compiles(validator, executor)
        return validator
    if len(validators) != 1 or validators[0].suffix != ".py":
        names = ", ".join(path.name for path in validators) or "none"
        raise UnusableProblemError(
            Reason.UNSUPPORTED,
            f"output validators: {names}; one in C++, or in one file of Python, can be used",
        )
    constants = f"FLAGS, VALIDATOR = {flags!r}, {package.text(validators[0])!r}\n"
    return Checker(program=constants + _VALIDATOR, limits=CHECKER_LIMITS)


def _is_one_program(validators: list[Path]) -> bool:
    """Whether these are the C++ files of one: those of its folder, or one file that may have headers."""
    sources = [path for path in validators if path.suffix in SOURCE_ENDINGS]
    others = [path for path in validators if path.suffix not in SOURCE_ENDINGS + HEADER_ENDINGS]
    folders = {path.parent for path in validators}
    if not sources or others or len(folders) != 1:
        return False
    return len(sources) == 1 or sources[0].parent.name != "output_validators"


def _require_compiles(validator: Validator, executor: Executor | None) -> None:
    assert executor is not None
    try:
        (result,) = executor.build_checkers([checker_of(validator)])
    except (ConfigError, ValueError, SandboxFault) as error:
        raise UnusableProblemError(Reason.UNSUPPORTED, f"its output validator: {error}") from None
    if result.verdict is not Verdict.PASSED:
        raise UnusableProblemError(
            Reason.UNSUPPORTED, f"its output validator does not compile: {why_not_built(result)}"
        )


def _flags(package: Package, settings: Fields) -> list[str]:
    """Of the output validator: those of problem.yaml, or of all tests."""
    flags = _words(settings.get("validator_flags"))
    for name in package.group_settings():
        group = package.yaml(name)
        for key in ("output_validator_flags", "output_validator_args"):
            given = _words(group.get(key))
            if not given or given == flags:
                continue
            if name.count("/") > 1 or flags:
                raise UnusableProblemError(
                    Reason.UNSUPPORTED, f"{name}: {key} of its own, {' '.join(given)!r}"
                )
            flags = given
    return flags


def _words(flags: Any) -> list[str]:
    if isinstance(flags, list):
        return [str(flag) for flag in flags]
    if flags is None or isinstance(flags, (str, int, float)):
        try:
            return shlex.split(str(flags or ""))
        except ValueError as error:
            raise UnusableProblemError(
                Reason.INVALID, f"validator flags {flags!r} cannot be read ({error})"
            ) from None
    raise UnusableProblemError(Reason.UNSUPPORTED, f"validator flags {flags!r} for one of several validators")


def _default_judge(flags: list[str]) -> Judge:
    absolute = relative = 0.0
    words = iter(flags)
    case_sensitive = space_sensitive = False
    for word in words:
        if word == "case_sensitive":
            case_sensitive = True
        elif word == "space_change_sensitive":
            space_sensitive = True
        elif word in ("float_tolerance", "float_absolute_tolerance", "float_relative_tolerance"):
            tolerance = _tolerance(word, next(words, ""))
            absolute = tolerance if word != "float_relative_tolerance" else absolute
            relative = tolerance if word != "float_absolute_tolerance" else relative
        else:
            raise UnusableProblemError(Reason.INVALID, f"the default validator has no flag {word!r}")
    if not space_sensitive:
        return Tokens(absolute=absolute, relative=relative, ignore_case=not case_sensitive)
    constants = f"ABSOLUTE, RELATIVE, CASE_SENSITIVE = {absolute!r}, {relative!r}, {case_sensitive!r}\n"
    return Checker(program=constants + _SPACE_SENSITIVE, limits=CHECKER_LIMITS)


def _tolerance(flag: str, text: str) -> float:
    tolerance = number_of(text)
    if not 0 <= tolerance < float("inf"):
        raise UnusableProblemError(Reason.INVALID, f"{flag} {text!r} is no tolerance")
    return tolerance


def _time_limit(package: Package, limits: Fields) -> float:
    """In seconds; 0 where the package leaves it to the judge. Of `legacy`, two systems have files for it."""
    if limits.get("time_limit") is not None:
        return _number(limits, "time_limit")
    for name, key in ((".timelimit", ""), ("domjudge-problem.ini", "timelimit")):
        for line in (package.optional_text(name) or "").splitlines():
            before, separator, after = line.partition("=") if key else ("", "", line)
            if before.strip() == key and (separator or after.strip()):
                return _number({name: after.strip().strip("'\"")}, name)
    return 0.0


def _number(fields: Fields, name: str) -> float:
    """0 where there is none."""
    value = fields.get(name)
    if value is None:
        return 0.0
    number = number_of(value)
    if not 0 <= number < float("inf"):
        raise UnusableProblemError(Reason.INVALID, f"{name} is {value!r}, not a number from 0")
    return number


def _with_samples(statement: str, tests: list[Test]) -> str:
    """A package's statement has no samples: systems show data/sample beside it."""
    samples = [
        f"Sample input {number}:\n{text_input(test)}\nSample output {number}:\n{test.expected_output}"
        for number, test in enumerate(tests, start=1)
    ]
    return "\n\n".join([statement.rstrip(), *samples])
