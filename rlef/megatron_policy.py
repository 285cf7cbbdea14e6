"""The policy, the reference and the value network on megatron-core: how `megatron_model` runs, and learns by
`megatron_training`.

It runs through megatron's own pipeline schedules, gradient buffers and optimiser.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from rlef import job, megatron_cpu
from rlef.config import OptimizerConfig, ParallelConfig
from rlef.context import ContextShare, context_share, gathered_places
from rlef.losses import token_logprobs
from rlef.megatron_model import PackedModel, chunks_per_rank, pad, transformer_config
from rlef.megatron_training import Training
from rlef.offload import HostWeights
from rlef.pieces import HeldState, Piece, State, pieces_of, require_same_network
from rlef.ports import LossFunction, Networks, ParallelState, UpdateStats, combine_statistics
from rlef.pretrained import Weights
from rlef.records import Batch, ModelShape
from rlef.shards import Cut, Head, StageWeight, check_layout, parameter_blocks, stage_weights
from rlef.weights import gather_huggingface, gather_stages, load_huggingface, stages_of

with warnings.catch_warnings():
    # Nothing of Apex or Transformer Engine is used, so that the model is the same with and without them.
    warnings.filterwarnings("ignore", message=".*Apex (are|is) not installed")
    from megatron.core import parallel_state as mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

Collect = Callable[[int, Batch, Tensor, Tensor | None], Any]
"""What the last stage does with (index of the micro-batch, micro-batch, outputs, rows), as `LossFunction` has
them."""

_PLAIN = ParallelConfig()


def initialize(parallel: ParallelConfig) -> ParallelState:
    """Join the job, and divide its learners as `parallel` says.

    May be called again with the same sizes.
    """
    if not torch.distributed.is_initialized():
        job.join(parallel)
    if not mpu.model_parallel_is_initialized():
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=(
                parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
            ),
            context_parallel_size=parallel.context,
            distributed_timeout_minutes=math.ceil(parallel.timeout_s / 60),
            create_gloo_process_groups=False,
        )
    # Sequence parallelism wants a state of random numbers to fork, but nothing here draws any: this tracker
    # keeps none.
    initialize_rng_tracker(inference_rng_tracker=True)
    megatron_cpu.install()
    _silence_known_warnings()
    replicas, cuda = mpu.get_data_parallel_world_size(), torch.cuda.is_available()
    return ParallelState(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        data_parallel_rank=mpu.get_data_parallel_rank(),
        data_parallel_size=replicas,
        data_parallel_group=mpu.get_data_parallel_group() if replicas > 1 else None,
        tensor_parallel_group=mpu.get_tensor_model_parallel_group() if parallel.tensor > 1 else None,
        tensor_parallel_rank=mpu.get_tensor_model_parallel_rank(),
        pipeline_rank=mpu.get_pipeline_model_parallel_rank(),
        copy_rank=mpu.get_data_parallel_rank(with_context_parallel=True),
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
    )


def _silence_known_warnings() -> None:
    """What megatron's sequence parallelism and distributed optimiser make torch say once in each process."""
    names = r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=names, category=FutureWarning)
    # A part of a parameter is a view of it, and megatron sets its gradient by hand.
    views = r"The \.grad attribute of a Tensor that is not a leaf"
    warnings.filterwarnings("ignore", message=views, module=r".*megatron")


def leave() -> None:
    """Undo `initialize`, so that this process may be part of another job."""
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    job.leave()


def build_networks(
    shape: ModelShape,
    weights: Weights,
    *,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    has_value: bool = True,
) -> Networks:
    """Policy, frozen reference and value network, all from the same Hugging Face weights (PAPER section 2).

    Raises:
        ConfigError: the model or the processes do not divide as `parallel` says, or `weights` are not those
            of a model of this shape.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    check_layout(shape, parallel, processes - parallel.sampling_processes)
    state = initialize(parallel)
    policy = MegatronNetwork(
        shape, weights, head="logits", parallel=parallel, optimizer=optimizer, lr=optimizer.lr
    )
    reference = MegatronNetwork(
        shape, weights, head="logits", parallel=parallel, offloaded=parallel.offload_reference
    )
    value = None
    if has_value:
        value = MegatronNetwork(
            shape, weights, head="value", parallel=parallel, optimizer=optimizer, lr=optimizer.value_lr
        )
    return Networks(policy=policy, reference=reference, value=value, parallel=state)


class MegatronNetwork:
    """A `ports.Network`: this rank's shard of it. Without `optimizer` it is frozen, and has no gradients.

    `initialize` comes first. `update` is collective over the whole job, all else over the model-parallel
    group.
    """

    def __init__(
        self,
        shape: ModelShape,
        weights: Weights,
        *,
        head: Head,
        parallel: ParallelConfig = _PLAIN,
        optimizer: OptimizerConfig | None = None,
        lr: float = 0.0,
        offloaded: bool = False,
    ) -> None:
        """Of `parallel` the options are read; the sizes are those that `initialize` was given.

        `offloaded`: the weights of a frozen network lie in host memory, and are on the device while it
        scores.
        """
        self._shape = shape
        self._head = head
        config = transformer_config(shape, parallel)
        self._config = config
        chunks = [PackedModel(config, shape, head, number) for number in range(chunks_per_rank())]
        self._model = nn.ModuleList(chunks)
        self._device = next(self._model.parameters()).device
        groups = {
            "tensor_group": mpu.get_tensor_model_parallel_group(),
            "pipeline_group": mpu.get_pipeline_model_parallel_group(),
        }
        load_huggingface(chunks, weights, shape, head, **groups)
        self._gather = partial(gather_huggingface, chunks, shape, head, **groups)
        self._gather_stages = partial(gather_stages, chunks, shape, head, **groups)
        self._training: Training | None = None
        if optimizer is not None:
            self._training = Training(config, chunks, optimizer, lr, sharded=parallel.distributed_optimizer)
        if self._training is None:
            self._model.requires_grad_(False)
        self._on_device: Callable[[], AbstractContextManager[None]] = nullcontext
        if offloaded:
            self._on_device = HostWeights(self._model, self._device).on_device

    def forward(self, micro_batches: Sequence[Batch]) -> list[Tensor]:
        """No gradient. A policy: log-prob of each token `[tokens]`, 0 outside the response mask.

        A value network: `[values]`. On every rank of the model-parallel group, float32.
        """
        if not micro_batches:
            return []
        with torch.no_grad(), self._on_device():
            outputs = self._run(self._model, enumerate(micro_batches), self._score, forward_only=True)
        if mpu.get_pipeline_model_parallel_world_size() == 1:
            return outputs
        return self._from_last_stage(outputs, [self._output_size(batch) for batch in micro_batches])

    def update(self, micro_batches: Sequence[Batch], loss: LossFunction) -> UpdateStats:
        """Forward, backward, all-reduce, clip, one optimiser step.

        The data-parallel ranks may bring different numbers of micro-batches. One that brings none takes part
        with a token whose loss is zero. If the gradient is not finite, weights and moments stay as they are.
        """
        if self._training is None:
            raise ValueError("a frozen network cannot be updated; build it with an optimizer")
        indexed = list(enumerate(micro_batches)) or [(-1, _single_token())]

        def evaluate(
            index: int, _: Batch, output: Tensor, rows: Tensor | None
        ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            no_count = torch.zeros((), dtype=torch.int)  # of tokens: see add_up_gradients
            if index < 0:
                return output.sum() * 0.0, no_count, {}
            is_whole = rows is None or self._head == "value"
            summed, statistics = loss(output, index) if is_whole else loss(output, index, rows)
            return summed, no_count, statistics

        self._training.zero_gradients()
        statistics = self._run(self._training.chunks, indexed, evaluate, forward_only=False)
        grad_norm = self._training.step()
        return UpdateStats(
            statistics=self._over_all_ranks(statistics),
            grad_norm=grad_norm,
            learning_rate=self._training.learning_rate,
            skipped=not math.isfinite(grad_norm),
        )

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Copies of the whole weights under Hugging Face names, on every rank. Collective: read all of it."""
        with self._on_device():
            yield from self._gather()

    def stage_weights(self) -> Iterable[Tensor]:
        """The whole weights of this rank's stages, in `weights.stage_buckets`, flat. Collective over its
        tensor parallel ranks."""
        buckets: Iterator[Tensor] = self._gather_stages()
        return buckets

    def state_dict(self) -> HeldState:
        """This rank's pieces of weights and optimiser, and the schedule: to continue in any layout, and in
        this one bit for bit."""
        counted = {} if self._training is None else self._training.counted()
        return HeldState(facts=self._facts() | counted, pieces=list(self._pieces()))

    def load_state_dict(self, state: State) -> None:
        """Continue from what all ranks of one network saved, in whichever layout.

        Raises:
            ValueError: it is of another model or kind of network, and nothing was loaded; or it is not whole.
        """
        require_same_network(state.facts, self._facts())
        if self._training is not None:
            self._training.set_counted(state.facts)
        state.read(self._pieces())

    def _facts(self) -> dict[str, Any]:
        return {**asdict(self._shape), "head": self._head, "trained": self._training is not None}

    def _pieces(self) -> Iterator[Piece]:
        """This rank's part of each weight, and of what the optimiser keeps of it: the live tensors.

        Of weights with fp32 masters these are saved, and both are read from them.
        """
        pipeline_group = mpu.get_pipeline_model_parallel_group()
        stages = pipeline_group.size() * len(self._model)
        for stage, chunk in stages_of(list(self._model), pipeline_group).items():
            parameters = dict(chunk.named_parameters())
            for weight in stage_weights(self._shape, self._head, stage=stage, stages=stages):
                yield from self._pieces_of(weight, parameters[weight.parameter])

    def _pieces_of(self, weight: StageWeight, parameter: nn.Parameter) -> Iterator[Piece]:
        rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
        replica = mpu.get_data_parallel_rank(with_context_parallel=True)
        replicas = mpu.get_data_parallel_world_size(with_context_parallel=True)
        blocks = parameter_blocks(weight, self._shape, rank=rank, size=size)
        same, which = (size, rank) if weight.cut is Cut.REPLICATED else (1, 0)
        on_replicas: tuple[int, int | None] = (same * replicas, which * replicas + replica)
        on_one_replica: tuple[int, int | None] = (same, which)
        if weight.duplicate:
            on_replicas = on_one_replica = (1, None)
        has_master = self._training is not None and self._training.has_masters
        of_weight = (1, None) if has_master else on_replicas
        yield from pieces_of("weight", blocks, parameter.detach().view(-1), copies=of_weight)
        if self._training is not None:
            copies = on_one_replica if self._training.sharded else on_replicas
            for kind, flat, begin in self._training.kept_of(parameter):
                yield from pieces_of(kind, blocks, flat, begin=begin, copies=copies)

    def _run(
        self,
        chunks: Iterable[nn.Module],
        batches: Iterable[tuple[int, Batch]],
        collect: Collect,
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Megatron's schedule for this pipeline: what the last stage collected, nothing on the others."""
        models, queue = list(chunks), list(batches)
        wanted = len(queue)
        lengths = [self._shared_equally(batch.num_tokens) for _, batch in queue]
        if len(models) > 1:
            # Interleaved, megatron wants as many micro-batches for each rank, and all of one length.
            queue += [(-1, _single_token())] * (-wanted % mpu.get_pipeline_model_parallel_world_size())
            lengths = [max(lengths)] * len(queue)

        def step(remaining: Iterator[tuple[int, Batch, int]], model: nn.Module) -> tuple[Tensor, Any]:
            index, batch, length = next(remaining)
            batch = batch.to(self._device)
            share = self._share(batch, length)

            def last(output: Tensor, **_: object) -> Any:
                rows = None if share is None else share.positions
                return collect(index, batch, self._outputs(batch, output, rows), rows)

            return model(batch, length, share), last

        packs = [(index, batch, length) for (index, batch), length in zip(queue, lengths, strict=True)]
        collected: list[Any] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(packs) for _ in models],
            model=models,
            num_microbatches=len(packs),
            seq_length=lengths[0],  # read where lengths do not vary: interleaved
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return collected[:wanted]

    def _shared_equally(self, tokens: int) -> int:
        """That many, or as many more as the ranks that share a pack need for equal parts."""
        ranks, contexts = 1, self._config.context_parallel_size
        if self._config.sequence_parallel:
            ranks = self._config.tensor_model_parallel_size
        multiple = ranks if contexts == 1 else contexts * math.lcm(ranks, 2)  # two chunks on each
        return tokens + -tokens % multiple

    def _share(self, batch: Batch, padded: int) -> ContextShare | None:
        """This rank's part of a padded pack; None where it holds all of it."""
        if self._config.context_parallel_size == 1:
            return None
        _, _, cu_seqlens = pad(batch, padded - batch.num_tokens)
        return context_share(
            cu_seqlens,
            rank=mpu.get_context_parallel_rank(),
            ranks=mpu.get_context_parallel_world_size(),
        )

    def _outputs(self, batch: Batch, output: Tensor, rows: Tensor | None) -> Tensor:
        """Of `[1, own tokens, channels]`: logits `[own tokens, vocab / tensor ranks]`, or float32 `[values]`.

        A policy's padding is cut off, unless a context is shared: then no row of padding predicts anything.
        """
        if self._head == "logits":
            logits = output.flatten(0, 1)  # not output[0], whose backward copies
            return logits[: batch.num_tokens] if rows is None else logits
        if rows is None:
            return output[0, batch.value_positions, 0].float()
        # All ranks make the same loss of all values, so each keeps its own tokens' gradient.
        values: Tensor = gather_from_sequence_parallel_region(
            output[0, :, 0], tensor_parallel_output_grad=False, group=mpu.get_context_parallel_group()
        )
        ranks = mpu.get_context_parallel_world_size()
        return values[gathered_places(batch.value_positions, tokens=values.shape[0], ranks=ranks)].float()

    def _score(self, _: int, batch: Batch, outputs: Tensor, rows: Tensor | None) -> Tensor:
        if self._head == "value":
            return outputs
        group = mpu.get_tensor_model_parallel_group()
        logprobs = token_logprobs(outputs, batch, rows=rows, group=group if group.size() > 1 else None)
        if rows is not None:
            torch.distributed.all_reduce(logprobs, group=mpu.get_context_parallel_group())
        return logprobs

    def _output_size(self, batch: Batch) -> int:
        return batch.value_positions.shape[0] if self._head == "value" else batch.num_tokens

    def _from_last_stage(self, outputs: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        if mpu.is_pipeline_last_stage():
            flat = torch.cat(list(outputs))
        else:
            flat = torch.empty(sum(sizes), dtype=torch.float32, device=self._device)
        source = mpu.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(flat, source, group=mpu.get_pipeline_model_parallel_group())
        return list(torch.split(flat, list(sizes)))

    def _over_all_ranks(self, collected: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        """Statistics of all micro-batches of all data-parallel ranks, equal on every rank of the job."""
        own = combine_statistics(collected)
        world_size = torch.distributed.get_world_size()
        if world_size == 1:
            return own
        if mpu.get_tensor_model_parallel_rank() > 0:
            own = {}  # the same as on tensor parallel rank 0
        if self._head == "value" and mpu.get_context_parallel_rank() > 0:
            own = {}  # the same likewise, since values are gathered
        gathered: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(gathered, own)
        return combine_statistics(gathered)


def _single_token() -> Batch:
    """What a data-parallel rank without micro-batches runs, for the sake of the collectives."""
    return Batch(
        token_ids=torch.zeros(1, dtype=torch.int64),
        position_ids=torch.zeros(1, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        response_mask=torch.zeros(1, dtype=torch.bool),
        behaviour_logprobs=torch.zeros(1),
        token_turns=torch.full((1,), -1),
        token_values=torch.full((1,), -1),
        value_positions=torch.zeros(1, dtype=torch.int64),
        value_turns=torch.zeros(1, dtype=torch.int64),
        turn_rewards=torch.zeros(1),
        turn_sequences=torch.zeros(1, dtype=torch.int64),
    )
