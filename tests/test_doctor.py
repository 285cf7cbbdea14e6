"""`rlef doctor`: what is amiss is found on a real machine, and comes with its mend."""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import os
import resource
import socket
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from rlef.cli import main
from rlef.config import Config, ConfigError
from rlef.doctor_machine import layout, limits, packages, processor
from rlef.doctor_network import collectives, host_name, interfaces
from rlef.doctor_sandbox import sandbox
from rlef.doctor_storage import checkpoint_bytes, disk, file_system, memory, shared_folder
from rlef.findings import Finding, Level
from rlef.run_folder import only_one_run
from rlef.settings_file import load_config
from rlef_sandbox import NAMESPACES
from tests.sandbox.machines import LIKE_DOCKER, python
from tests.small_runs import ROOT

TINY = ROOT / "configs" / "tiny.toml"


def rlef_doctor(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments])


def config(folder: Path, *overrides: str) -> Config:
    return load_config(TINY, (f"run.output_dir={folder}", *overrides))


def only(findings: list[Finding]) -> Finding:
    (found,) = findings
    return found


def test_a_machine_that_can_train_has_no_fault_and_every_subject_is_named(tmp_path: Path) -> None:
    result = rlef_doctor(str(TINY), f"run.output_dir={tmp_path}", "--json")
    findings = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 0, result.stdout
    subjects = {each["subject"] for each in findings}
    assert subjects >= {"python", "torch", "megatron-core", "cores", "memory", "disk", "gloo", "a program"}
    assert all(each["mend"] for each in findings if each["level"] != "good")


def test_text_puts_the_mend_below_what_is_amiss_and_the_status_is_1(tmp_path: Path) -> None:
    result = rlef_doctor(str(TINY), f"run.output_dir={tmp_path}", "checkpoint.keep=100000000")
    lines = result.stdout.splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith("fault")]
    assert "disk" in lines[place]
    assert "100000001 checkpoints take" in lines[place]
    assert lines[place + 1].strip() == "-> lower checkpoint.keep, or name a larger disk: run.output_dir=PATH"
    assert result.exit_code == 1


def test_a_folder_that_cannot_be_written_is_a_fault() -> None:
    found = only(list(disk(config(Path("/proc/runs")))))
    assert found.level is Level.FAULT
    assert "run.output_dir = /proc/runs" in found.found


def test_a_checkpoint_is_counted_as_weights_and_two_moments_of_two_networks(tmp_path: Path) -> None:
    from rlef.pretrained import model_folder, read_pretrained

    _, weights = read_pretrained(model_folder("embedded"))
    policy = sum(tensor.numel() for tensor in weights.values())
    counted = checkpoint_bytes(config(tmp_path))
    assert 2 * 12 * policy * 0.8 < counted <= 2 * 12 * policy  # the value head is smaller than the other
    alone = config(tmp_path, "ppo.method=sft", "ppo.value_warmup_steps=0")
    assert checkpoint_bytes(alone) == 12 * policy


def test_more_threads_than_cores_are_a_warning(tmp_path: Path) -> None:
    found = only(list(processor(config(tmp_path, "parallel.threads_per_process=1000"))))
    assert found.level is Level.WARNING
    assert "= 2000" in found.found


def test_programs_that_may_want_more_memory_than_there_is_are_a_warning(tmp_path: Path) -> None:
    found = only(list(memory(config(tmp_path, f"executor.default_memory_limit_bytes={1 << 50}"))))
    assert found.level is Level.WARNING
    assert "executor.workers" in found.mend


def test_the_copy_that_a_thread_saves_is_counted_where_there_is_one(tmp_path: Path) -> None:
    with_copy, without = (
        only(list(memory(config(tmp_path, f"checkpoint.asynchronous={value}")))).found
        for value in ("true", "false")
    )
    assert "the copy of a checkpoint" in with_copy
    assert "the copy of a checkpoint" not in without


@pytest.mark.parametrize(("name", "level"), [("megatron-core", Level.FAULT), ("vllm", Level.WARNING)])
def test_a_package_that_is_too_old_is_named_with_what_it_should_be(
    name: str, level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda asked: "0.1" if asked == name else real(asked))
    (found,) = [each for each in packages() if each.level is not Level.GOOD]
    assert (found.level, found.subject) == (level, name)
    assert found.found.startswith("0.1 is not ")


def test_a_package_that_training_needs_and_that_is_not_there_is_a_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.metadata.version

    def version(asked: str) -> str:
        if asked == "tokenizers":
            raise importlib.metadata.PackageNotFoundError(asked)
        return real(asked)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = only([each for each in packages() if each.level is Level.FAULT])
    assert (found.subject, found.mend) == ("tokenizers", "pip install 'rlef[train]'")


@pytest.mark.multiprocess
def test_processes_that_cannot_meet_are_a_fault_and_threads_stay_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = only(list(collectives()))
    assert (found.level, found.subject) == (Level.FAULT, "gloo")
    assert "GLOO_SOCKET_IFNAME" in found.mend
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_a_folder_of_one_machine_is_a_warning_for_a_run_on_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    (found,) = [each for each in shared_folder(config(tmp_path, "parallel.processes=16")) if each.mend]
    assert (found.level, found.subject) == (Level.WARNING, "shared folder")
    assert f"is on {file_system(tmp_path)}, a file system of this machine alone" in found.found
    assert [each.mend for each in shared_folder(config(tmp_path, "parallel.processes=8"))] == ["", ""]


def test_a_file_system_is_that_of_the_innermost_mount() -> None:
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(Path("/")) != "proc"


def test_a_clock_that_is_not_the_folders_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 100)
    (found,) = [each for each in shared_folder(config(tmp_path)) if each.subject == "clock"]
    assert found.level is Level.WARNING
    assert "differs by 100 s" in found.found


def test_a_folder_without_locks_is_a_fault_and_no_run_starts_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    found = only(list(shared_folder(config(tmp_path))))
    assert (found.level, found.subject) == (Level.FAULT, "locks")
    with pytest.raises(ConfigError, match="cannot lock files"), only_one_run(config(tmp_path)):
        raise AssertionError("the run must not begin")


def test_memory_that_may_not_be_locked_is_a_warning_beside_infiniband(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, hard))
    try:
        found = list(limits(infiniband=tmp_path))
        without = list(limits(infiniband=tmp_path / "none"))
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
    assert (found[0].level, found[0].subject) == (Level.WARNING, "locked memory")
    assert found[0].found == "64.0 KiB at most, and this machine has InfiniBand"
    assert "locked memory" not in {each.subject for each in without}


@pytest.mark.parametrize(
    ("variable", "chosen", "level"),
    [
        ("GLOO_SOCKET_IFNAME", "lo", Level.GOOD),
        ("GLOO_SOCKET_IFNAME", "l", Level.FAULT),
        ("GLOO_SOCKET_IFNAME", "nowhere0", Level.FAULT),
        ("NCCL_SOCKET_IFNAME", "l", Level.GOOD),
        ("NCCL_SOCKET_IFNAME", "nowhere0,lo", Level.GOOD),
        ("NCCL_SOCKET_IFNAME", "nowhere", Level.FAULT),
    ],
)
def test_an_interface_that_the_environment_chooses_must_be_up(
    variable: str, chosen: str, level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gloo takes whole names, nccl their beginnings."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, chosen)
    found = only(list(interfaces()))
    assert (found.level, found.subject) == (level, variable)
    assert level is Level.GOOD or "lo" in found.mend


def test_a_name_that_other_nodes_cannot_reach_is_a_warning_where_there_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    found = only(list(host_name(config(tmp_path, "parallel.processes=16"))))
    assert found.level is Level.WARNING
    assert "--local-addr" in found.mend
    assert only(list(host_name(config(tmp_path, "parallel.processes=8")))).level is Level.GOOD


@pytest.mark.parametrize(
    ("processes", "tensor", "subjects"),
    [(16, 8, []), (4, 4, []), (12, 1, ["processes"]), (16, 16, ["tensor parallel"])],
)
def test_processes_must_divide_over_the_gpus_and_a_matrix_stays_on_a_node(
    processes: int, tensor: int, subjects: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node of 8 GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    settings = (f"parallel.processes={processes}", f"parallel.tensor={tensor}")
    assert [each.subject for each in layout(config(tmp_path, *settings))] == subjects


LIST_SANDBOX = """
from pathlib import Path
from rlef.settings_file import load_config
from rlef.doctor_sandbox import sandbox
for each in sandbox(load_config(Path({path!r}), {overrides!r})):
    print(each.level, each.subject, each.mend, sep="|")
"""


def findings_like_docker(*overrides: str) -> list[list[str]]:
    program = LIKE_DOCKER + LIST_SANDBOX.format(path=str(TINY), overrides=overrides)
    return [line.split("|") for line in python(program).splitlines()]


def test_each_layer_that_docker_withholds_is_a_fault_with_the_setting_that_does_without_it() -> None:
    found = findings_like_docker()
    missing = {subject.removeprefix("sandbox, "): mend for level, subject, mend in found if level == "fault"}
    assert set(missing) == {layer.value for layer in NAMESPACES}
    assert all(mend.endswith(f"executor.allow_missing={layer}") for layer, mend in missing.items())


def test_layers_that_may_be_missing_are_warnings_and_a_program_is_tried() -> None:
    found = findings_like_docker("executor.allow_missing=" + ",".join(layer.value for layer in NAMESPACES))
    levels = {subject: level for level, subject, _ in found if subject.startswith("sandbox, ")}
    assert levels == {f"sandbox, {layer.value}": "warning" for layer in NAMESPACES}
    assert found[-1][1] == "a program"  # which fails where only root may read the interpreter


def test_a_program_runs_in_the_sandbox_of_this_machine(tmp_path: Path) -> None:
    found = list(sandbox(config(tmp_path)))
    assert (found[-1].level, found[-1].subject) == (Level.GOOD, "a program")
