"""The decoder in plain torch: the twin that Megatron's numbers are tested against, and what `rlef pretrain`
trains.

It is a Llama. Qwen2 adds biases to query, key and value, Qwen3 a norm of each head's query and key. Parameter
names are those of the Hugging Face checkpoint, so the state dict of a language model *is* the checkpoint.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlef.attention import packed_attention
from rlef.records import ModelShape


def rotary_tables(
    shape: ModelShape, length: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosine and sine for positions 0 to length - 1, each `[length, head_dim]`, halves repeated as Llama has
    them."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), rotary_frequencies(shape))
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotary_frequencies(shape: ModelShape) -> Tensor:
    """Radians per position of each pair of channels, `[head_dim / 2]` float32.

    Scaled as in Llama 3.1 where the shape says so; `RopeScaling` has the rule.
    """
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    frequencies = shape.rope_theta**-exponents
    scaling = shape.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)  # 0: divided by the factor, 1: as it was
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of `[..., head_dim]` with tables that broadcast against it."""
    half = states.shape[-1] // 2
    return states * cosine + torch.cat([-states[..., half:], states[..., :half]], dim=-1) * sine


class Attention(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.num_attention_heads * shape.head_dim
        key_value_width = shape.num_key_value_heads * shape.head_dim
        bias = shape.query_key_value_bias
        self.q_proj = nn.Linear(shape.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(shape.hidden_size, key_value_width, bias=bias)
        self.v_proj = nn.Linear(shape.hidden_size, key_value_width, bias=bias)
        self.o_proj = nn.Linear(width, shape.hidden_size, bias=False)
        if shape.query_key_norm:
            self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.rms_norm_eps)
            self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.rms_norm_eps)

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor, cu_seqlens: Tensor) -> Tensor:
        head_dim = self.shape.head_dim
        query = self.q_proj(hidden).unflatten(-1, (-1, head_dim))  # [tokens, heads, head_dim]
        key = self.k_proj(hidden).unflatten(-1, (-1, head_dim))  # [tokens, key_value_heads, head_dim]
        value = self.v_proj(hidden).unflatten(-1, (-1, head_dim))
        if self.shape.query_key_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        attended = packed_attention(query, key, value, cu_seqlens)  # [tokens, heads, head_dim]
        output: Tensor = self.o_proj(attended.flatten(-2))
        return output


class FeedForward(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output


class Layer(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor, cu_seqlens: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cosine, sine, cu_seqlens)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class Decoder(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)


class LlamaModel(nn.Module):
    """The decoder with a language-model head (`head="logits"`) or a scalar value head (`head="value"`).

    The value head is a fresh linear layer without bias that starts at zero (PAPER: "value head: a fresh
    linear layer"), so the first advantages are the plain returns.
    """

    def __init__(self, shape: ModelShape, head: str = "logits") -> None:
        super().__init__()
        self.shape = shape
        self.head = head
        self.model = Decoder(shape)
        if head == "value":
            self.value_head = nn.Linear(shape.hidden_size, 1, bias=False)
            nn.init.zeros_(self.value_head.weight)
        elif not shape.tie_word_embeddings:
            self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        cosine, sine = rotary_tables(shape, shape.max_position_embeddings)
        self.cosine: Tensor
        self.sine: Tensor
        self.register_buffer("cosine", cosine, persistent=False)  # [positions, head_dim]
        self.register_buffer("sine", sine, persistent=False)

    def forward(self, token_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Logits `[tokens, vocab]`, or values `[tokens]`, of packed sequences.

        `token_ids` and `position_ids` are `[tokens]` int64, `cu_seqlens` `[sequences + 1]` int32.
        """
        hidden = self.model.embed_tokens(token_ids)  # [tokens, hidden]
        cosine = self.cosine[position_ids][:, None]  # [tokens, 1, head_dim]
        sine = self.sine[position_ids][:, None]
        for layer in self.model.layers:
            hidden = layer(hidden, cosine, sine, cu_seqlens)
        hidden = self.model.norm(hidden)
        if self.head == "value":
            values: Tensor = self.value_head(hidden)[:, 0].float()
            return values
        weight = self.model.embed_tokens.weight if self.shape.tie_word_embeddings else self.lm_head.weight
        return functional.linear(hidden, weight)

    def load_named(self, weights: dict[str, Tensor]) -> None:
        """Copy a language model's weights in; a value network takes all but the head that it lacks."""
        wanted = set(self.state_dict())
        skipped = {"lm_head.weight"} if self.head == "value" or self.shape.tie_word_embeddings else set()
        fresh = {"value_head.weight"} - set(weights)
        missing, unexpected = wanted - set(weights) - fresh, set(weights) - wanted - skipped
        if missing or unexpected:
            raise ValueError(
                f"weights do not fit the model: missing {sorted(missing)}, unexpected {sorted(unexpected)}"
            )
        self.load_state_dict({name: weights[name] for name in wanted & set(weights)}, strict=False)


def initialise(model: LlamaModel, *, seed: int) -> None:
    """Normal(0, 0.02) matrices, residual outputs scaled down by the depth, from a seed. Biases start at
    zero."""
    generator = torch.Generator().manual_seed(seed)
    residual_std = 0.02 / (2 * model.shape.num_hidden_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and name != "value_head.weight":
            std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            nn.init.normal_(parameter, std=std, generator=generator)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)
