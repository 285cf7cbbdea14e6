"""Finding a memory cgroup that this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


class NoMemoryCgroup(RuntimeError):  # noqa: N818 - no error where nobody asked for one
    """Why there is none."""


def own_memory_cgroup(proc: Path = Path("/proc/self")) -> str:
    """The nearest folder, from the process's own cgroup upwards, below which it may make memory cgroups.

    Raises NoMemoryCgroup where there is none.
    """
    candidates = [
        folder
        for mount_point, path, is_first_version in _memory_hierarchies(proc)
        for folder in _upwards(mount_point, path)
        if is_first_version or _passes_memory_on(folder)
    ]
    if not candidates:
        raise NoMemoryCgroup("no cgroup hierarchy that is mounted here limits memory")
    for folder in candidates:
        if all(os.access(path, os.W_OK) for path in (folder, folder / "cgroup.procs")):
            return str(folder)
    raise NoMemoryCgroup(f"this process may not write {candidates[0]}")


def _memory_hierarchies(proc: Path) -> Iterator[tuple[Path, str, bool]]:
    """Mount points, the process's path below each, and whether it is of the first version."""
    paths = {}
    for line in (proc / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    for line in (proc / "mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        kind, _, options = source.split(" ", 2)
        mount_point = Path(mount.split()[4])
        if kind == "cgroup" and "memory" in options.split(",") and "memory" in paths:
            yield mount_point, paths["memory"], True
        if kind == "cgroup2" and "" in paths:
            yield mount_point, paths[""], False


def _upwards(mount_point: Path, path: str) -> Iterator[Path]:
    """The folders on the way that exist. In a container the first ones may not: they are the host's."""
    own = mount_point / path.lstrip("/")
    for folder in [own, *own.parents]:
        if folder.is_relative_to(mount_point) and folder.is_dir():
            yield folder


def _passes_memory_on(folder: Path) -> bool:
    try:
        return "memory" in (folder / "cgroup.subtree_control").read_text().split()
    except OSError:
        return False
