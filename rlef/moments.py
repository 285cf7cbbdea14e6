"""AdamW's state as a checkpoint holds it: two moments of each weight, and how many steps were made."""

from __future__ import annotations

from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


def steps_made(optimizer: Any) -> int:
    """By torch's AdamW, which counts for each parameter, or by a fused one, which counts for each group."""
    for group in optimizer.param_groups:
        if "step" in group:
            return int(group["step"])
        for parameter in group["params"]:
            if parameter in optimizer.state:
                return int(optimizer.state[parameter]["step"])
    return 0


def set_steps(optimizer: Any, steps: int) -> None:
    """Make `optimizer` one that has made so many steps, whose moments are zero and wait to be read."""
    counts_by_parameter = isinstance(optimizer, torch.optim.Adam)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.pop("step", None)
        if steps == 0:
            continue
        if not counts_by_parameter:
            group["step"] = steps
        for parameter in group["params"]:
            state = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            if counts_by_parameter:
                state["step"] = torch.tensor(float(steps))
            optimizer.state[parameter] = state
