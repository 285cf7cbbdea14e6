"""The Megatron networks in one process, on packs small enough to follow."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlef import megatron_policy
from rlef.config import ConfigError, OptimizerConfig, ParallelConfig
from rlef.losses import token_logprobs
from rlef.megatron_policy import MegatronNetwork, build_networks, initialize
from rlef.packing import pack
from rlef.pieces import HeldState
from rlef.ports import LossFunction
from rlef.records import Batch
from tests.megatron_examples import (
    SMOOTH,
    TIED,
    UNTIED,
    batches,
    policy_twin,
    ppo_policy_loss,
    ppo_value_loss,
    random_weights,
    value_twin,
)
from tests.ppo_examples import episode, noise

WEIGHTS = random_weights(UNTIED)


@pytest.fixture(autouse=True, scope="module")
def _one_process() -> Iterator[None]:
    initialize(ParallelConfig())
    yield
    megatron_policy.mpu.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def policy(optimizer: OptimizerConfig | None = SMOOTH) -> MegatronNetwork:
    lr = optimizer.lr if optimizer else 0.0
    return MegatronNetwork(UNTIED, WEIGHTS, head="logits", optimizer=optimizer, lr=lr)


def value(optimizer: OptimizerConfig | None = SMOOTH) -> MegatronNetwork:
    lr = optimizer.value_lr if optimizer else 0.0
    return MegatronNetwork(UNTIED, WEIGHTS, head="value", optimizer=optimizer, lr=lr)


def weights_of(network: MegatronNetwork) -> dict[str, Tensor]:
    return dict(network.named_weights())


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def assert_same_tensors(found: HeldState, expected: HeldState) -> None:
    for one, other in zip(found.pieces, expected.pieces, strict=True):
        assert one.name == other.name
        assert torch.equal(one.data, other.data), one.name


def constant_loss(outputs: Tensor, index: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Pulls at nothing."""
    return outputs.sum() * 0.0, {"count": torch.tensor(1.0), "index_max": torch.tensor(float(index))}


def logits_of(network: MegatronNetwork, batch: Batch) -> Tensor:
    seen = []

    def look(logits: Tensor, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(logits.detach().clone())
        return constant_loss(logits, index)

    network.update([batch], look)
    return seen[0]


@pytest.mark.parametrize("shape", [UNTIED, TIED], ids=["untied", "tied"])
def test_logits_are_those_of_transformers(shape: object) -> None:
    """Of each sequence alone, from the same Hugging Face weights."""
    import transformers

    assert isinstance(shape, type(UNTIED))
    weights = {name: tensor for name, tensor in random_weights(shape).items() if name != "value_head.weight"}
    settings = {name: getattr(shape, name) for name in shape.__slots__ if name != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(rope_parameters=rope, **settings)).eval()
    model.load_state_dict(
        {**weights, "lm_head.weight": weights.get("lm_head.weight", weights["model.embed_tokens.weight"])}
    )
    batch = batches()[2]
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
    with torch.no_grad():
        expected = torch.cat([model(input_ids=ids[None]).logits[0] for ids in batch.token_ids.split(lengths)])
        twin = policy_twin(shape, weights)._outputs(batch)
    found = logits_of(MegatronNetwork(shape, weights, head="logits", optimizer=SMOOTH, lr=1.0), batch)
    torch.testing.assert_close(twin, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_packed_sequences_score_as_each_would_alone() -> None:
    episodes = [episode("..####", seed=4), episode(".#.#.#..", seed=5), episode("...#", seed=6)]
    alone = [pack([each], value_level="turn") for each in episodes]
    together = [pack(episodes, value_level="turn")]
    for network in (policy(), value()):
        torch.testing.assert_close(
            network.forward(together)[0], torch.cat(network.forward(alone)), rtol=1e-5, atol=1e-6
        )


def test_a_packed_update_is_that_of_the_same_sequences_one_per_micro_batch() -> None:
    episodes = [episode("..####", seed=4), episode(".#.#.#..", seed=5), episode("...#", seed=6)]
    alone = [pack([each], value_level="turn") for each in episodes]
    together = [pack(episodes, value_level="turn")]
    for build in (policy, value):
        sizes = [each.shape[0] for each in build().forward(alone)]  # tokens, or values
        factors = noise(sum(sizes), seed=7)
        networks = []
        for micro_batches, shares in ((together, [factors]), (alone, factors.split(sizes))):
            loss = weighted_outputs(micro_batches, shares)
            network = build()
            networks.append((network.update(micro_batches, loss), weights_of(network)))
        (packed, packed_weights), (single, single_weights) = networks
        assert packed.grad_norm == pytest.approx(single.grad_norm, rel=1e-5)
        assert packed.statistics == pytest.approx(single.statistics, rel=1e-5)
        for name, weight in single_weights.items():
            torch.testing.assert_close(packed_weights[name], weight, rtol=1e-5, atol=1e-6)


def weighted_outputs(micro_batches: list[Batch], shares: Sequence[Tensor]) -> LossFunction:
    """Each log-prob of a response token, or each value, times a number of its own."""

    def loss(outputs: Tensor, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        is_policy = outputs.ndim == 2
        scores = token_logprobs(outputs, micro_batches[index]) if is_policy else outputs
        summed = (scores * shares[index]).sum()
        return summed, {"loss": summed.detach()}

    return loss


def test_logprobs_are_zero_outside_responses_and_negative_inside() -> None:
    batch = pack([episode("..##.#.", seed=1)], value_level="turn")
    (logprobs,) = policy().forward([batch])
    assert logprobs.dtype == torch.float32
    assert [bool(number < 0) for number in logprobs] == [False, False, True, True, False, True, False]
    assert torch.equal(logprobs[~batch.response_mask], torch.zeros(4))


@pytest.mark.parametrize(
    ("build", "make_loss"), [(policy, ppo_policy_loss), (value, ppo_value_loss)], ids=["policy", "value"]
)
def test_observations_after_the_last_response_move_nothing(build: object, make_loss: object) -> None:
    """Whatever the feedback at the end of an episode says, scores and updates are the same, bit for bit."""
    assert callable(build)
    assert callable(make_loss)
    batch = pack([episode("..##...", seed=1), episode("...##", seed=2)], value_level="turn")
    changed = batch.token_ids.clone()
    changed[4:7] = (changed[4:7] + 1) % 7
    ends = []
    for token_ids in (batch.token_ids, changed):
        perturbed = replace(batch, token_ids=token_ids)
        network = build()
        scores = network.forward([perturbed])[0]
        stats = network.update([perturbed], make_loss([perturbed], [0]))
        ends.append((scores, stats, weights_of(network)))
    (scores, stats, weights), (other_scores, other_stats, other_weights) = ends
    assert torch.equal(scores, other_scores)
    assert stats == other_stats
    assert_same_weights(other_weights, weights)


@pytest.mark.parametrize(
    ("build", "build_twin", "make_loss"),
    [(policy, policy_twin, ppo_policy_loss), (value, value_twin, ppo_value_loss)],
    ids=["policy", "value"],
)
@pytest.mark.parametrize("clip_grad", [0.01, 100.0], ids=["clipped", "unclipped"])
def test_updates_are_those_of_the_torch_twin(
    build: object, build_twin: object, make_loss: object, clip_grad: float
) -> None:
    assert callable(build)
    assert callable(build_twin)
    assert callable(make_loss)
    settings = SMOOTH.model_copy(update={"clip_grad": clip_grad})
    everything = batches()
    loss: LossFunction = make_loss(everything, range(3))
    network, twin = build(settings), build_twin(UNTIED, WEIGHTS, settings)
    for _ in range(3):
        found, expected = network.update(everything, loss), twin.update(everything, loss)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert found.learning_rate == expected.learning_rate
    assert found.grad_norm > 0.01
    rounding = 1e-6 * max(1.0, found.grad_norm)  # a weight moves by about its gradient
    for name, weight in twin.named_weights():
        torch.testing.assert_close(weights_of(network)[name], weight, rtol=1e-5, atol=rounding)


def test_a_resumed_network_continues_bit_for_bit() -> None:
    everything, settings = batches(), OptimizerConfig(lr=1e-3, warmup_updates=3)
    loss = ppo_policy_loss(everything, range(3))
    network = policy(settings)
    network.update(everything, loss)
    state = copy.deepcopy(network.state_dict())
    resumed = MegatronNetwork(
        UNTIED, random_weights(UNTIED, seed=5), head="logits", optimizer=settings, lr=1e-3
    )
    resumed.load_state_dict(state)
    for _ in range(3):  # past the warm-up
        assert resumed.update(everything, loss) == network.update(everything, loss)
    assert_same_weights(weights_of(resumed), weights_of(network))


def test_a_loaded_state_is_not_shared_with_its_source() -> None:
    everything = batches()
    loss = ppo_policy_loss(everything, range(3))
    source = policy()
    source.update(everything, loss)
    follower = policy()
    follower.load_state_dict(source.state_dict())
    before = copy.deepcopy(source.state_dict())
    follower.update(everything, loss)
    assert source.state_dict().facts == before.facts
    assert_same_tensors(source.state_dict(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32}, r"the saved network has hidden_size = 32, this one 16; resume with the set"),
        ({"head": "value"}, r"head = value, this one logits"),
    ],
)
def test_a_state_of_another_network_is_refused_and_nothing_loaded(
    change: dict[str, object], message: str
) -> None:
    network = policy()
    before = weights_of(network)
    state = network.state_dict()
    moved = [replace(piece, data=piece.data + 1) for piece in state.pieces]
    with pytest.raises(ValueError, match=message):
        network.load_state_dict(HeldState(facts={**state.facts, **change}, pieces=moved))
    assert_same_weights(weights_of(network), before)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_moves_neither_weights_nor_moments(poison: float) -> None:
    everything = batches()
    network = policy()
    network.update(everything, ppo_policy_loss(everything, range(3)))
    before = copy.deepcopy(network.state_dict())
    assert before.facts["steps"] == 1

    def poisoned(logits: Tensor, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return logits.sum() * (poison if index == 1 else 1.0), {}

    stats = network.update(everything, poisoned)
    after = network.state_dict()
    assert stats.skipped
    assert after.facts["steps"] == 1
    assert_same_tensors(after, before)


def test_the_rate_warms_up_in_equal_steps_and_then_stays() -> None:
    network = policy(OptimizerConfig(lr=0.4, warmup_updates=4))
    rates = [network.update(batches(), constant_loss).learning_rate for _ in range(6)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_weight_decay_shrinks_matrices_and_spares_norms() -> None:
    network = value(OptimizerConfig(value_lr=0.5, weight_decay=0.1, warmup_updates=0))
    network.update(batches(), constant_loss)
    for name, weight in network.named_weights():
        factor = 1.0 if "norm" in name else 1.0 - 0.5 * 0.1
        torch.testing.assert_close(weight, WEIGHTS[name] * factor)


def test_statistics_are_added_up_but_maxima_kept() -> None:
    assert policy().update(batches(), constant_loss).statistics == {"count": 3.0, "index_max": 2.0}


def test_an_update_without_micro_batches_only_decays() -> None:
    network = policy(OptimizerConfig(lr=0.5, weight_decay=0.1, warmup_updates=0))
    stats = network.update([], constant_loss)
    assert (stats.statistics, stats.grad_norm, stats.skipped) == ({}, 0.0, False)
    torch.testing.assert_close(weights_of(network)["lm_head.weight"], WEIGHTS["lm_head.weight"] * 0.95)


def test_forward_without_micro_batches_is_empty() -> None:
    assert policy().forward([]) == []


def test_a_frozen_network_scores_alike_and_cannot_learn() -> None:
    frozen, learning = policy(None), policy()
    assert torch.equal(frozen.forward(batches())[0], learning.forward(batches())[0])
    with pytest.raises(ValueError, match="a frozen network cannot be updated"):
        frozen.update(batches(), constant_loss)
    assert {piece.name.split("/")[0] for piece in frozen.state_dict().pieces} == {"weight"}


def test_an_offloaded_network_scores_alike_and_keeps_nothing_on_the_device() -> None:
    """Here the device is the CPU too: what is used are copies, which nothing holds afterwards."""
    plain, offloaded = (
        MegatronNetwork(UNTIED, WEIGHTS, head="logits", offloaded=offloaded) for offloaded in (False, True)
    )
    host = [parameter.data_ptr() for parameter in offloaded._model.parameters()]
    used: list[weakref.ref[torch.nn.Parameter]] = []
    norm = offloaded._model[0].decoder.final_layernorm
    norm.register_forward_pre_hook(lambda module, _: used.append(weakref.ref(module.weight)))
    for found, expected in zip(offloaded.forward(batches()), plain.forward(batches()), strict=True):
        assert torch.equal(found, expected)
    assert len(used) == len(batches())
    assert all(copied() is None for copied in used)
    assert [parameter.data_ptr() for parameter in offloaded._model.parameters()] == host
    assert_same_weights(weights_of(offloaded), weights_of(plain))


def test_a_state_is_loaded_into_an_offloaded_network() -> None:
    other = MegatronNetwork(UNTIED, random_weights(UNTIED, seed=5), head="logits")
    offloaded = MegatronNetwork(UNTIED, WEIGHTS, head="logits", offloaded=True)
    offloaded.load_state_dict(other.state_dict())
    assert torch.equal(offloaded.forward(batches())[0], other.forward(batches())[0])


def test_recomputation_keeps_less_than_half_and_runs_each_layer_twice() -> None:
    """What is kept is counted when the loss is called, which is between the two passes."""
    kept: dict[str, int] = {}
    runs: dict[str, int] = {}
    for recompute in ("none", "full"):
        network = MegatronNetwork(
            UNTIED,
            WEIGHTS,
            head="value",
            parallel=ParallelConfig(recompute=recompute),
            optimizer=SMOOTH,
            lr=1.0,
        )
        bytes_kept, calls = [0], []
        for layer in network._model[0].decoder.layers:
            layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))

        def keep(tensor: Tensor, bytes_kept: list[int] = bytes_kept) -> Tensor:
            bytes_kept[0] += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.nbytes
            return tensor

        def loss(values: Tensor, index: int, name: str = recompute) -> tuple[Tensor, dict[str, Tensor]]:
            kept[name] = bytes_kept[0]  # noqa: B023
            return values.sum(), {}

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network.update(batches()[:1], loss)
        runs[recompute] = len(calls)
    assert runs == {"none": UNTIED.num_hidden_layers, "full": 2 * UNTIED.num_hidden_layers}
    assert kept["full"] < kept["none"] / 2


def test_exported_weights_are_copies() -> None:
    network = policy()
    before = weights_of(network)
    network.update(batches(), ppo_policy_loss(batches(), range(3)))
    assert torch.equal(before["model.norm.weight"], WEIGHTS["model.norm.weight"])
    assert not torch.equal(weights_of(network)["model.norm.weight"], before["model.norm.weight"])


def test_build_networks_starts_all_three_from_the_same_weights() -> None:
    weights = {name: tensor for name, tensor in WEIGHTS.items() if name != "value_head.weight"}
    networks = build_networks(UNTIED, weights, parallel=ParallelConfig(), optimizer=SMOOTH)
    exported = [
        dict(network.named_weights()) for network in (networks.policy, networks.reference, networks.value)
    ]
    assert_same_weights(exported[0], weights)
    assert_same_weights(exported[1], weights)
    head = exported[2].pop("value_head.weight")
    assert torch.equal(head, torch.zeros(1, UNTIED.hidden_size))
    del weights["lm_head.weight"]
    assert_same_weights(exported[2], weights)
    assert (networks.parallel.world_size, networks.parallel.data_parallel_group) == (1, None)


def test_build_networks_refuses_a_layout_before_it_builds() -> None:
    with pytest.raises(
        ConfigError, match=r"parallel\.tensor is 3, which does not divide the model's 4 attention"
    ):
        build_networks(UNTIED, WEIGHTS, parallel=ParallelConfig(tensor=3), optimizer=SMOOTH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.norm.weight": None},
            r"the weights lack model\.norm\.weight; name a whole model of the shape",
        ),
        (
            {"model.norm.weight": torch.ones(4)},
            r"model\.norm\.weight has shape \[4\], but config\.json makes it \[16\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change: dict[str, Tensor | None], message: str) -> None:
    weights = {name: tensor for name, tensor in (WEIGHTS | change).items() if tensor is not None}
    with pytest.raises(ConfigError, match=message):
        MegatronNetwork(UNTIED, weights, head="logits")


def test_a_stage_gives_what_its_torch_twin_gives() -> None:
    """Of one process, whose stage is the whole model."""
    for found, twin in zip(
        policy().stage_weights(), policy_twin(UNTIED, WEIGHTS).stage_weights(), strict=True
    ):
        assert torch.equal(found, twin)
