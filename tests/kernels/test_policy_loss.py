from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlef_kernels import (
    PolicyMetrics,
    logprobs_from_logits,
    mean_weights,
    ppo_policy_loss,
    ppo_policy_loss_from_logits,
)
from rlef_kernels.policy import KLEstimator
from tests.kernels.policy_twin import example, slow


def of_one_token(
    logprob: float, old: float, behaviour: float, advantage: float, *, correction: bool = True
) -> tuple[float, float, PolicyMetrics]:
    """Loss, its gradient and metrics with a clip of 0.2."""
    logprobs = torch.tensor([logprob], requires_grad=True)
    loss, metrics = ppo_policy_loss(
        logprobs,
        torch.tensor([old]),
        torch.tensor([behaviour]),
        torch.tensor([advantage]),
        torch.tensor([True]),
        clip_ratio=0.2,
        behaviour_correction=correction,
        normaliser=1.0,
    )
    loss.backward()
    assert logprobs.grad is not None
    return float(loss.detach()), float(logprobs.grad), metrics


LN_HALF, LN_QUARTER = math.log(1 / 2), math.log(1 / 4)


def test_a_token_of_unchanged_weights_has_the_policy_gradient() -> None:
    loss, gradient, _ = of_one_token(LN_HALF, LN_HALF, LN_HALF, 3.0)
    assert (loss, gradient) == pytest.approx((-3.0, -3.0))


def test_a_good_token_that_became_likely_enough_is_left_alone() -> None:
    loss, gradient, metrics = of_one_token(LN_HALF, LN_QUARTER, LN_QUARTER, 3.0)  # ratio 2
    assert (loss, gradient, float(metrics.clipped)) == pytest.approx((-3.6, 0.0, 1.0))


def test_a_bad_token_that_became_likely_is_pushed_back_in_full() -> None:
    loss, gradient, metrics = of_one_token(LN_HALF, LN_QUARTER, LN_QUARTER, -3.0)  # ratio 2
    assert (loss, gradient, float(metrics.clipped)) == pytest.approx((6.0, 6.0, 0.0))


def test_a_bad_token_that_became_unlikely_enough_is_left_alone() -> None:
    loss, gradient, metrics = of_one_token(LN_QUARTER, LN_HALF, LN_QUARTER, -3.0)  # ratio 1 / 2
    assert (loss, gradient, float(metrics.clipped)) == pytest.approx((2.4, 0.0, 1.0))


def test_a_token_less_likely_than_when_it_was_sampled_counts_less() -> None:
    loss, gradient, metrics = of_one_token(LN_QUARTER, LN_QUARTER, LN_HALF, 3.0)  # ratio 1, weight 1 / 2
    assert (loss, gradient) == pytest.approx((-1.5, -1.5))
    assert float(metrics.behaviour_weight) == pytest.approx(0.5)


def test_a_token_more_likely_than_when_it_was_sampled_counts_no_more() -> None:
    loss, gradient, metrics = of_one_token(LN_HALF, LN_HALF, LN_QUARTER, 3.0)  # ratio 1, weight min(2, 1)
    assert (loss, gradient) == pytest.approx((-3.0, -3.0))
    assert float(metrics.behaviour_weight) == pytest.approx(1.0)


def test_the_clip_acts_on_the_corrected_ratio() -> None:
    """Ratio 1 and weight 1/2: with a negative advantage the product lies below the clip, so nothing moves."""
    loss, gradient, metrics = of_one_token(LN_QUARTER, LN_QUARTER, LN_HALF, -3.0)
    assert (loss, gradient, float(metrics.clipped)) == pytest.approx((2.4, 0.0, 1.0))


def test_without_the_correction_the_samplers_weights_do_not_matter() -> None:
    for behaviour in (LN_QUARTER, LN_HALF, float("nan")):
        loss, gradient, metrics = of_one_token(LN_QUARTER, LN_QUARTER, behaviour, -3.0, correction=False)
        assert (loss, gradient) == pytest.approx((3.0, 3.0))
        assert float(metrics.behaviour_weight) == 1.0


def test_low_and_high_clips_may_differ() -> None:
    two, half = torch.tensor([LN_HALF - LN_QUARTER]), torch.tensor([LN_QUARTER - LN_HALF])
    for logprob, advantage, expected in ((two, 1.0, -1.5), (half, -1.0, 0.9)):
        loss, _ = ppo_policy_loss(
            logprob,
            torch.zeros(1),
            torch.zeros(1),
            torch.tensor([advantage]),
            torch.tensor([True]),
            clip_ratio=(0.1, 0.5),
            behaviour_correction=False,
            normaliser=1.0,
        )
        assert float(loss) == pytest.approx(expected)


@given(st.integers(0, 8), st.booleans(), st.sampled_from([(0.2, 0.2), (0.1, 0.5)]), st.integers(0, 99))
def test_equals_the_slow_twin_in_values_gradients_and_metrics(
    tokens: int, correction: bool, clip: tuple[float, float], seed: int
) -> None:
    arguments = example(tokens, seed)
    arguments[0].requires_grad_()
    loss, metrics = ppo_policy_loss(
        *arguments, clip_ratio=clip, behaviour_correction=correction, normaliser=torch.tensor(3.0)
    )
    expected, counts = slow(*arguments, *clip, correction)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()) / 3, rel=1e-12, abs=1e-12)
    for name, count in counts.items():
        assert float(getattr(metrics, name)) == pytest.approx(count, rel=1e-9, abs=1e-12), name
    (actual,) = torch.autograd.grad(loss, arguments[0])
    if expected.requires_grad:
        (gradient,) = torch.autograd.grad(expected / 3, arguments[0])
        torch.testing.assert_close(actual, gradient, rtol=1e-12, atol=1e-12)
    else:
        assert not actual.any()


@given(
    st.integers(0, 8),
    st.booleans(),
    st.sampled_from([None, 1.3, 3.0]),
    st.sampled_from(["k1", "k2", "k3"]),
    st.sampled_from([0.0, 0.1, 2.0]),
    st.booleans(),
    st.integers(0, 99),
)
def test_equals_the_slow_twin_with_weights_dual_clip_and_a_reference(
    tokens: int,
    has_weights: bool,
    dual_clip: float | None,
    kl_estimator: KLEstimator,
    kl_coef: float,
    correction: bool,
    seed: int,
) -> None:
    arguments = example(tokens, seed)
    random = torch.Generator().manual_seed(seed + 1)
    reference, weights = torch.rand(2, tokens, generator=random, dtype=torch.float64).unbind()
    options = {"dual_clip": dual_clip, "kl_coef": kl_coef, "kl_estimator": kl_estimator}
    options["weights"] = weights if has_weights else None
    arguments[0].requires_grad_()
    loss, metrics = ppo_policy_loss(
        *arguments,
        clip_ratio=0.2,
        behaviour_correction=correction,
        normaliser=2.0,
        reference_logprobs=-2 * reference,
        **options,
    )
    expected, counts = slow(*arguments, 0.2, 0.2, correction, reference_logprobs=-2 * reference, **options)

    assert float(loss.detach()) == pytest.approx(float(expected.detach()) / 2, rel=1e-12, abs=1e-12)
    for name, count in counts.items():
        assert float(getattr(metrics, name)) == pytest.approx(count, rel=1e-9, abs=1e-12), name
    (actual,) = torch.autograd.grad(loss, arguments[0])
    if expected.requires_grad:
        (gradient,) = torch.autograd.grad(expected / 2, arguments[0])
        torch.testing.assert_close(actual, gradient, rtol=1e-12, atol=1e-12)


def test_the_dual_clip_bounds_what_a_bad_token_can_do() -> None:
    logprobs = torch.tensor([0.0], requires_grad=True)
    loss, metrics = ppo_policy_loss(
        logprobs,
        torch.tensor([-50.0]),  # ratio e^50
        torch.tensor([0.0]),
        torch.tensor([-2.0]),
        torch.tensor([True]),
        clip_ratio=0.2,
        behaviour_correction=False,
        normaliser=1.0,
        dual_clip=3.0,
    )
    loss.backward()
    assert logprobs.grad is not None
    assert (float(loss.detach()), float(logprobs.grad), float(metrics.clipped)) == (6.0, 0.0, 1.0)


@given(st.integers(0, 99))
def test_what_the_estimators_of_the_kl_expect(seed: int) -> None:
    """Over all tokens, weighted by pi: k1 and k3 have the mean KL(pi || reference); k2, its gradient."""
    random = torch.Generator().manual_seed(seed)
    logits, other = torch.randn(2, 5, generator=random, dtype=torch.float64).unbind()
    logits.requires_grad_()
    logprobs, reference = logits.log_softmax(0), other.log_softmax(0)
    probabilities = logprobs.exp().detach()
    kl = (logprobs.exp() * (logprobs - reference)).sum()
    zeros, mask = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.bool)

    def estimated(estimator: KLEstimator) -> Tensor:
        loss, _ = ppo_policy_loss(
            *(logprobs, logprobs.detach(), zeros, zeros, mask),
            clip_ratio=0.2,
            behaviour_correction=False,
            normaliser=1.0,
            weights=probabilities,
            reference_logprobs=reference,
            kl_coef=1.0,
            kl_estimator=estimator,
        )
        return loss

    assert float(estimated("k1").detach()) == pytest.approx(float(kl.detach()), rel=1e-9, abs=1e-12)
    assert float(estimated("k3").detach()) == pytest.approx(float(kl.detach()), rel=1e-9, abs=1e-12)
    (gradient,) = torch.autograd.grad(kl, logits, retain_graph=True)
    (of_k1,) = torch.autograd.grad(estimated("k1"), logits, retain_graph=True)
    (of_k2,) = torch.autograd.grad(estimated("k2"), logits, retain_graph=True)
    torch.testing.assert_close(of_k2, gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(of_k1, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@given(st.lists(st.lists(st.booleans(), max_size=6), max_size=5))
def test_mean_weights_make_a_sum_a_sum_of_means(segments: list[list[bool]]) -> None:
    mask = torch.tensor([inside for segment in segments for inside in segment], dtype=torch.bool)
    values = torch.arange(1.0, mask.shape[0] + 1)
    lengths = torch.tensor([0, *(len(segment) for segment in segments)])
    cu_seqlens = lengths.cumsum(0, dtype=torch.int32 if mask.any() else torch.int64)
    means = [
        float(values[begin:end][mask[begin:end]].mean())
        for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
        if mask[begin:end].any()
    ]

    weights = mean_weights(cu_seqlens, mask)

    assert float((weights * values).sum()) == pytest.approx(sum(means), rel=1e-6)
    assert not weights[~mask].any()


ALL_THREE = torch.ones(3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("cu_seqlens", "mask", "message"),
    [
        (torch.tensor([0, 2]), ALL_THREE, "cu_seqlens ends with 2 but there are 3 tokens"),
        (torch.tensor([1, 3]), ALL_THREE, "cu_seqlens begins with 1; the first sequence begins at token 0"),
        (torch.tensor([0, 2, 1, 3]), ALL_THREE, "cu_seqlens descends from 2 to 1; sequences cannot end"),
        (torch.tensor([0.0, 3.0]), ALL_THREE, "cu_seqlens is torch.float32; convert it to torch.int32 or"),
        (torch.tensor([0, 3]), torch.ones(3), "mask is torch.float32; convert it to torch.bool"),
        (torch.tensor([0, 3]), ALL_THREE[None], r"mask has shape \[1, 3\]; it must be one-dimensional"),
        (torch.tensor([]).long(), ALL_THREE, r"cu_seqlens has shape \[0\]; it must be \[sequences \+ 1\]"),
    ],
)
def test_limits_of_segments_that_cannot_be_right_are_refused(
    cu_seqlens: Tensor, mask: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mean_weights(cu_seqlens, mask)


def test_gradients_equal_finite_differences_but_for_the_weight_held_constant() -> None:
    logprobs, old, _, advantages, mask = example(6)
    entropy = torch.rand(6, dtype=torch.float64, requires_grad=True)

    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        value, _ = ppo_policy_loss(
            logprobs,
            old,
            logprobs.detach(),
            advantages,
            mask,
            clip_ratio=0.2,
            behaviour_correction=False,
            normaliser=2.0,
            entropy=entropy,
            entropy_coef=0.3,
        )
        return value

    assert torch.autograd.gradcheck(loss, (logprobs.requires_grad_(), entropy))


def test_entropy_is_paid_for_inside_the_mask() -> None:
    entropy = torch.tensor([0.5, torch.nan, 1.5], requires_grad=True)
    zeros = torch.zeros(3)
    loss, metrics = ppo_policy_loss(
        *(zeros, zeros, zeros, zeros),
        torch.tensor([True, False, True]),
        clip_ratio=0.2,
        behaviour_correction=True,
        normaliser=4.0,
        entropy=entropy,
        entropy_coef=0.1,
    )
    loss.backward()
    assert (float(loss.detach()), float(metrics.entropy)) == pytest.approx((-0.05, 2.0))
    assert entropy.grad is not None
    assert entropy.grad.tolist() == pytest.approx([-0.025, 0.0, -0.025])


def test_poison_outside_the_mask_reaches_nothing() -> None:
    clean = [torch.full((3,), LN_HALF) for _ in range(3)] + [torch.tensor([1.0, -1.0, 2.0])]
    mask = torch.tensor([True, False, True])
    poisoned = [torch.where(mask, tensor, torch.nan) for tensor in clean]
    results = []
    for tensors in (clean, poisoned):
        tensors[0].requires_grad_()
        loss, metrics = ppo_policy_loss(
            *tensors, mask, clip_ratio=0.2, behaviour_correction=True, normaliser=2.0
        )
        loss.backward()
        results.append((loss.detach(), tensors[0].grad, metrics))
    assert torch.equal(results[0][0], results[1][0])
    assert results[1][1].tolist() == [-0.5, 0.0, -1.0]
    assert torch.equal(results[0][2].approximate_kl, results[1][2].approximate_kl)


def test_all_masked_is_a_loss_of_zero() -> None:
    logprobs = torch.full((2,), torch.nan, requires_grad=True)
    others = [torch.full((2,), torch.nan)] * 3
    loss, metrics = ppo_policy_loss(
        logprobs,
        *others,
        torch.tensor([False, False]),
        clip_ratio=0.2,
        behaviour_correction=True,
        normaliser=1.0,
    )
    loss.backward()
    assert logprobs.grad is not None
    assert (float(loss.detach()), logprobs.grad.tolist(), float(metrics.ratio_max)) == (0.0, [0.0, 0.0], 0.0)


def test_an_overflowing_ratio_is_harmless_where_it_is_clipped_and_reported_where_it_is_not() -> None:
    loss, gradient, metrics = of_one_token(0.0, -1000.0, 0.0, 1.0)
    assert (loss, gradient, float(metrics.ratio_max)) == pytest.approx((-1.2, 0.0, float("inf")))
    loss, gradient, _ = of_one_token(0.0, -1000.0, 0.0, -1.0)
    assert (loss, gradient) == (float("inf"), float("inf"))


def test_a_nan_inside_the_mask_is_reported() -> None:
    loss, gradient, _ = of_one_token(float("nan"), 0.0, 0.0, 1.0)
    assert math.isnan(loss)
    assert math.isnan(gradient)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_from_logits_is_the_composition(entropy_coef: float) -> None:
    _, old, behaviour, advantages, mask = example(6)
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets, rows = torch.tensor([0, 4, 2, 2, 1, 3]), torch.tensor([0, 1, 3, 4, 6, 8])
    settings = {"clip_ratio": 0.2, "behaviour_correction": True, "normaliser": 3.0}
    logits.requires_grad_()
    chosen = logprobs_from_logits(logits, targets, rows=rows, temperature=0.8, want_entropy=True)
    entropy = chosen.entropy if entropy_coef else None
    expected, _ = ppo_policy_loss(
        chosen.logprobs,
        old,
        behaviour,
        advantages,
        mask,
        entropy=entropy,
        entropy_coef=entropy_coef,
        **settings,
    )
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    loss, metrics = ppo_policy_loss_from_logits(
        logits,
        targets,
        old,
        behaviour,
        advantages,
        mask,
        rows=rows,
        temperature=0.8,
        entropy_coef=entropy_coef,
        want_entropy=True,
        **settings,
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert chosen.entropy is not None
    torch.testing.assert_close(metrics.entropy, chosen.entropy[mask].sum().detach())


def test_from_logits_reads_no_masked_row() -> None:
    logits = torch.zeros(3, 2)
    logits[1] = torch.nan
    logits.requires_grad_()
    zeros = torch.zeros(3)
    loss, _ = ppo_policy_loss_from_logits(
        logits,
        torch.zeros(3, dtype=torch.int64),
        torch.full((3,), LN_HALF),
        zeros,
        torch.ones(3),
        torch.tensor([True, False, True]),
        clip_ratio=0.2,
        behaviour_correction=False,
        normaliser=1.0,
    )
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-0.5, 0.5], [0.0, 0.0], [-0.5, 0.5]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"advantages": torch.zeros(3)},
            r"advantages has shape \[3\] but logprobs has \[2\]; make them equal",
        ),
        ({"logprobs": torch.zeros(1, 2)}, r"logprobs has shape \[1, 2\]; it must be one-dimensional"),
        ({"old_logprobs": torch.zeros(2).long()}, r"old_logprobs is torch.int64; convert it to a floating"),
        ({"mask": torch.ones(2)}, r"mask is torch.float32; convert it to torch.bool"),
        ({"clip_ratio": (0.2, 0.0)}, r"clip_ratio is 0.0; it must be a finite number above 0"),
        ({"normaliser": 0}, r"normaliser is 0.0; it must be a finite number above 0"),
        ({"normaliser": torch.ones(2)}, r"normaliser has shape \[2\]; it must be one number"),
        ({"entropy_coef": -0.1}, r"entropy_coef is -0.1; it must be a finite number of at least 0"),
        ({"entropy_coef": 0.1}, r"entropy_coef is 0.1 but entropy is missing; pass it, or set"),
        ({"kl_coef": 0.1}, r"kl_coef is 0.1 but reference_logprobs is missing; pass it, or set"),
        ({"kl_coef": -1.0}, r"kl_coef is -1.0; it must be a finite number of at least 0"),
        ({"kl_estimator": "k4"}, r"kl_estimator is 'k4'; give 'k1', 'k2' or 'k3'"),
        ({"dual_clip": 1.1}, r"dual_clip is 1.1; it must be a finite number above 1 \+ clip_ratio = 1.2"),
        ({"weights": torch.zeros(1)}, r"weights has shape \[1\] but logprobs has \[2\]"),
        ({"entropy": torch.zeros(1)}, r"entropy has shape \[1\] but logprobs has \[2\]"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(arguments: dict[str, object], message: str) -> None:
    right: dict[str, object] = {
        "logprobs": torch.zeros(2),
        "old_logprobs": torch.zeros(2),
        "behaviour_logprobs": torch.zeros(2),
        "advantages": torch.zeros(2),
        "mask": torch.ones(2, dtype=torch.bool),
        "clip_ratio": 0.2,
        "behaviour_correction": True,
        "normaliser": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        ppo_policy_loss(**(right | arguments))  # type: ignore[arg-type]
