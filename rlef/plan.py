"""`rlef plan`: layouts of a run over a cluster, with their memory and step time, ranked; and the command for
the best one that the trainer can run.

`TRAINER` says what the trainer can run today; a test compares it with the trainer's own configuration.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from rlef.config import ConfigError, RolloutConfig
from rlef.files import write_text
from rlef.plan_cluster import Assumptions, Cluster
from rlef.plan_memory import Layout, RankMemory, cache_capacity, rank_memory
from rlef.plan_model import NAMED, ModelSize
from rlef.plan_time import StepTime, Workload, step_time

_SAMPLING_SHARES = 18  # of a cluster that are tried, when some GPUs sample and others train
_MOST_CHUNKS = 4  # of layers per pipeline rank that are tried: each one more is one more round of messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What a trainer has, of that which a layout can ask for."""

    bf16: bool
    distributed_optimizer: bool
    sequence_parallel: bool
    recompute: bool
    interleaved: bool
    disaggregated: bool
    paged_sampler: bool  # a sampler with a paged cache: vLLM
    split_sampler: bool  # the same over several ranks that only sample
    split_colocated_sampler: bool  # and over several that learn too


# With the embedded sampler; `trainer_with` knows the other. Layouts with context parallelism are not made.
TRAINER = Abilities(
    bf16=True,
    distributed_optimizer=True,
    sequence_parallel=True,
    recompute=True,
    interleaved=True,
    disaggregated=True,
    paged_sampler=False,
    split_sampler=False,
    split_colocated_sampler=False,
)
EVERYTHING = Abilities(**{field.name: True for field in fields(Abilities)})


def trainer_with(rollout: RolloutConfig) -> Abilities:
    """What the trainer can run with these settings."""
    has_vllm = rollout.sampler == "vllm"
    return replace(TRAINER, paged_sampler=has_vllm, split_sampler=has_vllm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout, and what it comes to."""

    layout: Layout
    memory: RankMemory  # of the fullest rank that trains
    sampler_memory: float  # bytes of a rank that only samples; 0 when colocated
    time: StepTime
    fits: bool
    missing: tuple[str, ...]  # what the trainer lacks for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All candidates: those that fit first, the fastest first."""

    candidates: tuple[Candidate, ...]
    work: Workload
    cluster: Cluster
    refusal: str | None  # why the trainer cannot load the model, whatever the layout

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    @property
    def runnable(self) -> Candidate | None:
        """The best that fits and that the trainer can run."""
        if self.refusal is not None:
            return None
        return next((found for found in self.candidates if found.fits and not found.missing), None)


def make_plan(
    size: ModelSize,
    cluster: Cluster,
    work: Workload,
    assumptions: Assumptions,
    *,
    trainer: Abilities = TRAINER,
    refusal: str | None = None,
) -> Plan:
    """Every layout that the model and the cluster divide into, ranked.

    Raises:
        ConfigError: there is none, because not one data-parallel replica gets a sequence of each update.
    """
    made = [layout for has in (trainer, EVERYTHING) for layout in layouts_of(size, cluster, work, has)]
    layouts = dict.fromkeys(made)
    if not layouts:
        raise ConfigError(
            f"no layout uses {cluster.gpus} GPUs: an update has {work.episodes // work.updates} sequences, "
            "and each data-parallel replica needs one; take fewer GPUs or raise rollout.episodes_per_step"
        )
    candidates = [_evaluate(size, cluster, layout, work, assumptions, trainer) for layout in layouts]
    candidates.sort(key=_rank)
    return Plan(candidates=tuple(candidates), work=work, cluster=cluster, refusal=refusal)


def _rank(candidate: Candidate) -> tuple[bool, float, float]:
    """Of those that do not fit, the one that lacks least memory is the most telling."""
    if candidate.fits:
        return False, candidate.time.total, candidate.memory.total
    return True, max(candidate.memory.total, candidate.sampler_memory), candidate.time.total


def layouts_of(size: ModelSize, cluster: Cluster, work: Workload, abilities: Abilities) -> Iterator[Layout]:
    """Layouts that use all that `abilities` has, where it applies.

    Recomputation and interleaved pipelines, which cost something too, are tried both ways.
    """
    for training, sampling in _shares(cluster, abilities):
        for tensor in _tensor_sizes(size, cluster):
            for pipeline in _divisors(size.num_hidden_layers):
                if training % (tensor * pipeline):
                    continue
                replicas = training // (tensor * pipeline)
                if replicas > work.episodes // work.updates:
                    continue
                base = Layout(
                    tensor=tensor,
                    pipeline=pipeline,
                    training_gpus=training,
                    sampling_gpus=sampling,
                    whole_cache=not abilities.paged_sampler,
                    colocated=training == cluster.gpus,
                    precision="bf16" if abilities.bf16 else "fp32",
                    distributed_optimizer=abilities.distributed_optimizer and replicas > 1,
                    sequence_parallel=abilities.sequence_parallel and tensor > 1,
                )
                splits = abilities.split_colocated_sampler if base.colocated else abilities.split_sampler
                samplers = _tensor_sizes(size, cluster) if splits else [1]
                chunks = _chunk_counts(size, pipeline) if abilities.interleaved else [1]
                for sampler_tensor, chunk_count in itertools.product(samplers, chunks):
                    if sampling % sampler_tensor == 0:
                        layout = replace(base, sampler_tensor=sampler_tensor, virtual_pipeline=chunk_count)
                        yield layout
                        if abilities.recompute:
                            yield replace(layout, recompute=True)


def _chunk_counts(size: ModelSize, pipeline: int) -> list[int]:
    """Into how many chunks a pipeline rank's layers may be divided."""
    if pipeline == 1:
        return [1]
    return [count for count in _divisors(size.num_hidden_layers // pipeline) if count <= _MOST_CHUNKS]


def _shares(cluster: Cluster, abilities: Abilities) -> Iterator[tuple[int, int]]:
    """GPUs that train and GPUs that sample: all do both, or some nodes (of one node, some GPUs) sample."""
    yield cluster.gpus, cluster.gpus
    if not abilities.disaggregated:
        return
    unit, units = (1, cluster.gpus) if cluster.nodes == 1 else (cluster.gpus_per_node, cluster.nodes)
    steps = min(units, _SAMPLING_SHARES)
    for share in sorted({units * step // steps for step in range(1, steps)}):
        yield (units - share) * unit, share * unit


def _tensor_sizes(size: ModelSize, cluster: Cluster) -> list[int]:
    """Within a node: beyond it, each layer would wait for the network."""
    return [number for number in _divisors(cluster.gpus_per_node) if tensor_divides(size, number)]


def tensor_divides(size: ModelSize, tensor: int) -> bool:
    """Whether heads, key-value heads, vocabulary and feed-forward channels can be cut over so many ranks."""
    parts = (size.num_attention_heads, size.num_key_value_heads, size.vocab_size, size.intermediate_size)
    return all(part % tensor == 0 for part in parts)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _evaluate(
    size: ModelSize,
    cluster: Cluster,
    layout: Layout,
    work: Workload,
    assumptions: Assumptions,
    trainer: Abilities,
) -> Candidate:
    def stages(cache_tokens: float) -> list[RankMemory]:
        return rank_memory(
            size,
            layout,
            assumptions,
            micro_batch_tokens=max(work.micro_batch_tokens, work.longest_tokens),
            cache_tokens=cache_tokens,
            has_value=work.has_value,
            has_reference=work.has_reference,
        )

    taken = max(memory.training for memory in stages(0)) if layout.colocated else 0.0
    capacity = cache_capacity(size, layout, assumptions, cluster.gpu, taken)
    here = -(-work.episodes // (layout.sampling_gpus // layout.sampler_tensor))
    if layout.whole_cache:
        cache = needed = work.slots * work.longest_tokens
    else:
        needed = work.longest_tokens
        cache = max(needed, min(int(capacity), min(work.slots, here) * work.longest_tokens))
    memory = max(stages(cache), key=lambda stage: stage.total)
    sampling = 0.0
    if not layout.colocated:
        alone = rank_memory(
            size, replace(layout, colocated=True), assumptions, micro_batch_tokens=0, cache_tokens=cache
        )[0]
        sampling = alone.sampler_weights + alone.kv_cache + alone.reserve
    return Candidate(
        layout=layout,
        memory=memory,
        sampler_memory=sampling,
        time=step_time(size, cluster, layout, work, assumptions, cache_tokens=cache),
        fits=capacity >= needed and max(memory.total, sampling) <= cluster.gpu.memory_bytes,
        missing=missing_abilities(layout, trainer),
    )


def missing_abilities(layout: Layout, abilities: Abilities) -> tuple[str, ...]:
    """In words, what `layout` asks for and `abilities` has not."""
    asked = {
        "bf16": (layout.precision == "bf16", abilities.bf16),
        "distributed optimiser": (layout.distributed_optimizer, abilities.distributed_optimizer),
        "sequence parallel": (layout.sequence_parallel, abilities.sequence_parallel),
        "recomputation": (layout.recompute, abilities.recompute),
        "interleaved pipeline": (layout.virtual_pipeline > 1, abilities.interleaved),
        "disaggregated topology": (not layout.colocated, abilities.disaggregated),
        "rollout.sampler=vllm": (not layout.whole_cache, abilities.paged_sampler),
        "sampler over several ranks": (
            layout.sampler_tensor > 1 and not layout.colocated,
            abilities.split_sampler,
        ),
        "sampler over several ranks that learn too": (
            layout.sampler_tensor > 1 and layout.colocated,
            abilities.split_colocated_sampler,
        ),
    }
    return tuple(name for name, (wanted, had) in asked.items() if wanted and not had)


def launch_command(
    candidate: Candidate, cluster: Cluster, arguments: Sequence[str], *, is_stale: bool = False
) -> str:
    """What to start on each node. `arguments` are the run file and the user's own overrides, and `is_stale`
    says whether `rollout.max_staleness` is above 0 by them.

    Several nodes meet at port 29500 of the host in the shell's variable HEAD.
    """
    processes = str(cluster.gpus_per_node)
    start = ["torchrun", "--standalone", "--nproc-per-node", processes]
    if cluster.nodes > 1:
        start = ["torchrun", "--nnodes", str(cluster.nodes), "--nproc-per-node", processes]
        start += ["--rdzv-backend", "c10d", "--rdzv-id", "rlef"]
    words = [shlex.quote(word) for word in start]
    if cluster.nodes > 1:
        words += ["--rdzv-endpoint", '"$HEAD:29500"']
    layout, memory = candidate.layout, candidate.memory
    dtype = "bfloat16" if layout.precision == "bf16" else "float32"
    overrides = [
        *arguments,
        f"parallel.tensor={layout.tensor}",
        f"parallel.pipeline={layout.pipeline}",
        f"parallel.virtual_pipeline={layout.virtual_pipeline}",
        "parallel.context=1",
        f"parallel.sequence_parallel={str(layout.sequence_parallel).lower()}",
        f"parallel.recompute={'full' if layout.recompute else 'none'}",
        f"parallel.distributed_optimizer={str(layout.distributed_optimizer).lower()}",
        f"parallel.dtype={dtype}",
        f"parallel.sampling_processes={0 if layout.colocated else layout.sampling_gpus}",
    ]
    said = any(each.startswith("rollout.max_staleness=") for each in arguments)
    if not layout.colocated and not is_stale and not said:
        overrides.append("rollout.max_staleness=1")  # its time is that of both at once
    if not layout.whole_cache:
        sampler = memory.sampler_weights + memory.kv_cache if layout.colocated else candidate.sampler_memory
        share = sampler / cluster.gpu.memory_bytes
        overrides += [f"vllm.memory_fraction={math.ceil(100 * share) / 100}", f"vllm.dtype={dtype}"]
        overrides.append(f"vllm.tensor_parallel={layout.sampler_tensor}")
    return " ".join([*words, "-m", "rlef", "train", *(shlex.quote(word) for word in overrides)])


def loading_refusal(model: str) -> str | None:
    """Why the trainer cannot load the model today, in its own words; None when it can.

    Of a name only its `config.json` is looked at, of a folder the weights' file too.
    """
    from rlef.families import read_shape  # these import torch, which the rest does without
    from rlef.pretrained import StoredWeights
    from rlef.shards import check_weights

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) if model in NAMED else Path(model)
        if model in NAMED:
            write_text(folder / "config.json", json.dumps(NAMED[model]))
        try:
            shape = read_shape(folder)
            if model not in NAMED:
                check_weights(StoredWeights(folder), shape)
        except ConfigError as error:
            return str(error).replace(str(folder), model)
    return None
