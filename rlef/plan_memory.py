"""Memory of one rank, by part.

Weights, gradients and optimiser states are counted exactly: a test compares them with a Megatron network's
own tensors. Activations are counted from the tensors that a layer keeps for its backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlef.plan_cluster import Assumptions, Gpu, Precision
from rlef.plan_model import Head, ModelSize, stage_parameters

GRADIENT_BYTES = 4  # accumulated in fp32, whatever the weights are
MASTER_BYTES = 4  # beside bf16 weights; fp32 weights are their own
MOMENT_BYTES = 8  # AdamW's two, in fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a run is laid over GPUs. `training_gpus` and `sampling_gpus` are the same ones when colocated."""

    tensor: int = 1
    pipeline: int = 1
    training_gpus: int = 1
    sampling_gpus: int = 1
    sampler_tensor: int = 1
    whole_cache: bool = False  # room for the longest dialog in each slot, as the embedded sampler takes it
    colocated: bool = True
    precision: Precision = "bf16"
    distributed_optimizer: bool = False
    sequence_parallel: bool = False
    recompute: bool = False

    @property
    def data(self) -> int:
        """Data-parallel replicas."""
        return self.training_gpus // (self.tensor * self.pipeline)

    @property
    def element_bytes(self) -> int:
        return 2 if self.precision == "bf16" else 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes on the fullest rank of the job."""

    weights: float
    gradients: float
    optimizer: float  # moments, and fp32 master weights beside bf16 ones
    reference: float
    value_network: float  # its weights, gradients and optimiser
    activations: float
    logits: float
    sampler_weights: float
    kv_cache: float
    reserve: float

    @property
    def training(self) -> float:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.reference
            + self.value_network
            + self.activations
            + self.logits
        )

    @property
    def total(self) -> float:
        return self.training + self.sampler_weights + self.kv_cache + self.reserve


def trained_bytes(parameters: int, layout: Layout) -> tuple[float, float, float]:
    """Weights, gradients and optimiser of so many parameters of a rank."""
    states = MOMENT_BYTES + (MASTER_BYTES if layout.precision == "bf16" else 0)
    share = layout.data if layout.distributed_optimizer else 1
    return parameters * layout.element_bytes, parameters * GRADIENT_BYTES, parameters * states / share


def activation_elements(size: ModelSize, layout: Layout) -> float:
    """Elements per token that one layer keeps for its backward pass on one rank.

    What is as wide as the hidden state is on every tensor-parallel rank, unless the sequence is split too:
    the input of each norm and its output. Divided in any case: query, key and value before and after their
    rotation, what attention gives, gate and up, and their product.
    """
    if layout.recompute:
        return size.hidden_size / (layout.tensor if layout.sequence_parallel else 1)
    wide = 4 * size.hidden_size / (layout.tensor if layout.sequence_parallel else 1)
    attention = 2 * (size.query_size + size.key_value_size) + size.key_value_size + size.query_size
    return wide + (attention + 3 * size.intermediate_size) / layout.tensor


def rank_memory(
    size: ModelSize,
    layout: Layout,
    assumptions: Assumptions,
    *,
    micro_batch_tokens: int,
    cache_tokens: float,
    has_value: bool = True,
    has_reference: bool = True,
) -> list[RankMemory]:
    """Of each pipeline stage's ranks when training, the sampler's parts beside them where they are colocated.

    `cache_tokens` are those that one sampler, over its `sampler_tensor` ranks, is to hold at once.
    """
    sampler, cache = sampler_bytes(size, layout, cache_tokens) if layout.colocated else (0.0, 0.0)
    stages = []
    for stage in range(layout.pipeline):
        weights, gradients, optimizer = trained_bytes(_parameters(size, "logits", layout, stage), layout)
        value = trained_bytes(_parameters(size, "value", layout, stage), layout)
        activations, logits = _pass_bytes(size, layout, stage, micro_batch_tokens)
        stages.append(
            RankMemory(
                weights=weights,
                gradients=gradients,
                optimizer=optimizer,
                reference=weights if has_reference else 0.0,
                value_network=sum(value) if has_value else 0.0,
                activations=activations,
                logits=logits,
                sampler_weights=sampler,
                kv_cache=cache,
                reserve=assumptions.memory_reserve_bytes,
            )
        )
    return stages


def sampler_bytes(size: ModelSize, layout: Layout, cache_tokens: float) -> tuple[float, float]:
    """Weights and cache of one of a sampler's ranks."""
    weights = stage_parameters(size, "logits", stage=0, stages=1, tensor=layout.sampler_tensor)
    cache = cache_tokens * size.cache_elements() / layout.sampler_tensor
    return weights * layout.element_bytes, cache * layout.element_bytes


def cache_capacity(
    size: ModelSize, layout: Layout, assumptions: Assumptions, gpu: Gpu, taken: float
) -> float:
    """Tokens that a sampler's cache has room for, when `taken` bytes of each of its ranks are others'."""
    weights, _ = sampler_bytes(size, layout, 0)
    free = gpu.memory_bytes - taken - weights - assumptions.memory_reserve_bytes
    per_token = size.cache_elements() * layout.element_bytes / layout.sampler_tensor
    return max(0.0, free * assumptions.kv_memory_share / per_token)


def _parameters(size: ModelSize, head: Head, layout: Layout, stage: int) -> int:
    return stage_parameters(size, head, stage=stage, stages=layout.pipeline, tensor=layout.tensor)


def _pass_bytes(size: ModelSize, layout: Layout, stage: int, tokens: int) -> tuple[float, float]:
    """Activations of the micro-batches in flight (1F1B), and the logits of one with their gradient."""
    layers = size.num_hidden_layers / layout.pipeline
    in_flight = layout.pipeline - stage
    kept = layers * activation_elements(size, layout) * in_flight
    if layout.recompute:  # one layer at a time is computed again, and kept whole meanwhile
        kept += activation_elements(size, _without_recomputation(layout))
    logits = 0.0
    if stage == layout.pipeline - 1:
        logits = 2.0 * tokens * size.vocab_size / layout.tensor * layout.element_bytes
    return tokens * kept * layout.element_bytes, logits


def _without_recomputation(layout: Layout) -> Layout:
    return Layout(
        tensor=layout.tensor, sequence_parallel=layout.sequence_parallel, precision=layout.precision
    )
