"""Networks in bf16 with master weights in fp32, against the plain torch twin in fp32 and its optimiser.

One launch of two ranks plays all layouts; the tests look at what it recorded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from rlef.checkpoint import CheckpointStore
from rlef.config import OptimizerConfig, ParallelConfig
from rlef.megatron_policy import MegatronNetwork, initialize, leave
from tests.distributed import common_folder, run_ranks
from tests.megatron_examples import (
    QWEN2,
    QWEN3,
    SMOOTH,
    batches,
    policy_twin,
    ppo_policy_loss,
    ppo_value_loss,
    random_weights,
    value_twin,
)

RANKS = 2
SHAPES = {"qwen2": QWEN2, "qwen3": QWEN3}
LAYOUTS = {
    "1x1": ParallelConfig(processes=RANKS, dtype="bfloat16"),
    "1x1 distributed": ParallelConfig(processes=RANKS, dtype="bfloat16", distributed_optimizer=True),
    "2x1 sequence": ParallelConfig(processes=RANKS, dtype="bfloat16", tensor=2, sequence_parallel=True),
    "1x2": ParallelConfig(processes=RANKS, dtype="bfloat16", pipeline=2, recompute="full"),
}
LARGE = SMOOTH.model_copy(update={"lr": 32.0, "value_lr": 32.0})  # moves far beyond the last of eight bits
OF_A_SCORE, OF_A_LOSS, OF_A_GRADIENT = 0.05, 0.01, 0.04  # the most that bf16 may change


def rounded_weights(shape: Any, *, seed: int = 0) -> dict[str, Tensor]:
    """Such that bf16 holds them exactly, so that both twins start from the same."""
    return {name: weight.bfloat16().float() for name, weight in random_weights(shape, seed=seed).items()}


def masters(network: MegatronNetwork) -> list[Tensor]:
    """Of this rank, in fp32: the optimiser's, under the same name as the weights that come of them."""
    pieces = network.state_dict().pieces
    return [
        piece.data.clone()
        for piece in pieces
        if piece.name.startswith("weight/") and piece.data.dtype == torch.float32
    ]


def play() -> dict[str, Any]:
    """On one rank: each layout's scores, updates and weights."""
    recorded: dict[str, Any] = {}
    rank = initialize(ParallelConfig()).rank
    leave_layout()
    store = CheckpointStore(common_folder() / "checkpoints", keep=1, rank=rank, world_size=RANKS)
    for layout, parallel in LAYOUTS.items():
        for name in SHAPES:
            for head in ("logits", "value"):
                recorded[f"{layout} {name} {head}"] = _play(parallel, name, head, store)
        leave_layout()
    return recorded


def leave_layout() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def _play(parallel: ParallelConfig, name: str, head: Any, store: CheckpointStore) -> dict[str, Any]:
    shape, everything = SHAPES[name], batches()
    state = initialize(parallel)
    mine = range(state.data_parallel_rank, len(everything), state.data_parallel_size)
    own = [everything[number] for number in mine]
    if head == "logits":
        loss = ppo_policy_loss(everything, mine, state.tensor_parallel_group)
    else:
        loss = ppo_value_loss(everything, mine)
    settings: Any = {"head": head, "parallel": parallel, "optimizer": LARGE, "lr": LARGE.lr}
    network = MegatronNetwork(shape, rounded_weights(shape), **settings)
    record = {
        "batches": list(mine),
        "loaded": dict(network.named_weights()),
        "scores": network.forward(own),
        "update": network.update(own, loss),
        "weights": dict(network.named_weights()),
    }
    resumed = MegatronNetwork(shape, rounded_weights(shape, seed=9), **settings)
    store.save(1, {"network": network.state_dict()}, {})
    checkpoint = store.load_latest()
    assert checkpoint is not None
    resumed.load_state_dict(checkpoint.states["network"])
    for each in (network, resumed):
        each.update(own, loss)
    return record | {
        "continued": [*masters(network), *dict(network.named_weights()).values()],
        "resumed": [*masters(resumed), *dict(resumed.named_weights()).values()],
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(play, ranks=RANKS, folder=tmp_path_factory.mktemp("ranks"), timeout_s=900)


@pytest.fixture(scope="module", params=SHAPES)
def shape_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module", params=["logits", "value"])
def head(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def twin(shape_name: str, head: str) -> dict[str, Any]:
    """The same weights in fp32, in plain torch and one process."""
    everything, shape = batches(), SHAPES[shape_name]
    weights = rounded_weights(shape)
    if head == "logits":
        network, loss = policy_twin(shape, weights, LARGE), ppo_policy_loss(everything, range(3))
    else:
        network, loss = value_twin(shape, weights, LARGE), ppo_value_loss(everything, range(3))
    return {
        "scores": network.forward(everything),
        "update": network.update(everything, loss),
        "weights": dict(network.named_weights()),
        "loaded": {name: weights[name] for name, _ in network.named_weights()},
    }


@pytest.fixture(params=LAYOUTS)
def records(
    request: pytest.FixtureRequest, ranks: list[dict[str, Any]], shape_name: str, head: str
) -> list[dict[str, Any]]:
    return [rank[f"{request.param} {shape_name} {head}"] for rank in ranks]


@pytest.mark.multiprocess
def test_scores_are_float32_and_near_those_of_the_float32_twin(
    records: list[dict[str, Any]], twin: dict[str, Any]
) -> None:
    for record in records:
        for number, scores in zip(record["batches"], record["scores"], strict=True):
            assert scores.dtype == torch.float32
            assert (scores - twin["scores"][number]).abs().max() < OF_A_SCORE
            assert not torch.equal(scores, twin["scores"][number])


@pytest.mark.multiprocess
def test_an_update_is_near_that_of_the_float32_twin(
    records: list[dict[str, Any]], twin: dict[str, Any]
) -> None:
    for record in records:
        found, expected = record["update"], twin["update"]
        assert found.statistics["loss"] == pytest.approx(expected.statistics["loss"], abs=OF_A_LOSS)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=OF_A_GRADIENT)
        assert distance(record["weights"], twin["weights"]) < OF_A_GRADIENT * distance(
            twin["weights"], twin["loaded"]
        )


def distance(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Of all weights together."""
    assert some.keys() == others.keys()
    return math.sqrt(sum(float((some[name].float() - others[name]).square().sum()) for name in some))


@pytest.mark.multiprocess
def test_exported_weights_are_those_that_were_loaded_bit_for_bit(
    records: list[dict[str, Any]], twin: dict[str, Any]
) -> None:
    for record in records:
        for name, weight in twin["loaded"].items():
            assert record["loaded"][name].dtype == torch.bfloat16
            assert torch.equal(record["loaded"][name].float(), weight), name


@pytest.mark.multiprocess
def test_every_rank_ends_with_the_same_weights(records: list[dict[str, Any]]) -> None:
    for record in records[1:]:
        assert record["update"] == records[0]["update"]
        for name, weight in records[0]["weights"].items():
            assert torch.equal(record["weights"][name], weight), name


@pytest.mark.multiprocess
def test_a_resumed_network_continues_bit_for_bit(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert any(tensor.dtype == torch.float32 for tensor in record["resumed"])  # the master weights
        for found, expected in zip(record["resumed"], record["continued"], strict=True):
            assert torch.equal(found, expected)


@pytest.fixture
def _one_process() -> Iterator[None]:
    initialize(ParallelConfig())
    yield
    leave()


def build(optimizer: OptimizerConfig = SMOOTH, *, distributed: bool = False) -> MegatronNetwork:
    parallel = ParallelConfig(dtype="bfloat16", distributed_optimizer=distributed)
    return MegatronNetwork(
        QWEN3, rounded_weights(QWEN3), head="value", parallel=parallel, optimizer=optimizer, lr=optimizer.lr
    )


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("distributed", [False, True])
def test_the_optimizer_steps_float32_weights_by_float32_gradients(distributed: bool) -> None:
    """As torch's AdamW steps a float32 copy of the weights; and the network has what comes of it, rounded."""
    everything = batches()
    settings = OptimizerConfig(lr=1e-3, warmup_updates=0, clip_grad=1e6, weight_decay=0.1)
    network = build(settings, distributed=distributed)
    parameters = list(network._model.parameters())
    copies = [parameter.detach().float() for parameter in parameters]
    optimizer = torch.optim.AdamW(
        [
            {"params": [each for each in copies if each.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [each for each in copies if each.ndim == 1], "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
    for _ in range(3):
        network.update(everything, ppo_value_loss(everything, range(3)))
        for each, parameter in zip(copies, parameters, strict=True):
            assert parameter.main_grad.dtype == torch.float32
            each.grad = parameter.main_grad.clone()
        optimizer.step()
    for each, parameter in zip(copies, parameters, strict=True):
        master = parameter.main_param.view_as(parameter)
        torch.testing.assert_close(master, each, rtol=1e-6, atol=1e-7)
        assert torch.equal(master.bfloat16(), parameter)
        assert not torch.equal(master, parameter.float())


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("distributed", [False, True])
def test_moves_too_small_for_bf16_add_up(distributed: bool) -> None:
    """AdamW moves what is near 1 by about 1/32 of its last bit an update: the first changes nothing there."""
    everything = batches()
    last_bit = 2.0**-8
    settings = OptimizerConfig(lr=last_bit / 32, warmup_updates=0, weight_decay=0.0)
    network = build(settings, distributed=distributed)
    before = dict(network.named_weights())["model.norm.weight"].clone()

    def constant(values: Tensor, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return values.sum(), {}

    moved = []
    for _ in range(40):
        network.update(everything, constant)
        moved.append(dict(network.named_weights())["model.norm.weight"] != before)
    assert not moved[0].any()
    assert moved[-1].float().mean() > 0.5


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("distributed", [False, True])
def test_a_gradient_that_is_not_finite_moves_no_master_weight(distributed: bool) -> None:
    everything = batches()
    network = build(distributed=distributed)
    network.update(everything, ppo_value_loss(everything, range(3)))
    before = masters(network)
    stats = network.update(everything, lambda values, _: (values.sum() * torch.nan, {}))
    assert stats.skipped
    for found, expected in zip(masters(network), before, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("_one_process")
def test_weights_saved_in_float32_become_the_masters() -> None:
    plain = MegatronNetwork(QWEN3, random_weights(QWEN3, seed=5), head="value", optimizer=SMOOTH, lr=1.0)
    network = build()
    network.load_state_dict(plain.state_dict())
    for parameter, exact in zip(network._model.parameters(), plain._model.parameters(), strict=True):
        assert torch.equal(parameter.main_param.view_as(exact), exact)
        assert torch.equal(parameter, exact.bfloat16())
