"""The layers of isolation that a machine may lack."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum
from typing import Final

from rlef_sandbox import _core


class Layer(str, Enum):
    """What isolates a program besides seccomp, rlimits and NO_NEW_PRIVS, without which nothing runs."""

    UNPRIVILEGED_USER = "unprivileged_user"
    MOUNT_NAMESPACE = "mount_namespace"
    PID_NAMESPACE = "pid_namespace"
    NETWORK_NAMESPACE = "network_namespace"
    IPC_NAMESPACE = "ipc_namespace"
    UTS_NAMESPACE = "uts_namespace"
    LANDLOCK = "landlock"


NAMESPACES: Final = frozenset(layer for layer in Layer if layer.value.endswith("_namespace"))
"""What docker's default profile withholds: `Executor(allow_missing=NAMESPACES)` starts there."""


def mask_of(layers: Collection[str]) -> int:
    """One bit per named layer. Raises ValueError for a name that is no layer."""
    names = _core.layer_names()
    mask = 0
    for layer in layers:
        name = layer.value if isinstance(layer, Layer) else layer
        if name not in names:
            raise ValueError(f"allow_missing names {name!r}: the layers are {', '.join(names)}")
        mask |= 1 << names.index(name)
    return mask
