"""Machines that give less than this one, made by a system call filter, and users that may do less than root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import rlef_sandbox
from rlef_sandbox import Layer, _core
from rlef_sandbox.workers import COMMAND_WORKER

_FILTER = """
import ctypes, struct
steps = {steps!r}
code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in steps))
class Program(ctypes.Structure):
    _fields_ = [("count", ctypes.c_ushort), ("code", ctypes.c_void_p)]
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(steps), ctypes.addressof(code))), 0, 0) == 0
"""

_Step = tuple[int, int, int, int]
_LOAD_NUMBER: _Step = (0x20, 0, 0, 0)
_LOAD_FIRST_ARGUMENT: _Step = (0x20, 0, 0, 16)
_ALLOW: _Step = (0x06, 0, 0, 0x7FFF0000)
_EPERM: _Step = (0x06, 0, 0, 0x00050001)
_ENOSYS: _Step = (0x06, 0, 0, 0x00050026)
_ENOMEM: _Step = (0x06, 0, 0, 0x0005000C)
_SETGROUPS, _UNSHARE, _CLONE, _CLONE3, _LANDLOCK, _MEMFD_CREATE = 116, 272, 56, 435, 444, 319


def _refuse(number: int, answer: _Step = _EPERM) -> list[_Step]:
    return [(0x15, 0, 1, number), answer]


def _refuse_flags(number: int, flags: int) -> list[_Step]:
    return [(0x15, 0, 3, number), _LOAD_FIRST_ARGUMENT, (0x45, 0, 1, flags), _EPERM, _LOAD_NUMBER]


def _machine(*refusals: list[_Step]) -> str:
    """A program to run first: from then on the kernel refuses these calls."""
    return _FILTER.format(steps=[_LOAD_NUMBER, *(step for refusal in refusals for step in refusal), _ALLOW])


# What docker's default profile does to a process: no namespaces, no mounts.
_NAMESPACE_CALLS = [_UNSHARE, 165, 166, 155, 308, 428, 429, 442]  # mount, umount2, pivot_root, setns, ...
LIKE_DOCKER = _machine(
    *map(_refuse, _NAMESPACE_CALLS), _refuse(_CLONE3, _ENOSYS), _refuse_flags(_CLONE, 0x7E020000)
)

NO_MEMORY_FILES = _machine(_refuse(_MEMFD_CREATE, _ENOMEM))

WITHOUT = {
    Layer.UNPRIVILEGED_USER: _machine(_refuse(_SETGROUPS)),
    Layer.MOUNT_NAMESPACE: _machine(_refuse_flags(_UNSHARE, 0x00020000)),
    Layer.PID_NAMESPACE: _machine(_refuse_flags(_CLONE, 0x20000000)),
    Layer.NETWORK_NAMESPACE: _machine(_refuse_flags(_UNSHARE, 0x40000000)),
    Layer.IPC_NAMESPACE: _machine(_refuse_flags(_UNSHARE, 0x08000000)),
    Layer.UTS_NAMESPACE: _machine(_refuse_flags(_UNSHARE, 0x04000000)),
    Layer.LANDLOCK: _machine(_refuse(_LANDLOCK, _ENOSYS)),
}


def python(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    ).stdout


def as_user(user: str, program: str, folder: Path, *, mode: int = 0o755) -> str:
    """What the program prints, run by root or an ordinary user, with the interpreter in a folder of that mode."""
    if os.geteuid() != 0:
        return python(program)
    package = folder / "packages" / "rlef_sandbox"
    shutil.copytree(Path(rlef_sandbox.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for compiled in (_core.__file__, COMMAND_WORKER):
        shutil.copy(compiled, package)
    place = folder / "home" / "python"
    place.mkdir(parents=True)
    place.parent.chmod(mode)
    become = "setpriv --reuid 65534 --regid 65534 --clear-groups" if user == "nobody" else ""
    interpreter = place / "bin" / Path(os.path.realpath(sys.executable)).name
    script = (
        f"mount --bind {sys.base_prefix} {place} && {open_the_way_to_shared_libraries(place)} exec {become} "
        f'env PYTHONPATH={package.parent} LD_LIBRARY_PATH={place}/lib {interpreter} -c "$0"'
    )
    command = ["unshare", "--mount", "sh", "-c", script, program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def open_the_way_to_shared_libraries(place: Path) -> str:
    """Workers get no LD_LIBRARY_PATH: what the interpreter is linked to must be where it was installed."""
    prefix = Path(sys.base_prefix)
    closed = [parent for parent in [prefix, *prefix.parents] if not parent.stat().st_mode & 0o001]
    if not closed or place.is_relative_to(closed[-1]):
        return ""
    return f"mount -t tmpfs -o mode=755 none {closed[-1]} && mkdir -p {prefix} && mount --bind {place} {prefix} &&"
