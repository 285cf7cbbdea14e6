from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlef_kernels import value_loss


def of_one_value(value: float, old: float, target: float) -> tuple[float, float, float]:
    """Loss, gradient and how many were clipped, with alpha 0.2."""
    values = torch.tensor([value], requires_grad=True)
    loss, metrics = value_loss(
        values, torch.tensor([old]), torch.tensor([target]), value_clip=0.2, normaliser=1.0
    )
    loss.backward()
    assert values.grad is not None
    return float(loss.detach()), float(values.grad), float(metrics.clipped)


def test_near_the_old_value_it_is_half_the_squared_error() -> None:
    assert of_one_value(0.1, 0.0, 1.0) == pytest.approx((0.405, -0.9, 0.0))


def test_a_value_that_moved_far_towards_its_return_is_left_alone() -> None:
    assert of_one_value(0.5, 0.0, 1.0) == pytest.approx((0.32, 0.0, 1.0))


def test_a_value_that_moved_far_from_its_return_is_pulled_back_in_full() -> None:
    assert of_one_value(-0.5, 0.0, 1.0) == pytest.approx((1.125, -1.5, 0.0))


@given(st.integers(0, 8), st.sampled_from([0.05, 0.2, 10.0]), st.integers(0, 99))
def test_equals_the_slow_twin_in_values_and_gradients(count: int, alpha: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    values, old, returns = torch.randn(3, count, generator=random, dtype=torch.float64).unbind()
    mask = torch.rand(count, generator=random) < 0.7
    values.requires_grad_()
    loss, metrics = value_loss(values, old, returns, mask, value_clip=alpha, normaliser=torch.tensor(7.0))
    expected = torch.zeros((), dtype=torch.float64)
    for index in mask.nonzero()[:, 0].tolist():
        far = (values[index] - returns[index]) ** 2
        near = (old[index] + (values[index] - old[index]).clamp(-alpha, alpha) - returns[index]) ** 2
        expected = expected + max(near, far) / 2 / 7
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert float(metrics.values) == int(mask.sum())
    (actual,) = torch.autograd.grad(loss, values)
    if expected.requires_grad:
        (gradient,) = torch.autograd.grad(expected, values)
        torch.testing.assert_close(actual, gradient, rtol=1e-12, atol=1e-12)
    else:
        assert not actual.any()


def test_gradients_equal_finite_differences() -> None:
    values, old, returns = torch.randn(3, 6, dtype=torch.float64).unbind()
    assert torch.autograd.gradcheck(
        lambda values: value_loss(values, old, returns, value_clip=0.2, normaliser=2.0)[0],
        (values.clone().requires_grad_(),),
    )


def test_poison_outside_the_mask_reaches_nothing() -> None:
    poison = torch.tensor([1.0, torch.nan])
    values = poison.clone().requires_grad_()
    loss, metrics = value_loss(
        values, poison, torch.zeros(2), torch.tensor([True, False]), value_clip=0.2, normaliser=1.0
    )
    loss.backward()
    assert values.grad is not None
    assert (float(loss.detach()), values.grad.tolist()) == (0.5, [1.0, 0.0])
    assert (float(metrics.values), float(metrics.squared_error)) == (1.0, 1.0)


def test_half_precision_values_are_summed_in_single_precision() -> None:
    many = torch.full((4096,), 1.0, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = value_loss(
        many, many.detach(), torch.zeros(4096, dtype=torch.bfloat16), value_clip=0.2, normaliser=1.0
    )
    assert (loss.dtype, float(loss.detach())) == (torch.float32, 2048.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"returns": torch.zeros(3)}, r"returns has shape \[3\] but values has \[2\]; make them equal"),
        ({"values": torch.zeros(2).long()}, r"values is torch.int64; convert it to a floating type"),
        ({"mask": torch.ones(2)}, r"mask is torch.float32; convert it to torch.bool"),
        ({"value_clip": -0.2}, r"value_clip is -0.2; it must be a finite number above 0"),
        ({"normaliser": float("inf")}, r"normaliser is inf; it must be a finite number above 0"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(arguments: dict[str, object], message: str) -> None:
    right: dict[str, object] = {
        "values": torch.zeros(2),
        "old_values": torch.zeros(2),
        "returns": torch.zeros(2),
        "value_clip": 0.2,
        "normaliser": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        value_loss(**(right | arguments))  # type: ignore[arg-type]
