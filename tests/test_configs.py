"""The run files for GPUs: checked against models of their size, of which only the weights' headers exist."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import re
import shutil
import struct
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.learning import RUNS
from rlef.cli import main
from rlef.config import Config, load_config, longest_dialog
from rlef.doctor import checkpoint_bytes
from rlef.families import read_shape
from rlef.plan import Candidate, Plan, make_plan, trainer_with
from rlef.plan_cluster import GPUS, Assumptions, Cluster
from rlef.plan_model import NAMED, read_model
from rlef.plan_time import workload_of
from rlef.pretrained import model_folder
from rlef.shards import stage_weights
from tests.small_runs import ROOT

NODES = {"one_node_8b": 1, "codecontests_8b": 36, "codecontests_70b": 288}
MODELS = {
    "one_node_8b": "llama-3.1-8b",
    "codecontests_8b": "llama-3.1-8b",
    "codecontests_70b": "llama-3.1-70b",
}


def file_of(name: str) -> Path:
    return ROOT / "configs" / f"{name}.toml"


def without_weights(folder: Path, model: str) -> Path:
    """A model folder as the publisher's, whose weights are headers and holes of the right size."""
    (folder / "config.json").write_text(json.dumps(NAMED[model]))
    for name in ("tokenizer.json", "dialog.json"):
        shutil.copy(model_folder("embedded") / name, folder / name)
    files: dict[str, str] = {}
    for weight in stage_weights(read_shape(folder), "logits", stage=0, stages=1):
        for name, size in zip(weight.names, weight.shapes, strict=True):
            files[name] = f"model-{len(files):05d}.safetensors"
            header = {name: {"dtype": "BF16", "shape": list(size), "data_offsets": [0, 2 * math.prod(size)]}}
            text = json.dumps(header).encode()
            with (folder / files[name]).open("wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                file.truncate(8 + len(text) + 2 * math.prod(size))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@functools.cache
def plan_of(name: str) -> Plan:
    config = load_config(file_of(name))
    assumptions = Assumptions()
    return make_plan(
        read_model(MODELS[name]),
        Cluster(gpu=GPUS["H100"], nodes=NODES[name]),
        workload_of(config, assumptions, longest_tokens=longest_dialog(config)),
        assumptions,
        trainer=trainer_with(config.rollout),
    )


def planned(name: str) -> Candidate:
    """The layout that the file chooses."""
    parallel = load_config(file_of(name)).parallel
    (found,) = [
        each
        for each in plan_of(name).candidates
        if each.layout.sampling_gpus == parallel.samplers
        and each.layout.training_gpus == parallel.learners
        and each.layout.precision == ("bf16" if parallel.dtype == "bfloat16" else "fp32")
        and each.layout.sampler_tensor == load_config(file_of(name)).vllm.tensor_parallel
        and each.layout.tensor == parallel.tensor
        and each.layout.pipeline == parallel.pipeline
        and each.layout.virtual_pipeline == parallel.virtual_pipeline
        and each.layout.sequence_parallel == parallel.sequence_parallel
        and each.layout.recompute == (parallel.recompute == "full")
        and each.layout.distributed_optimizer == parallel.distributed_optimizer
    ]
    return found


@pytest.mark.parametrize("name", NODES)
def test_a_run_file_passes_every_check_that_needs_no_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where vLLM is installed; of the problems, which are not there, the embedded ones take the place."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: find("json" if asked == "vllm" else asked))
    without_weights(tmp_path, MODELS[name])
    ours = ("problems.train=hidden_conventions:train", "problems.eval=hidden_conventions:heldout")
    arguments = ["train", str(file_of(name)), "--dry-run", f"model.path={tmp_path}", *ours]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert f"processes: {8 * NODES[name]:,}" in result.stdout.splitlines()
    assert "longest dialog in tokens: 7,170" in result.stdout.splitlines()


def ablations() -> dict[str, list[str]]:
    """The overrides of each ablation that docs/reproducing.md lists."""
    text = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| `([a-z_]+\.[^`]*)` \|$", text, flags=re.MULTILINE)
    return {name: overrides.split() for name, overrides in rows}


@pytest.mark.parametrize("name", ["tiny", "codecontests_8b"])
def test_every_ablation_passes_the_checks_of_a_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: find("json" if asked == "vllm" else asked))
    ours = ["problems.train=hidden_conventions:train", "problems.eval=hidden_conventions:heldout"]
    if name in MODELS:
        ours.append(f"model.path={without_weights(tmp_path, MODELS[name])}")
    for overrides in ablations().values():
        arguments = ["train", str(file_of(name)), "--dry-run", *ours, *overrides]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output


def test_the_documented_ablations_are_those_that_are_measured() -> None:
    measured = {name: [each for each in made if each != "run.seed=1"] for name, made in RUNS.items()}
    assert ablations() == {name: made for name, made in measured.items() if "seed" not in name}


@pytest.mark.parametrize("name", NODES)
def test_the_layout_of_a_run_file_fits_80_gb_and_the_trainer_can_run_it(name: str) -> None:
    found, parallel = planned(name), load_config(file_of(name))
    assert found.fits
    assert not found.missing
    text = file_of(name).read_text()
    assert f"{found.memory.total / 1e9:.0f} of 80 GB a GPU" in text
    assert f"{found.time.total:.0f} s a step" in text
    sampler = found.sampler_memory or found.memory.sampler_weights + found.memory.kv_cache
    share = sampler / GPUS["H100"].memory_bytes
    assert 0 <= parallel.vllm.memory_fraction - share < 0.02


def test_the_70b_run_file_is_the_best_that_the_plan_finds_and_divides_gpus_as_the_paper_did() -> None:
    plan = plan_of("codecontests_70b")
    assert plan.runnable is plan.best is planned("codecontests_70b")
    assert (plan.best.layout.training_gpus, plan.best.layout.sampling_gpus) == (1024, 1280)


@pytest.mark.parametrize("name", ["codecontests_8b", "codecontests_70b"])
def test_the_paper_run_files_change_no_constant_of_the_paper(name: str) -> None:
    config = load_config(file_of(name))
    assert (config.rewards, config.optimizer) == (Config().rewards, Config().optimizer)
    assert (
        config.ppo.model_copy(update={"micro_batch_tokens": Config().ppo.micro_batch_tokens}) == Config().ppo
    )
    assert config.rollout.model_copy(update={"sampler": "torch", "max_staleness": 0}) == Config().rollout
    updates = config.run.steps * config.ppo.updates_per_step
    assert updates == {"codecontests_8b": 12_000, "codecontests_70b": 8_000}[name]


@pytest.mark.parametrize("name", NODES)
def test_a_run_file_repeats_no_default(name: str) -> None:
    for section, table in tomllib.loads(file_of(name).read_text()).items():
        for key, value in table.items():
            assert value != getattr(getattr(Config(), section), key), f"{section}.{key}"


@pytest.mark.parametrize("name", NODES)
def test_the_sizes_of_checkpoints_that_the_run_files_name_are_theirs(name: str, tmp_path: Path) -> None:
    without_weights(tmp_path, MODELS[name])
    said = re.search(r"takes ([\d.]+) (GB|TB)$", file_of(name).read_text(), flags=re.MULTILINE)
    assert said is not None
    size = checkpoint_bytes(load_config(file_of(name), [f"model.path={tmp_path}"]))
    unit = {"GB": 1e9, "TB": 1e12}[said[2]]
    assert float(said[1]) == pytest.approx(size / unit, rel=0.02)
