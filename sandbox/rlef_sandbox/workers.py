"""How worker processes are started."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlef_sandbox import _core
from rlef_sandbox.layers import mask_of
from rlef_sandbox.worker import outermost

COMMAND_WORKER = Path(_core.__file__).with_name("command_worker")
_FLAGS = ("-S", "-s", "-B", "-X", "utf8")  # no site-packages, no user folder, no bytecode written
_ENVIRONMENT = ("PYTHONHASHSEED=0", "LD_BIND_NOW=1")


# What commands find of the machine, where it exists: programs, libraries, and how to choose among them.
_MACHINE = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/alternatives",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def start_workers(
    count: int,
    *,
    allow_missing: Collection[str],
    readable: Collection[str] = (),
    memory_cgroup: str | None = None,
    cores: Collection[int] | None = None,
    patience_s: float = 60.0,
) -> _core.Supervisor:
    """Start `count` workers and wait until each is isolated. Commands may read the paths `readable`, too.

    Nothing of theirs runs outside `cores`: a filter denies programs the system call that would change it.

    Raises ValueError for a name that is no layer, SandboxFault when a layer is missing that `allow_missing`
    does not name, or when no worker can be started or put below `memory_cgroup`.
    """
    interpreter = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    script = Path(__file__).with_name("worker.py")
    found = [path for path in _MACHINE if Path(path).exists()]
    seen = list(dict.fromkeys([*found, *map(_checked, readable)]))
    with _confined_to(cores):
        supervisor = _core.Supervisor(
            for_python=[interpreter, *_FLAGS, str(script), _core.__file__, str(os.getpid())],
            for_commands=[str(COMMAND_WORKER), str(os.getpid()), ":".join(_DEVICES), *outermost(seen)],
            environment=list(_ENVIRONMENT),
            workers=count,
            allowed_missing=mask_of(allow_missing),
            memory_cgroup=memory_cgroup or "",
            report_patience_s=patience_s,
        )
    try:
        supervisor.wait_until_ready()
    except BaseException:
        supervisor.close()
        raise
    return supervisor


@contextmanager
def _confined_to(cores: Collection[int] | None) -> Iterator[None]:
    """The supervisor's thread inherits the cores of the thread that makes it, and the workers inherit its."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # of this thread alone
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _checked(path: str) -> str:
    normal = os.path.normpath(path)
    taken = normal == os.sep or Path(normal).is_relative_to("/box")
    if Path(path).is_absolute() and Path(path).exists() and not taken:
        return normal
    raise ValueError(f"readable names {path!r}: give absolute paths that exist, not the root and not /box")
