"""One rank of a small gloo job: vocabulary-parallel and data-parallel operations against one process's own
answer.

Started by `test_parallel.py` as `ranks.py STORE`. The ranks are forked from one process that has imported
torch, which would take most of the time if each did it. Rank 0 prints one line of JSON.
"""

from __future__ import annotations

import json
import multiprocessing.connection
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from rlef_kernels import (
    linear_ppo_loss,
    logprobs_from_logits,
    masked_mean,
    masked_variance,
    masked_whiten,
    ppo_policy_loss_from_logits,
)

SIZES = (1, 2, 4, 8)
TOKENS, VOCAB = 11, 24


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def largest_difference(actual: Tensor, expected: Tensor, group: ProcessGroup) -> float:
    """Over all ranks of the group; NaN counts as infinite."""
    differences = (actual - expected).detach().abs().double().nan_to_num(nan=torch.inf)
    difference = torch.cat([differences.flatten(), torch.zeros(1)]).max()
    dist.all_reduce(difference, op=dist.ReduceOp.MAX, group=group)
    return float(difference)


def shard_of(logits: Tensor, group: ProcessGroup) -> Tensor:
    return logits.chunk(dist.get_world_size(group), dim=1)[dist.get_rank(group)].clone().requires_grad_()


def logprobs(group: ProcessGroup, logits: Tensor, words: int = VOCAB) -> dict[str, float]:
    """The targets are among the first `words`."""
    targets = torch.randint(0, words, (TOKENS,), generator=generator())
    weights = torch.linspace(-1, 2, 3 * TOKENS, dtype=logits.dtype).view(3, TOKENS)

    def run(logits: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
        result = logprobs_from_logits(logits, targets, temperature=0.8, want_entropy=True, group=group)
        assert result.entropy is not None
        outputs = torch.stack([result.logprobs, result.entropy, result.logsumexp])
        (gradient,) = torch.autograd.grad((weights * outputs).sum(), logits)
        return outputs, gradient

    outputs, gradient = run(shard_of(logits, group), group)
    expected_outputs, expected_gradient = run(logits.clone().requires_grad_(), None)
    return {
        "values": largest_difference(outputs, expected_outputs, group),
        "gradient": largest_difference(gradient, shard_of(expected_gradient, group), group),
    }


def linear_loss(group: ProcessGroup) -> dict[str, float]:
    random = generator()
    hidden, weight = (torch.randn(n, 5, generator=random, dtype=torch.float64) for n in (TOKENS, VOCAB))
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=random)
    old, behaviour, advantages = torch.randn(3, TOKENS, generator=random, dtype=torch.float64).unbind()
    mask = torch.rand(TOKENS, generator=random) < 0.7

    def run(weight: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
        states = hidden.clone().requires_grad_()
        loss, _ = linear_ppo_loss(
            *(states, weight, targets, old, behaviour, advantages, mask),
            clip_ratio=0.2,
            behaviour_correction=True,
            normaliser=7.0,
            entropy_coef=0.1,
            group=group,
            chunk_elements=2 * weight.shape[0],
        )
        return loss, *torch.autograd.grad(loss, (states, weight))

    parts = weight.chunk(dist.get_world_size(group))
    loss, for_hidden, for_weight = run(parts[dist.get_rank(group)].clone().requires_grad_(), group)
    expected_loss, expected_for_hidden, expected_for_weight = run(weight.clone().requires_grad_(), None)
    expected_part = expected_for_weight.chunk(len(parts))[dist.get_rank(group)]
    return {
        "values": largest_difference(loss, expected_loss, group),
        "gradient in the hidden states": largest_difference(for_hidden, expected_for_hidden, group),
        "gradient in the weight": largest_difference(for_weight, expected_part, group),
    }


def policy_loss(group: ProcessGroup, logits: Tensor) -> dict[str, float]:
    random = generator()
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=random)
    old, behaviour = (-2 * torch.rand(2, TOKENS, generator=random, dtype=torch.float64)).unbind()
    advantages = torch.randn(TOKENS, generator=random, dtype=torch.float64)
    mask = torch.rand(TOKENS, generator=random) < 0.7

    def run(logits: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
        loss, _ = ppo_policy_loss_from_logits(
            logits,
            targets,
            old,
            behaviour,
            advantages,
            mask,
            clip_ratio=0.2,
            behaviour_correction=True,
            normaliser=7.0,
            entropy_coef=0.1,
            group=group,
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        return loss, gradient

    loss, gradient = run(shard_of(logits, group), group)
    expected_loss, expected_gradient = run(logits.clone().requires_grad_(), None)
    return {
        "values": largest_difference(loss, expected_loss, group),
        "gradient": largest_difference(gradient, shard_of(expected_gradient, group), group),
    }


def traffic(group: ProcessGroup) -> dict[str, Any]:
    """Which collectives a forward and a backward pass call, and how many bytes per token a rank sends."""
    calls: list[str] = []
    sent: list[int] = []
    originals = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}

    def recorded(name: str) -> Any:
        def call(*arguments: Any, **settings: Any) -> Any:
            calls.append(name)
            sent.append(arguments[-1].numel() * arguments[-1].element_size())
            return originals[name](*arguments, **settings)

        return call

    for name in originals:
        setattr(dist, name, recorded(name))
    shard = shard_of(torch.zeros(TOKENS, VOCAB), group)
    targets = torch.zeros(TOKENS, dtype=torch.int64)
    result = logprobs_from_logits(shard, targets, want_entropy=True, group=group)
    result.logprobs.sum().backward()
    for name, original in originals.items():
        setattr(dist, name, original)
    return {"calls": calls, "bytes_per_token": sum(sent) / TOKENS}


def whitening(group: ProcessGroup) -> dict[str, float]:
    """Ranks hold unequal parts, some of them none; float32 values far from 0."""
    values = 1000 + torch.randn(60, generator=generator())
    mask = torch.rand(60, generator=generator()) < 0.7
    parts = {1: [60], 2: [60, 0], 4: [10, 35, 15, 0], 8: [7, 0, 21, 1, 9, 0, 22, 0]}
    sizes = parts[dist.get_world_size(group)]
    own_values, own_mask, expected = (
        part.split(sizes)[dist.get_rank(group)] for part in (values, mask, masked_whiten(values, mask))
    )
    whitened = masked_whiten(own_values, own_mask, group=group)
    mean = masked_mean(own_values, own_mask, group=group)
    return {
        "whitened": largest_difference(whitened, expected, group),
        "mean": largest_difference(mean, masked_mean(values, mask), group),
        "variance": largest_difference(
            masked_variance(own_values, own_mask, group=group), masked_variance(values, mask), group
        ),
    }


def run(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=max(SIZES))
    logits = 3 * torch.randn(TOKENS, VOCAB, generator=generator(), dtype=torch.float64)
    half_impossible = logits.clone()
    half_impossible[:, VOCAB // 2 :] = -torch.inf
    report: dict[str, Any] = {}
    for size in SIZES:
        group = dist.new_group(list(range(size)))
        if rank < size:
            report[str(size)] = {
                "plain": logprobs(group, logits),
                "offset": logprobs(group, logits + 1e4),
                "far apart": logprobs(group, logits * 1e4),
                "half impossible": logprobs(group, half_impossible, VOCAB // 2),
                "policy loss": policy_loss(group, logits),
                "linear loss": linear_loss(group),
                "whitening": whitening(group),
                "traffic": traffic(group),
            }
    dist.barrier()
    if rank == 0:
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()
    dist.destroy_process_group()


def main() -> None:
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run, args=(rank, sys.argv[1]), daemon=True) for rank in range(max(SIZES))]
    for each in ranks:
        each.start()
    while running := [each.sentinel for each in ranks if each.is_alive()]:
        multiprocessing.connection.wait(running)
        if any(each.exitcode for each in ranks):  # then the others wait for it
            for each in ranks:
                each.kill()
    sys.exit(any(each.exitcode for each in ranks))


if __name__ == "__main__":
    main()
