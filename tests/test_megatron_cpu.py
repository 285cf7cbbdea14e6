"""What makes megatron-core run without CUDA: no more than it takes, and nothing where there is CUDA."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import ProcessGroup

from rlef import megatron_cpu
from rlef.config import ParallelConfig
from rlef.megatron_policy import MegatronNetwork, initialize, leave
from tests.distributed import ROOT, run_ranks
from tests.megatron_examples import SMOOTH, UNTIED, batches, ppo_policy_loss, random_weights

FAKE_CUDA = """
import importlib
import torch
torch.cuda.is_available = lambda: True
from rlef import megatron_cpu
for name in megatron_cpu.REASONS:
    importlib.import_module(name)
generator = importlib.import_module(megatron_cpu.GENERATOR)
before = dict(vars(torch)), dict(vars(torch.cuda)), dict(vars(generator))
megatron_cpu.install()
for name in megatron_cpu.REASONS:
    assert importlib.import_module(name).torch is torch, name
assert (dict(vars(torch)), dict(vars(torch.cuda)), dict(vars(generator))) == before
print("unchanged")
"""


def test_nothing_is_changed_where_cuda_is_available() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FAKE_CUDA], env=environment, capture_output=True, text=True
    )
    assert ran.stdout == "unchanged\n", ran.stderr


LAYOUTS = (
    ParallelConfig(processes=2, pipeline=2),
    ParallelConfig(processes=2, tensor=2, sequence_parallel=True),
)
GENERATOR_FUNCTIONS = {
    name: getattr(importlib.import_module(megatron_cpu.GENERATOR), name)
    for name in ("_get_cuda_rng_state", "_set_cuda_rng_state")
}


def leave_out_each() -> dict[str, list[str]]:
    """On each of two ranks: what an update in each layout raises without one of the stand-ins."""
    from megatron.core import parallel_state

    outcomes: dict[str, list[str]] = {name: [] for name in ("none", *megatron_cpu.REASONS)}
    for parallel in LAYOUTS:
        state = initialize(parallel)
        for name, said in outcomes.items():
            if name != "none":
                module: Any = importlib.import_module(name)
                module.torch = torch
            try:
                said.append(_updated(parallel, state.tensor_parallel_group))
            except (AssertionError, RuntimeError) as error:
                said.append(str(error))
            megatron_cpu.install()
        parallel_state.destroy_model_parallel()
    return outcomes


def _updated(parallel: ParallelConfig, group: ProcessGroup | None) -> str:
    from megatron.core import parallel_state

    parallel_state.destroy_global_memory_buffer()  # it would be kept from the update before
    parallel_state._set_global_memory_buffer()
    network = MegatronNetwork(
        UNTIED, random_weights(UNTIED), head="logits", parallel=parallel, optimizer=SMOOTH, lr=1.0
    )
    everything = batches()
    loss = ppo_policy_loss(everything, range(3), group)
    return f"grad norm {network.update(everything, loss).grad_norm:.3f}"


@pytest.mark.multiprocess
def test_an_update_fails_without_any_one_of_the_stand_ins(tmp_path: Path) -> None:
    for outcomes in run_ranks(leave_out_each, ranks=2, folder=tmp_path):
        assert all(outcome.startswith("grad norm 0.") for outcome in outcomes.pop("none"))
        assert outcomes.keys() == megatron_cpu.REASONS.keys()
        for name, said in outcomes.items():
            faults = [outcome for outcome in said if not outcome.startswith("grad norm")]
            assert faults, name
            for fault in faults:
                assert "CUDA" in fault or "NVIDIA" in fault, (name, fault)


@pytest.fixture
def _one_process() -> Iterator[None]:
    initialize(ParallelConfig())
    yield
    leave()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize(
    "parallel", [ParallelConfig(distributed_optimizer=True), ParallelConfig(dtype="bfloat16")]
)
def test_an_optimizer_that_looks_at_types_fails_without_the_type_names_of_cuda(
    parallel: ParallelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _updated(parallel, None).startswith("grad norm 0.")
    monkeypatch.setattr(megatron_cpu, "type_names_of_cuda", lambda _: nullcontext())
    with pytest.raises(TypeError, match=r"torch\.cuda\.FloatTensor"):
        _updated(parallel, None)


def test_parameters_have_their_own_type_names_again_afterwards() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    with megatron_cpu.type_names_of_cuda([parameter]):
        assert parameter.type() == "torch.cuda.FloatTensor"
    assert parameter.type() == "torch.FloatTensor"


@pytest.mark.usefixtures("_one_process")
def test_recomputation_fails_or_leaks_without_the_functions_for_random_numbers() -> None:
    """Of the second, torch keeps each call, to make it once CUDA has started."""
    generator: Any = importlib.import_module(megatron_cpu.GENERATOR)
    parallel = ParallelConfig(recompute="full")
    waiting = torch.cuda._queued_calls  # type: ignore[attr-defined]
    before = len(waiting)
    assert _updated(parallel, None).startswith("grad norm 0.")
    assert len(waiting) == before
    try:
        generator._set_cuda_rng_state = GENERATOR_FUNCTIONS["_set_cuda_rng_state"]
        _updated(parallel, None)
        assert len(waiting) > before
        del waiting[before:]
        generator._get_cuda_rng_state = GENERATOR_FUNCTIONS["_get_cuda_rng_state"]
        with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
            _updated(parallel, None)
    finally:
        megatron_cpu.install()
