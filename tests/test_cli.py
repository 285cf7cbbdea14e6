"""The commands as a user meets them: what is refused, and how; what is printed, and what is made."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rlef.cli import main
from rlef.run_folder import open_run_folder
from tests.small_runs import ROOT, one_process_job, read_lines, run_file, small_config

PROBLEM = {
    "id": "double",
    "statement": "Print twice the number.",
    "public_tests": [{"input": "2\n", "expected_output": "4\n"}],
    "private_tests": [{"input": "5\n", "expected_output": "10\n"}],
    "source": "hand",
}


def rlef(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def assert_refused(result: Result, message: str) -> None:
    """One line on standard error that says what to mend, nothing else, and status 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("rlef: error: ")
    assert message in line


def model_without(name: str) -> Callable[[Path, Path], list[str]]:
    def prepare(folder: Path, model: Path) -> list[str]:
        copy = shutil.copytree(model, folder / "model")
        (copy / name).unlink()
        return [f"model.path={copy}"]

    return prepare


def model_with_half_of(name: str) -> Callable[[Path, Path], list[str]]:
    def prepare(folder: Path, model: Path) -> list[str]:
        copy = shutil.copytree(model, folder / "model")
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[: len(whole) // 2])
        return [f"model.path={copy}"]

    return prepare


def model_with_config(**changes: object) -> Callable[[Path, Path], list[str]]:
    """A value of None takes the key out."""

    def prepare(folder: Path, model: Path) -> list[str]:
        copy = shutil.copytree(model, folder / "model")
        config = json.loads((copy / "config.json").read_text()) | changes
        kept = {name: value for name, value in config.items() if value is not None}
        (copy / "config.json").write_text(json.dumps(kept))
        return [f"model.path={copy}"]

    return prepare


def problems(*lines: str, which: str = "train") -> Callable[[Path, Path], list[str]]:
    def prepare(folder: Path, model: Path) -> list[str]:
        (folder / "problems.jsonl").write_text("".join(line + "\n" for line in lines))
        return [f"model.path={model}", f"problems.{which}={folder}/problems.jsonl"]

    return prepare


def settings(*overrides: str) -> Callable[[Path, Path], list[str]]:
    return lambda _, model: [f"model.path={model}", *overrides]


BAD_INPUT = {
    "unknown setting": (
        settings("ppo.clipratio=0.1"),
        "unknown setting 'ppo.clipratio'; did you mean 'ppo.clip_ratio'?",
    ),
    "batch arithmetic": (
        settings("rollout.episodes_per_step=9"),
        "rollout.episodes_per_step = 9 is not a multiple of ppo.updates_per_step = 2; use 8",
    ),
    "tensor parallel size": (
        settings("parallel.tensor=4", "parallel.processes=4"),
        "parallel.tensor is 4, which does not divide the model's 2 key-value heads; use 1 or 2",
    ),
    "pipeline parallel size": (
        settings("parallel.pipeline=3", "parallel.processes=3"),
        "parallel.pipeline is 3, which does not divide the model's 2 layers; use 1 or 2",
    ),
    "no model folder": (
        lambda folder, _: [f"model.path={folder}/absent"],
        "absent has no config.json; name a Hugging Face model folder",
    ),
    "half a config.json": (model_with_half_of("config.json"), "config.json is not JSON ("),
    "a config.json without a key": (
        model_with_config(hidden_size=None),
        "config.json lacks 'hidden_size'; copy it again",
    ),
    "another architecture": (
        model_with_config(architectures=["GPT2LMHeadModel"]),
        "; only LlamaForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM are read",
    ),
    "another rotary embedding": (
        model_with_config(rope_scaling={"rope_type": "yarn", "factor": 8.0}, rope_parameters=None),
        "has rope_type = 'yarn'; only 'default' and 'llama3' are implemented",
    ),
    "weights of another shape": (
        model_with_config(intermediate_size=64),
        "mlp.gate_proj.weight has shape [48, 32], but config.json makes it [64, 32]; copy both again",
    ),
    "no weights": (model_without("model.safetensors"), "has no model.safetensors"),
    "half the weights": (model_with_half_of("model.safetensors"), "model.safetensors cannot be read ("),
    "no tokenizer": (model_without("tokenizer.json"), "tokenizer.json is missing"),
    "no role markers": (model_without("dialog.json"), "dialog.json is missing"),
    "half a tokenizer": (model_with_half_of("tokenizer.json"), "tokenizer.json cannot be read ("),
    "half the role markers": (model_with_half_of("dialog.json"), "dialog.json is not JSON ("),
    "no problem file": (
        settings("problems.train=absent.jsonl"),
        "problems.train: there is no file 'absent.jsonl'; give a JSONL file or hidden_conventions:train",
    ),
    "no such split": (
        settings("problems.eval=hidden_conventions:test"),
        "problems.eval: 'hidden_conventions:test' is not a split of the embedded source; use one of ",
    ),
    "an empty problem file": (
        problems(""),
        "problems.jsonl holds no problem; put one JSON object on each line",
    ),
    "a broken problem line": (
        problems(json.dumps(PROBLEM), "{", which="eval"),
        "problems.jsonl, line 2: not JSON (",
    ),
    "a wrong problem field": (
        problems(json.dumps(PROBLEM), json.dumps(PROBLEM | {"id": "second", "statement": 3})),
        "problems.jsonl, line 2: field 'statement': Input should be a valid string",
    ),
    "a context that is too small": (
        settings("rollout.max_prompt_tokens=400"),
        "rollout.turns = 2, evaluation.turns = 2), but the model's context holds 512; lower one of them",
    ),
    "no such isolation layer": (
        settings('executor.allow_missing=["moat"]'),
        "executor: allow_missing names 'moat': the layers are ",
    ),
    "no such memory cgroup": (
        settings("executor.memory_cgroup=/nowhere"),
        "executor: memory_cgroup: /nowhere: cannot find it",
    ),
    "no such checkpoint": (
        settings("--resume", "absent"),
        "--resume absent: there is no such checkpoint folder; give one, or auto, or never",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_in_one_line_before_anything_is_made(
    name: str, tmp_path: Path, random_model: Path
) -> None:
    prepare, message = BAD_INPUT[name]
    result = rlef("train", str(run_file(tmp_path)), *prepare(tmp_path, random_model))
    assert_refused(result, message)
    assert not (tmp_path / "small").exists()


def test_a_missing_run_file_is_refused(tmp_path: Path) -> None:
    assert_refused(rlef("train", str(tmp_path / "absent.toml")), "absent.toml'; configs/ has examples")


def test_a_change_of_settings_on_resume_is_refused(tmp_path: Path, random_model: Path) -> None:
    open_run_folder(small_config(tmp_path, f"model.path={random_model}"), resume="auto")
    result = rlef("train", str(run_file(tmp_path)), f"model.path={random_model}", "run.seed=2")
    assert_refused(result, "run.seed = 2, but the run in")


def test_a_damaged_checkpoint_named_by_the_user_is_refused(tmp_path: Path, random_model: Path) -> None:
    folder, _ = open_run_folder(small_config(tmp_path, f"model.path={random_model}"), resume="auto")
    checkpoint = folder.checkpoints / "step-000001"
    checkpoint.mkdir(parents=True)
    with one_process_job():
        result = rlef(
            *("train", str(run_file(tmp_path)), f"model.path={random_model}", "--resume", str(checkpoint))
        )
    assert result.exit_code == 2, result.output
    assert result.stderr == f"rlef: error: {checkpoint / 'manifest.json'} is missing: delete the folder\n"


def test_a_process_that_is_refused_says_no_more_than_its_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rlef", "train", str(run_file(tmp_path)), "run.sede=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "rlef: error: unknown setting 'run.sede'; did you mean 'run.seed'?\n"


EMBEDDED = [path for path in sorted((ROOT / "configs").glob("*.toml")) if "[model]" not in path.read_text()]


@pytest.mark.parametrize("path", EMBEDDED, ids=lambda path: path.stem)
def test_a_dry_run_prints_settings_and_arithmetic_and_makes_nothing(path: Path, tmp_path: Path) -> None:
    result = rlef("train", str(path), "--dry-run", "run.steps=7", f"run.output_dir={tmp_path}")
    assert result.exit_code == 0, result.output
    settings, _, arithmetic = result.stdout.partition("\n}\n")
    config = json.loads(settings + "}")
    assert config["run"]["steps"] == 7
    assert f"updates in all: {7 * config['ppo']['updates_per_step']}" in arithmetic.splitlines()
    assert list(tmp_path.iterdir()) == []


def test_torchrun_decides_on_the_number_of_processes(
    tmp_path: Path, random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    result = rlef(
        *("train", str(run_file(tmp_path)), "--dry-run", f"model.path={random_model}"),
        *("parallel.tensor=2", "parallel.processes=3"),
    )
    assert result.exit_code == 0, result.output
    assert "data-parallel replicas: 2" in result.stdout.splitlines()


def test_a_run_ends_with_a_table_and_a_report_and_the_next_one_moves_it_aside(
    tmp_path: Path, random_model: Path
) -> None:
    arguments = ("train", str(run_file(tmp_path)), f"model.path={random_model}", "run.steps=1")
    run = tmp_path / "small"
    for _ in range(2):
        with one_process_job():
            result = rlef(*arguments)
        assert result.exit_code == 0, result.output
        summary = json.loads((run / "summary.json").read_text())
        assert summary["final"]["problems"] == 2
        assert (run / "report.html").read_text().startswith("<!doctype html>")
        assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1]
        assert "1@2, true feedback" in result.stdout
        assert result.stdout.endswith(f"report: {run / 'report.html'}\n")
    assert result.stdout.startswith(f"the earlier run of that name is now in {tmp_path / 'small.1'}\n")
    assert (tmp_path / "small.1" / "summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report", "{empty}"), "summary.json is missing"),
        (("export", "{empty}", "{empty}/out"), "is not a run's folder: it has no config.json"),
        (("export", "{empty}", "{model}"), "is not a run's folder"),
        (("pretrain", "{model}"), "is not empty; name another folder"),
        (("eval", "{empty}/absent.toml"), "there is no run file"),
        (("report", "{model}/config.json"), "summary.json is missing"),
        (("report", "{empty}/damaged"), "summary.json has no figures of the start: evaluate the run again"),
        (("export", "{model}/config.json", "{empty}/out"), "is not a run's folder: it has no config.json"),
        (("export", "{empty}/damaged", "{empty}/out"), "of this version writes: Invalid JSON"),
        (("compare", "{model}/config.json", "{empty}"), "evaluation.json is missing: name the folder of"),
        (("compare", "{empty}", "{empty}", "--output", "{empty}"), "is a folder; name a file to write"),
        (("import-gguf", "{empty}", "{empty}/out"), "cannot be read (Is a directory); name a GGUF file"),
    ],
)
def test_the_other_commands_refuse_in_the_same_way(
    arguments: tuple[str, ...], message: str, tmp_path: Path, random_model: Path
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "summary.json").write_text('{"start": 3, "final": null}')
    (damaged / "config.json").write_text("x")
    filled = [argument.format(empty=tmp_path, model=random_model) for argument in arguments]
    assert_refused(rlef(*filled), message)


@pytest.mark.parametrize(
    ("rank", "local_rank", "told"),
    [("0", "0", ""), ("1", "1", None), ("2", "0", f"on {socket.gethostname()}: "), ("3", "1", None)],
)
def test_under_torchrun_the_first_process_of_each_machine_tells_what_is_refused(
    rank: str, local_rank: str, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines of two processes; the first machine is that of rank 0, and needs no name."""
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    result = rlef("train", str(run_file(tmp_path)), "run.sede=1")
    line = "unknown setting 'run.sede'; did you mean 'run.seed'?\n"
    assert result.stderr == ("" if told is None else f"rlef: error: {told}{line}")
    assert (result.stdout, result.exit_code) == ("", 2)
