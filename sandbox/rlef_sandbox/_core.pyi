from collections.abc import Callable, Sequence
from types import CodeType
from typing import Literal, TypeAlias

from rlef_sandbox.records import Job, Judge, Limits, StoppedBy

_Outcome: TypeAlias = tuple[
    str,
    int | None,
    int | None,
    str,
    str,
    bool,
    bool,
    float,
    float,
    int,
    StoppedBy | None,
    dict[str, bytes],
]
_Architecture: TypeAlias = Literal["x86_64", "aarch64"]
# number, action, when, argument, value, values, otherwise: struct Rule of csrc/filter.hpp
_Rule: TypeAlias = tuple[int, int, str, int, int, list[int], int]
# rules, unnamed, beyond, first alien number, audit architecture: struct Policy
_Policy: TypeAlias = tuple[list[_Rule], int, int, int, int]
_Instruction: TypeAlias = tuple[int, int, int, int]

def outputs_match(expected: str, output: str, judge: Judge) -> bool: ...
def serve(
    socket: int,
    supervisor: int,
    readable: list[str],
    hidden: list[str],
    compile: Callable[[bytes], CodeType | tuple[str, bool, bool]],  # noqa: A002
    run: Callable[[CodeType, str], tuple[int, bool]],
) -> None: ...
def layer_names() -> list[str]: ...
def worker_policy(architecture: _Architecture) -> _Policy: ...
def command_policy(may_fork: bool, may_write: bool, architecture: _Architecture) -> _Policy: ...
def test_policy(own_pid: int, architecture: _Architecture, may_fork: bool) -> _Policy: ...
def compile_policy(policy: _Policy) -> list[_Instruction]: ...

class Batch:
    def wait(self, for_all: bool) -> None: ...
    def take(self) -> list[tuple[int, list[_Outcome]]]: ...
    def is_over(self) -> bool: ...
    def fileno(self) -> int: ...
    def cancel(self) -> None: ...

class Supervisor:
    def __init__(
        self,
        for_python: list[str],
        for_commands: list[str],
        environment: list[str],
        workers: int,
        allowed_missing: int,
    ) -> None: ...
    def wait_until_ready(self) -> None: ...
    def submit(self, jobs: Sequence[Job], default_limits: Limits) -> Batch: ...
    def layers(self) -> list[tuple[str, int]]: ...
    def worker_pids(self) -> list[int]: ...
    def restarts(self) -> int: ...
    def close(self) -> None: ...
