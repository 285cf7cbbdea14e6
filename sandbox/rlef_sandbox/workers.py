"""How worker processes are started."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from pathlib import Path

from rlef_sandbox import _core
from rlef_sandbox.layers import mask_of

_FLAGS = ("-S", "-s", "-B", "-X", "utf8")  # no site-packages, no user folder, no bytecode written
_ENVIRONMENT = ("PYTHONHASHSEED=0", "LD_BIND_NOW=1")


def start_workers(
    count: int, *, allow_missing: Collection[str], memory_cgroup: str | None = None
) -> _core.Supervisor:
    """Start `count` workers and wait until each is isolated.

    Raises ValueError for a name that is no layer, SandboxFault when a layer is missing that `allow_missing`
    does not name, or when no worker can be started or put below `memory_cgroup`.
    """
    interpreter = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    script = Path(__file__).with_name("worker.py")
    supervisor = _core.Supervisor(
        arguments=[interpreter, *_FLAGS, str(script), _core.__file__, str(os.getpid())],
        environment=list(_ENVIRONMENT),
        workers=count,
        allowed_missing=mask_of(allow_missing),
        memory_cgroup=memory_cgroup or "",
    )
    try:
        supervisor.wait_until_ready()
    except BaseException:
        supervisor.close()
        raise
    return supervisor
