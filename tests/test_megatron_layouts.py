"""Every way to divide four processes computes what one process of plain torch computes.

One launch of four ranks plays all layouts and both kinds of embedding; the tests look at what it recorded.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from rlef.checkpoint import CheckpointStore
from rlef.config import ParallelConfig
from tests.distributed import common_folder, run_ranks
from tests.megatron_examples import (
    QWEN2,
    QWEN3,
    SMOOTH,
    TIED,
    UNTIED,
    batches,
    policy_twin,
    ppo_policy_loss,
    ppo_value_loss,
    random_weights,
    relative_error,
    value_twin,
)

pytestmark = pytest.mark.multiprocess

RANKS = 4
TOLERANCE = 1e-5
LAYOUTS = {  # tensor x pipeline; the rest is data
    "1x1": ParallelConfig(processes=RANKS),
    "2x1": ParallelConfig(processes=RANKS, tensor=2),
    "1x2": ParallelConfig(processes=RANKS, pipeline=2),
    "2x2": ParallelConfig(processes=RANKS, tensor=2, pipeline=2),
    "2x1 sequence": ParallelConfig(processes=RANKS, tensor=2, sequence_parallel=True),
    "2x2 sequence": ParallelConfig(processes=RANKS, tensor=2, pipeline=2, sequence_parallel=True),
    "2x1 recompute": ParallelConfig(processes=RANKS, tensor=2, recompute="full"),
    "1x2 recompute": ParallelConfig(processes=RANKS, pipeline=2, recompute="full"),
    "2x2 sequence recompute": ParallelConfig(
        processes=RANKS, tensor=2, pipeline=2, sequence_parallel=True, recompute="full"
    ),
    "1x1 distributed": ParallelConfig(processes=RANKS, distributed_optimizer=True),
    "2x1 distributed sequence": ParallelConfig(
        processes=RANKS, tensor=2, distributed_optimizer=True, sequence_parallel=True
    ),
    "1x2 distributed": ParallelConfig(processes=RANKS, pipeline=2, distributed_optimizer=True),
}
SHAPES = {"untied": UNTIED, "tied": TIED, "qwen2": QWEN2, "qwen3": QWEN3}
UPDATES = 2


def play() -> dict[str, Any]:
    """On one rank: each layout's scores, updates and weights."""
    from megatron.core import parallel_state

    from rlef.megatron_policy import initialize

    rank = initialize(ParallelConfig()).rank
    parallel_state.destroy_model_parallel()
    store = CheckpointStore(common_folder() / "checkpoints", keep=1, rank=rank, world_size=RANKS)
    recorded: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as warned:
        for layout, parallel in LAYOUTS.items():
            for embedding in SHAPES:
                recorded[f"{layout} {embedding}"] = _play_layout(parallel, embedding, store)
            parallel_state.destroy_model_parallel()
    recorded["warnings"] = sorted({str(warning.message) for warning in warned})
    return recorded


def _play_layout(parallel: ParallelConfig, embedding: str, store: CheckpointStore) -> dict[str, Any]:
    from rlef.megatron_policy import MegatronNetwork, initialize

    shape = SHAPES[embedding]
    weights = random_weights(shape)
    state = initialize(parallel)
    everything = batches()
    mine = range(
        state.data_parallel_rank, len(everything), state.data_parallel_size
    )  # none on the fourth of four
    own = [everything[number] for number in mine]
    losses = {
        "logits": ppo_policy_loss(everything, mine, state.tensor_parallel_group),
        "value": ppo_value_loss(everything, mine),
    }
    record: dict[str, Any] = {"batches": list(mine)}
    for head, loss in losses.items():
        settings: Any = {"head": head, "parallel": parallel, "optimizer": SMOOTH, "lr": SMOOTH.lr}
        network = MegatronNetwork(shape, weights, **settings)
        frozen = MegatronNetwork(shape, weights, head=head, parallel=parallel)
        record[head] = {
            "loaded": dict(network.named_weights()),
            "scores": network.forward(own),
            "frozen scores": frozen.forward(own),
            "updates": [network.update(own, loss)],
        }
        saved = network.state_dict()
        record[head]["moments"] = sum(
            piece.data.numel() for piece in saved.pieces if piece.name.startswith("exp_avg/")
        )
        store.save(1, {"network": saved}, {})
        record[head]["updates"].append(network.update(own, loss))
        record[head]["weights"] = dict(network.named_weights())
        resumed = MegatronNetwork(shape, random_weights(shape, seed=9), **settings)
        checkpoint = store.load_latest()
        assert checkpoint is not None
        resumed.load_state_dict(checkpoint.states["network"])
        resumed.update(own, loss)
        record[head]["resumed"] = dict(resumed.named_weights())
    return record


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(play, ranks=RANKS, folder=tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module", params=SHAPES)
def embedding(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module", params=["logits", "value"])
def head(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def twin(embedding: str, head: str) -> dict[str, Any]:
    """What the plain torch network makes of the same weights and micro-batches, all in one process."""
    everything = batches()
    weights = random_weights(SHAPES[embedding])
    if head == "logits":
        network, loss = policy_twin(SHAPES[embedding], weights), ppo_policy_loss(everything, range(3))
    else:
        network, loss = value_twin(SHAPES[embedding], weights), ppo_value_loss(everything, range(3))
    return {
        "scores": network.forward(everything),
        "updates": [network.update(everything, loss) for _ in range(UPDATES)],
        "weights": dict(network.named_weights()),
        "loaded": {name: weights[name] for name, _ in network.named_weights()},
    }


@pytest.fixture(params=LAYOUTS)
def records(
    request: pytest.FixtureRequest, ranks: list[dict[str, Any]], embedding: str, head: str
) -> list[dict[str, Any]]:
    """What each rank recorded in one layout."""
    played = [rank[f"{request.param} {embedding}"] for rank in ranks]
    return [{"batches": record["batches"], **record[head]} for record in played]


def test_every_layout_scores_like_the_torch_twin(records: list[dict[str, Any]], twin: dict[str, Any]) -> None:
    for record in records:
        assert len(record["scores"]) == len(record["batches"])
        for number, scores in zip(record["batches"], record["scores"], strict=True):
            assert relative_error(scores, twin["scores"][number]) < TOLERANCE


def test_a_frozen_network_scores_like_the_torch_twin_in_every_layout(
    records: list[dict[str, Any]], twin: dict[str, Any]
) -> None:
    """Its linear layers are others in megatron, and round differently."""
    for record in records:
        if record["batches"]:
            expected = torch.cat([twin["scores"][number] for number in record["batches"]])
            assert relative_error(torch.cat(record["frozen scores"]), expected) < TOLERANCE


def test_every_layout_updates_like_the_torch_twin(
    records: list[dict[str, Any]], twin: dict[str, Any]
) -> None:
    for record in records:
        for found, expected in zip(record["updates"], twin["updates"], strict=True):
            assert found.grad_norm == pytest.approx(expected.grad_norm, rel=TOLERANCE)
            assert found.learning_rate == expected.learning_rate
            assert found.skipped is False
            assert found.statistics == pytest.approx(expected.statistics, rel=TOLERANCE, abs=1e-7)


def test_every_layout_moves_every_weight_like_the_torch_twin(
    records: list[dict[str, Any]], twin: dict[str, Any]
) -> None:
    """The optimiser is so smooth that weights move by their gradients: this compares gradients too.

    What a weight keeps of its move is rounded to the weight's last bit.
    """
    last_bit = torch.finfo(torch.float32).eps
    for record in records:
        assert record["weights"].keys() == twin["weights"].keys()
        for name, expected in twin["weights"].items():
            start = twin["loaded"][name]
            allowed = TOLERANCE * (expected - start).abs().max() + last_bit * expected.abs().max()
            assert (record["weights"][name] - expected).abs().max() < allowed, name


def test_exported_weights_are_those_that_were_loaded_bit_for_bit(
    records: list[dict[str, Any]], twin: dict[str, Any]
) -> None:
    for record in records:
        assert record["loaded"].keys() == twin["loaded"].keys()
        for name, weight in twin["loaded"].items():
            assert torch.equal(record["loaded"][name], weight), name


def test_a_resumed_network_continues_bit_for_bit(records: list[dict[str, Any]]) -> None:
    for record in records:
        for name, weight in record["weights"].items():
            assert torch.equal(record["resumed"][name], weight), name


def test_every_rank_ends_with_the_same_weights_and_statistics(records: list[dict[str, Any]]) -> None:
    for record in records[1:]:
        assert record["updates"] == records[0]["updates"]
        for name, weight in records[0]["weights"].items():
            assert torch.equal(record["weights"][name], weight), name


def test_one_rank_had_no_micro_batch_and_took_part(ranks: list[dict[str, Any]]) -> None:
    assert [rank["1x1 untied"]["batches"] for rank in ranks] == [[0], [1], [2], []]


def test_some_packs_divide_among_the_ranks_and_others_are_padded() -> None:
    assert {batch.num_tokens % 2 for batch in batches()} == {0, 1}


@pytest.mark.parametrize("embedding", SHAPES)
def test_a_distributed_optimizer_keeps_each_moment_on_one_of_the_replicas(
    ranks: list[dict[str, Any]], embedding: str
) -> None:
    for whole, split, replicas in [("1x1", "1x1 distributed", 4), ("1x2", "1x2 distributed", 2)]:
        kept = [rank[f"{whole} {embedding}"]["logits"]["moments"] for rank in ranks]
        shared = [rank[f"{split} {embedding}"]["logits"]["moments"] for rank in ranks]
        assert sum(shared) * replicas == sum(kept)
        assert max(shared) < max(kept)


def test_no_layout_warns_of_what_a_user_cannot_mend(ranks: list[dict[str, Any]]) -> None:
    assert [rank["warnings"] for rank in ranks] == [[]] * RANKS
