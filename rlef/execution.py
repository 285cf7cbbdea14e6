"""How a process opens its executor: with its share of the cores that its node gives to programs."""

from __future__ import annotations

import os
from collections.abc import Collection

from rlef.config import ConfigError, ExecutorConfig
from rlef_sandbox import Executor


def open_executor(settings: ExecutorConfig, *, workers: int | None = None, ranks: int = 1) -> Executor:
    """With `workers`, or as many as the settings say. It is that of this process and of the next `ranks` - 1.

    Raises ConfigError for a budget that the node cannot give or its processes cannot share, ValueError and
    SandboxFault as `Executor` does.
    """
    available = os.sched_getaffinity(0)
    processes, index = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    cores = share_of_cores(settings, available, processes=processes, index=index, ranks=ranks)
    share = len(cores) if cores else max(1, len(available) * ranks // processes)
    return Executor(
        workers=workers or settings.workers or share,
        allow_missing=settings.allow_missing,
        memory_cgroup=settings.memory_cgroup or None,
        cores=cores,
        patience_s=settings.patience_s,
    )


def share_of_cores(
    settings: ExecutorConfig, available: Collection[int], *, processes: int, index: int, ranks: int = 1
) -> list[int] | None:
    """Which cores the programs of one of a node's processes may use, or of `ranks` processes from it on; None
    without a budget: all.

    The budget is the last of the `available` cores. No two processes share a core.
    """
    budget = settings.cores
    if not budget:
        return None
    if budget > len(available):
        raise ConfigError(
            f"executor.cores = {budget}, but a process may use {len(available)} of this machine's cores; "
            "lower it, or 0 to share all"
        )
    if budget < processes:
        raise ConfigError(
            f"executor.cores = {budget} cannot be shared by {processes} processes of one machine; "
            f"raise it to {processes}, or 0 to share all"
        )
    of_node = sorted(available)[-budget:]
    return of_node[index * budget // processes : (index + ranks) * budget // processes]
