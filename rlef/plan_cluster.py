"""What a plan knows about machines: GPUs from their datasheets, how they are joined, and the assumptions
about what share of a datasheet's rates a run reaches.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from rlef.config import ConfigError

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Rates of a datasheet, without sparsity."""

    name: str
    bf16_flops: float  # dense matrix products, operations per second
    fp32_flops: float  # without TF32, which would round the inputs
    memory_bytes: float
    memory_bandwidth: float  # bytes per second
    link_bandwidth: float  # to the other GPUs of the node, bytes per second and direction

    def flops(self, precision: Precision) -> float:
        return self.bf16_flops if precision == "bf16" else self.fp32_flops


# NVIDIA's datasheets of the SXM (A100, H100, H200, H20), HGX (B200) and NVL72 (GB200) variants.
GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="A100",
            bf16_flops=312e12,
            fp32_flops=19.5e12,
            memory_bytes=80e9,
            memory_bandwidth=2.039e12,
            link_bandwidth=300e9,
        ),
        Gpu(
            name="H100",
            bf16_flops=989e12,
            fp32_flops=67e12,
            memory_bytes=80e9,
            memory_bandwidth=3.35e12,
            link_bandwidth=450e9,
        ),
        Gpu(
            name="H200",
            bf16_flops=989e12,
            fp32_flops=67e12,
            memory_bytes=141e9,
            memory_bandwidth=4.8e12,
            link_bandwidth=450e9,
        ),
        Gpu(
            name="H20",
            bf16_flops=148e12,
            fp32_flops=44e12,
            memory_bytes=96e9,
            memory_bandwidth=4.0e12,
            link_bandwidth=450e9,
        ),
        Gpu(
            name="B200",
            bf16_flops=2250e12,
            fp32_flops=75e12,
            memory_bytes=180e9,
            memory_bandwidth=8.0e12,
            link_bandwidth=900e9,
        ),
        Gpu(
            name="GB200",
            bf16_flops=2500e12,
            fp32_flops=80e12,
            memory_bytes=186e9,
            memory_bandwidth=8.0e12,
            link_bandwidth=900e9,
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int = 8
    network_gbps: float = 400.0  # per GPU and direction, as one ConnectX-7 for each

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def network_bandwidth(self) -> float:
        """Bytes per second, per GPU and direction."""
        return self.network_gbps * 1e9 / 8


def cluster_of(gpu: str, *, nodes: int, gpus_per_node: int, network_gbps: float) -> Cluster:
    """A cluster from what the command line says.

    Raises:
        ConfigError: no such GPU is in the table.
    """
    known = {name.lower(): found for name, found in GPUS.items()}
    if gpu.lower() not in known:
        raise ConfigError(f"--gpu {gpu}: no such GPU in the table; take the nearest of {', '.join(GPUS)}")
    return Cluster(
        gpu=known[gpu.lower()], nodes=nodes, gpus_per_node=gpus_per_node, network_gbps=network_gbps
    )


def _assumed(value: float, reason: str) -> float:
    """A field of `Assumptions`: its default, and why."""
    described: float = field(default=value, metadata={"reason": reason})
    return described


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """Every number of a plan that is neither in the model, nor in the run file, nor in a datasheet.

    docs/plan.md says which are calibrated on what, and which are judged.
    """

    training_efficiency: float = _assumed(
        0.45,
        "Share of the dense rate in forward and backward passes, recomputation counted as work. Published: "
        "0.43 (Llama 3 405B, 8,192 H100, bf16) and 0.46 (a 7B model on H100, FSDP).",
    )
    prefill_efficiency: float = _assumed(
        0.45,
        "Share of the dense rate when the sampler reads prompts and feedback: taken as that of training.",
    )
    decode_bandwidth: float = _assumed(
        0.76,
        "Share of the DRAM rate at which decoding reads weights and cache. With decode_step_s it makes two "
        "published times of a token of Llama 3.1 8B in vLLM: 6.48 ms (H100) and 13.3 ms (A100 40 GB).",
    )
    decode_step_s: float = _assumed(
        0.0005, "Seconds of one decoding step that do not depend on the GPU: see decode_bandwidth."
    )
    decode_sequence_s: float = _assumed(
        0.00002,
        "Seconds of one decoding step per sequence: drawing, log-probabilities, bookkeeping. Judged.",
    )
    decode_operations: float = _assumed(
        0.5, "Share of the dense rate in the thin matrix products of decoding. Judged."
    )
    reduce_latency_s: float = _assumed(
        0.00003,
        "Seconds of one small all-reduce within a node. Judged on vLLM's published latencies on H200, which "
        "are 1 to 2 ms a token above the plan for Llama 3.1 8B on one GPU and for 70B on four.",
    )
    link_efficiency: float = _assumed(
        0.75, "Share of a link's rate that large collectives reach, in a node and between nodes. Judged."
    )
    layer_launch_s: float = _assumed(
        0.0001,
        "Least seconds of one layer's forward pass, however few tokens it has: some twenty kernels. A "
        "backward pass has twice as many. Judged.",
    )
    length_spread: float = _assumed(
        0.5, "Standard deviation of the tokens of an episode, as a share of their mean. Judged."
    )
    step_overhead: float = _assumed(
        1.2,
        "Factor on the whole step for all that is not modelled. Calibrated on NeMo RL v0.4, Llama 3.1 8B, "
        "1 step off.",
    )
    switch_s: float = _assumed(
        17.0,
        "Seconds a step to turn colocated GPUs from learning to sampling and back, before that factor. "
        "Calibrated on NeMo RL v0.4, Llama 3.1 8B, on policy. The embedded sampler moves nothing: none.",
    )
    kv_memory_share: float = _assumed(
        0.9, "Share of the memory left on a sampling GPU that the cache may take. Judged: vLLM's own default."
    )
    memory_reserve_bytes: float = _assumed(
        4e9, "Bytes of each GPU for CUDA, NCCL, workspaces and fragmentation. Judged."
    )
    test_s: float = _assumed(
        0.05, "Core-seconds to run a program on one test. Judged; a run's own figure is in its metrics."
    )
    tests_per_turn: float = _assumed(
        5.0, "Tests that run per response, public and private. Judged; CodeContests has more private ones."
    )
    cores_per_gpu: float = _assumed(12.0, "CPU cores per GPU that run tests: 96 for a node of 8.")
    prompt_share: float = _assumed(
        0.4, "Mean prompt, as a share of rollout.max_prompt_tokens. Judged; metrics.jsonl of a run tells."
    )
    response_share: float = _assumed(
        0.4, "Mean response, as a share of rollout.max_response_tokens. Judged, as above."
    )
    feedback_share: float = _assumed(
        0.25, "Mean feedback, as a share of rollout.max_feedback_tokens. Judged, as above."
    )
    turn_share: float = _assumed(
        0.8, "Mean number of responses of an episode, as a share of rollout.turns. Judged, as above."
    )


def with_assumptions(changes: Iterable[str]) -> Assumptions:
    """The assumptions, changed as `name=value` words say.

    Raises:
        ConfigError: a word has no such form, names nothing, or its value is not a number above 0.
    """
    known = [entry.name for entry in fields(Assumptions)]
    values: dict[str, float] = {}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(known)
            raise ConfigError(f"--assume {change}: there is no assumption {name!r}; {hint}")
        try:
            values[name] = float(text)
        except ValueError:
            raise ConfigError(f"--assume {change}: write it as {name}=NUMBER") from None
        if not 0 < values[name] < float("inf"):
            raise ConfigError(f"--assume {change}: it must be a number above 0")
    return replace(Assumptions(), **values)


def reduce_s(bytes_: float, ranks: int, bandwidth: float) -> float:
    """Seconds of a ring all-reduce: every rank sends and receives its buffer almost twice."""
    return 2 * (ranks - 1) / ranks * bytes_ / bandwidth


def gather_s(bytes_: float, ranks: int, bandwidth: float) -> float:
    """Seconds of a ring all-gather (or reduce-scatter) whose whole buffer has so many bytes."""
    return (ranks - 1) / ranks * bytes_ / bandwidth


def bandwidth_within(cluster: Cluster, ranks: int, assumptions: Assumptions) -> float:
    """Bytes per second between so many neighbouring ranks: the network's once they span nodes."""
    in_node = ranks <= cluster.gpus_per_node
    rate = cluster.gpu.link_bandwidth if in_node else cluster.network_bandwidth
    return rate * assumptions.link_efficiency
