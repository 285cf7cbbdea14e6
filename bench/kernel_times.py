"""Times of the kernels on a GPU, measured where there is one, beside what others have published for theirs.

    python bench/kernel_times.py [--gpu H100]

Without a GPU the column `ours` is a PREDICTION, and says so: the bytes that the kernels move (the gate of
`bench/kernels.py --aot` counts them) over 0.85 of the DRAM bandwidth of the datasheet, and matrix products at
0.85 of the datasheet's dense bf16 rate. With a GPU it is the median of many launches on it, each beside the
same arithmetic in eager torch where that fits in memory; only rows published for that GPU compare then.

Published figures are those of their authors, of operations that move the same tensors but are not all the
same: cross-entropy where ours is PPO's loss, for one. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import rlef_kernels

REACHED = 0.85  # of a datasheet's rate, in a prediction
# Bytes per second of DRAM and dense bf16 operations per second, from datasheets.
GPUS = {
    "A100": (2.039e12, 312e12),
    "H100": (3.35e12, 989e12),
    "H200": (4.8e12, 989e12),
    "B200": (8.0e12, 2250e12),
}
LIGER_CSV = "Liger-Kernel, benchmark/data/all_benchmark_data.csv, megatron_cross_entropy (2026-08)"
TRL = "TRL, issue 7244 (2026-09)"
LIGER_TP = "Liger-Kernel, pull request 1422 (2026), tensor parallel 1"
RL_TRITON = "rl-triton 0.1.3, benchmarks.md (2026-08), time on the device"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operation at one size, in bf16 unless it says otherwise."""

    operation: str  # a key of OPERATIONS
    tokens: int
    vocab: int = 0
    hidden: int = 0
    sequences: int = 0

    @property
    def name(self) -> str:
        sizes = {"vocab": self.vocab, "hidden": self.hidden, "sequences": self.sequences}
        words = [f"{name} {size:,}" for name, size in sizes.items() if size]
        return ", ".join([f"{self.operation}: {self.tokens:,} tokens", *words])


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What somebody measured for the operation of a case, or what comes nearest to it."""

    what: str
    milliseconds: float
    gpu: str
    source: str


LOGPROBS = Case(operation="logprobs forward", tokens=8192, vocab=151_936)
POLICY_32K = Case(operation="policy loss forward+backward", tokens=8192, vocab=32_768)
POLICY_128K = Case(operation="policy loss forward+backward", tokens=8192, vocab=131_072)
LINEAR_128K = Case(operation="linear loss forward+backward", tokens=2048, vocab=131_072, hidden=4096)
LINEAR_152K = Case(operation="linear loss forward+backward", tokens=8192, vocab=151_936, hidden=4096)
GAE_LONG = Case(operation="gae", tokens=4096 * 2048, sequences=4096)
GAE_SHORT = Case(operation="gae", tokens=16384 * 512, sequences=16384)

PUBLISHED = {
    LOGPROBS: [
        Published(what="TRL, torch", milliseconds=12.8, gpu="H100", source=TRL),
        Published(what="TRL, a Triton kernel tried there", milliseconds=0.89, gpu="H100", source=TRL),
    ],
    POLICY_32K: [
        Published(what="Liger cross-entropy", milliseconds=2.06, gpu="H100", source=LIGER_CSV),
        Published(what="Megatron cross-entropy, fused", milliseconds=4.45, gpu="H100", source=LIGER_CSV),
        Published(what="Megatron cross-entropy", milliseconds=5.41, gpu="H100", source=LIGER_CSV),
    ],
    POLICY_128K: [
        Published(what="Liger cross-entropy", milliseconds=7.96, gpu="H100", source=LIGER_CSV),
        Published(what="Megatron cross-entropy, fused", milliseconds=18.23, gpu="H100", source=LIGER_CSV),
        Published(what="Megatron cross-entropy", milliseconds=21.25, gpu="H100", source=LIGER_CSV),
    ],
    LINEAR_128K: [
        Published(what="Liger CuTe, backward alone", milliseconds=8.59, gpu="H200", source=LIGER_TP),
        # 445.2 TFLOP/s of 6 x tokens x vocab x hidden
        Published(what="verl, backward alone", milliseconds=14.82, gpu="H200", source=LIGER_TP),
    ],
    LINEAR_152K: [
        Published(what="the two bare matrix products", milliseconds=42, gpu="H100", source=TRL),
        Published(what="cross-entropy, logits in memory", milliseconds=59, gpu="H100", source=TRL),
        Published(what="TRL chunked cross-entropy", milliseconds=167, gpu="H100", source=TRL),
        Published(what="Liger fused linear cross-entropy", milliseconds=192, gpu="H100", source=TRL),
    ],
    GAE_LONG: [Published(what="rl-triton", milliseconds=0.054, gpu="H100", source=RL_TRITON)],
    GAE_SHORT: [Published(what="rl-triton", milliseconds=0.046, gpu="H100", source=RL_TRITON)],
}


def predicted_milliseconds(case: Case, gpu: str, *, rows_stay_in_cache: bool = True) -> float:
    """What the bytes and the products would take, one after the other.

    The policy loss reads a row twice, and its second reading is meant to come from the L2 cache.
    """
    bandwidth, rate = GPUS[gpu]
    logits = case.tokens * case.vocab
    bytes_moved = {
        "logprobs forward": 2 * logits,
        "policy loss forward+backward": (4 if rows_stay_in_cache else 6) * logits,
        "linear loss forward+backward": 6 * logits,  # each chunk: written, read, its gradient written
        "gae": case.tokens * (4 + 4 + 1 + 4 + 4),
    }[case.operation]
    products = 6 * logits * case.hidden
    return 1e3 * (bytes_moved / (REACHED * bandwidth) + products / (REACHED * rate))


def tensors_of(case: Case, device: str) -> dict[str, Any]:
    """What `ppo_policy_loss_from_logits` and `linear_ppo_loss` take besides logits."""
    random = torch.Generator(device=device).manual_seed(0)
    noise = torch.randn(3, case.tokens, device=device, generator=random)
    return {
        "targets": torch.randint(0, case.vocab, (case.tokens,), device=device, generator=random),
        "old_logprobs": -noise[0].abs(),
        "behaviour_logprobs": -noise[1].abs(),
        "advantages": noise[2],
        "mask": torch.ones(case.tokens, dtype=torch.bool, device=device),
        "clip_ratio": 0.2,
        "behaviour_correction": True,
        "normaliser": case.tokens,
    }


def eager_loss(logits: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """PPO's loss as one would write it down."""
    logprobs = logits.float().log_softmax(-1).gather(1, arguments["targets"][:, None])[:, 0]
    ratio = (logprobs - arguments["old_logprobs"]).exp()
    weight = (logprobs.detach() - arguments["behaviour_logprobs"]).clamp(max=0).exp()
    product, advantages = ratio * weight, arguments["advantages"]
    bounded = torch.minimum(product * advantages, product.clamp(0.8, 1.2) * advantages)
    return -bounded.sum() / arguments["normaliser"]


def calls_of(case: Case, device: str = "cuda") -> tuple[Callable[[], object], Callable[[], object] | None]:
    """Our operation, and the same in eager torch; each returns its results."""
    if case.operation == "gae":
        length = case.tokens // case.sequences
        values, rewards = torch.randn(2, case.tokens, device=device).unbind()
        mask = torch.ones(case.tokens, dtype=torch.bool, device=device)
        borders = torch.arange(0, case.tokens + 1, length, device=device, dtype=torch.int32)
        return lambda: rlef_kernels.gae(values, rewards, mask, borders, gamma=0.99, lambda_=0.95), None
    if case.operation == "logprobs forward":
        logits = torch.randn(case.tokens, case.vocab, device=device, dtype=torch.bfloat16)
        targets = tensors_of(case, device)["targets"]

        def eager_logprobs() -> object:
            every = logits.float().log_softmax(-1)
            return every.gather(1, targets[:, None])[:, 0], -(every.exp() * every).sum(-1)

        def our_logprobs() -> object:
            found = rlef_kernels.logprobs_from_logits(logits, targets, want_entropy=True)
            return found.logprobs, found.entropy

        return our_logprobs, eager_logprobs
    arguments = tensors_of(case, device)
    if case.operation == "policy loss forward+backward":
        logits = torch.randn(case.tokens, case.vocab, device=device, dtype=torch.bfloat16).requires_grad_()

        def gradient(loss: torch.Tensor) -> object:
            return torch.autograd.grad(loss, logits)

        return (
            lambda: gradient(rlef_kernels.ppo_policy_loss_from_logits(logits, **arguments)[0]),
            lambda: gradient(eager_loss(logits, arguments)),
        )
    hidden = torch.randn(case.tokens, case.hidden, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(case.vocab, case.hidden, device=device, dtype=torch.bfloat16) / case.hidden**0.5
    weight.requires_grad_()
    return (
        lambda: torch.autograd.grad(
            rlef_kernels.linear_ppo_loss(hidden, weight, **arguments)[0], (hidden, weight)
        ),
        lambda: torch.autograd.grad(eager_loss(hidden @ weight.T, arguments), (hidden, weight)),
    )


def measured_milliseconds(call: Callable[[], object]) -> float | None:
    """The median of the launches of half a second; None where the GPU has too little memory."""
    from triton.testing import do_bench

    try:
        return float(do_bench(call, warmup=100, rep=500, return_mode="median"))
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()


def gpu_here() -> str | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((known for known in GPUS if known in name), name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpu", default="H100", choices=GPUS, help="whose datasheet, without a GPU")
    chosen = parser.parse_args().gpu
    here = gpu_here()
    print(f"ours: MEASURED on this {here}" if here else "ours: PREDICTED, nothing was run; there is no GPU")
    rows = []
    for case, published in PUBLISHED.items():
        print(f"\n{case.name}")
        eager = None
        if here is None:
            row: dict[str, Any] = {"case": case.name, "predicted_ms": {}}
            for gpu in sorted({chosen, *(each.gpu for each in published)}):
                row["predicted_ms"][gpu] = round(predicted_milliseconds(case, gpu), 3)
                print(f"  {row['predicted_ms'][gpu]:9.3f} ms  {gpu}  ours, predicted")
                without = round(predicted_milliseconds(case, gpu, rows_stay_in_cache=False), 3)
                if without != row["predicted_ms"][gpu]:
                    row[f"predicted_ms_without_l2_{gpu}"] = without
                    print(f"  {without:9.3f} ms  {gpu}  ours, predicted, if no row stays in L2")
        else:
            ours, torch_call = calls_of(case)
            milliseconds = measured_milliseconds(ours)
            eager = measured_milliseconds(torch_call) if torch_call else None
            row = {"case": case.name, "gpu": here, "measured_ms": milliseconds, "eager_torch_ms": eager}
            row["predicted_ms"] = predicted_milliseconds(case, here) if here in GPUS else None
            print(f"  {milliseconds or float('nan'):9.3f} ms  {here}  ours, measured")
            print(f"  {eager or float('nan'):9.3f} ms  {here}  eager torch, measured")
        for each in published:
            print(f"  {each.milliseconds:9.3f} ms  {each.gpu}  {each.what} [{each.source}]")
        rows.append(row)
    json.dump({"measured": here is not None, "rows": rows}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
