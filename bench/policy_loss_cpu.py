"""CPU time and memory of the policy loss from logits, forward and backward, beside those of eager torch.

    python bench/policy_loss_cpu.py [--tokens 4096] [--vocab 32000] [--repeats 5] [--keep-freed-memory]

Eager is `log_softmax`, `gather`, the clipped loss and autograd. Each measurement has a process of its own: a
step that is not measured, then one that is; the kinds take turns, so that a busy machine slows all of them.
Process time counts every thread. `beyond_gb` is the peak of the resident memory over what logits and gradient
take. Every step pays for the first touch of its tensors' pages, unless `--keep-freed-memory` has glibc keep
what is freed for the next tensor, as `rlef train` does. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor

from rlef_kernels import ppo_policy_loss_from_logits

KINDS = ("eager", "ours", "ours in place")
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


def eager_step(logits: Tensor, targets: Tensor, old: Tensor, advantages: Tensor) -> None:
    logprobs = logits.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    ratio = (logprobs - old).exp()
    bounded = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    (-bounded.sum() / targets.shape[0]).backward()


def our_step(logits: Tensor, targets: Tensor, old: Tensor, advantages: Tensor, *, in_place: bool) -> None:
    loss, _ = ppo_policy_loss_from_logits(
        *(logits, targets, old, old, advantages, torch.ones_like(targets, dtype=torch.bool)),
        clip_ratio=0.2,
        behaviour_correction=False,
        normaliser=targets.shape[0],
        in_place=in_place,
    )
    loss.backward()


def measure(kind: str, tokens: int, vocab: int) -> dict[str, float]:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, vocab, generator=random)
    targets = torch.randint(0, vocab, (tokens,), generator=random)
    old = torch.full((tokens,), -10.0)
    advantages = torch.randn(tokens, generator=random)
    size = logits.numel() * logits.element_size()
    before = peak()
    for _ in range(2):
        held = logits.clone().requires_grad_()  # in place, the second step must not find the first's gradient
        began = time.process_time()
        if kind == "eager":
            eager_step(held, targets, old, advantages)
        else:
            our_step(held, targets, old, advantages, in_place=kind == "ours in place")
        seconds = time.process_time() - began
        del held
    return {"cpu_seconds": seconds, "beyond_gb": (peak() - before - 2 * size) / 1e9}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kind", choices=KINDS, help="measure this one alone, once")
    parser.add_argument("--keep-freed-memory", action="store_true", help="as `rlef train` does")
    arguments = parser.parse_args()
    if arguments.kind:
        print(json.dumps(measure(arguments.kind, arguments.tokens, arguments.vocab)))
        return

    environment = {**os.environ, **(KEEP_FREED_MEMORY if arguments.keep_freed_memory else {})}
    sizes = ["--tokens", str(arguments.tokens), "--vocab", str(arguments.vocab)]
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.repeats):
        for kind in KINDS:
            command = [sys.executable, __file__, *sizes, "--kind", kind]
            process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            runs[kind].append(json.loads(process.stdout))
    result: dict[str, object] = {"tokens": arguments.tokens, "vocab": arguments.vocab}
    result |= {"repeats": arguments.repeats, "torch": torch.__version__}
    for kind in KINDS:
        seconds = [run["cpu_seconds"] for run in runs[kind]]
        ratios = [
            base["cpu_seconds"] / run["cpu_seconds"]
            for base, run in zip(runs["eager"], runs[kind], strict=True)
        ]
        result[kind] = {
            "cpu_seconds": round(statistics.median(seconds), 3),
            "from_to": [round(min(seconds), 3), round(max(seconds), 3)],
            "times_less_than_eager": round(statistics.median(ratios), 2),
            "beyond_gb": round(max(run["beyond_gb"] for run in runs[kind]), 2),
        }
        print(f"{kind:14} {result[kind]}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
