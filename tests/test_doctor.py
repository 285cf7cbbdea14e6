"""`rlef doctor`: what is amiss is found on a real machine, and comes with its mend."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rlef import doctor
from rlef.cli import main
from rlef.config import Config, load_config
from rlef.doctor import Finding, Level
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
    found = only(list(doctor.disk(config(Path("/proc/runs")))))
    assert found.level is Level.FAULT
    assert "run.output_dir = /proc/runs" in found.found


def test_a_checkpoint_is_counted_as_weights_and_two_moments_of_two_networks(tmp_path: Path) -> None:
    from rlef.pretrained import model_folder, read_pretrained

    _, weights = read_pretrained(model_folder("embedded"))
    policy = sum(tensor.numel() for tensor in weights.values())
    counted = doctor.checkpoint_bytes(config(tmp_path))
    assert 2 * 12 * policy * 0.8 < counted <= 2 * 12 * policy  # the value head is smaller than the other


def test_more_threads_than_cores_are_a_warning(tmp_path: Path) -> None:
    found = only(list(doctor.processor(config(tmp_path, "parallel.threads_per_process=1000"))))
    assert found.level is Level.WARNING
    assert "= 2000" in found.found


def test_programs_that_may_want_more_memory_than_there_is_are_a_warning(tmp_path: Path) -> None:
    found = only(list(doctor.memory(config(tmp_path, f"executor.default_memory_limit_bytes={1 << 50}"))))
    assert found.level is Level.WARNING
    assert "executor.workers" in found.mend


@pytest.mark.parametrize(("name", "level"), [("megatron-core", Level.FAULT), ("vllm", Level.WARNING)])
def test_a_package_that_is_too_old_is_named_with_what_it_should_be(
    name: str, level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda asked: "0.1" if asked == name else real(asked))
    (found,) = [each for each in doctor.packages() if each.level is not Level.GOOD]
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
    found = only([each for each in doctor.packages() if each.level is Level.FAULT])
    assert (found.subject, found.mend) == ("tokenizers", "pip install 'rlef[train]'")


@pytest.mark.multiprocess
def test_processes_that_cannot_meet_are_a_fault_and_threads_stay_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = only(list(doctor.collectives()))
    assert (found.level, found.subject) == (Level.FAULT, "gloo")
    assert "GLOO_SOCKET_IFNAME" in found.mend
    assert os.environ["OMP_NUM_THREADS"] == "7"


LIST_SANDBOX = """
from pathlib import Path
from rlef import doctor
from rlef.config import load_config
for each in doctor.sandbox(load_config(Path({path!r}), {overrides!r})):
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
    found = list(doctor.sandbox(config(tmp_path)))
    assert (found[-1].level, found[-1].subject) == (Level.GOOD, "a program")
