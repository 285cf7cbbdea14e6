"""The policy, the reference and the value network on megatron-core: the only file that imports it.

The model is megatron's GPTModel in the Llama shape, over packed variable-length sequences, and runs through megatron's
own pipeline schedules, gradient buffers and optimiser. Ours are the parts that packing or portability ask for: rotary
embedding and attention over packed sequences (shared with the plain torch twin), the norm, and the value head.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from rlef import megatron_cpu
from rlef.attention import packed_attention
from rlef.config import OptimizerConfig, ParallelConfig
from rlef.losses import token_logprobs
from rlef.ports import LossFunction, Networks, ParallelState, UpdateStats
from rlef.records import Batch, ModelShape
from rlef.torch_model import rotary_tables, rotate
from rlef.weights import Head, check_layout, gather_huggingface, load_huggingface, stage_weights

with warnings.catch_warnings():
    # Neither is wanted: the layers below are the same with and without them.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
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
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

MAXIMUM = "_max"  # ending of the statistics of which the largest is kept


def initialize(parallel: ParallelConfig) -> ParallelState:
    """Join the job that torchrun started, or be a job of one process, and divide it as `parallel` says.

    May be called again with the same sizes.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        torch.set_num_threads(parallel.threads_per_process)
    if not torch.distributed.is_initialized():
        # Megatron wants it so: the all-reduce of a tensor parallel gradient starts before the next kernel.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        alone = {} if "RANK" in os.environ else {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
        torch.distributed.init_process_group(
            "nccl" if cuda else "gloo", timeout=timedelta(seconds=parallel.timeout_s), **alone
        )
    if not mpu.model_parallel_is_initialized():
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            distributed_timeout_minutes=math.ceil(parallel.timeout_s / 60),
            create_gloo_process_groups=False,
        )
    megatron_cpu.install()
    return ParallelState(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        data_parallel_rank=mpu.get_data_parallel_rank(),
        data_parallel_size=mpu.get_data_parallel_world_size(),
        data_parallel_group=mpu.get_data_parallel_group() if mpu.get_data_parallel_world_size() > 1 else None,
        tensor_parallel_group=mpu.get_tensor_model_parallel_group() if parallel.tensor > 1 else None,
    )


def build_networks(
    shape: ModelShape, weights: Mapping[str, Tensor], *, parallel: ParallelConfig, optimizer: OptimizerConfig
) -> Networks:
    """Policy, frozen reference and value network, all from the same Hugging Face weights (PAPER section 2).

    Raises:
        ConfigError: the model or the processes do not divide as `parallel` says.
        ValueError: `weights` are not those of a Llama of this shape.
    """
    state = initialize(parallel)
    check_layout(shape, parallel, state.world_size)
    policy = MegatronNetwork(shape, weights, head="logits", optimizer=optimizer, lr=optimizer.lr)
    reference = MegatronNetwork(shape, weights, head="logits")
    value = MegatronNetwork(shape, weights, head="value", optimizer=optimizer, lr=optimizer.value_lr)
    return Networks(policy=policy, reference=reference, value=value, parallel=state)


class MegatronNetwork:
    """A `ports.Network` on this rank's shard. Without `optimizer` it is frozen: no gradients, no buffers for them.

    `initialize` must have been called. Every method is collective over the model-parallel group, `update` over all.
    """

    def __init__(
        self,
        shape: ModelShape,
        weights: Mapping[str, Tensor],
        *,
        head: Head,
        optimizer: OptimizerConfig | None = None,
        lr: float = 0.0,
    ) -> None:
        self.shape = shape
        self.head = head
        config = _transformer_config(shape)
        self.model = _PackedModel(config, shape, head)
        self.device = self.model.cosine.device
        groups = {
            "tensor_group": mpu.get_tensor_model_parallel_group(),
            "pipeline_group": mpu.get_pipeline_model_parallel_group(),
        }
        load_huggingface(self.model, weights, shape, head, **groups)
        self._gather = partial(gather_huggingface, self.model, shape, head, **groups)
        self._training = None if optimizer is None else _Training(config, self.model, optimizer, lr)
        if self._training is None:
            self.model.requires_grad_(False)

    def forward(self, micro_batches: Sequence[Batch]) -> list[Tensor]:
        """No gradient. A policy: log-prob of each token `[tokens]`, 0 outside the response mask.

        A value network: `[values]`. On every rank of the model-parallel group, float32.
        """
        if not micro_batches:
            return []
        read = self._values if self.head == "value" else self._logprobs

        def collect(batch: Batch, output: Tensor, non_loss_data: bool = True) -> Tensor:
            return read(batch, output)

        def step(batches: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Any]:
            batch = next(batches)
            return model(batch), partial(collect, batch)

        with torch.no_grad():
            outputs = _run_schedule(step, self.model, micro_batches, self.device, forward_only=True)
        sizes = [self._output_size(batch) for batch in micro_batches]
        if mpu.get_pipeline_model_parallel_world_size() > 1:
            outputs = self._from_last_stage(outputs, sizes)
        return outputs

    def update(self, micro_batches: Sequence[Batch], loss: LossFunction) -> UpdateStats:
        """Forward, backward, all-reduce, clip, one optimiser step.

        The data-parallel ranks may bring different numbers of micro-batches; one that brings none takes part with a
        token whose loss is zero. If the gradient is not finite, the weights and the moments stay; the schedule moves on.
        """
        assert self._training is not None, "a frozen network cannot be updated"
        indexed = list(enumerate(micro_batches)) or [(-1, _single_token())]

        def evaluate(index: int, batch: Batch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            output = self._values(batch, output) if self.head == "value" else output[0]
            summed, statistics = (output.float().sum() * 0.0, {}) if index < 0 else loss(output, index)
            return summed, torch.zeros((), dtype=torch.int), statistics  # the count is not used: see _Training

        def step(batches: Iterator[tuple[int, Batch]], model: nn.Module) -> tuple[Tensor, Any]:
            index, batch = next(batches)
            return model(batch), partial(evaluate, index, batch)

        self._training.zero_gradients()
        statistics = _run_schedule(step, self._training.wrapped, indexed, self.device, forward_only=False)
        grad_norm, stepped = self._training.step()
        return UpdateStats(
            statistics=_over_all_ranks(statistics),
            grad_norm=grad_norm,
            learning_rate=self._training.learning_rate,
            skipped=not stepped,
        )

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        """The whole weights under Hugging Face names, on every rank (collective: read it to its end). Copies."""
        named: Iterator[tuple[str, Tensor]] = self._gather()
        return named

    def state_dict(self) -> Mapping[str, Any]:
        """This rank's shard: weights, optimiser and schedule, to continue bit for bit.

        Its tensors are the live ones: save or copy them before the next update.
        """
        state: dict[str, Any] = {
            "layout": self._layout(),
            "weights": {name: parameter.detach() for name, parameter in self.model.named_parameters()},
        }
        return state if self._training is None else state | self._training.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave on this rank of the same layout.

        Raises:
            ValueError: it belongs to another model, network, layout or rank; nothing was loaded.
        """
        expected = self._layout()
        if state["layout"] != expected:
            differing = {key: state["layout"].get(key) for key in expected if state["layout"].get(key) != expected[key]}
            wanted = {key: expected[key] for key in differing}
            raise ValueError(f"the saved network has {differing}, this one {wanted}; resume with the saved settings")
        parameters = dict(self.model.named_parameters())
        if state["weights"].keys() != parameters.keys():
            different = sorted(state["weights"].keys() ^ parameters.keys())
            raise ValueError(f"the saved network differs in {different}; resume with the model that it was saved from")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state["weights"][name])
        if self._training is not None:
            self._training.load_state_dict(state)

    def _layout(self) -> dict[str, Any]:
        return {
            "head": self.head,
            "trained": self._training is not None,
            "shape": {name: getattr(self.shape, name) for name in self.shape.__slots__},
            "tensor": mpu.get_tensor_model_parallel_world_size(),
            "tensor_rank": mpu.get_tensor_model_parallel_rank(),
            "pipeline": mpu.get_pipeline_model_parallel_world_size(),
            "pipeline_rank": mpu.get_pipeline_model_parallel_rank(),
        }

    def _logprobs(self, batch: Batch, logits: Tensor) -> Tensor:
        """`[1, tokens, vocab / tensor parallel size]` -> `[tokens]`."""
        group = mpu.get_tensor_model_parallel_group()
        logprobs = token_logprobs(logits[0], batch, group if group.size() > 1 else None)
        return logprobs.float().masked_fill(~batch.response_mask, 0.0)

    def _values(self, batch: Batch, values: Tensor) -> Tensor:
        """`[1, tokens, 1]` -> `[values]`."""
        return values[0, :, 0].float()[batch.value_positions]

    def _output_size(self, batch: Batch) -> int:
        return batch.value_positions.shape[0] if self.head == "value" else batch.num_tokens

    def _from_last_stage(self, outputs: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        if mpu.is_pipeline_last_stage():
            flat = torch.cat(list(outputs))
        else:
            flat = torch.empty(sum(sizes), dtype=torch.float32, device=self.device)
        source = mpu.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(flat, source, group=mpu.get_pipeline_model_parallel_group())
        return list(flat.split(list(sizes)))


class _Training:
    """Gradient buffers, optimiser and schedule of a network that learns."""

    def __init__(
        self, config: TransformerConfig, model: _PackedModel, optimizer: OptimizerConfig, lr: float
    ) -> None:
        self.wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
        config.no_sync_func = self.wrapped.no_sync
        # A loss is normalised over the whole update already, so gradients are added up and divided by nothing: with
        # `calculate_per_token_loss` megatron divides neither by the number of micro-batches nor by that of replicas,
        # and the token count by which it would divide instead is withheld here.
        config.finalize_model_grads_func = lambda chunks, tokens, **groups: finalize_model_grads(chunks, **groups)
        self._optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=lr,
                min_lr=lr,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.beta1,
                adam_beta2=optimizer.beta2,
                adam_eps=optimizer.eps,
                clip_grad=optimizer.clip_grad,
            ),
            [self.wrapped],
            use_gloo_process_groups=False,
        )
        # Exempts norms from weight decay too: parameter groups are only marked, the schedule sets their rates.
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
        self._clip_grad = optimizer.clip_grad

    @property
    def learning_rate(self) -> float:
        rates: set[float] = {group["lr"] for group in self._optimizer.param_groups}
        return rates.pop()

    def zero_gradients(self) -> None:
        self.wrapped.zero_grad_buffer()
        self._optimizer.zero_grad()

    def step(self) -> tuple[float, bool]:
        """The norm of the whole gradient, before clipping, and whether the weights moved.

        Megatron's own step takes a NaN for a gradient that needs no clipping, hence these lines in its place.
        """
        self._schedule.step(1)  # first, so that the first update has a rate
        self._optimizer.prepare_grads()
        grad_norm = self._grad_norm()
        if not math.isfinite(grad_norm):
            return grad_norm, False
        if grad_norm > self._clip_grad:
            gradients = [parameter.grad for parameter in self.wrapped.parameters()]
            torch._foreach_mul_(gradients, self._clip_grad / grad_norm)
        self._optimizer.step_with_ready_grads()
        return grad_norm, True

    def _grad_norm(self) -> float:
        """Over all shards; what several ranks hold is counted once."""
        gradients = [
            gradient
            for optimizer in self._optimizer.chained_optimizers
            for gradient in optimizer.get_main_grads_for_grad_norm()
        ]
        squared = torch.zeros((), device=self.wrapped.module.cosine.device)
        if gradients:
            squared += torch.stack(torch._foreach_norm(gradients)).square().sum()
        torch.distributed.all_reduce(squared, group=mpu.get_model_parallel_group())
        return math.sqrt(squared.item())

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict(), "schedule": self._schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.num_steps = 0
        self._schedule.load_state_dict(state["schedule"])


@dataclass
class _PackedSequences(PackedSeqParams):
    """Megatron's description of a pack, and the rotary tables of its positions, made once for all layers."""

    cosine: Tensor | None = None  # [tokens, 1, head_dim]
    sine: Tensor | None = None  # [tokens, 1, head_dim]


class _PackedModel(GPTModel):
    """This rank's stage and shard of the decoder, on packed batches."""

    def __init__(self, config: TransformerConfig, shape: ModelShape, head: Head) -> None:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = _RMSNorm
        layer.submodules.self_attention.submodules.core_attention = _PackedAttention
        layers = shape.num_hidden_layers // config.pipeline_model_parallel_size
        super().__init__(
            config,
            TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=_RMSNorm),
            vocab_size=shape.vocab_size,
            max_sequence_length=shape.max_position_embeddings,
            pre_process=mpu.is_pipeline_first_stage(),
            post_process=mpu.is_pipeline_last_stage(),
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tie_word_embeddings and head == "logits",
            position_embedding_type="none",  # rotation is part of our core attention
        )
        if self.post_process and head == "value":
            self.output_layer = _ValueHead(config)
        self.to(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu")
        cosine, sine = rotary_tables(shape, shape.max_position_embeddings)
        device = next(self.parameters()).device
        self.cosine, self.sine = cosine.to(device), sine.to(device)  # [positions, head_dim]
        self._mark_shards(shape, head)

    def forward(self, batch: Batch) -> Tensor:
        """Last stage: `[1, tokens, vocab / tensor parallel size]` or `[1, tokens, 1]`; else hidden states."""
        sequences = _PackedSequences(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            cosine=self.cosine[batch.position_ids][:, None],
            sine=self.sine[batch.position_ids][:, None],
        )
        output: Tensor = super().forward(
            batch.token_ids[None], batch.position_ids[None], None, packed_seq_params=sequences
        )
        return output

    def _is_in_embd_group(self) -> bool:
        """Tied embeddings: the stages need not agree on first weights by all-reduce, both load them."""
        return False

    def _mark_shards(self, shape: ModelShape, head: Head) -> None:
        """Say which parameters are divided, or their gradients would count once in the norm, not once per rank.

        Megatron says so while it draws first weights, which `perform_initialization=False` leaves out.
        """
        parameters = dict(self.named_parameters())
        stage, stages = mpu.get_pipeline_model_parallel_rank(), mpu.get_pipeline_model_parallel_world_size()
        for weight in stage_weights(shape, head, stage=stage, stages=stages):
            if weight.cut.dimension is not None:
                set_tensor_model_parallel_attributes(parameters[weight.parameter], True, weight.cut.dimension, 1)


class _PackedAttention(nn.Module):
    """Rotary embedding and causal attention within each packed sequence; megatron's own takes no packed input."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: None, *, packed_seq_params: _PackedSequences, **_: Any
    ) -> Tensor:
        """`[tokens, heads, head_dim]` and twice `[tokens, groups, head_dim]` -> `[tokens, heads * head_dim]`."""
        cosine, sine = packed_seq_params.cosine, packed_seq_params.sine
        assert cosine is not None and sine is not None
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        return packed_attention(query, key, value, packed_seq_params.cu_seqlens_q).flatten(1)


class _RMSNorm(nn.RMSNorm):
    """Named, because megatron's choice depends on whether Apex or Transformer Engine is installed."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


class _ValueHead(nn.Module):
    """Takes the place of the output layer of a value network; every tensor parallel rank holds all of it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.value_head = nn.Linear(config.hidden_size, 1, bias=False, dtype=config.params_dtype)

    def forward(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        return self.value_head(hidden), None


def _transformer_config(shape: ModelShape) -> TransformerConfig:
    pipeline = mpu.get_pipeline_model_parallel_world_size()
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
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=mpu.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=pipeline,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        perform_initialization=False,  # weights are always loaded
        use_cpu_initialization=not torch.cuda.is_available(),
        calculate_per_token_loss=True,  # see _Training
        variable_seq_lengths=pipeline > 1,  # each pack has its own number of tokens
        moe_token_dispatcher_type="alltoall",  # which variable_seq_lengths insists on
        batch_p2p_comm=False,  # with variable lengths, batches of sends and receives may cross
        deallocate_pipeline_outputs=False,
        # Fused kernels of Apex and Transformer Engine, or compiled at first use:
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def _run_schedule(
    step: Any, model: nn.Module, micro_batches: Sequence[Any], device: torch.device, *, forward_only: bool
) -> list[Any]:
    """Megatron's schedule for this pipeline; what the last stage collected, and nothing on the others."""

    def on_device() -> Iterator[Any]:
        for item in micro_batches:
            yield item.to(device) if isinstance(item, Batch) else (item[0], item[1].to(device))

    collected: list[Any] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=on_device(),
        model=model,
        num_microbatches=len(micro_batches),
        seq_length=1,  # not used: the lengths vary
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return collected


def _over_all_ranks(collected: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Statistics of all micro-batches of all data-parallel ranks, equal on every rank of the job."""
    own = _combine({name: float(number) for name, number in item.items()} for item in collected)
    if torch.distributed.get_world_size() == 1:
        return own
    if mpu.get_tensor_model_parallel_rank() > 0:
        own = {}  # those of the first tensor parallel rank, again
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    return _combine(gathered)


def _combine(items: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for item in items:
        for name, number in item.items():
            if name not in total:
                total[name] = number
            else:
                total[name] = max(total[name], number) if name.endswith(MAXIMUM) else total[name] + number
    return total


def _single_token() -> Batch:
    """What a data-parallel rank without micro-batches runs, for the sake of the collectives."""
    nothing = torch.empty(0, dtype=torch.int64)
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
        turn_sequences=nothing,
    )
