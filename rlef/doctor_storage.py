"""Whether memory and disks hold a run, and its folder does what a run wants of it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from rlef.config import Config
from rlef.families import read_shape
from rlef.findings import Finding, readable_size, spans_nodes
from rlef.pretrained import model_folder
from rlef.shards import Head, stage_weights

MEMORY_OF_A_PROCESS = 1 << 30  # before it holds a model: torch and megatron-core, imported
CLOCKS_APART_S = 5.0
OF_ONE_MACHINE = {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}  # file systems


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
    found = f"{readable_size(free)} free; {takers}: may want {readable_size(wanted)}"
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
    count = config.checkpoint.keep + 1
    wanted = count * checkpoint_bytes(config)
    found = f"{readable_size(free)} free in {place}; {count} checkpoints take {readable_size(wanted)}"
    if free >= wanted:
        yield Finding.good("disk", found)
        return
    yield Finding.fault("disk", found, "lower checkpoint.keep, or name a larger disk: run.output_dir=PATH")


def checkpoint_bytes(config: Config) -> int:
    """Weights and two moments of the networks that learn, in float32: of bf16 weights it is the masters."""
    shape = read_shape(model_folder(config.model.path))
    heads: list[Head] = ["logits", "value"] if config.ppo.has_value else ["logits"]
    elements = sum(
        weight.elements for head in heads for weight in stage_weights(shape, head, stage=0, stages=1)
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
