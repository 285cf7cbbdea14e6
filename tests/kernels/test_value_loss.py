"""`interpreted_value.py` runs these tests a second time, with the Triton kernel."""

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


def test_a_nan_inside_the_mask_is_reported_in_the_loss_and_at_its_own_gradient() -> None:
    for poisoned in range(3):
        operands = torch.tensor([[0.1, 0.1, 0.1], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
        operands[poisoned, 1] = torch.nan
        values = operands[0].clone().requires_grad_()
        loss, metrics = value_loss(values, *operands[1:], value_clip=0.2, normaliser=1.0)
        loss.backward()
        assert values.grad is not None
        assert loss.isnan()
        assert values.grad.isnan().tolist() == [False, True, False]
        assert float(metrics.clipped) == 0
        assert bool(metrics.squared_error.isnan()) == (poisoned != 1)


def test_nothing_costs_nothing() -> None:
    poison = torch.full((3,), torch.nan)
    for values, mask in ((torch.empty(0), None), (poison.clone(), torch.zeros(3, dtype=torch.bool))):
        values.requires_grad_()
        constant = values.detach()
        loss, metrics = value_loss(values, constant, constant, mask, value_clip=0.2, normaliser=1.0)
        loss.backward()
        assert values.grad is not None
        assert (float(loss.detach()), values.grad.tolist()) == (0.0, [0.0] * len(values))
        assert [float(metrics.values), float(metrics.clipped), float(metrics.squared_error)] == [0.0] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@given(count=st.integers(0, 40), seed=st.integers(0, 2**32))
def test_half_and_single_precision_are_summed_in_float32(count: int, seed: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(seed)
    rounded = torch.randn(3, count, generator=random).to(dtype)
    mask = torch.rand(count, generator=random) < 0.7

    def run(operands: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = operands[0].clone().requires_grad_()
        loss, _ = value_loss(values, operands[1], operands[2], mask, value_clip=0.5, normaliser=7.0)
        return loss.detach(), *torch.autograd.grad(loss, values)

    (loss, gradient), (expected_loss, expected_gradient) = run(rounded), run(rounded.double())
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=1e-6)
    one_unit = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=one_unit, atol=1e-7)


def test_old_values_and_returns_may_be_of_other_types_and_strided() -> None:
    table = torch.tensor([[0.5, 0.0], [0.25, 1.0]])
    values = table[:, 0].clone().bfloat16().requires_grad_()
    loss, _ = value_loss(values, table[:, 0].double(), table[:, 1].half(), value_clip=0.2, normaliser=1)
    loss.backward()
    assert values.grad is not None
    assert (float(loss.detach()), values.grad.tolist()) == ((0.25 + 0.5625) / 2, [0.5, -0.75])


@pytest.mark.parametrize("normaliser", [4, torch.tensor(4), torch.tensor([4.0], dtype=torch.float64)])
def test_the_normaliser_changes_no_type_and_no_shape(normaliser: float | torch.Tensor) -> None:
    values = torch.tensor([2.0], requires_grad=True)
    loss, _ = value_loss(values, values.detach(), torch.zeros(1), value_clip=0.2, normaliser=normaliser)
    loss.backward()
    assert values.grad is not None
    assert (loss.dtype, loss.shape, float(loss.detach()), float(values.grad)) == (torch.float32, (), 0.5, 0.5)


def test_the_gradient_has_no_gradient_of_its_own() -> None:
    values = torch.ones(2, requires_grad=True)
    loss, metrics = value_loss(values, values.detach(), torch.zeros(2), value_clip=0.2, normaliser=1.0)
    (gradient,) = torch.autograd.grad(loss * loss, values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    assert not metrics.squared_error.requires_grad


def test_torch_compile_steps_over_it_without_a_break() -> None:
    old, returns, mask = torch.zeros(4), torch.ones(4), torch.tensor([True, True, False, True])

    def whole(values: torch.Tensor, normaliser: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, metrics = value_loss(2 * values, old, returns, mask, value_clip=0.2, normaliser=normaliser)
        return 3 * loss, metrics.clipped + metrics.values

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    values, same = (torch.linspace(-1, 1, 4).requires_grad_() for _ in range(2))
    (found, counts), (expected, same_counts) = compiled(values, torch.tensor(3)), whole(same, torch.tensor(3))
    found.backward()
    expected.backward()
    assert values.grad is not None
    assert torch.equal(found, expected)
    assert torch.equal(counts, same_counts)
    assert torch.equal(values.grad, same.grad)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_operator_keeps_what_its_schema_promises(dtype: torch.dtype, masked: bool) -> None:
    values, old, returns = torch.randn(3, 5).to(dtype).unbind()
    mask = torch.tensor([True, False, True, True, False]) if masked else None
    normaliser = torch.tensor(2.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    operands = (values.clone().requires_grad_(), old, returns, mask, normaliser, 0.2)
    results = torch.library.opcheck(torch.ops.rlef_kernels.value_loss.default, operands)
    assert set(results.values()) == {"SUCCESS"}


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
        ({"normaliser": torch.ones(2)}, r"normaliser has shape \[2\]; it must be one number"),
        ({"values": torch.zeros(1, 2)}, r"values has shape \[1, 2\]; it must be one-dimensional"),
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


def test_on_a_cpu_a_normaliser_that_is_not_above_0_is_refused() -> None:
    values = torch.zeros(2)
    with pytest.raises(ValueError, match=r"^normaliser is 0.0; it must be a finite number above 0$"):
        value_loss(values, values, values, value_clip=0.2, normaliser=torch.tensor(0.0))
