"""Machines that give less: what is missing is an error unless named."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from rlef_sandbox import NAMESPACES, Layer, _core, check
from tests.sandbox.machines import LIKE_DOCKER, as_user, python

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


def test_names_of_the_layers_are_those_of_the_core():
    assert [layer.value for layer in Layer] == _core.layer_names()


def test_this_machine_gives_every_layer():
    assert [report.layer for report in check() if not report.given] == []


def test_check_prints_a_line_per_layer_one_of_the_memory_cgroup_and_json():
    command = [sys.executable, "-m", "rlef_sandbox", "check"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    data = json.loads(
        subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=True).stdout
    )

    *layers, cgroup = [line.split()[0] for line in text.splitlines()]
    assert (layers, cgroup) == ([layer.value for layer in Layer], "memory_cgroup")
    assert [row["layer"] for row in data["layers"]] == [layer.value for layer in Layer]
    assert all(row["given"] for row in data["layers"])
    assert (data["memory_cgroup"]["folder"] is None) == bool(data["memory_cgroup"]["reason"])


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
def test_layers_that_are_left_hold_for_root_and_for_an_ordinary_user(docker, user, open_folder):
    program = docker + RUN.format(allowed="NAMESPACES" if docker else "()")

    assert as_user(user, program, open_folder) == VERDICTS


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has folders that its programs cannot read")
def test_interpreter_that_programs_cannot_read_is_a_fault(open_folder):
    program = LIKE_DOCKER + RUN.format(allowed="NAMESPACES")

    said = as_user("root", program, open_folder, mode=0o700)

    assert said.startswith(
        "honest programs fail in this sandbox (exception: ModuleNotFoundError: No module named"
    )
