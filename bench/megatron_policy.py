"""Seconds of CPU that the Megatron network takes, against its plain torch twin, on one pack.

    python bench/megatron_policy.py

The pack is what the smallest run trains on: sequences of 60 to 200 tokens, half of each a response. Both
networks take turns in one process and one thread, and CPU time is counted, as machines are shared. The last
line is JSON: the median over the rounds of each time in seconds, and of the ratio within a round, with its
smallest and largest.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor

from rlef.config import OptimizerConfig, ParallelConfig, PPOConfig
from rlef.losses import policy_loss
from rlef.megatron_policy import MegatronNetwork, initialize
from rlef.ports import Network
from rlef.pretrain import SHAPE
from rlef.records import Batch
from rlef.torch_model import LlamaModel, initialise
from rlef.torch_policy import TorchNetwork


def random_pack(sequences: int, seed: int) -> Batch:
    """Sequences of 60 to 200 random tokens with one turn each."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(60, 201, (sequences,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = int(cu_seqlens[-1])
    turns = torch.arange(sequences)
    token_turns = turns.repeat_interleave(lengths)
    position_ids = torch.arange(tokens) - cu_seqlens[token_turns]
    response_mask = position_ids >= lengths[token_turns] // 2
    return Batch(
        token_ids=torch.randint(0, SHAPE.vocab_size, (tokens,), generator=generator),
        position_ids=position_ids,
        cu_seqlens=cu_seqlens.int(),
        response_mask=response_mask,
        behaviour_logprobs=torch.where(response_mask, -6.0, 0.0),
        token_turns=token_turns.masked_fill(~response_mask, -1),
        token_values=token_turns.masked_fill(~response_mask, -1),
        value_positions=cu_seqlens[:-1] + lengths // 2 - 1,
        value_turns=turns,
        turn_rewards=torch.zeros(sequences),
        turn_sequences=turns,
    )


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    initialize(ParallelConfig())  # one process, one thread
    model = LlamaModel(SHAPE)
    initialise(model, seed=arguments.seed)
    optimizer = OptimizerConfig(lr=1e-6)
    networks: dict[str, Network] = {
        "megatron": MegatronNetwork(SHAPE, model.state_dict(), head="logits", optimizer=optimizer, lr=1e-6),
        "torch": TorchNetwork(model, lr=1e-6, optimizer=optimizer),
    }
    batch = random_pack(arguments.sequences, arguments.seed)
    advantages = torch.randn(arguments.sequences, generator=torch.Generator().manual_seed(arguments.seed))

    def loss(logits: Tensor, _: int) -> tuple[Tensor, dict[str, Tensor]]:
        return policy_loss(
            logits,
            batch,
            old_logprobs=batch.behaviour_logprobs,
            advantages=advantages,
            settings=PPOConfig(),
            normaliser=batch.num_response_tokens,
        )

    times: dict[str, list[float]] = {
        f"{work}_{name}": [] for work in ("forward", "update") for name in networks
    }
    for number in range(arguments.rounds + 1):
        for name, network in networks.items():
            forward = cpu_seconds(lambda: network.forward([batch]))  # noqa: B023 (called at once)
            update = cpu_seconds(lambda: network.update([batch], loss))  # noqa: B023
            if number:  # the first round warms up
                times[f"forward_{name}"].append(forward)
                times[f"update_{name}"].append(update)

    result: dict[str, object] = {
        "bench": "megatron_policy",
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "hardware": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, 1 thread",
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "seed": arguments.seed,
        "rounds": arguments.rounds,
        "tokens": batch.num_tokens,
    }
    for name, seconds in times.items():
        result[f"{name}_s"] = round(statistics.median(seconds), 4)
    for work in ("forward", "update"):
        pairs = zip(times[f"{work}_megatron"], times[f"{work}_torch"], strict=True)
        ratios = sorted(megatron / plain for megatron, plain in pairs)
        result[f"{work}_ratio"] = round(statistics.median(ratios), 3)
        result[f"{work}_ratio_spread"] = [round(ratios[0], 3), round(ratios[-1], 3)]
        print(f"{work}: {result[f'{work}_ratio']} of the torch twin's CPU time")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
