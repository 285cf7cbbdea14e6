"""`rlef` under torchrun, of which three attempts lose a rank: while it samples, learns and saves."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from rlef import cli
from rlef.megatron_policy import MegatronNetwork
from rlef.torch_sampler import TorchSampler

UPDATES_OF_A_STEP = 4  # two of each network
SAVED_IN_VAIN = "step-000003"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_sampling_step_2() -> None:
    push, generate = TorchSampler.push, TorchSampler.generate
    versions: list[int] = []

    def pushed(self: TorchSampler, weights: Any, version: int) -> None:
        versions.append(version)
        push(self, weights, version)

    def generated(self: TorchSampler, *arguments: Any) -> Any:
        responses = generate(self, *arguments)
        if versions[-1] == 1:
            die()
        return responses

    TorchSampler.push, TorchSampler.generate = pushed, generated  # type: ignore[method-assign, assignment]


def die_in_the_middle_of_a_learning_step() -> None:
    update = MegatronNetwork.update
    calls: list[int] = []

    def updated(self: MegatronNetwork, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > UPDATES_OF_A_STEP // 2:
            die()
        return update(self, *arguments)

    MegatronNetwork.update = updated  # type: ignore[method-assign]


def die_before_the_rename_that_makes_a_checkpoint_valid() -> None:
    rename = Path.rename

    def renamed(self: Path, target: Path) -> Path:
        if Path(target).name == SAVED_IN_VAIN:
            die()
        return rename(self, target)

    Path.rename = renamed  # type: ignore[method-assign, assignment]


DEATHS = {
    (0, 1): die_while_sampling_step_2,
    (1, 0): die_in_the_middle_of_a_learning_step,
    (2, 0): die_before_the_rename_that_makes_a_checkpoint_valid,
}


def main() -> None:
    place = (int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"]))
    DEATHS.get(place, lambda: None)()
    cli.main()
