"""Machines that give less: what is missing is an error unless named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rlef_sandbox
from rlef_sandbox import NAMESPACES, Layer, _core, check

# What docker's default profile does to a process, by a filter of our own: no namespaces, no mounts.
LIKE_DOCKER = """
import ctypes, struct, sys
NUMBERS = [272, 165, 166, 155, 308, 428, 429, 442]  # unshare, mount, umount2, pivot_root, setns, open_tree, ...
steps = [(0x20, 0, 0, 0)]
for number in NUMBERS:
    steps += [(0x15, 0, 1, number), (0x06, 0, 0, 0x00050001)]
steps += [(0x15, 0, 1, 435), (0x06, 0, 0, 0x00050026)]  # clone3: ENOSYS
steps += [(0x15, 0, 3, 56), (0x20, 0, 0, 16), (0x45, 0, 1, 0x7E020000), (0x06, 0, 0, 0x00050001)]  # clone
steps += [(0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in steps))
class Program(ctypes.Structure):
    _fields_ = [("count", ctypes.c_ushort), ("code", ctypes.c_void_p)]
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(steps), ctypes.addressof(code))), 0, 0) == 0
"""

RUN = """
from rlef_sandbox import Executor, NAMESPACES, SandboxFault, Test
try:
    with Executor(workers=1, allow_missing={allowed}) as executor:
        programs = ["print(input())", "import socket; socket.socket()", "open('/etc/passwd')", "import os; os.fork()",
                    "import os; os.kill(1, 9)", "while True: pass", "open('/tmp/x', 'w')", "import os; print(os.getuid() > 0)"]
        from rlef_sandbox import Job, Limits
        jobs = [Job(program, [Test("True", "True")], limits=Limits(cpu_s=0.5)) for program in programs]
        print(*[result.verdict.value for [result] in executor.run_many(jobs)])
except SandboxFault as fault:
    print(fault)
"""

VERDICTS = "passed security exception exception exception timeout exception passed\n"


def python(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    ).stdout


def test_names_of_the_layers_are_those_of_the_core():
    assert [layer.value for layer in Layer] == _core.layer_names()


def test_this_machine_gives_every_layer():
    assert [report.layer for report in check() if not report.given] == []


def test_check_prints_a_line_per_layer_and_json():
    command = [sys.executable, "-m", "rlef_sandbox", "check"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    data = json.loads(
        subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=True).stdout
    )

    assert [line.split()[0] for line in text.splitlines()] == [layer.value for layer in Layer]
    assert [row["layer"] for row in data["layers"]] == [layer.value for layer in Layer]
    assert all(row["given"] for row in data["layers"])


def test_missing_layers_are_an_error_that_names_them():
    missing = ", ".join(f"'{layer.value}'" for layer in Layer if layer in NAMESPACES)

    assert python(LIKE_DOCKER + RUN.format(allowed="()")) == (
        f"this machine does not give the isolation layers {{{missing}}}: mend that, or accept it with "
        f"allow_missing={{{missing}}}\n"
    )


def test_check_says_what_is_missing():
    program = LIKE_DOCKER + (
        "from rlef_sandbox import check\n"
        "print(*[report.layer.value for report in check() if not report.given and report.loss and report.reason])"
    )

    assert set(python(program).split()) == {layer.value for layer in NAMESPACES}


@pytest.mark.parametrize("user", ["root", "nobody"])
@pytest.mark.parametrize("docker", ["", LIKE_DOCKER], ids=["with_namespaces", "without_namespaces"])
def test_layers_that_are_left_hold_for_root_and_for_an_ordinary_user(docker, user, tmp_path):
    program = docker + RUN.format(allowed="NAMESPACES" if docker else "()")

    assert as_user(user, program, tmp_path) == VERDICTS


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has folders that its programs cannot read")
def test_interpreter_that_programs_cannot_read_is_a_fault(tmp_path):
    program = LIKE_DOCKER + RUN.format(allowed="NAMESPACES")

    said = as_user("root", program, tmp_path, mode=0o700)

    assert said.startswith(
        "honest programs fail in this sandbox (exception: ModuleNotFoundError: No module named"
    )


def as_user(user: str, program: str, folder: Path, *, mode: int = 0o755) -> str:
    """What the program prints, run by root or an ordinary user, with the interpreter in a folder of that mode."""
    if os.geteuid() != 0:
        return python(program)
    package = folder / "packages" / "rlef_sandbox"
    shutil.copytree(Path(rlef_sandbox.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(_core.__file__, package)
    for parent in [folder, *folder.parents[:3]]:
        parent.chmod(0o755)
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
