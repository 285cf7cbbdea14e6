"""The model on megatron-core: its GPTModel in the shapes of Llama, Qwen2 and Qwen3, over packed sequences.

Ours are the parts that packing or portability ask for: rotary embedding and attention over packed sequences
(shared with the plain torch twin), the norm, the gated activation, and the value head.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlef.attention import packed_attention
from rlef.config import ParallelConfig
from rlef.context import ContextShare
from rlef.records import Batch, ModelShape
from rlef.shards import Head, stage_weights
from rlef.torch_model import rotary_tables, rotate

with warnings.catch_warnings():
    # Nothing of Apex or Transformer Engine is used, so that the model is the same with and without them.
    warnings.filterwarnings("ignore", message=".*Apex (are|is) not installed")
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        set_tensor_model_parallel_attributes,
    )
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


@dataclass
class _PackedSequences(PackedSeqParams):  # type: ignore[misc]
    """Megatron's description of a pack, and what layers need besides, made once for all of them."""

    cosine: Tensor | None = None  # [tokens, 1, head_dim] of the rotary embedding
    sine: Tensor | None = None  # [tokens, 1, head_dim]
    share: ContextShare | None = None  # None: this rank holds the whole pack


def chunks_per_rank() -> int:
    """Of layers on each pipeline rank; more than one make the pipeline interleaved."""
    return mpu.get_virtual_pipeline_model_parallel_world_size() or 1


class PackedModel(GPTModel):  # type: ignore[misc]
    """A stage of the decoder, and this rank's shard of it, on packed batches."""

    def __init__(self, config: TransformerConfig, shape: ModelShape, head: Head, chunk: int) -> None:
        """`chunk`: the first of this rank's stages, or the next one of an interleaved pipeline."""
        ranks = mpu.get_pipeline_model_parallel_world_size()
        stage, stages = chunk * ranks + mpu.get_pipeline_model_parallel_rank(), chunks_per_rank() * ranks
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
            vp_stage=chunk if chunks_per_rank() > 1 else None,
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
        token_ids, position_ids, cu_seqlens = pad(batch, padded - batch.num_tokens)
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


def pad(batch: Batch, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
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


def transformer_config(shape: ModelShape, parallel: ParallelConfig) -> TransformerConfig:
    pipeline, chunks = mpu.get_pipeline_model_parallel_world_size(), chunks_per_rank()
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
        calculate_per_token_loss=True,  # see `add_up_gradients` in megatron_training.py
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
