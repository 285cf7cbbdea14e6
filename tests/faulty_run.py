"""`python -m tests.faulty_run FOLDER MODEL FAULT`: a run of two processes, of which rank 1 meets a fault."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from rlef import cli
from rlef.config import Config
from rlef.launch import run_processes
from rlef.learner import Learner
from rlef.own_rollouts import OwnRollouts
from rlef.records import Episode
from rlef.rollout import Collection
from rlef.run_folder import RunFolder, open_run_folder
from rlef.stopping import StopRequest
from tests.small_runs import small_config


def run(config: Config, folder: RunFolder, fault: str) -> int:
    learn = Learner.step

    def learn_with_a_fault(
        self: Learner, episodes: Sequence[Episode], *, train_policy: bool = True
    ) -> dict[str, float]:
        torch.zeros(1 << 50)
        return learn(self, episodes, train_policy=train_policy)

    def sleep(*_: object, **_by_name: object) -> Collection:
        time.sleep(3600)
        raise AssertionError("it has outlived its run")

    if os.environ["RANK"] == "1":
        if fault == "memory":
            Learner.step = learn_with_a_fault  # type: ignore[method-assign]
        elif fault == "pause":
            StopRequest.agreed = sleep  # type: ignore[assignment, method-assign]
        else:
            OwnRollouts.collect = sleep  # type: ignore[assignment, method-assign]
    return cli._train(config, folder)


if __name__ == "__main__":
    settings = ("parallel.processes=2", "parallel.timeout_s=4", f"model.path={sys.argv[2]}")
    small = small_config(Path(sys.argv[1]), *settings)
    opened, _ = open_run_folder(small, resume="never")
    sys.exit(run_processes(run, (small, opened, sys.argv[3]), processes=2, threads=1))
