"""Whether processes reach each other: by name, by the interfaces that were chosen, and in a collective."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rlef.config import Config
from rlef.findings import Finding, spans_nodes
from rlef.launch import run_processes

MEETING_S = 60  # for the processes of the trial collective to meet


def host_name(config: Config) -> Iterator[Finding]:
    """gloo and nccl reach other processes by the address of this name, unless they are told an interface."""
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError as error:
        yield Finding.warning(
            "host name",
            f"{name} has no address: {error.strerror}",
            f"add '127.0.1.1 {name}' to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
        )
        return
    if spans_nodes(config) and ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        yield Finding.warning(
            "host name",
            f"{name} is {address}, which other nodes cannot reach",
            "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between the nodes, and give "
            "torchrun its address: --local-addr",
        )
        return
    yield Finding.good("host name", f"{name} is {address}")


def interfaces() -> Iterator[Finding]:
    """Those that the environment chooses must be there, and up."""
    known = {path.name: _is_up(path) for path in Path("/sys/class/net").iterdir()}
    up = ", ".join(sorted(name for name, is_up in known.items() if is_up)) or "none"
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        chosen = os.environ.get(variable, "")
        if not chosen or chosen.startswith("^"):  # those to leave out
            continue
        names = tuple(chosen.lstrip("=").split(","))
        usable = any(
            name in names or (variable.startswith("NCCL") and name.startswith(names))  # which takes prefixes
            for name, is_up in known.items()
            if is_up
        )
        if usable:
            yield Finding.good(variable, chosen)
        else:
            yield Finding.fault(
                variable, f"{chosen}: no such interface is up", f"name one that is up ({up}), or unset it"
            )


def _is_up(interface: Path) -> bool:
    """A loop-back's state is always unknown."""
    flags = int((interface / "flags").read_text(encoding="ascii"), 16)
    state = (interface / "operstate").read_text(encoding="ascii").strip()
    return bool(flags & 1) and state in {"up", "unknown"}


def collectives() -> Iterator[Finding]:
    """Processes of this machine add up their ranks: two on gloo, and one for each GPU on nccl."""
    yield _collective("gloo", 2, available=dist.is_gloo_available)
    if torch.cuda.device_count() > 1:
        yield _collective("nccl", torch.cuda.device_count(), available=dist.is_nccl_available)


def _collective(backend: str, processes: int, *, available: Callable[[], bool]) -> Finding:
    fault = Finding.fault(
        backend,
        f"{processes} processes of this machine could not add up a number; their errors stand above",
        f"set {backend.upper()}_SOCKET_IFNAME to an interface that `ip -brief address` lists as up",
    )
    if not available():
        return Finding.fault(
            backend,
            f"torch {torch.__version__} was built without it",
            "install torch as its publishers build it",
        )
    kept = os.environ.get("OMP_NUM_THREADS")
    status = run_processes(add_up_ranks, (backend,), processes=processes, threads=1)
    if kept is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    else:
        os.environ["OMP_NUM_THREADS"] = kept
    if status != 0:
        return fault
    found = f"{processes} processes of this machine added up a number"
    if backend == "nccl":
        version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        found = f"{'.'.join(map(str, version))}; {found}"
    return Finding.good(backend, found)


def add_up_ranks(backend: str) -> int:
    """What each process of the trial does; 0 if the sum is right."""
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, timeout=timedelta(seconds=MEETING_S))
    number = torch.tensor([rank + 1], device=f"cuda:{rank}" if backend == "nccl" else "cpu")
    dist.all_reduce(number)
    dist.destroy_process_group()
    return int(number.item() != processes * (processes + 1) // 2)
