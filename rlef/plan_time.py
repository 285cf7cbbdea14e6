"""Seconds of one step, by phase: rollout, execution, scoring, updates, publishing.

The rates are a datasheet's times an assumption (`plan_cluster.Assumptions`). Sampling is a small simulation,
since its last and longest episodes decide when it ends; everything else is operations and bytes over rates.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from rlef.config import Config
from rlef.plan_cluster import Assumptions, Cluster, bandwidth_within, gather_s, reduce_s
from rlef.plan_memory import GRADIENT_BYTES, Layout, trained_bytes
from rlef.plan_model import Head, ModelSize, stage_parameters

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What one step does, in tokens."""

    episodes: int  # of a step
    updates: int  # of a step
    turns: float  # responses of an episode, on average
    max_turns: int
    prompt_tokens: float  # of the first message, on average
    response_tokens: float  # on average
    max_response_tokens: int
    feedback_tokens: float  # of one message, on average
    longest_tokens: int  # an episode can have
    micro_batch_tokens: int
    slots: int  # sequences that one sampler decodes at once
    has_value: bool = True
    has_reference: bool = True
    executes: bool = True

    @property
    def episode_tokens(self) -> float:
        """On average."""
        return (
            self.prompt_tokens + self.turns * self.response_tokens + (self.turns - 1) * self.feedback_tokens
        )

    @property
    def read_tokens(self) -> float:
        """Of an episode, those that the policy does not write. A cache keeps what was read once."""
        return self.prompt_tokens + (self.turns - 1) * self.feedback_tokens


def workload_of(config: Config, assumptions: Assumptions, *, longest_tokens: int) -> Workload:
    """The limits of a run file, and mean lengths as shares of them."""
    rollout = config.rollout
    return Workload(
        episodes=rollout.episodes_per_step,
        updates=config.ppo.updates_per_step,
        turns=max(1.0, assumptions.turn_share * rollout.turns),
        max_turns=rollout.turns,
        prompt_tokens=rollout.max_few_shot_tokens + assumptions.prompt_share * rollout.max_prompt_tokens,
        response_tokens=assumptions.response_share * rollout.max_response_tokens,
        max_response_tokens=rollout.max_response_tokens,
        feedback_tokens=assumptions.feedback_share * rollout.max_feedback_tokens,
        longest_tokens=longest_tokens,
        micro_batch_tokens=config.ppo.micro_batch_tokens,
        slots=rollout.slots,
        has_value=config.ppo.has_value,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one step."""

    rollout: float
    execution: float  # what sampling does not hide
    scoring: float
    updates: float
    publishing: float
    other: float
    overlapped: bool  # sampling of the next step goes on during scoring and updates

    @property
    def total(self) -> float:
        sampling, learning = self.rollout + self.execution, self.scoring + self.updates
        together = max(sampling, learning) if self.overlapped else sampling + learning
        return together + self.publishing + self.other


def step_time(
    size: ModelSize,
    cluster: Cluster,
    layout: Layout,
    work: Workload,
    assumptions: Assumptions,
    *,
    cache_tokens: float,
) -> StepTime:
    """Of a step in which each sampler's cache holds `cache_tokens`."""
    sampled = rollout_s(size, cluster, layout, work, assumptions, cache_tokens=cache_tokens)
    seconds = {
        "rollout": sampled,
        "execution": execution_s(cluster, layout, work, assumptions, hidden_s=sampled),
        "scoring": scoring_s(size, cluster, layout, work, assumptions),
        "updates": updates_s(size, cluster, layout, work, assumptions),
        "publishing": publishing_s(size, cluster, layout, assumptions),
        "other": assumptions.switch_s if layout.colocated and not layout.whole_cache else 0.0,
    }
    factor = assumptions.step_overhead
    return StepTime(
        **{name: phase * factor for name, phase in seconds.items()}, overlapped=not layout.colocated
    )


def rollout_s(
    size: ModelSize,
    cluster: Cluster,
    layout: Layout,
    work: Workload,
    assumptions: Assumptions,
    *,
    cache_tokens: float,
) -> float:
    """Until the last sampler's last episode has its last token; without execution."""
    samplers = layout.sampling_gpus // layout.sampler_tensor
    here = -(-work.episodes // samplers)
    lengths = episode_lengths(work, here)
    context = work.prompt_tokens + (work.episode_tokens - work.prompt_tokens) / 2
    fitting = max(1, int(cache_tokens / work.episode_tokens))
    slots = min(here, work.slots, fitting)
    step = DecodeStep(size, cluster, layout, assumptions, context)
    operations = size.forward_operations("logits", work.episode_tokens) * work.read_tokens * here
    flops = cluster.gpu.flops(layout.sampler_precision)
    rate = flops * assumptions.prefill_efficiency * layout.sampler_tensor
    return operations / rate + _decode_all(lengths, slots, step)


def episode_lengths(work: Workload, count: int) -> list[float]:
    """Tokens that each of `count` episodes of one sampler decodes, spread as evenly as a sample can be.

    A response's length is exponential, cut at its limit, with the workload's mean. Turns of an episode are
    drawn independently. The sampler is the unlucky one: among the many responses of a step some one never
    stops, and runs to its limit. No random numbers: equal plans are equal.
    """
    scale = exponential_scale(work.response_tokens, work.max_response_tokens)
    lengths = []
    for index in range(count):
        turns = math.floor(work.turns + (index * _GOLDEN) % 1.0)
        first = (index + 0.5) / count
        quantiles = [first] + [(index + 0.5) * math.sqrt(turn + 1.5) % 1.0 for turn in range(1, turns)]
        responses = [_cut_exponential(scale, work, quantile) for quantile in quantiles]
        if index == count - 1:
            responses[0] = work.max_response_tokens
        lengths.append(sum(responses))
    return lengths


def _cut_exponential(scale: float, work: Workload, quantile: float) -> float:
    if math.isinf(scale):
        return work.response_tokens
    return min(work.max_response_tokens, -scale * math.log1p(-quantile))


def exponential_scale(mean: float, limit: float) -> float:
    """The scale of an exponential variable that has this mean when cut at `limit`; infinite if both agree."""
    if mean >= limit * 0.999:
        return math.inf
    low, high = mean, mean * 1e6
    for _ in range(100):
        middle = math.sqrt(low * high)
        if middle * -math.expm1(-limit / middle) < mean:
            low = middle
        else:
            high = middle
    return low


class DecodeStep:
    """Seconds in which a sampler writes one token of each of its sequences."""

    def __init__(
        self, size: ModelSize, cluster: Cluster, layout: Layout, assumptions: Assumptions, context: float
    ) -> None:
        gpu, ranks = cluster.gpu, layout.sampler_tensor
        matrices = size.matrix_parameters("logits") / ranks
        reading = gpu.memory_bandwidth * assumptions.decode_bandwidth
        rate = gpu.flops(layout.sampler_precision) * assumptions.decode_operations
        self._weights = matrices * layout.sampler_element_bytes / reading
        self._operations = 2 * matrices / rate
        self._cache = size.cache_elements() * layout.sampler_element_bytes * context / ranks / reading
        self._each = assumptions.decode_sequence_s
        self._fixed = assumptions.decode_step_s
        if ranks > 1:
            self._fixed += 2 * size.num_hidden_layers * assumptions.reduce_latency_s
            link = bandwidth_within(cluster, ranks, assumptions)
            bytes_ = 2 * size.num_hidden_layers * size.hidden_size * layout.sampler_element_bytes
            self._each += reduce_s(bytes_, ranks, link)

    def __call__(self, sequences: int) -> float:
        matrices = max(self._weights, self._operations * sequences)
        return matrices + (self._cache + self._each) * sequences + self._fixed


def _decode_all(lengths: list[float], slots: int, step: DecodeStep) -> float:
    """Continuous batching: a sequence that ends gives its slot to the next one at once."""
    waiting = list(reversed(lengths))
    decoded = elapsed = 0.0  # tokens that a sequence in a slot since the start would have, and seconds
    ends: list[float] = []
    while waiting or ends:
        while waiting and len(ends) < slots:
            heapq.heappush(ends, decoded + waiting.pop())
        end = heapq.heappop(ends)
        elapsed += (end - decoded) * step(len(ends) + 1)
        decoded = end
    return elapsed


def execution_s(
    cluster: Cluster, layout: Layout, work: Workload, assumptions: Assumptions, *, hidden_s: float
) -> float:
    """Programs run while others decode. What remains are the tests for which the cores need longer than the
    `hidden_s` of sampling, or those of the last episode, for which nobody else decodes."""
    if not work.executes:
        return 0.0
    nodes = -(-layout.sampling_gpus // cluster.gpus_per_node)
    cores = nodes * cluster.gpus_per_node * assumptions.cores_per_gpu
    tests = work.episodes * work.turns * assumptions.tests_per_turn
    own = work.max_turns * assumptions.tests_per_turn
    return max(tests / cores * assumptions.test_s - hidden_s, own * assumptions.test_s)


def scoring_s(
    size: ModelSize, cluster: Cluster, layout: Layout, work: Workload, assumptions: Assumptions
) -> float:
    """Forward passes of the policy, the reference and the value network over a step's episodes."""
    heads: list[Head] = ["logits"]
    heads += ["logits"] if work.has_reference else []
    heads += ["value"] if work.has_value else []
    passes = [_passes_s(size, cluster, layout, work, assumptions, head, forward=1) for head in heads]
    return work.updates * sum(passes)


def updates_s(
    size: ModelSize, cluster: Cluster, layout: Layout, work: Workload, assumptions: Assumptions
) -> float:
    """Forward, backward, gradients over the replicas, optimiser; of the policy and the value network."""
    heads: list[Head] = ["logits", "value"] if work.has_value else ["logits"]
    forward = 4 if layout.recompute else 3  # a backward pass is two forward passes' work
    seconds = 0.0
    for head in heads:
        seconds += _passes_s(size, cluster, layout, work, assumptions, head, forward=forward)
        seconds += _optimizer_s(size, cluster, layout, assumptions, head)
    return work.updates * seconds


def busiest_share(sequences: int, replicas: int, assumptions: Assumptions) -> float:
    """Tokens of the replica with most of them, over the mean of all: they wait for it.

    Replicas get whole sequences. The largest of n sums of k lengths exceeds their mean by about
    sqrt(2 ln n) standard deviations; sharing out by length divides that by about k.
    """
    each = sequences / replicas
    extreme = math.sqrt(2 * math.log(replicas)) if replicas > 1 else 0.0
    return math.ceil(each) / each * (1 + assumptions.length_spread * extreme / math.ceil(each))


def _passes_s(
    size: ModelSize,
    cluster: Cluster,
    layout: Layout,
    work: Workload,
    assumptions: Assumptions,
    head: Head,
    *,
    forward: int,
) -> float:
    """Of one update's episodes through one network; `forward` is the work, in forward passes: 1, 3 or 4."""
    sequences = work.episodes / work.updates
    tokens = sequences * work.episode_tokens / layout.data
    tokens *= busiest_share(int(sequences), layout.data, assumptions)
    micro_batches = max(1, math.ceil(tokens / work.micro_batch_tokens))
    each = tokens / micro_batches
    chunks = layout.virtual_pipeline
    if chunks > 1:  # the schedule wants as many for each rank: the last ones are padding
        micro_batches = math.ceil(micro_batches / layout.pipeline) * layout.pipeline
    ranks = layout.tensor * layout.pipeline
    rate = cluster.gpu.flops(layout.precision) * assumptions.training_efficiency
    computing = forward * each * size.forward_operations(head, work.episode_tokens) / ranks / rate
    layers = size.num_hidden_layers / layout.pipeline
    computing = max(computing, forward * layers * assumptions.layer_launch_s)
    hidden_bytes = each * size.hidden_size * layout.element_bytes
    moving = 0.0
    passes = max(1, forward - 1)  # a backward pass, with the work of two, communicates once
    if layout.tensor > 1:  # two all-reduces per layer and pass
        link = bandwidth_within(cluster, layout.tensor, assumptions)
        moving += 2 * passes * layers * reduce_s(hidden_bytes, layout.tensor, link)
    if layout.pipeline > 1:
        hop = bandwidth_within(cluster, ranks, assumptions)
        moving += chunks * (1 if forward == 1 else 2) * hidden_bytes / hop
    return (micro_batches + (layout.pipeline - 1) / chunks) * (computing + moving)


def _optimizer_s(
    size: ModelSize, cluster: Cluster, layout: Layout, assumptions: Assumptions, head: Head
) -> float:
    """Gradients over the replicas, not overlapped with anything, and AdamW's reading and writing."""
    parameters = stage_parameters(
        size, head, stage=layout.pipeline - 1, stages=layout.pipeline, tensor=layout.tensor
    )
    weights, gradients, states = trained_bytes(parameters, layout)
    memory = cluster.gpu.memory_bandwidth * assumptions.decode_bandwidth
    share = layout.data if layout.distributed_optimizer else 1
    stepping = (2 * states + (weights + gradients) / share) / memory
    if layout.data == 1:
        return stepping
    link = bandwidth_within(cluster, layout.training_gpus, assumptions)
    bytes_ = parameters * GRADIENT_BYTES
    if layout.distributed_optimizer:
        return stepping + gather_s(bytes_, layout.data, link) + gather_s(weights, layout.data, link)
    return stepping + reduce_s(bytes_, layout.data, link)


def publishing_s(size: ModelSize, cluster: Cluster, layout: Layout, assumptions: Assumptions) -> float:
    """The whole weights to every sampler: each of its ranks receives them all, bucket by bucket."""
    bytes_ = size.parameters * layout.element_bytes
    ranks = layout.tensor * layout.pipeline
    receivers = ranks if layout.colocated else layout.training_gpus + layout.sampling_gpus
    if receivers == 1:
        return 0.0
    return bytes_ / bandwidth_within(cluster, receivers, assumptions)
