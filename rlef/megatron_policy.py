"""The policy, the reference and the value network on megatron-core: the only file that imports it.

The model is megatron's GPTModel in the shapes of Llama, Qwen2 and Qwen3, over packed variable-length
sequences. It runs through megatron's own pipeline schedules, gradient buffers and optimiser. Ours are the
parts that packing or portability ask for: rotary embedding and attention over packed sequences (shared with
the plain torch twin), the norm, the gated activation, and the value head.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from rlef import job, megatron_cpu
from rlef.attention import packed_attention
from rlef.config import OptimizerConfig, ParallelConfig
from rlef.context import ContextShare, context_share, gathered_places
from rlef.losses import token_logprobs
from rlef.moments import MOMENTS, set_steps, steps_made
from rlef.offload import HostWeights
from rlef.pieces import HeldState, Piece, State, pieces_of, require_same_network
from rlef.ports import LossFunction, Networks, ParallelState, UpdateStats, combine_statistics
from rlef.pretrained import Weights
from rlef.records import Batch, ModelShape
from rlef.shards import Cut, Head, StageWeight, check_layout, parameter_blocks, stage_weights
from rlef.torch_model import rotary_tables, rotate
from rlef.weights import gather_huggingface, gather_stages, load_huggingface, stages_of

with warnings.catch_warnings():
    # Nothing of Apex or Transformer Engine is used, so that the model is the same with and without them.
    warnings.filterwarnings("ignore", message=".*Apex (are|is) not installed")
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        set_tensor_model_parallel_attributes,
    )
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

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
    shape: ModelShape, weights: Weights, *, parallel: ParallelConfig, optimizer: OptimizerConfig
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
        config = _transformer_config(shape, parallel)
        self._config = config
        chunks = [_PackedModel(config, shape, head, number) for number in range(_chunks())]
        self._model = nn.ModuleList(chunks)
        self._device = next(self._model.parameters()).device
        groups = {
            "tensor_group": mpu.get_tensor_model_parallel_group(),
            "pipeline_group": mpu.get_pipeline_model_parallel_group(),
        }
        load_huggingface(chunks, weights, shape, head, **groups)
        self._gather = partial(gather_huggingface, chunks, shape, head, **groups)
        self._gather_stages = partial(gather_stages, chunks, shape, head, **groups)
        self._training: _Training | None = None
        if optimizer is not None:
            self._training = _Training(config, chunks, optimizer, lr, sharded=parallel.distributed_optimizer)
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
            no_count = torch.zeros((), dtype=torch.int)  # of tokens: see _add_up_gradients
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
        _, _, cu_seqlens = _pad(batch, padded - batch.num_tokens)
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


class _Training:
    """Gradient buffers, optimiser and schedule of a network that learns."""

    def __init__(
        self,
        config: TransformerConfig,
        chunks: Sequence[_PackedModel],
        optimizer: OptimizerConfig,
        lr: float,
        *,
        sharded: bool,
    ) -> None:
        """`sharded`: each data-parallel rank keeps moments of, and steps, its part of the parameters."""
        self.sharded = sharded
        self.has_masters = config.bf16  # the optimiser keeps fp32 copies of the weights, and steps those
        buffers = DistributedDataParallelConfig(
            use_distributed_optimizer=sharded,
            grad_reduce_in_fp32=True,  # and added up over micro-batches
        )
        self.chunks = [DistributedDataParallel(config, buffers, chunk) for chunk in chunks]
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._device = parameters[0].device
        later = [chunk.no_sync for chunk in self.chunks]
        config.no_sync_func = later if len(later) > 1 else later[0]
        config.finalize_model_grads_func = _add_up_gradients
        self._clip_grad = optimizer.clip_grad
        settings = MegatronOptimizerConfig(
            optimizer="adam",
            lr=lr,
            min_lr=lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_eps=optimizer.eps,
            use_distributed_optimizer=sharded,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
        )
        with megatron_cpu.type_names_of_cuda(parameters):
            self._optimizer = get_megatron_optimizer(settings, self.chunks, use_gloo_process_groups=False)
        (only,) = self._optimizer.chained_optimizers  # there would be another for experts
        self._own = only
        # It also keeps weight decay from the norms: parameter groups are only marked, the schedule acts on
        # it.
        self._schedule = OptimizerParamScheduler(
            self._optimizer,
            init_lr=0.0,
            max_lr=lr,
            min_lr=lr,
            lr_warmup_steps=optimizer.warmup_updates,
            lr_decay_steps=optimizer.warmup_updates + 1,
            lr_decay_style="constant",
            start_wd=optimizer.weight_decay,
            end_wd=optimizer.weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )

    @property
    def learning_rate(self) -> float:
        rate: float = self._optimizer.param_groups[0]["lr"]
        return rate

    def zero_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()

    def step(self) -> float:
        """Clip and step; returns the norm of the whole gradient before clipping. Not finite: no step.

        In megatron's own step a NaN passes for a gradient that needs no clipping, hence these lines.
        """
        self._schedule.step(1)  # first, so that the first update has a rate
        self._optimizer.prepare_grads()
        grad_norm = self._grad_norm()
        if math.isfinite(grad_norm):
            nn.utils.clip_grads_with_norm_(
                self._own.get_parameters(), self._clip_grad, torch.tensor(grad_norm)
            )
            self._optimizer.step_with_ready_grads()
        return grad_norm

    def _grad_norm(self) -> float:
        """Over all shards. What several ranks hold, counts once."""
        gradients = self._own.get_main_grads_for_grad_norm()
        squared = nn.utils.get_total_norm(gradients).to(self._device).square()
        everyone = None
        torch.distributed.all_reduce(
            squared, group=everyone if self.sharded else mpu.get_model_parallel_group()
        )
        return math.sqrt(squared.item())

    def counted(self) -> dict[str, int]:
        """Updates, and of them the steps, which a gradient that is not finite leaves out."""
        return {"updates": self._schedule.num_steps, "steps": steps_made(self._own.optimizer)}

    def set_counted(self, facts: Mapping[str, Any]) -> None:
        """Go on from there, with moments of zero for `kept_of` to give."""
        self._schedule.num_steps = facts["updates"]
        set_steps(self._own.optimizer, facts["steps"])

    def kept_of(self, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor, int]]:
        """What the optimiser keeps on this rank: its kind, the numbers, flat, and which of the parameter's
        is the first."""
        stepped, begin = parameter, 0
        if self.sharded:
            if parameter not in self._own.model_param_gbuf_map:
                return  # another replica's
            begin = self._own._get_model_param_range_map(parameter)["param"].start  # noqa: SLF001
            group, place = self._own.model_param_group_index_map[parameter]
            stepped = self._own.optimizer.param_groups[group]["params"][place]
        elif self.has_masters:
            stepped = parameter.main_param  # type: ignore[attr-defined]  # megatron's
        if self.has_masters:
            yield "weight", stepped.detach().view(-1), begin
        state = self._own.optimizer.state.get(stepped, {})
        for moment in MOMENTS:
            if moment in state:
                yield moment, state[moment].view(-1), begin


def _add_up_gradients(chunks: list[nn.Module], _tokens: Tensor, **groups: Any) -> None:
    """All-reduce. A loss is normalised over the whole update already, so nothing is divided by anything.

    With `calculate_per_token_loss` megatron divides neither by the number of micro-batches nor by the number
    of data-parallel ranks, but by the number of tokens: here that is withheld.
    """
    finalize_model_grads(chunks, **groups)


@dataclass
class _PackedSequences(PackedSeqParams):  # type: ignore[misc]
    """Megatron's description of a pack, and what layers need besides, made once for all of them."""

    cosine: Tensor | None = None  # [tokens, 1, head_dim] of the rotary embedding
    sine: Tensor | None = None  # [tokens, 1, head_dim]
    share: ContextShare | None = None  # None: this rank holds the whole pack


def _chunks() -> int:
    """Of layers on each pipeline rank; more than one make the pipeline interleaved."""
    return mpu.get_virtual_pipeline_model_parallel_world_size() or 1


class _PackedModel(GPTModel):  # type: ignore[misc]
    """A stage of the decoder, and this rank's shard of it, on packed batches."""

    def __init__(self, config: TransformerConfig, shape: ModelShape, head: Head, chunk: int) -> None:
        """`chunk`: the first of this rank's stages, or the next one of an interleaved pipeline."""
        ranks = mpu.get_pipeline_model_parallel_world_size()
        stage, stages = chunk * ranks + mpu.get_pipeline_model_parallel_rank(), _chunks() * ranks
        layers = [_layer_spec(shape)] * (shape.num_hidden_layers // stages)
        super().__init__(
            config,
            TransformerBlockSubmodules(layer_specs=layers, layer_norm=_RMSNorm),
            vocab_size=shape.vocab_size,
            max_sequence_length=shape.max_position_embeddings,
            pre_process=stage == 0,
            post_process=stage == stages - 1,
            parallel_output=True,  # logits stay split over the vocabulary
            share_embeddings_and_output_weights=shape.tie_word_embeddings and head == "logits",
            position_embedding_type="none",  # _PackedAttention rotates
            vp_stage=chunk if _chunks() > 1 else None,
        )
        if self.post_process and head == "value":
            self.output_layer = _ValueHead(config)
        # Which parameters are split decides whether their gradients count on every rank in the norm. Megatron
        # says so of biases, and of weights while it draws them, which `perform_initialization=False` leaves
        # out.
        parameters = dict(self.named_parameters())
        for weight in stage_weights(shape, head, stage=stage, stages=stages):
            split = parameters[weight.parameter]
            if weight.cut.dimension is not None and not hasattr(split, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(
                    split, is_parallel=True, dim=weight.cut.dimension, stride=1
                )
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        self.to(device)
        cosine, sine = rotary_tables(shape, shape.max_position_embeddings)
        self.cosine, self.sine = cosine.to(device), sine.to(device)  # [positions, head_dim]

    def forward(self, batch: Batch, padded: int, share: ContextShare | None) -> Tensor:
        """Last stage: `[1, own, vocab / tensor parallel size]` or `[1, own, 1]`; others: hidden states.

        Padding to so many tokens follows the batch's own; of those this rank has its share.
        """
        token_ids, position_ids, cu_seqlens = _pad(batch, padded - batch.num_tokens)
        if share is not None:
            token_ids, position_ids = token_ids[share.positions], position_ids[share.positions]
        sequences = _PackedSequences(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cosine=self.cosine[position_ids][:, None],
            sine=self.sine[position_ids][:, None],
            share=share,
        )
        output: Tensor = super().forward(
            token_ids[None], position_ids[None], None, packed_seq_params=sequences
        )
        return output

    def _is_in_embd_group(self) -> bool:
        """With tied embeddings, first and last stage need not agree on first weights: both load theirs."""
        return False


def _pad(batch: Batch, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, position ids and `cu_seqlens` with so many tokens more.

    They are a sequence of its own, so that no token attends to it; and no loss reads it. Any position will
    do, and the context may be shorter than the padding.
    """
    if tokens == 0:
        return batch.token_ids, batch.position_ids, batch.cu_seqlens
    return (
        nn.functional.pad(batch.token_ids, (0, tokens)),
        nn.functional.pad(batch.position_ids, (0, tokens)),
        torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:] + tokens]),
    )


class _PackedAttention(nn.Module):
    """Rotary embedding and causal attention within each packed sequence. Megatron's own takes no packs."""

    def __init__(self, **_settings: Any) -> None:
        super().__init__()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, _mask: None, *, packed_seq_params: Any, **_: Any
    ) -> Tensor:
        """`[tokens, heads, head_dim]`, twice `[tokens, groups, head_dim]` -> `[tokens, heads * head_dim]`."""
        cosine, sine = packed_seq_params.cosine, packed_seq_params.sine
        # In fp32, and rounded once: to rotate in bf16 would round each factor and each product.
        query, key = (rotate(states, cosine, sine).to(value.dtype) for states in (query, key))
        share = packed_seq_params.share
        if share is None:
            return packed_attention(query, key, value, packed_seq_params.cu_seqlens_q).flatten(1)
        # Gradients of a key come from all ranks whose queries attend to it: backward reduces and scatters.
        gathered = gather_from_sequence_parallel_region(
            torch.cat([key, value], dim=1), group=mpu.get_context_parallel_group()
        )
        key, value = gathered.index_select(0, share.keys).chunk(2, dim=1)
        return packed_attention(query, key, value, share.query_cu_seqlens, share.key_cu_seqlens).flatten(1)


class _SwiGLU(nn.Module):
    """`[..., 2 * channels]`, gate then up -> `[..., channels]`: silu(gate) * up.

    Megatron's plain version copies the halves apart and their gradients together: twice the time on a CPU.
    """

    def __init__(self, **_settings: Any) -> None:
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        output: Tensor = _SwiGLUFunction.apply(gate_up)  # type: ignore[no-untyped-call]
        return output


class _SwiGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, for_output: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        for_gate_up = torch.empty_like(gate_up)
        for_gate, for_up = for_gate_up.chunk(2, dim=-1)
        torch.mul(for_output, nn.functional.silu(gate), out=for_up)
        torch.ops.aten.silu_backward.grad_input(for_output * up, gate, grad_input=for_gate)
        return for_gate_up


class _RMSNorm(nn.RMSNorm):
    """Named here, because megatron's choice depends on whether Apex or Transformer Engine is installed."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark_shared_tokens(self.weight, config)


def _mark_shared_tokens(weight: Any, config: TransformerConfig) -> None:
    """Under sequence parallelism each rank's gradient of it is of its own tokens: megatron adds them up."""
    weight.sequence_parallel = config.sequence_parallel


class _ValueHead(nn.Module):
    """Takes the place of the output layer of a value network. Every tensor parallel rank holds all of it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.value_head = nn.Linear(config.hidden_size, 1, bias=False, dtype=config.params_dtype)
        self._gathers = config.sequence_parallel
        _mark_shared_tokens(self.value_head.weight, config)

    def forward(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        """`[tokens / ranks, 1, hidden]` -> `[tokens, 1, 1]`; ranks: those of sequence parallelism."""
        # In fp32 also where the weights are bf16: rounded to eight bits, neighbouring values would be equal.
        values = nn.functional.linear(hidden.float(), self.value_head.weight.float())
        if self._gathers:
            # Every rank makes the same loss of all values, so each keeps its own tokens' gradient.
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None


def _layer_spec(shape: ModelShape) -> Any:
    """Megatron's own layer, with our norms, attention and activation in it."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = _RMSNorm
    layer.submodules.pre_mlp_layernorm = _RMSNorm
    layer.submodules.self_attention.submodules.core_attention = _PackedAttention
    if shape.query_key_norm:
        layer.submodules.self_attention.submodules.q_layernorm = _RMSNorm
        layer.submodules.self_attention.submodules.k_layernorm = _RMSNorm
    layer.submodules.mlp.submodules.activation_func = _SwiGLU
    return layer


def _transformer_config(shape: ModelShape, parallel: ParallelConfig) -> TransformerConfig:
    pipeline, chunks = mpu.get_pipeline_model_parallel_world_size(), _chunks()
    recompute = parallel.recompute == "full"
    dtype = getattr(torch, parallel.dtype)
    return TransformerConfig(
        num_layers=shape.num_hidden_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.intermediate_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        use_te_activation_func=True,  # that is, the one in the layer: _SwiGLU
        add_bias_linear=False,
        add_qkv_bias=shape.query_key_value_bias,
        qk_layernorm=shape.query_key_norm,  # every rank has some heads: sum the gradients of what they share
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=mpu.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=mpu.get_context_parallel_world_size(),
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,  # kept: what goes into each layer
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        perform_initialization=False,  # weights are always loaded
        use_cpu_initialization=not torch.cuda.is_available(),
        calculate_per_token_loss=True,  # see _add_up_gradients
        variable_seq_lengths=pipeline > 1 and chunks == 1,  # each pack has its own number of tokens
        moe_token_dispatcher_type="alltoall",  # noqa: S106 (no password) variable_seq_lengths insists on it
        # Batched sends and receives of varying lengths can cross; of an interleaved pipeline, so batched or
        # overlapped, some gradients are silently wrong on gloo.
        batch_p2p_comm=False,
        batch_p2p_sync=False,
        overlap_p2p_comm=False,
        deallocate_pipeline_outputs=False,
        cuda_graph_scope=[],  # the default is a deprecated word for the same, and warns
        # Kernels of Apex and Transformer Engine, or compiled at first use:
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


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
