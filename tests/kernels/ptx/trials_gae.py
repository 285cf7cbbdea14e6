"""Of the kernel of `gae`: three blocks of one sequence, an empty one, a single token, less than a block."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.machine_code import Configuration
from tests.kernels.gae_twin import naive_gae, pack_of
from tests.kernels.ptx.trial import Expected, Trial, dtype_of, settings_of


def gae(configuration: Configuration) -> list[Trial]:
    block = settings_of(configuration)["BLOCK"]
    of = configuration.arguments
    pack = pack_of([2 * block + 70, 0, 1, 300], seed=0)
    values = pack.values.to(dtype_of(of["values_ptr"]))
    rewards = pack.rewards.to(dtype_of(of["rewards_ptr"]))
    pack = replace(pack, values=values.double(), rewards=rewards.double())
    advantages, returns = naive_gae(
        pack, gamma=configuration.constants["GAMMA"], lambda_=configuration.constants["LAMBDA"]
    )
    tokens, total = len(values), dtype_of(of["advantages_ptr"])
    rounding = 1e-13 if total == torch.float64 else 5e-6
    trial = Trial(
        grid=(len(pack.cu_seqlens) - 1,),
        arguments={
            "values_ptr": values,
            "rewards_ptr": rewards,
            "action_mask_ptr": pack.action_mask.view(torch.uint8),
            "cu_seqlens_ptr": pack.cu_seqlens,
            "advantages_ptr": torch.full((tokens,), torch.nan, dtype=total),
            "returns_ptr": torch.full((tokens,), torch.nan, dtype=total),
            "tokens": tokens,
        },
        expected={
            "advantages_ptr": Expected(values=advantages, absolute=rounding),
            "returns_ptr": Expected(values=returns, absolute=rounding),
        },
        stored=2 * tokens * torch.empty(0, dtype=total).element_size(),
    )
    return [trial]
