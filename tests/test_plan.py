"""Layouts, their order, what the trainer can run of them, and the command."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from rlef.cli import main
from rlef.config import Config, ConfigError, ParallelConfig, RolloutConfig
from rlef.families import read_shape
from rlef.megatron_policy import MegatronNetwork, initialize, leave
from rlef.plan import (
    EVERYTHING,
    TRAINER,
    Abilities,
    Candidate,
    Plan,
    launch_command,
    layouts_of,
    loading_refusal,
    make_plan,
    missing_abilities,
    tensor_divides,
    trainer_with,
)
from rlef.plan_cluster import GPUS, Assumptions, Cluster
from rlef.plan_memory import Layout
from rlef.plan_model import NAMED, read_model
from rlef.plan_time import Workload, workload_of
from rlef.pretrained import model_folder
from rlef.settings_file import load_config
from rlef.shards import check_layout
from tests.megatron_examples import SMOOTH, UNTIED, random_weights
from tests.test_plan_model import shapes, size_of

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny.toml"
SIZE = read_model("llama-3.1-8b")


def work_of(*overrides: str) -> Workload:
    return workload_of(load_config(TINY, overrides), Assumptions(), longest_tokens=9000)


def plan_of(
    model: str = "llama-3.1-8b", *, gpu: str = "H100", nodes: int = 2, work: Workload | None = None
) -> Plan:
    cluster = Cluster(gpu=GPUS[gpu], nodes=nodes)
    return make_plan(read_model(model), cluster, work or work_of(), Assumptions())


def rlef(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", str(TINY), *arguments])


@pytest.fixture
def network() -> Iterator[MegatronNetwork]:
    parallel = ParallelConfig(recompute="full", distributed_optimizer=True, dtype="bfloat16")
    initialize(parallel)
    yield MegatronNetwork(
        UNTIED, random_weights(UNTIED), head="logits", parallel=parallel, optimizer=SMOOTH, lr=1.0
    )
    leave()


def test_the_plan_knows_what_the_trainer_can_run(network: MegatronNetwork) -> None:
    """If this fails, the trainer has learned something: tell `TRAINER` and `launch_command` in plan.py."""
    config = network._config
    assert network._training is not None
    settings_of_all = {name for _, section in Config() for name in type(section).model_fields}
    assert (
        Abilities(
            bf16=config.bf16,
            distributed_optimizer=network._training.chunks[0].ddp_config.use_distributed_optimizer,
            sequence_parallel="sequence_parallel" in settings_of_all,
            recompute=config.recompute_granularity == "full",
            interleaved="virtual_pipeline" in settings_of_all,
            disaggregated="sampling_processes" in settings_of_all,
            paged_sampler=Config().rollout.sampler == "vllm",
            split_sampler=Config().rollout.sampler == "vllm",
            split_colocated_sampler=False,  # samplers.check_sampler refuses it
        )
        == TRAINER
    )


@given(shapes, st.sampled_from([1, 2, 3, 4, 8]))
def test_the_plan_divides_a_model_where_the_trainer_does(shape: object, tensor: int) -> None:
    try:
        check_layout(shape, ParallelConfig(tensor=tensor), tensor)  # type: ignore[arg-type]
    except ConfigError:
        accepted = False
    else:
        accepted = True
    assert tensor_divides(size_of(shape), tensor) == accepted  # type: ignore[arg-type]


@settings(max_examples=25)
@given(st.sampled_from(list(NAMED)), st.integers(1, 3), st.sampled_from([1, 4, 6, 8]), st.booleans())
def test_every_layout_uses_all_gpus_and_gives_each_replica_a_sequence(
    model: str, nodes: int, per_node: int, everything: bool
) -> None:
    size, work = read_model(model), work_of()
    cluster = Cluster(gpu=GPUS["H100"], nodes=nodes, gpus_per_node=per_node)
    for layout in layouts_of(size, cluster, work, EVERYTHING if everything else TRAINER):
        together = layout.training_gpus if layout.colocated else layout.training_gpus + layout.sampling_gpus
        assert together == cluster.gpus
        assert layout.data * layout.tensor * layout.pipeline == layout.training_gpus
        assert layout.data <= work.episodes // work.updates
        assert size.num_hidden_layers % (layout.pipeline * layout.virtual_pipeline) == 0
        assert layout.virtual_pipeline == 1 or layout.pipeline > 1
        assert layout.sampling_gpus % layout.sampler_tensor == 0
        assert not missing_abilities(layout, EVERYTHING if everything else TRAINER)


def test_layouts_that_fit_come_first_and_the_fastest_of_them_before_the_others() -> None:
    plan = plan_of()
    fitting = [candidate for candidate in plan.candidates if candidate.fits]
    assert plan.candidates[: len(fitting)] == tuple(fitting)
    times = [candidate.time.total for candidate in fitting]
    assert times == sorted(times)
    assert fitting


def test_nothing_that_is_said_to_fit_exceeds_the_memory() -> None:
    for candidate in plan_of("llama-3.1-70b", nodes=4).candidates:
        if candidate.fits:
            assert max(candidate.memory.total, candidate.sampler_memory) <= 80e9


def test_a_model_of_seventy_billion_does_not_fit_one_node() -> None:
    """Two networks of 18 bytes a parameter and a reference of 2 are 2.7 TB; eight H100 have 0.64."""
    assert not any(candidate.fits for candidate in plan_of("llama-3.1-70b", nodes=1).candidates)


def test_what_a_layout_asks_for_beyond_the_trainer_is_named() -> None:
    layout = Layout(tensor=2, training_gpus=4, sequence_parallel=True, precision="fp32", whole_cache=True)
    plain = replace(TRAINER, sequence_parallel=False)
    assert missing_abilities(layout, plain) == ("sequence parallel",)
    assert missing_abilities(replace(layout, sequence_parallel=False), plain) == ()


def test_the_best_that_runs_today_needs_nothing_that_is_missing() -> None:
    plan = plan_of("smollm2-135m", nodes=1)
    assert plan.runnable is not None
    assert plan.runnable.fits
    assert plan.runnable.missing == ()


def test_a_model_that_cannot_be_loaded_has_no_layout_that_runs() -> None:
    plan = plan_of("smollm2-135m", nodes=1)
    assert replace(plan, refusal="no such family").runnable is None


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.1-8b", "qwen2.5-7b"])
def test_a_name_is_refused_as_a_folder_with_its_config_would_be(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(NAMED[name]))
    try:
        read_shape(tmp_path)
    except ConfigError as error:
        said = str(error).replace(str(tmp_path), name)
    else:
        said = None
    assert loading_refusal(name) == said


def test_the_shipped_model_can_be_loaded_and_has_the_size_of_its_shape() -> None:
    folder = model_folder("embedded")
    assert loading_refusal(str(folder)) is None
    size, shape = asdict(read_model(str(folder))), asdict(read_shape(folder))
    assert {name: shape[name] for name in size if name in shape} == {
        name: value for name, value in size.items() if name in shape
    }
    assert {"hidden_size", "num_hidden_layers", "head_dim"} <= size.keys() & shape.keys()


def test_more_gpus_than_sequences_of_an_update_are_refused() -> None:
    size = replace(SIZE, num_key_value_heads=1, num_hidden_layers=1)  # divides nowhere
    work = replace(work_of(), episodes=16, updates=4)
    with pytest.raises(
        ConfigError, match=r"no layout uses 16 GPUs: an update has 4 sequences, .* take fewer GPUs"
    ):
        make_plan(size, Cluster(gpu=GPUS["H100"], nodes=2), work, Assumptions())


def test_planning_imports_no_torch() -> None:
    imports = "import sys, rlef.plan, rlef.plan_report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", imports], check=False).returncode == 0


def test_the_command_shows_the_layouts_the_parts_and_what_to_launch() -> None:
    result = rlef("run.seed=2", "--gpu", "H100", "--nodes", "2", "--gpus-per-node", "1")
    assert result.exit_code == 0, result.output
    assert "layouts, fastest first" in result.stdout
    assert "kv cache" in result.stdout
    (command,) = [line for line in result.stdout.splitlines() if line.startswith("torchrun")]
    assert "--nnodes 2 --nproc-per-node 1" in command
    assert f'"$HEAD:29500" -m rlef train {TINY} run.seed=2 parallel.tensor=1 ' in command


def test_a_model_that_the_trainer_cannot_load_gets_a_plan_and_the_reason_but_no_command(
    tmp_path: Path,
) -> None:
    config = NAMED["llama-3.1-8b"] | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    reason = loading_refusal(str(tmp_path))
    assert reason is not None
    result = rlef("--model", str(tmp_path), "--gpu", "H100", "--nodes", "2")
    assert "8,030,261,248 parameters" in result.stdout
    assert f"The trainer cannot load this model today: {reason}" in result.stdout
    assert "torchrun" not in result.stdout


def test_nothing_that_fits_is_said_with_what_would_help() -> None:
    result = rlef("--model", "qwen2.5-72b", "--gpu", "H100", "--nodes", "1")
    assert result.exit_code == 0
    assert "Nothing fits: take more GPUs" in result.stdout


def test_a_model_too_large_for_what_runs_today_is_told_what_its_best_layout_needs() -> None:
    """Seventy billion parameters: loadable, but the embedded sampler would hold them whole in fp32."""
    result = rlef("--model", "llama-3.1-70b", "--gpu", "H100", "--nodes", "8")
    (needs,) = [line for line in result.stdout.splitlines() if "The best needs: " in line]
    assert needs.startswith("No layout that the trainer can run today fits.")
    assert "rollout.sampler=vllm" in needs
    assert "torchrun" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "H900", "--nodes", "1"], "--gpu H900: no such GPU"),
        (["--gpu", "H100", "--nodes", "1", "--model", "none"], "model 'none' is neither a folder"),
        (["--gpu", "H100", "--nodes", "1", "--assume", "speed=2"], "there is no assumption 'speed'"),
        (["--gpu", "H100", "--nodes", "1", "rollout.max_response_tokens=9000"], "the model's context holds"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(arguments: list[str], message: str) -> None:
    result = rlef(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("rlef: error: ")
    assert message in line


@settings(max_examples=25)
@given(st.sampled_from(plan_of("smollm2-135m", nodes=1).candidates))
def test_the_command_sets_what_its_layout_has(candidate: Candidate) -> None:
    """Each of its settings, also those that are off: the run file may have them on."""
    layout = candidate.layout
    words = shlex.split(launch_command(candidate, Cluster(gpu=GPUS["H100"], nodes=1), [str(TINY)]))
    overrides = [word for word in words if word.startswith("parallel.")]
    sampling = 0 if layout.colocated else layout.sampling_gpus
    found = load_config(TINY, [*overrides, f"parallel.processes={layout.training_gpus + sampling}"]).parallel
    assert found.sampling_processes == sampling
    assert (found.tensor, found.pipeline) == (layout.tensor, layout.pipeline)
    assert found.virtual_pipeline == layout.virtual_pipeline
    assert found.replica == layout.tensor * layout.pipeline
    assert found.sequence_parallel == layout.sequence_parallel
    assert found.distributed_optimizer == layout.distributed_optimizer
    assert found.recompute == ("full" if layout.recompute else "none")
    assert found.dtype == ("bfloat16" if layout.precision == "bf16" else "float32")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_torchrun_accepts_the_command_of_the_plan(tmp_path: Path) -> None:
    """The printed words, with --dry-run behind them: each of two processes checks everything and stops."""
    result = rlef("run.name=planned", "--gpu", "H100", "--nodes", "1", "--gpus-per-node", "2", "--json")
    command = shlex.split(json.loads(result.stdout)["command"])
    assert command[0] == "torchrun"
    torchrun = str(Path(sys.executable).parent / "torchrun")
    finished = subprocess.run(
        [torchrun, *command[1:], "--dry-run"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.count("processes that sample: 1") == 2


def test_the_json_has_what_the_tables_have() -> None:
    found = json.loads(rlef("--gpu", "H100", "--nodes", "1", "--json", "--top", "2").stdout)
    first = found["candidates"][0]
    assert first["memory_bytes"]["total"] == pytest.approx(
        sum(part for name, part in first["memory_bytes"].items() if name != "total")
    )
    assert {"rollout", "execution", "scoring", "updates", "publishing", "total"} <= first["seconds"].keys()
    assert found["cluster"]["gpu"]["name"] == "H100"


def test_with_vllm_the_plan_gives_its_cache_a_share_of_the_gpu() -> None:
    """And without it, layouts that want it say so."""
    work, size = work_of(), read_model("llama-3.1-8b")
    cluster = Cluster(gpu=GPUS["H100"], nodes=4)
    plan = make_plan(size, cluster, work, Assumptions(), trainer=trainer_with(RolloutConfig(sampler="vllm")))
    paged = next(each for each in plan.candidates if not each.layout.whole_cache and not each.missing)
    command = launch_command(paged, cluster, ["run.toml", "rollout.sampler=vllm"])
    assert "vllm.dtype=bfloat16" in shlex.split(command)
    (share,) = [word for word in shlex.split(command) if word.startswith("vllm.memory_fraction=")]
    taken = float(share.partition("=")[2]) * cluster.gpu.memory_bytes
    assert taken >= paged.memory.sampler_weights + paged.memory.kv_cache
    assert f"vllm.tensor_parallel={paged.layout.sampler_tensor}" in shlex.split(command)
    plain = make_plan(size, cluster, work, Assumptions(), trainer=trainer_with(RolloutConfig()))
    assert any("rollout.sampler=vllm" in each.missing for each in plain.candidates)


@pytest.mark.parametrize(
    ("overrides", "is_stale", "expected"),
    [([], False, 1), ([], True, 0), (["rollout.max_staleness=2"], True, 0)],
)
def test_the_command_makes_rollouts_stale_unless_they_are(
    overrides: list[str], is_stale: bool, expected: int
) -> None:
    found = next(each for each in plan_of("smollm2-135m", nodes=1).candidates if not each.layout.colocated)
    command = launch_command(
        found, Cluster(gpu=GPUS["H100"], nodes=1), ["run.toml", *overrides], is_stale=is_stale
    )
    assert command.count("rollout.max_staleness=1") == expected
