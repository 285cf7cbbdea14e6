"""Which layers of isolation this machine gives, and whether it gives a memory cgroup."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from rlef_sandbox.layers import Layer
from rlef_sandbox.memory_cgroup import NoMemoryCgroup, own_memory_cgroup
from rlef_sandbox.records import SandboxFault
from rlef_sandbox.workers import start_workers

_LOSS: Final = {
    Layer.UNPRIVILEGED_USER: "programs run as the caller's user",
    Layer.MOUNT_NAMESPACE: "file access rests on Landlock and on the file permissions",
    Layer.PID_NAMESPACE: "programs share the caller's process numbers",
    Layer.NETWORK_NAMESPACE: "the network is closed by the system call filter alone",
    Layer.IPC_NAMESPACE: "System V IPC is closed by the system call filter alone",
    Layer.UTS_NAMESPACE: "programs see the machine's name",
    Layer.LANDLOCK: "file access rests on the mount namespace and on the file permissions",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """Whether this machine gives one layer, and what is lost without it."""

    layer: Layer
    given: bool
    reason: str  # why not; empty when given
    loss: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCgroupReport:
    """A folder for `Executor(memory_cgroup=...)`, or why there is none, and what is lost without it."""

    folder: str | None
    reason: str  # why not; empty when there is one
    loss: str


def check() -> list[LayerReport]:
    """Start one worker and report what it got. Raises SandboxFault when none can be started at all."""
    supervisor = start_workers(1, allow_missing=list(Layer))
    errors = supervisor.layers()
    supervisor.close()
    return [
        LayerReport(
            layer=Layer(name),
            given=error == 0,
            reason=os.strerror(error) if error else "",
            loss=_LOSS[Layer(name)],
        )
        for name, error in errors
    ]


def check_memory_cgroup() -> MemoryCgroupReport:
    """Look for a memory cgroup at and above this process's own, and try it out with a worker."""
    loss = "memory use above the limit is found out when the program ends, and only what is resident counts"
    try:
        folder = own_memory_cgroup()
        start_workers(1, allow_missing=list(Layer), memory_cgroup=folder).close()
    except (NoMemoryCgroup, SandboxFault) as error:
        return MemoryCgroupReport(folder=None, reason=str(error), loss=loss)
    return MemoryCgroupReport(folder=folder, reason="", loss=loss)
