"""Start this machine's processes when torchrun did not: `rlef train` on a laptop needs no launcher.

Each child gets the environment that torchrun would give it. No child outlives the parent, whatever happens to
it, and when one child fails the others are ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from rlef.config import ConfigError

TOLD = 3  # exit status of a process that has said what ended the run; the command's is 1

_PR_SET_PDEATHSIG = 1
_FIRST_PORT = 10_000  # below it known services listen
# glibc would give the pages of each large tensor back and fault them in again for the next one. Keeping them
# saves about a tenth of the CPU time of an update, and costs the peak of memory while the process lives.
_KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
_GRACE_S = 60.0  # for the other ranks to save and leave after an interrupt
_FAREWELL_S = 10.0  # for the other ranks to find out that one has failed, and to say so


def launched_by_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def processes_here(processes: int) -> int:
    """How many of a run's `processes` are this machine's: torchrun says so, or all are."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes)) if launched_by_torchrun() else processes


def require_restartable() -> None:
    """Under a torchrun that starts processes again, each attempt must have a store of its own.

    torch shares the agent's store with the processes by default, and what an attempt leaves there is read by
    the next one: addresses of processes that have ended (pytorch/pytorch, issue 135712).

    Raises:
        ConfigError: torchrun was started without the variable that gives each attempt its own.
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ConfigError(
            f"torchrun --max-restarts {restarts} would start processes that look for ended ones: export "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on each node, with --standalone or --rdzv-backend c10d"
        )


def torchrun_agent() -> str:
    """A name of the torchrun that started this process, which no other one has, of any machine or time."""
    agent = os.getppid()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    status = Path(f"/proc/{agent}/stat").read_text(encoding="utf-8", errors="replace")
    started = status.rpartition(")")[2].split()[19]  # in ticks after the boot
    return f"{boot} {agent} {started}"


def run_processes(
    target: Callable[..., int], arguments: tuple[Any, ...], *, processes: int, threads: int
) -> int:
    """Run `target(*arguments)` in `processes` processes; the first non-zero exit status, or 0."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before the children import torch
    for name, value in _KEEP_FREED_MEMORY.items():
        os.environ.setdefault(name, value)
    if processes == 1:
        return target(*arguments)
    context = multiprocessing.get_context("spawn")
    port = free_port()
    children = [
        context.Process(target=_child, args=(os.getpid(), rank, processes, port, target, arguments))
        for rank in range(processes)
    ]
    with _SignalsLeftTo(children):
        _start(children)
        status = _first_failure(children)
        deadline = time.monotonic() + (_GRACE_S if status == 0 else _FAREWELL_S)
        for child in children:
            child.join(timeout=max(0.0, deadline - time.monotonic()))
            if child.is_alive():
                child.kill()
                child.join()
    return status


def _start(children: list[SpawnProcess]) -> None:
    """A terminal's Ctrl-C reaches the children as well, and while they import they would answer it with a
    traceback. So they inherit that it is ignored, and hear of it from this process."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for child in children:
        child.start()
    signal.signal(signal.SIGINT, handler)


def _child(
    parent: int, rank: int, processes: int, port: int, target: Callable[..., int], arguments: tuple[Any, ...]
) -> None:
    die_with_parent(parent)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    raise SystemExit(target(*arguments))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, kill -9 included."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the request was made
        os._exit(1)


def _first_failure(children: list[SpawnProcess]) -> int:
    """Wait until all end, or one fails; a signal's status is 128 plus its number, as a shell has it."""
    running = {child.sentinel: child for child in children}
    while running:
        for sentinel in wait(list(running)):
            child = running.pop(sentinel)  # type: ignore[arg-type]
            child.join()
            code = child.exitcode or 0
            if code != 0:
                return code if code > 0 else 128 - code
    return 0


class _SignalsLeftTo:
    """While inside, the first SIGINT or SIGTERM asks the children to save and leave; a second one ends them
    at once."""

    def __init__(self, children: list[SpawnProcess]) -> None:
        self._children = children
        self._asked = False

    def __enter__(self) -> None:
        self._previous = {
            number: signal.signal(number, self._forward) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _forward(self, _number: int, _frame: object) -> None:
        message = signal.SIGKILL if self._asked else signal.SIGTERM
        self._asked = True
        for child in self._children:
            if child.pid is not None and child.is_alive():
                os.kill(child.pid, message)


def free_port() -> int:
    """A free port of this machine: if there is one, none of those that the kernel gives to whoever asks.

    So nobody is likely to take it before rank 0 has imported what it needs and listens.
    """
    given_out = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()
    own = range(_FIRST_PORT, int(given_out[0]))
    for port in (*random.sample(own, k=len(own)), 0):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            bound: int = listener.getsockname()[1]
            return bound
    raise ConfigError("no port of 127.0.0.1 is free for the processes to meet at: end what holds them")
