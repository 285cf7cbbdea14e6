"""A stand-in for an engine over two ranks.

`python -m tests.engine_examples FOLDER MODEL FAULT`: a run with it and a learner; its follower meets a fault.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlef import cli, own_rollouts
from rlef.arithmetic import longest_dialog
from rlef.config import Config
from rlef.launch import run_processes
from rlef.ports import Request, Response, SamplingParams
from rlef.records import ModelShape
from rlef.run_folder import RunFolder, open_run_folder
from rlef.torch_sampler import TorchSampler
from tests.small_runs import small_config

ONE_ENGINE = (
    "parallel.processes=3",
    "parallel.sampling_processes=2",
    "rollout.sampler=vllm",
    "vllm.tensor_parallel=2",
)
FOLLOWER = 2
HEALTHY_STEPS = 5


class RankOfEngine(TorchSampler):
    """Holds the whole model, but no rank gets a token before all ranks have come to the same call.

    `fault` is what the follower meets after some steps.
    """

    def __init__(self, *arguments: Any, fault: str = "", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.calls: list[tuple[object, ...]] = []
        self._fault = fault if os.environ["RANK"] == str(FOLLOWER) else ""
        self._steps = 0

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        self.calls.append(("generate", [request.stream for request in requests], params.temperature))
        return super().generate(requests, params)

    def submit(self, request: Request, params: SamplingParams) -> None:
        self.calls.append(("submit", request.stream, list(request.token_ids), request.num_sampled, params))
        super().submit(request, params)

    def step(self) -> list[tuple[int, Response]]:
        self.calls.append(("step",))
        self._steps += 1
        if self._steps > HEALTHY_STEPS:
            self._meet_fault()
        together = torch.ones(1)
        dist.all_reduce(together)
        assert together == 2
        finished = super().step()
        if self._fault == "other tokens" and finished:
            finished[0][1].token_ids[-1] += 1
        return finished

    def abort(self) -> list[tuple[int, Response]]:
        self.calls.append(("abort",))
        return super().abort()

    def push(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        weights = {name: whole.clone() for name, whole in named_weights}
        self.calls.append(("push", version, float(sum(whole.double().sum() for whole in weights.values()))))
        super().push(weights.items(), version)

    def _meet_fault(self) -> None:
        match self._fault:
            case "memory":
                raise MemoryError
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hung":
                os.kill(os.getpid(), signal.SIGSTOP)


def build(
    config: Config, _: Path, shape: ModelShape, *, end_token_id: int, device: object, fault: str = ""
) -> RankOfEngine:
    """As `samplers.build_sampler`."""
    return RankOfEngine(
        shape,
        end_token_id=end_token_id,
        slots=config.rollout.slots,
        context=longest_dialog(config),
        device=device,
        fault=fault,
    )


def run(config: Config, folder: RunFolder, fault: str) -> int:
    own_rollouts.build_sampler = lambda *arguments, **options: build(  # type: ignore[assignment]
        *arguments, **options, fault=fault
    )
    return cli._train(config, folder)


if __name__ == "__main__":
    settings = (*ONE_ENGINE, "parallel.silence_s=15", f"model.path={sys.argv[2]}", "rollout.overlap=true")
    small = small_config(Path(sys.argv[1]), *settings)
    opened, _ = open_run_folder(small, resume="never")
    sys.exit(run_processes(run, (small, opened, sys.argv[3]), processes=3, threads=1))
