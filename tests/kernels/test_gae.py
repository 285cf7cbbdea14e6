from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlef_kernels import AdvantageEstimate, gae, turn_gae, turn_returns
from tests.kernels.gae_twin import FRACTIONS, Pack, naive_gae, pack_of, packs

NAN = torch.nan


def gae_of(pack: Pack, *, gamma: float = 0.9, lambda_: float = 0.8) -> AdvantageEstimate:
    return gae(pack.values, pack.rewards, pack.action_mask, pack.cu_seqlens, gamma=gamma, lambda_=lambda_)


def dialog(values: list[float]) -> Pack:
    """Two tokens of the policy, three of the environment, two of the policy; then a reward of 1."""
    acts = [True, True, False, False, False, True, True]
    return Pack(
        values=torch.tensor(values),
        rewards=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]),
        action_mask=torch.tensor(acts),
        cu_seqlens=torch.tensor([0, 7], dtype=torch.int32),
    )


def test_what_the_environment_wrote_takes_no_time() -> None:
    # From the end, with gamma lambda = .95: 1 - .7; .7 - .6 + .95 * .300; .6 - .4 + .95 * .385;
    # .4 - .5 + .95 * .56575. Between the second and the third lie three tokens of the environment.
    estimate = gae_of(dialog([0.5, 0.4, NAN, NAN, NAN, 0.6, 0.7]), gamma=1, lambda_=0.95)
    expected = [0.4374625, 0.56575, 0, 0, 0, 0.385, 0.3]
    assert estimate.advantages.tolist() == pytest.approx(expected, abs=1e-6)
    assert estimate.returns.tolist() == pytest.approx([0.9374625, 0.96575, 0, 0, 0, 0.985, 1], abs=1e-6)


@pytest.mark.parametrize("written", [0.0, 0.5, 1e30, torch.inf, NAN])
def test_values_of_what_the_environment_wrote_change_no_bit(written: float) -> None:
    estimate = gae_of(dialog([0.5, 0.4, written, written, written, 0.6, 0.7]))
    expected = gae_of(dialog([0.5, 0.4, 0.1, 0.2, 0.3, 0.6, 0.7]))
    assert torch.equal(estimate.advantages, expected.advantages)
    assert torch.equal(estimate.returns, expected.returns)


@given(packs(), FRACTIONS, FRACTIONS)
def test_equals_a_loop_from_the_last_token_back(pack: Pack, gamma: float, lambda_: float) -> None:
    estimate = gae_of(pack, gamma=gamma, lambda_=lambda_)
    advantages, returns = naive_gae(pack, gamma=gamma, lambda_=lambda_)
    torch.testing.assert_close(estimate.advantages, advantages, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(estimate.returns, returns, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@given(pack=packs(), gamma=FRACTIONS, lambda_=FRACTIONS)
def test_half_and_single_precision_are_summed_in_float32(
    pack: Pack, gamma: float, lambda_: float, dtype: torch.dtype
) -> None:
    rounded = pack.in_type(dtype)
    estimate = gae_of(rounded, gamma=gamma, lambda_=lambda_)
    advantages, returns = naive_gae(rounded.in_type(torch.float64), gamma=gamma, lambda_=lambda_)
    assert estimate.advantages.dtype == estimate.returns.dtype == torch.float32
    torch.testing.assert_close(estimate.advantages.double(), advantages, rtol=0, atol=pack.rounding())
    torch.testing.assert_close(estimate.returns.double(), returns, rtol=0, atol=pack.rounding())


@given(packs(), FRACTIONS, FRACTIONS)
def test_is_linear_in_rewards_and_values(pack: Pack, gamma: float, lambda_: float) -> None:
    zeros = torch.zeros_like(pack.values)

    def advantages(values: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        mask, borders = pack.action_mask, pack.cu_seqlens
        return gae(values, rewards, mask, borders, gamma=gamma, lambda_=lambda_).advantages

    early, late = pack.rewards * 0.25, pack.rewards * 0.75
    parts = advantages(pack.values, early) + advantages(zeros, late)
    torch.testing.assert_close(advantages(pack.values, pack.rewards), parts, rtol=1e-12, atol=1e-12)
    both = advantages(pack.values, zeros) + advantages(zeros, pack.rewards)
    torch.testing.assert_close(advantages(pack.values, pack.rewards), both, rtol=1e-12, atol=1e-12)


@given(packs(), FRACTIONS, FRACTIONS, st.sampled_from([torch.float32, torch.float64]))
def test_a_sequence_gets_the_same_bits_alone_as_among_others(
    pack: Pack, gamma: float, lambda_: float, dtype: torch.dtype
) -> None:
    pack = pack.in_type(dtype)
    together = gae_of(pack, gamma=gamma, lambda_=lambda_)
    alone = [
        gae_of(pack.alone(number), gamma=gamma, lambda_=lambda_) for number in range(len(pack.cu_seqlens) - 1)
    ]
    nothing = torch.empty(0, dtype=dtype)
    assert torch.equal(together.advantages, torch.cat([nothing, *(each.advantages for each in alone)]))
    assert torch.equal(together.returns, torch.cat([nothing, *(each.returns for each in alone)]))


def test_lambda_0_is_the_error_of_one_step_and_lambda_1_the_discounted_return() -> None:
    values, rewards = torch.tensor([2.0, 4.0, 8.0]), torch.tensor([1.0, 1.0, 1.0])
    everything, borders = torch.ones(3, dtype=torch.bool), torch.tensor([0, 3])
    one_step = gae(values, rewards, everything, borders, gamma=0.5, lambda_=0)
    assert one_step.advantages.tolist() == [1 + 2 - 2, 1 + 4 - 4, 1 - 8]
    monte_carlo = gae(values, rewards, everything, borders, gamma=0.5, lambda_=1)
    assert monte_carlo.returns.tolist() == [1.75, 1.5, 1]


def test_no_token_gives_no_advantage() -> None:
    for borders in ([0], [0, 0, 0]):
        nothing = torch.empty(0)
        estimate = gae(nothing, nothing, nothing.bool(), torch.tensor(borders), gamma=1, lambda_=1)
        assert estimate.advantages.tolist() == estimate.returns.tolist() == []


def test_one_token_has_its_reward_minus_its_value() -> None:
    one = torch.ones(1)
    estimate = gae(one * 3, one * 5, one.bool(), torch.tensor([0, 1]), gamma=0.9, lambda_=0.9)
    assert (estimate.advantages.tolist(), estimate.returns.tolist()) == ([2.0], [5.0])


def test_a_sequence_without_actions_gets_zeros() -> None:
    nothing = torch.full((3,), NAN)
    estimate = gae(nothing, nothing, torch.zeros(3).bool(), torch.tensor([0, 1, 3]), gamma=1, lambda_=1)
    assert estimate.advantages.tolist() == estimate.returns.tolist() == [0, 0, 0]


@pytest.mark.parametrize("where", ["values", "rewards"])
def test_a_nan_inside_the_mask_reaches_all_before_it_in_its_sequence_and_nothing_else(where: str) -> None:
    pack = Pack(
        values=torch.zeros(7),
        rewards=torch.zeros(7),
        action_mask=torch.tensor([True, True, False, True, True, True, True]),
        cu_seqlens=torch.tensor([0, 1, 5, 7]),
    )
    getattr(pack, where)[3] = NAN
    for estimate in (gae_of(pack), gae_of(pack, lambda_=1)):
        assert estimate.advantages.isnan().tolist() == [False, True, False, True, False, False, False]
        assert estimate.returns.isnan().tolist() == [False, True, False, True, False, False, False]


def test_inputs_stay_as_they_are_and_no_gradient_flows() -> None:
    pack = pack_of([3, 4], seed=0, acting=1)
    values, rewards = pack.values.clone(), pack.rewards.clone()
    pack.values.requires_grad_()
    estimate = gae_of(pack)
    assert not estimate.advantages.requires_grad
    assert not estimate.returns.requires_grad
    assert torch.equal(pack.values, values)
    assert torch.equal(pack.rewards, rewards)


def test_strided_inputs_give_the_same_bits() -> None:
    pack = pack_of([5, 6], seed=1, acting=1)
    table = torch.stack([pack.values, pack.rewards], dim=1)
    estimate = gae(*table.unbind(1), pack.action_mask, pack.cu_seqlens, gamma=0.9, lambda_=0.8)
    assert torch.equal(estimate.advantages, gae_of(pack).advantages)


def test_torch_compile_steps_over_it_without_a_break() -> None:
    pack = pack_of([5, 0, 6], seed=2)

    def whole(values: torch.Tensor) -> torch.Tensor:
        mask, borders = pack.action_mask, pack.cu_seqlens
        return gae(2 * values, pack.rewards, mask, borders, gamma=0.9, lambda_=0.8).advantages + 1

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(pack.values), whole(pack.values))


def test_torch_compile_steps_over_that_of_turns_too() -> None:
    sequences, rewards = torch.tensor([2, 2, 2, 5]), torch.ones(4)

    def whole(values: torch.Tensor) -> torch.Tensor:
        return turn_gae(2 * values, rewards, sequences, gamma=0.9, lambda_=0.8).advantages + 1

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    values = torch.arange(4.0)
    assert torch.equal(compiled(values), whole(values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_operator_keeps_what_its_schema_promises(dtype: torch.dtype) -> None:
    pack = pack_of([5, 0, 6], seed=3, acting=1).in_type(dtype)
    operands = (pack.values, pack.rewards, pack.action_mask, pack.cu_seqlens, 0.9, 0.8)
    results = torch.library.opcheck(torch.ops.rlef_kernels.gae.default, operands)
    assert set(results.values()) == {"SUCCESS"}


def test_turns_are_steps_however_many_tokens_they_have() -> None:
    # Two dialogs: from the end 1 - .5; 0 + .5 - .25 + .5 * .5; and -1 - .5 alone.
    values, rewards = torch.tensor([0.25, 0.5, 0.5]), torch.tensor([0.0, 1.0, -1.0])
    estimate = turn_gae(values, rewards, torch.tensor([4, 4, 9]), gamma=1, lambda_=0.5)
    assert estimate.advantages.tolist() == [0.5, 0.5, -1.5]
    assert estimate.returns.tolist() == [0.75, 1.0, -1.0]


@given(packs(), FRACTIONS, FRACTIONS)
def test_turns_are_tokens_among_which_only_the_first_of_each_turn_acts(
    pack: Pack, gamma: float, lambda_: float
) -> None:
    sequences = torch.repeat_interleave(pack.cu_seqlens.diff().long())[pack.action_mask]
    values, rewards = pack.values[pack.action_mask], pack.rewards[pack.action_mask]
    of_turns = turn_gae(values, rewards, sequences, gamma=gamma, lambda_=lambda_)
    of_tokens = gae_of(pack, gamma=gamma, lambda_=lambda_)
    assert torch.equal(of_turns.advantages, of_tokens.advantages[pack.action_mask])
    assert torch.equal(of_turns.returns, of_tokens.returns[pack.action_mask])


@given(packs())
def test_turn_returns_are_those_with_gamma_1_and_lambda_1(pack: Pack) -> None:
    sequences = torch.repeat_interleave(pack.cu_seqlens.diff().long())[pack.action_mask]
    values, rewards = pack.values[pack.action_mask], pack.rewards[pack.action_mask]
    estimate = turn_gae(values, rewards, sequences, gamma=1, lambda_=1)
    returns = turn_returns(rewards, sequences)
    torch.testing.assert_close(estimate.returns, returns, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(estimate.advantages, returns - values, rtol=1e-12, atol=1e-12)


def test_no_turn_gives_no_turn_advantage() -> None:
    nothing = torch.empty(0)
    estimate = turn_gae(nothing, nothing, nothing.long(), gamma=1, lambda_=1)
    assert estimate.advantages.tolist() == estimate.returns.tolist() == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"values": torch.zeros(2).int()}, r"^values is torch.int32; convert it to a floating type$"),
        ({"values": torch.zeros(1, 2)}, r"^values has shape \[1, 2\]; it must be one-dimensional$"),
        ({"rewards": torch.zeros(2).long()}, r"^rewards is torch.int64; convert it to a floating type$"),
        ({"rewards": torch.zeros(3)}, r"^rewards has shape \[3\] but values has \[2\]; make them equal$"),
        ({"action_mask": torch.ones(2)}, r"^action_mask is torch.float32; convert it to torch.bool$"),
        ({"action_mask": torch.ones(1).bool()}, r"^action_mask has shape \[1\] but values has \[2\]; make"),
        (
            {"cu_seqlens": torch.zeros(2)},
            r"^cu_seqlens is torch.float32; convert it to torch.int32 or torch.i",
        ),
        ({"cu_seqlens": torch.tensor(2)}, r"^cu_seqlens has shape \[\]; it must be \[sequences \+ 1\]$"),
        (
            {"cu_seqlens": torch.zeros(0).int()},
            r"^cu_seqlens has shape \[0\]; it must be \[sequences \+ 1\]$",
        ),
        (
            {"cu_seqlens": torch.tensor([1, 2])},
            r"^cu_seqlens begins with 1; the first sequence begins at tok",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 3])},
            r"^cu_seqlens ends with 3 but there are 2 tokens; end with th",
        ),
        (
            {"cu_seqlens": torch.tensor([0])},
            r"^cu_seqlens ends with 0 but there are 2 tokens; end with their",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 5, 2])},
            r"^cu_seqlens descends from 5 to 2; sequences cannot end bef",
        ),
        (
            {"rewards": torch.zeros(2, device="meta")},
            r"^rewards is on meta but values on cpu; move one of them$",
        ),
        (
            {"cu_seqlens": torch.zeros(2, device="meta").int()},
            r"^cu_seqlens is on meta but values on cpu; mo",
        ),
        ({"gamma": 1.5}, r"^gamma is 1.5; it must be between 0 and 1$"),
        ({"gamma": NAN}, r"^gamma is nan; it must be between 0 and 1$"),
        ({"lambda_": -0.1}, r"^lambda_ is -0.1; it must be between 0 and 1$"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(changed: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "values": torch.zeros(2),
        "rewards": torch.zeros(2),
        "action_mask": torch.ones(2, dtype=torch.bool),
        "cu_seqlens": torch.tensor([0, 2], dtype=torch.int32),
        "gamma": 1.0,
        "lambda_": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        gae(**(arguments | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "rewards", "sequences", "message"),
    [
        (
            torch.zeros(2),
            torch.zeros(2),
            torch.tensor([1, 0]),
            r"^turn_sequences do not ascend; sort the turns",
        ),
        (
            torch.zeros(2),
            torch.zeros(2),
            torch.tensor([0]),
            r"^turn_sequences has shape \[1\] but turn_values",
        ),
        (
            torch.zeros(1),
            torch.zeros(1),
            torch.zeros(1),
            r"^turn_sequences is torch.float32; convert it to torch",
        ),
        (
            torch.zeros(1),
            torch.zeros(2),
            torch.tensor([0]),
            r"^turn_rewards has shape \[2\] but turn_values has",
        ),
        (torch.zeros(1).int(), torch.zeros(1), torch.tensor([0]), r"^turn_values is torch.int32; convert it"),
        (
            torch.zeros(1),
            torch.zeros(1).int(),
            torch.tensor([0]),
            r"^turn_rewards is torch.int32; convert it",
        ),
    ],
)
def test_turns_that_cannot_be_right_are_refused_by_name(
    values: torch.Tensor, rewards: torch.Tensor, sequences: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        turn_gae(values, rewards, sequences, gamma=1, lambda_=1)
