"""What makes megatron-core run without CUDA: no more than it takes, and nothing where there is CUDA."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlef import megatron_cpu
from rlef.config import ParallelConfig
from tests.distributed import ROOT, run_ranks
from tests.megatron_examples import SMOOTH, UNTIED, batches, ppo_policy_loss, random_weights

FAKE_CUDA = """
import importlib
import torch
torch.cuda.is_available = lambda: True
from rlef import megatron_cpu
for name in megatron_cpu.REASONS:
    importlib.import_module(name)
before = dict(vars(torch)), dict(vars(torch.cuda))
megatron_cpu.install()
for name in megatron_cpu.REASONS:
    assert importlib.import_module(name).torch is torch, name
assert (dict(vars(torch)), dict(vars(torch.cuda))) == before
print("unchanged")
"""


def test_nothing_is_changed_where_cuda_is_available() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FAKE_CUDA], env=environment, capture_output=True, text=True
    )
    assert ran.stdout == "unchanged\n", ran.stderr


def leave_out_each() -> dict[str, str]:
    """On each of two pipeline stages: what an update raises without one of the stand-ins."""
    from rlef.megatron_policy import MegatronNetwork, initialize

    state = initialize(ParallelConfig(processes=2, pipeline=2))
    everything = batches()
    loss = ppo_policy_loss(everything, range(3), state.tensor_parallel_group)

    def update() -> str:
        network = MegatronNetwork(UNTIED, random_weights(UNTIED), head="logits", optimizer=SMOOTH, lr=1.0)
        return f"grad norm {network.update(everything, loss).grad_norm:.3f}"

    outcomes = {"none": update()}
    for name in megatron_cpu.REASONS:
        module: Any = importlib.import_module(name)
        module.torch = torch
        try:
            outcomes[name] = update()
        except (AssertionError, RuntimeError) as error:
            outcomes[name] = str(error)
        megatron_cpu.install()
    return outcomes


@pytest.mark.multiprocess
def test_an_update_fails_without_any_one_of_the_stand_ins(tmp_path: Path) -> None:
    for outcomes in run_ranks(leave_out_each, ranks=2, folder=tmp_path):
        assert outcomes.pop("none").startswith("grad norm 0.")
        assert outcomes.keys() == megatron_cpu.REASONS.keys()
        for name, outcome in outcomes.items():
            assert "CUDA" in outcome or "NVIDIA" in outcome, (name, outcome)
