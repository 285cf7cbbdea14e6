"""Memory of a rank: against the tensors of real Megatron networks, and in examples for the head."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlef import megatron_policy
from rlef.config import ParallelConfig
from rlef.megatron_policy import MegatronNetwork, initialize, leave
from rlef.plan_cluster import GPUS, Assumptions
from rlef.plan_memory import (
    Layout,
    activation_elements,
    cache_capacity,
    rank_memory,
    sampler_bytes,
    trained_bytes,
)
from rlef.plan_model import ModelSize, read_model, stage_parameters
from rlef.records import ModelShape
from tests.distributed import run_ranks
from tests.megatron_examples import SMOOTH, TIED, UNTIED, batches, random_weights

LAYOUTS = [(1, 2), (2, 1), (1, 1)]  # tensor, pipeline; over two ranks, so the last one has two replicas


def size_of(shape: ModelShape) -> ModelSize:
    known = ModelSize.__dataclass_fields__
    return ModelSize(**{name: value for name, value in asdict(shape).items() if name in known})


def held_by_networks() -> dict[Any, tuple[int, int, int, int]]:
    """Per layout, shape and head: this rank's stage, and bytes of weights, gradients and moments."""
    held = {}
    for tensor, pipeline in LAYOUTS:
        state = initialize(ParallelConfig(processes=2, tensor=tensor, pipeline=pipeline))
        stage = state.rank if pipeline == 2 else 0
        for name, shape in (("untied", UNTIED), ("tied", TIED)):
            for head in ("logits", "value"):
                network = MegatronNetwork(shape, random_weights(shape), head=head, optimizer=SMOOTH, lr=1.0)
                network.update(batches(), pull)
                held[tensor, pipeline, name, head] = (stage, *bytes_of(network))
        megatron_policy.mpu.destroy_model_parallel()  # the processes stay joined for the next layout
    return held


def pull(outputs: Tensor, _index: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss that moves every weight."""
    return outputs.square().sum(), {}


def bytes_of(network: MegatronNetwork) -> tuple[int, int, int]:
    """Weights, gradient buffers and AdamW's moments that the network really holds after an update."""
    held = {"weight": 0, "exp_avg": 0, "exp_avg_sq": 0}
    for piece in network.state_dict().pieces:
        held[piece.name.split("/")[0]] += nbytes(piece.data)
    assert network._training is not None
    buffers = [buffer.grad_data for buffer in network._training.model.buffers]
    return held["weight"], sum(map(nbytes, buffers)), held["exp_avg"] + held["exp_avg_sq"]


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, tuple[int, int, int, int]]]:
    return run_ranks(held_by_networks, ranks=2, folder=tmp_path_factory.mktemp("ranks"))


@pytest.mark.multiprocess
def test_a_plan_counts_the_bytes_that_a_megatron_network_holds(
    held: list[dict[Any, tuple[int, int, int, int]]],
) -> None:
    """Two ranks over gloo; weights, gradients and moments of policies and value networks after an update."""
    for rank in held:
        for (tensor, pipeline, name, head), (stage, *measured) in rank.items():
            size = size_of(UNTIED if name == "untied" else TIED)
            parameters = stage_parameters(size, head, stage=stage, stages=pipeline, tensor=tensor)
            layout = Layout(tensor=tensor, pipeline=pipeline, training_gpus=2, precision="fp32")
            planned = trained_bytes(parameters, layout)
            assert list(planned) == measured, (tensor, pipeline, name, head)


def test_activations_are_those_that_autograd_keeps() -> None:
    """What one layer more keeps per token, in fp32.

    On a CPU a little more is kept than by fused kernels: each norm's input over its root mean square,
    and that root; a copy of what attention gave, and the logarithm of each head's sum of exponentials.
    """
    initialize(ParallelConfig())
    shape = replace(UNTIED, hidden_size=64, intermediate_size=160, head_dim=20, max_position_embeddings=64)
    kept = [bytes_kept(replace(shape, num_hidden_layers=layers)) for layers in (1, 2)]
    leave()
    size, tokens = size_of(shape), batches()[0].num_tokens
    on_cpu = 2 * size.hidden_size + 2 + size.query_size + size.num_attention_heads
    planned = activation_elements(size, Layout(precision="fp32")) + on_cpu
    assert (kept[1] - kept[0]) / tokens / 4 == planned


def bytes_kept(shape: ModelShape) -> int:
    """What autograd keeps of an update with one micro-batch, each storage once, without the weights."""
    network = MegatronNetwork(shape, random_weights(shape), head="logits", optimizer=SMOOTH, lr=1.0)
    pieces = network.state_dict().pieces
    weights = {piece.data.untyped_storage().data_ptr() for piece in pieces}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in weights and tensor.is_floating_point():
            kept[storage] = tensor  # held, so that no other tensor gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.update(batches()[:1], pull)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_sixteen_bytes_a_parameter_in_fp32_and_eighteen_in_bf16() -> None:
    assert sum(trained_bytes(1, Layout(precision="fp32"))) == 4 + 4 + 8
    assert sum(trained_bytes(1, Layout(precision="bf16"))) == 2 + 4 + 4 + 8


def test_a_distributed_optimizer_shares_its_states_over_the_replicas() -> None:
    layout = Layout(tensor=2, training_gpus=8, distributed_optimizer=True)
    assert trained_bytes(100, layout) == (200, 400, 1200 / 4)


SIZE = read_model("llama-3.2-1b")


@given(
    tensor=st.sampled_from([1, 2, 4, 8]),
    sequence_parallel=st.booleans(),
    recompute=st.booleans(),
)
def test_no_more_is_kept_when_more_is_divided_or_recomputed(
    tensor: int, sequence_parallel: bool, recompute: bool
) -> None:
    plain = activation_elements(SIZE, Layout())
    kept = activation_elements(
        SIZE, Layout(tensor=tensor, sequence_parallel=sequence_parallel, recompute=recompute)
    )
    assert kept <= plain
    if recompute:
        assert kept <= activation_elements(SIZE, Layout(tensor=tensor, sequence_parallel=sequence_parallel))


def parts(layout: Layout, **changes: Any) -> list[dict[str, float]]:
    stages = rank_memory(SIZE, layout, Assumptions(), micro_batch_tokens=1000, cache_tokens=100, **changes)
    return [asdict(stage) for stage in stages]


def test_the_first_stage_keeps_the_most_micro_batches_and_the_last_the_logits() -> None:
    first, last = parts(Layout(pipeline=2))
    assert first["activations"] == 2 * last["activations"]
    assert (first["logits"], last["logits"]) == (0, 2 * 1000 * SIZE.vocab_size * 2)


def test_a_run_without_value_network_and_reference_has_no_memory_for_them() -> None:
    (stage,) = parts(Layout(), has_value=False, has_reference=False)
    assert (stage["value_network"], stage["reference"]) == (0, 0)


def test_a_rank_that_only_trains_holds_no_sampler() -> None:
    (stage,) = parts(Layout(colocated=False))
    assert (stage["sampler_weights"], stage["kv_cache"]) == (0, 0)


def test_the_cache_holds_keys_and_values_of_all_layers() -> None:
    """Llama 3.2 1B: 16 layers, 8 groups of 64 channels; 32 KiB a token in bf16."""
    _, cache = sampler_bytes(SIZE, Layout(), 1)
    assert cache == 2 * 16 * 8 * 64 * 2


def test_what_the_cache_has_room_for_fills_its_share_of_what_is_left() -> None:
    gpu, assumptions, taken = GPUS["H100"], Assumptions(), 10e9
    tokens = cache_capacity(SIZE, Layout(), assumptions, gpu, taken)
    weights, cache = sampler_bytes(SIZE, Layout(), tokens)
    left = gpu.memory_bytes - taken - weights - assumptions.memory_reserve_bytes
    assert cache == pytest.approx(left * assumptions.kv_memory_share)


def test_no_room_is_never_negative() -> None:
    assert cache_capacity(SIZE, Layout(), Assumptions(), GPUS["H100"], taken=1e12) == 0


def test_stages_together_hold_the_weights_of_the_model() -> None:
    stages = parts(Layout(pipeline=4))
    tied_copy = SIZE.vocab_size * SIZE.hidden_size  # of the last stage
    assert sum(stage["weights"] for stage in stages) == 2 * (SIZE.parameters + tied_copy)


def test_each_part_counts_once_in_the_total() -> None:
    (stage,) = rank_memory(SIZE, Layout(), Assumptions(), micro_batch_tokens=10, cache_tokens=10)
    assert stage.total == sum(Counter(asdict(stage)).values())
