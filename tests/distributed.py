"""Real processes joined over gloo, for tests of what several ranks do together."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from rlef.launch import free_port

ROOT = Path(__file__).parent.parent
_FOLDER = "RLEF_TEST_FOLDER"


def run_ranks(
    function: Callable[[], Any], *, ranks: int, folder: Path, timeout_s: float = 300.0
) -> list[Any]:
    """What `function`, which a test module defines, returned in each of `ranks` processes, in their order.

    The processes find themselves as under torchrun. If one fails, all end, and their output is the error.
    """
    log = folder / "log"
    with log.open("wb") as output:
        launcher = subprocess.Popen(
            [
                sys.executable,
                "-m",
                __name__,
                f"{function.__module__}:{function.__name__}",
                str(ranks),
                str(folder),
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, so that nothing is left of it
        )
    try:
        status = launcher.wait(timeout_s)
    finally:
        with contextlib.suppress(ProcessLookupError):  # none is left, as it should be
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    assert status == 0, f"the ranks ended with status {status}:\n{log.read_text(errors='replace')[-6000:]}"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def common_folder() -> Path:
    """In one of the ranks: the folder that `run_ranks` was given."""
    return Path(os.environ[_FOLDER])


def _launch(name: str, ranks: int, folder: Path) -> int:
    """Import once, then fork: megatron takes longer to import than most tests take to run."""
    importlib.import_module("rlef.megatron_policy")
    module, function = name.split(":")
    target = getattr(importlib.import_module(module), function)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(ranks))
    os.environ[_FOLDER] = str(folder)
    context = multiprocessing.get_context("fork")
    processes = {}
    for rank in range(ranks):
        process = context.Process(target=_rank, args=(target, rank, folder / f"{rank}.pt"))
        process.start()
        processes[process.sentinel] = process
    while processes:
        for sentinel in wait(list(processes)):
            process = processes.pop(sentinel)  # type: ignore[call-overload]
            process.join()
            if process.exitcode:
                return 1
    return 0


def _rank(function: Callable[[], Any], rank: int, path: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.save(function(), path)


if __name__ == "__main__":
    os._exit(_launch(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))  # without waiting for ranks that hang
