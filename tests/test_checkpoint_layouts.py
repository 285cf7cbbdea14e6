"""A network that was saved in one layout goes on in every other as if nothing had happened.

One launch of four ranks trains in each layout, saves, goes on, and then takes up in each layout what each of
them saved; the tests look at what it recorded. One process, and the plain torch twin, take it up too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from rlef.checkpoint import CheckpointStore
from rlef.checkpoint_files import Checkpoint
from rlef.config import ParallelConfig
from rlef.megatron_policy import MegatronNetwork, initialize, leave, mpu
from rlef.ports import LossFunction, Network
from rlef.records import Batch
from rlef.shards import Head, stage_weights
from tests.distributed import common_folder, run_ranks
from tests.megatron_examples import (
    QWEN3,
    SMOOTH,
    TIED,
    batches,
    policy_twin,
    ppo_policy_loss,
    ppo_value_loss,
    random_weights,
    value_twin,
)

pytestmark = pytest.mark.multiprocess

RANKS = 4
TOLERANCE = 1e-5
LAYOUTS = {  # tensor x pipeline; the rest is data
    "1x1": ParallelConfig(processes=RANKS),
    "1x2 distributed": ParallelConfig(processes=RANKS, pipeline=2, distributed_optimizer=True),
    "2x1 distributed": ParallelConfig(processes=RANKS, tensor=2, distributed_optimizer=True),
    "2x2": ParallelConfig(processes=RANKS, tensor=2, pipeline=2),
}
SHAPES = {"tied": TIED, "qwen3": QWEN3}
# Each layout takes up both shapes, but not from each other: that halves the time.
SHAPE_OF = {
    (saved, layout): list(SHAPES)[(first + second) % 2]
    for first, saved in enumerate(LAYOUTS)
    for second, layout in enumerate(LAYOUTS)
}
HEADS: tuple[Head, ...] = ("logits", "value")
UPDATES = 2


@dataclass(frozen=True)
class Played:
    """What a network came to."""

    loaded: dict[str, Tensor]  # whole weights that it began with
    weights: dict[str, Tensor]  # after another update
    learning_rate: float


def play() -> dict[str, Any]:
    """On one rank: what each layout came to, and what those came to that took up what it had saved."""
    rank = initialize(ParallelConfig()).rank
    stores = {
        (layout, shape): CheckpointStore(
            common_folder() / layout / shape, keep=1, rank=rank, world_size=RANKS
        )
        for layout in LAYOUTS
        for shape in SHAPES
    }
    mpu.destroy_model_parallel()
    went_on: dict[Any, Played] = {}
    for layout in LAYOUTS:
        with in_layout(layout) as losses:
            for shape in SHAPES:
                networks = {head: network(shape, head, layout) for head in HEADS}
                for head in HEADS:
                    for _ in range(UPDATES):
                        networks[head].update(*losses[head])
                states = {head: networks[head].state_dict() for head in HEADS}
                stores[layout, shape].save(UPDATES, states, {})
                for head in HEADS:
                    went_on[layout, shape, head] = go_on(networks[head], losses[head])
    taken_up: dict[Any, Played] = {}
    for layout in LAYOUTS:
        with in_layout(layout) as losses:
            for saved in LAYOUTS:
                shape = SHAPE_OF[saved, layout]
                checkpoint = stores[saved, shape].load_latest()
                assert checkpoint is not None
                for head in HEADS:
                    other = network(shape, head, layout, seed=9)
                    other.load_state_dict(checkpoint.states[head])
                    taken_up[saved, layout, head] = go_on(other, losses[head])
    return {"went on": went_on, "taken up": taken_up}


@contextmanager
def in_layout(name: str) -> Iterator[dict[str, tuple[list[Batch], LossFunction]]]:
    """This rank's micro-batches and loss for each kind of network."""
    state = initialize(LAYOUTS[name])
    everything = batches()
    mine = range(state.data_parallel_rank, len(everything), state.data_parallel_size)
    own = [everything[number] for number in mine]
    yield {
        "logits": (own, ppo_policy_loss(everything, mine, state.tensor_parallel_group)),
        "value": (own, ppo_value_loss(everything, mine)),
    }
    mpu.destroy_model_parallel()


def network(shape: str, head: Head, layout: str, *, seed: int = 0) -> MegatronNetwork:
    weights = random_weights(SHAPES[shape], seed=seed)
    return MegatronNetwork(
        SHAPES[shape], weights, head=head, parallel=LAYOUTS[layout], optimizer=SMOOTH, lr=SMOOTH.lr
    )


def go_on(network: Network, loss: tuple[list[Batch], LossFunction]) -> Played:
    loaded = {name: weight.clone() for name, weight in network.named_weights()}
    stats = network.update(*loss)
    weights = {name: weight.clone() for name, weight in network.named_weights()}
    return Played(loaded=loaded, weights=weights, learning_rate=stats.learning_rate)


@dataclass(frozen=True)
class Story:
    folder: Path  # layout / shape / step
    ranks: list[dict[str, dict[Any, Played]]]

    def went_on(self, *key: str) -> Played:
        return self.ranks[0]["went on"][key]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("ranks")
    return Story(folder=folder, ranks=run_ranks(play, ranks=RANKS, folder=folder))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("saved", LAYOUTS)
def test_any_layout_takes_up_what_any_other_has_saved(story: Story, saved: str, layout: str) -> None:
    for rank in story.ranks:
        for head in HEADS:
            expected = story.went_on(saved, SHAPE_OF[saved, layout], head)
            assert_went_on(rank["taken up"][saved, layout, head], expected, same_layout=saved == layout)


@pytest.mark.parametrize("saved", LAYOUTS)
def test_one_process_takes_up_what_any_layout_has_saved(story: Story, saved: str) -> None:
    initialize(ParallelConfig())
    everything = batches()
    for shape in SHAPES:
        for head, loss in one_process_losses(everything).items():
            single = network(shape, head, "1x1", seed=9)
            single.load_state_dict(newest(story.folder / saved / shape).states[head])
            found = go_on(single, (everything, loss))
            assert_went_on(found, story.went_on(saved, shape, head), same_layout=False)
    leave()


@pytest.mark.parametrize("saved", LAYOUTS)
def test_the_torch_twin_takes_up_what_any_layout_has_saved(story: Story, saved: str) -> None:
    """Names and places are the Hugging Face model's: nothing of Megatron's is left in a checkpoint."""
    everything = batches()
    for shape, size in SHAPES.items():
        for head, loss in one_process_losses(everything).items():
            twin = {"logits": policy_twin, "value": value_twin}[head](size, random_weights(size, seed=9))
            twin.load_state_dict(newest(story.folder / saved / shape).states[head])
            found = go_on(twin, (everything, loss))
            assert_went_on(found, story.went_on(saved, shape, head), same_layout=False)


def one_process_losses(everything: list[Batch]) -> dict[Head, LossFunction]:
    mine = range(len(everything))
    return {"logits": ppo_policy_loss(everything, mine), "value": ppo_value_loss(everything, mine)}


def newest(folder: Path) -> Checkpoint:
    checkpoint = CheckpointStore(folder, keep=1).load_latest()
    assert checkpoint is not None
    return checkpoint


def assert_went_on(found: Played, expected: Played, *, same_layout: bool) -> None:
    """The same weights, bit for bit, and after another update the same but for rounding.

    The optimiser is so smooth that a weight moves by its moments: these must have come back too. What a
    weight keeps of its move is rounded to its last bit.
    """
    assert found.learning_rate == expected.learning_rate
    assert found.loaded.keys() == expected.loaded.keys()
    for name, start in expected.loaded.items():
        assert torch.equal(found.loaded[name], start), name
        after = expected.weights[name]
        moved = (after - start).abs().max()
        assert moved > 0, name
        if same_layout:
            assert torch.equal(found.weights[name], after), name
        allowed = TOLERANCE * moved + torch.finfo(torch.float32).eps * after.abs().max()
        assert (found.weights[name] - after).abs().max() <= allowed, name


def test_each_number_is_saved_once(story: Story) -> None:
    """Two networks of weights and two moments each, whatever the layout and the replicas."""
    for layout in LAYOUTS:
        for shape, size in SHAPES.items():
            elements = sum(
                weight.elements for head in HEADS for weight in stage_weights(size, head, stage=0, stages=1)
            )
            (step,) = (story.folder / layout / shape).iterdir()
            saved = 0
            for file in step.glob("*.safetensors"):
                with safe_open(file, framework="pt") as opened:
                    saved += sum(opened.get_tensor(key).numel() for key in opened.keys())  # noqa: SIM118
            assert saved == 3 * elements, (layout, shape)


def test_every_rank_writes_a_share(story: Story) -> None:
    for layout in LAYOUTS:
        (step,) = (story.folder / layout / "qwen3").iterdir()
        sizes = {
            rank: sum(f.stat().st_size for f in step.glob(f"rank-{rank:05d}-*")) for rank in range(RANKS)
        }
        assert min(sizes.values()) > 0.1 * sum(sizes.values()), (layout, sizes)
