"""What goes into an executor and what comes out."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from enum import Enum
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Literal

from rlef_sandbox.values import text_of


class SandboxFault(RuntimeError):  # noqa: N818 - a fault of ours, as against a program's error
    """The machine or this library failed; the program that was to run is not to blame."""


class Verdict(str, Enum):
    """What one program did on one test."""

    PASSED = "passed"
    WRONG_OUTPUT = "wrong_output"
    EXCEPTION = "exception"  # a non-zero exit status, or a signal that no other verdict explains
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out_of_memory"
    OUTPUT_LIMIT = "output_limit"
    SYNTAX_ERROR = "syntax_error"
    SECURITY = "security"  # killed at a system call that no honest program makes
    SKIPPED = "skipped"  # not run: an earlier test failed


StoppedBy = Literal["system_call_filter", "cpu_limit", "wall_limit", "memory_limit", "output_limit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A judge: outputs are split at blanks, and their tokens must agree one by one.

    Two tokens agree when they are equal or, where both are finite decimal numbers, when the distance is at
    most `absolute`, or at most `relative` times the expected number. Without a tolerance 007 is not 7.
    Raises ValueError for a tolerance that is not a number from 0.
    """

    absolute: float = 0.0
    relative: float = 0.0
    ignore_case: bool = False

    def __post_init__(self) -> None:
        for name in ("absolute", "relative"):
            tolerance = getattr(self, name)
            if not (is_number(tolerance) and tolerance >= 0):
                raise ValueError(f"{name} is {tolerance!r}: give a number from 0")


@dataclass(frozen=True, slots=True)
class Test:
    """What a program reads on standard input, and what it should write to standard output.

    Text is read and written as UTF-8. Input that is no such text is given as bytes; `sys.stdin.buffer` reads
    them as they are. Raises TypeError for anything else.
    """

    input: str | bytes
    expected_output: str

    __test__ = False  # pytest: not a test class

    def __post_init__(self) -> None:
        if not isinstance(self.input, (str, bytes)):
            raise TypeError(f"input is {_shown(self.input)}: give a str, or bytes where it is no text")
        if not isinstance(self.expected_output, str):
            raise TypeError(f"expected_output is {_shown(self.expected_output)}: give a str")


@dataclass(frozen=True, slots=True)
class Call:
    """What a function is called with, and what it should return: values that JSON has.

    Stands where a `Test` does, in a job that names a `function`.
    """

    arguments: Sequence[object]
    expected: object

    @property
    def input(self) -> str:
        """The arguments as the program's process reads them. Raises TypeError if JSON cannot hold them."""
        return json.dumps(list(self.arguments)) + "\n"

    @property
    def expected_output(self) -> str:
        """Raises TypeError if JSON cannot hold the value."""
        return text_of(self.expected)


@dataclass(frozen=True, slots=True)
class Command:
    """A program that is not Python source but, say, a compiled one: what to execute, and what lies beside it.

    `arguments` begin with the executable: an absolute path, or "./name" for one of `files`. Its working
    folder holds `files` and nothing else. It may change that folder if `Limits.file_bytes` says so; the files
    named in `outputs` are then in `Result.files`. It finds the machine's programs and libraries (/usr, /bin,
    /lib and what `Executor(readable=...)` adds) and /dev/null, zero, random and urandom, but no /proc.

    It may start threads, and with `may_fork` processes, as compilers do; `Limits.processes` counts both.
    `stack_bytes` is its main thread's stack, and by default that of every thread of a C program.

    Raises ValueError for a name that leaves the folder and for anything that no program can be given.
    """

    arguments: Sequence[str]
    _: KW_ONLY
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)  # besides PATH, HOME, TMPDIR and LANG
    outputs: Sequence[str] = ()
    may_fork: bool = False
    stack_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if isinstance(self.arguments, str) or not self.arguments:
            raise ValueError(f"arguments is {self.arguments!r}: give a list that begins with the executable")
        if "/" not in self.arguments[0]:
            raise ValueError(
                f"arguments[0] is {self.arguments[0]!r}: give an absolute path, or './name' for one of files"
            )
        _check_names([*self.files, *self.outputs])
        for name in self.environment:
            if not name or "=" in name:
                raise ValueError(f"environment names {name!r}: give a name without '='")
        for text in [
            *self.arguments,
            *self.files,
            *self.outputs,
            *self.environment,
            *self.environment.values(),
        ]:
            if "\0" in text:
                raise ValueError(f"a command holds {text!r}: no program can be given a NUL")
        if not _is_whole(self.stack_bytes, 1 << 16):
            raise ValueError(
                f"stack_bytes is {self.stack_bytes!r}: give a whole number of at least {1 << 16}"
            )

    @property
    def environment_lines(self) -> list[str]:
        executable = Path(self.arguments[0])
        # The loader cannot ask /proc where the libraries lie that an executable has beside it.
        origin = {"LD_ORIGIN_PATH": str(executable.resolve().parent)} if executable.is_absolute() else {}
        lines = _COMMAND_ENVIRONMENT | origin | dict(self.environment)
        return [f"{name}={value}" for name, value in lines.items()]


def _check_names(names: Sequence[str]) -> None:
    """Of files in a working folder."""
    for name in names:
        if {"", ".", ".."} & set(name.split("/")):
            raise ValueError(f"the file {name!r} is not below the working folder: give a name like 'a.cpp'")
        for folder in map(str, PurePosixPath(name).parents):
            if folder in names:
                raise ValueError(f"the file {folder!r} is the folder of {name!r}, too: rename one of them")


_COMMAND_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/box",
    "TMPDIR": "/box",
    "LANG": "C.UTF-8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one test of one program may use. Raises ValueError for a value out of range."""

    cpu_s: float = 10.0  # the verdict `timeout` rests on this clock, so it does not depend on the load
    wall_s: float | None = None  # guards against idling; None: three times `cpu_s`, plus two seconds
    memory_bytes: int = 1_000_000_000  # on top of what the bare interpreter holds
    processes: int = 64  # the program's threads, the first included (a `Command` may have processes, too)
    output_bytes: int = 16 * 1024 * 1024  # of standard output, and as many of standard error
    kept_output_bytes: int = 64 * 1024  # how much of each a Result keeps
    open_files: int = 64
    file_bytes: int = 0  # what a `Command` may write in its working folder; 0: the folder is read-only

    def __post_init__(self) -> None:
        for name in ("cpu_s", "wall_s"):
            seconds = getattr(self, name)
            if seconds is not None and not (is_number(seconds) and 0 < seconds <= 86_400):
                raise ValueError(f"{name} is {seconds!r}: give a number of seconds in (0, 86400]")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not _is_whole(value, least):
                raise ValueError(f"{name} is {value!r}: give a whole number of at least {least}")

    @property
    def wall_limit_s(self) -> float:
        return 3 * self.cpu_s + 2 if self.wall_s is None else self.wall_s


_LEAST = {
    "memory_bytes": 1 << 20,
    "processes": 1,
    "output_bytes": 1,
    "kept_output_bytes": 0,
    "open_files": 16,
    "file_bytes": 0,
}


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**62


def _shown(value: object) -> str:
    """On one line: what was given by mistake may be a whole file."""
    return reprlib.repr(value).replace("\n", " ")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checker:
    """A judge of your own: Python that defines `check(input, expected_output, output)`, which returns a bool,
    or a command.

    A command gets three more arguments, as programs made with testlib expect: the names of files with the
    input, the output and the expected output. It accepts with exit status 0 and rejects with 1, 2, 4 or 8.
    With `build`, a compiler's command, the files that this names as `outputs` are among the command's own: an
    executor builds them before the first job that needs them, once.

    It runs in the sandbox too, once for each test of a program that ended well, and only when all tests have
    run. A checker that raises, exceeds `limits` or answers anything else is a SandboxFault: the program that
    it judges is not to blame, and so is one that cannot be built. Raises ValueError for a `build` without
    outputs, or beside Python.
    """

    program: str | Command
    limits: Limits = Limits()
    build: Command | None = None

    def __post_init__(self) -> None:
        if self.build is None:
            return
        if not isinstance(self.program, Command) or not self.build.outputs:
            raise ValueError(
                "build is given: let it name outputs, and program be the Command that they are for"
            )


Judge = Literal["code_contests", "exact", "tokens", "any"] | Tokens | Checker
"""How outputs are compared: see `outputs_match`. "tokens" is `Tokens()`; "any" accepts all outputs."""


@dataclass(frozen=True, slots=True)
class Job:
    """One program (Python source, or a `Command`) and the tests to run it on.

    With a `function`, the program is loaded as a module and that function is called, or that method of a new
    `Solution()`; tests are then `Call`s. What it prints goes to standard error; what it returns is the
    output, as JSON. Raises ValueError for a name that is none.
    """

    program: str | Command
    tests: Sequence[Test] | Sequence[Call]
    _: KW_ONLY
    limits: Limits | None = None  # None: the executor's
    stop_at_first_failure: bool = False
    judge: Judge | None = None  # None: "code_contests", and "tokens" for what a function returns
    function: str = ""

    def __post_init__(self) -> None:
        if self.function and not self.function.isidentifier():
            raise ValueError(f"function is {self.function!r}: give the name of one, as in 'solve'")
        if not self.function and any(isinstance(test, Call) for test in self.tests):
            raise ValueError("tests are calls: name the function that they call, as in function='solve'")
        if isinstance(self.program, Command) and self.function:
            raise ValueError(f"function is {self.function!r}: a command has none that could be called")
        if self.judge is None:
            object.__setattr__(self, "judge", "tokens" if self.function else "code_contests")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One program on one test, in facts of the kernel: exit status, signal, clocks, sizes."""

    verdict: Verdict
    exit_code: int | None  # None when a signal ended it, or it did not run
    signal: int | None
    stdout: str  # its beginning
    stderr: str  # its end; frames are those of `solution.py` and of the libraries that it called
    stdout_truncated: bool
    stderr_truncated: bool
    cpu_s: float
    wall_s: float
    peak_memory_bytes: int  # resident, the bare interpreter's share included
    stopped_by: StoppedBy | None = None  # what ended it, when it did not end of itself
    files: Mapping[str, bytes] = field(default_factory=dict)  # those of `Command.outputs` that are there


@dataclass(frozen=True, slots=True)
class Tally:
    """What an executor had to do in some time, and what held it up."""

    programs: int = 0  # that ended, with all their tests
    restarts: int = 0  # workers replaced because they died, did not answer or could not be started
    retries: int = 0  # programs that went to another worker, with the tests that were left, because of that
    longest_s: float = 0.0  # of a program: wall clock from its first worker to its end, all tests
    alone_s: float = 0.0  # the longest that one program went on when all others had ended
    recalled: int = 0  # programs that a caller's cache answered for; an `Executor` itself keeps nothing
    recalled_s: float = 0.0  # CPU time that those had taken when they were run

    @classmethod
    def of_all(cls, tallies: Iterable[Tally]) -> Tally:
        """Of executors side by side: counts add up, and of seconds the most is kept."""
        each = list(tallies)
        return cls(
            programs=sum(tally.programs for tally in each),
            restarts=sum(tally.restarts for tally in each),
            retries=sum(tally.retries for tally in each),
            longest_s=max((tally.longest_s for tally in each), default=0.0),
            alone_s=max((tally.alone_s for tally in each), default=0.0),
            recalled=sum(tally.recalled for tally in each),
            recalled_s=sum(tally.recalled_s for tally in each),
        )
