"""A model and batches that every layout of four ranks can divide, and the plain torch twins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rlef.config import OptimizerConfig, PPOConfig
from rlef.losses import policy_loss, value_loss
from rlef.packing import pack
from rlef.ports import LossFunction, ParallelState
from rlef.records import Batch, ModelShape, RopeScaling
from rlef.torch_model import LlamaModel
from rlef.torch_policy import TorchNetwork
from tests.ppo_examples import episode, log_uniform, noise

UNTIED = ModelShape(
    vocab_size=8,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=32,
    rope_theta=100.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
# With theta 100 and three pairs of channels, wavelengths are 6.3, 29 and 135: kept, in between, divided.
SCALING = RopeScaling(
    factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
TIED = replace(UNTIED, tie_word_embeddings=True)
QWEN2 = replace(TIED, model_type="qwen2")
QWEN3 = replace(UNTIED, model_type="qwen3", rope_scaling=SCALING)

# With so large an epsilon AdamW moves a weight by about its gradient, so that weights compare as gradients
# do, to rounding. With a small one it moves by the sign of what may be rounding alone.
SMOOTH = OptimizerConfig(lr=1.0, value_lr=1.0, eps=1.0, warmup_updates=2, clip_grad=0.5)

ALONE = ParallelState(
    device=torch.device("cpu"),
    rank=0,
    world_size=1,
    data_parallel_rank=0,
    data_parallel_size=1,
    data_parallel_group=None,
    tensor_parallel_group=None,
    tensor_parallel_rank=0,
    pipeline_rank=0,
    copy_rank=0,
)


def random_weights(shape: ModelShape, *, seed: int = 0) -> dict[str, Tensor]:
    """Whole weights under Hugging Face names; norms away from 1, biases and a value head from 0."""
    models = [LlamaModel(shape), LlamaModel(shape, head="value")]
    names = {name: tensor.shape for model in models for name, tensor in model.state_dict().items()}
    return {
        name: noise(*size, seed=seed + number) * 0.3 + (1.0 if "norm" in name else 0.0)
        for number, (name, size) in enumerate(sorted(names.items()))
    }


def policy_twin(
    shape: ModelShape, weights: dict[str, Tensor], optimizer: OptimizerConfig = SMOOTH
) -> TorchNetwork:
    model = LlamaModel(shape)
    model.load_named({name: tensor for name, tensor in weights.items() if name != "value_head.weight"})
    return TorchNetwork(model, lr=optimizer.lr, optimizer=optimizer)


def value_twin(
    shape: ModelShape, weights: dict[str, Tensor], optimizer: OptimizerConfig = SMOOTH
) -> TorchNetwork:
    model = LlamaModel(shape, head="value")
    model.load_named(weights)
    return TorchNetwork(model, lr=optimizer.value_lr, optimizer=optimizer)


def batches() -> list[Batch]:
    """Three micro-batches, of 1, 2 and 3 episodes."""
    return [
        pack([episode("....##..###", seed=1)], value_level="turn"),
        pack([episode("..#", seed=2), episode("...##.##.#", seed=3)], value_level="turn"),
        pack(
            [episode("..####", seed=4), episode(".#.#.#..", seed=5), episode("...#", seed=6)],
            value_level="turn",
        ),
    ]


def ppo_policy_loss(
    all_batches: Sequence[Batch], mine: Sequence[int], group: ProcessGroup | None = None
) -> LossFunction:
    """The policy loss of micro-batches `mine`, normalised over all of them, with made-up advantages."""
    tokens = sum(batch.num_response_tokens for batch in all_batches)

    def loss(logits: Tensor, index: int, rows: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        number = mine[index]
        batch = all_batches[number]
        return policy_loss(
            logits,
            batch,
            old_logprobs=log_uniform(batch.num_tokens, seed=number),
            advantages=noise(batch.value_positions.shape[0], seed=number),
            settings=PPOConfig(entropy_coef=0.1),
            normaliser=tokens,
            rows=rows,
            group=group,
        )

    return loss


def ppo_value_loss(all_batches: Sequence[Batch], mine: Sequence[int]) -> LossFunction:
    """The value loss of micro-batches `mine`, normalised over all of them, with made-up returns."""
    count = sum(batch.value_positions.shape[0] for batch in all_batches)

    def loss(values: Tensor, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        number = mine[index]
        old_values, returns = noise(2, values.shape[0], seed=number)
        return value_loss(
            values,
            all_batches[number],
            old_values=old_values,
            returns=returns,
            settings=PPOConfig(),
            normaliser=count,
        )

    return loss


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest expected number."""
    return float(
        (found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    )
