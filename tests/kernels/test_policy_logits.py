from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlef_kernels import (
    PolicyMetrics,
    logprobs_from_logits,
    policy_logits,
    ppo_policy_loss,
    ppo_policy_loss_from_logits,
)
from tests.kernels.policy_twin import SETTINGS, example, optional_data, slow_from_logits


def from_logits(
    logits: Tensor, *arguments: Any, in_place: bool = False, **options: Any
) -> tuple[Tensor, Tensor, PolicyMetrics]:
    """Loss, gradient and metrics."""
    held = logits.clone().requires_grad_()
    loss, metrics = ppo_policy_loss_from_logits(held, *arguments, in_place=in_place, **options)
    loss.backward()
    assert held.grad is not None
    return loss.detach(), held.grad, metrics


@given(
    st.integers(0, 7),
    st.sampled_from([1, 5, 40]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from([0.7, 1.0]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([None, "adjacent", "apart"]),
    st.booleans(),
    st.booleans(),
    SETTINGS,
    st.integers(0, 99),
)
def test_from_logits_equals_the_slow_twin_in_loss_gradient_and_metrics(
    tokens: int,
    vocab: int,
    dtype: torch.dtype,
    temperature: float,
    entropy_coef: float,
    placed: str | None,
    has_data: bool,
    in_place: bool,
    options: dict[str, Any],
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    rows = {None: None, "adjacent": torch.arange(tokens) + 2, "apart": 2 * torch.arange(tokens) + 1}[placed]
    logits = torch.randn(2 * tokens + 2 if rows is not None else tokens, vocab, generator=random).to(dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=random)
    data = (targets, *example(tokens, seed)[1:])
    options = options | optional_data(
        tokens, has_weights=has_data, has_reference=has_data, seed=seed, dtype=torch.float64
    )
    options |= {"kl_coef": options["kl_coef"] if has_data else 0.0, "rows": rows}
    options |= {"temperature": temperature, "entropy_coef": entropy_coef}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_logits, "CPU_CHUNK_ELEMENTS", 2 * vocab)
        loss, gradient, metrics = from_logits(logits, *data, in_place=in_place, want_entropy=True, **options)

    exact = logits.double().requires_grad_()
    expected, counts = slow_from_logits(exact, *data, **options)
    expected_gradient = torch.zeros_like(exact)
    if expected.requires_grad:
        (expected_gradient,) = torch.autograd.grad(expected, exact)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    assert float(loss) == pytest.approx(float(expected.detach()), rel=tolerance, abs=tolerance)
    for name, count in counts.items():
        assert float(getattr(metrics, name)) == pytest.approx(count, rel=tolerance, abs=tolerance), name
    rtol = max(tolerance, torch.finfo(dtype).eps)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=tolerance)


def one_step(logits: Tensor, *, in_place: bool, **options: Any) -> Tensor:
    """The loss of three tokens that want the first word, the second of them masked."""
    zeros = torch.zeros(3)
    loss, _ = ppo_policy_loss_from_logits(
        *(
            logits,
            torch.zeros(3, dtype=torch.int64),
            zeros,
            zeros,
            zeros + 1,
            torch.tensor([True, False, True]),
        ),
        **{"clip_ratio": 0.2, "behaviour_correction": False, "normaliser": 2.0} | options,
        in_place=in_place,
    )
    return loss


ONE_GRADIENT = [[-0.125, 0.125], [0.0, 0.0], [-0.125, 0.125]]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("is_leaf", [False, True])
def test_the_gradient_may_be_written_over_the_logits(in_place: bool, is_leaf: bool) -> None:
    weight = torch.zeros(3, 2, requires_grad=True)
    logits = weight if is_leaf else weight + 0
    address = logits.data_ptr()
    one_step(logits, in_place=in_place).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == ONE_GRADIENT
    assert (logits.tolist() == ONE_GRADIENT) == in_place
    if is_leaf:
        assert (weight.grad.data_ptr() == address) == in_place


@pytest.mark.parametrize("in_place", [False, True])
def test_the_backward_pass_multiplies_by_what_comes_in(in_place: bool) -> None:
    logits = torch.zeros(3, 2, requires_grad=True)
    (4 * one_step(logits, in_place=in_place)).backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[4 * number for number in row] for row in ONE_GRADIENT]


def test_logits_that_autograd_saved_cannot_be_overwritten_unnoticed() -> None:
    weight = torch.zeros(3, 2, requires_grad=True)
    logits = weight.exp()  # keeps its output
    loss = one_step(logits, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_who_saved_the_gradient_for_the_logits_is_told_after_it_was_used() -> None:
    logits = torch.zeros(3, 2, requires_grad=True) * 1
    loss = one_step(logits, in_place=True)
    later = logits.square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()


def test_a_kept_graph_gives_the_same_gradient_again() -> None:
    logits = torch.zeros(3, 2, requires_grad=True)
    loss = one_step(logits, in_place=False)
    for factor in (1.0, 3.0, 1.0):
        (gradient,) = torch.autograd.grad(factor * loss, logits, retain_graph=True)
        assert gradient.tolist() == [[factor * number for number in row] for row in ONE_GRADIENT]
    for times in (1, 2):
        loss.backward(retain_graph=True)
        assert logits.grad is not None
        assert logits.grad.tolist() == [[times * number for number in row] for row in ONE_GRADIENT]


def test_in_place_there_is_one_backward_pass() -> None:
    logits = torch.zeros(3, 2, requires_grad=True)
    loss = one_step(logits, in_place=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_there_is_no_second_derivative_of_the_loss_from_logits() -> None:
    logits = torch.zeros(3, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(one_step(logits, in_place=False) ** 2, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("in_place", [False, True])
def test_without_autograd_nothing_of_the_size_of_the_logits_is_made(in_place: bool) -> None:
    logits = torch.zeros(3, 2, requires_grad=True)
    with torch.no_grad():
        loss = one_step(logits, in_place=in_place)
    assert float(loss) == -0.5
    assert not logits.any()
    for_operator = (0.2, 0.2, None, False, 0.0, 0.0, "k3")
    zeros = torch.zeros(3)
    *_, gradient = torch.ops.rlef_kernels.ppo_policy_loss_from_logits(
        *(logits.detach(), False, torch.zeros(3, dtype=torch.int64), None, zeros, zeros, zeros),
        *(zeros == 0, None, None, None, 1.0, 1.0, False, "", *for_operator),
    )
    assert gradient.shape == (0, 2)


def test_rows_that_lie_over_each_other_cannot_be_overwritten() -> None:
    with pytest.raises(ValueError, match=r"logits have strides \[0, 1\]; in_place needs rows"):
        one_step(torch.zeros(1, 2).expand(3, 2), in_place=True)


def operands(seed: int = 0) -> tuple[Tensor, ...]:
    """Targets among seven words, and the data of six tokens in single precision."""
    _, *data, mask = example(6, seed)
    return torch.randint(0, 7, (6,)), *(each.float() for each in data), mask


@pytest.mark.parametrize("normaliser", [3.0, torch.tensor(3.0)])
def test_torch_compile_traces_through_the_loss_from_logits(normaliser: float | Tensor) -> None:
    data = operands()
    hidden, weight = (torch.randn(size, requires_grad=True) for size in ((6, 3), (3, 7)))

    def whole(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        loss, metrics = ppo_policy_loss_from_logits(
            hidden @ weight,
            *data,
            clip_ratio=0.2,
            behaviour_correction=True,
            normaliser=normaliser,
            entropy_coef=0.1,
            in_place=True,
        )
        return 2 * loss, metrics.entropy

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    expected, found = whole(hidden, weight), compiled(hidden, weight)
    assert torch.equal(torch.stack(found), torch.stack(expected))
    for actual, twin in zip(
        torch.autograd.grad(found[0], (hidden, weight)),
        torch.autograd.grad(expected[0], (hidden, weight)),
        strict=True,
    ):
        assert torch.equal(actual, twin)


def test_torch_compile_traces_through_a_group_of_processes(tmp_path: Path) -> None:
    """Of one; `test_parallel.py` has more."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        targets, *data = operands()

        def whole(logits: Tensor, group: dist.ProcessGroup | None = dist.group.WORLD) -> Tensor:
            loss, _ = ppo_policy_loss_from_logits(
                *(logits, targets, *data),
                clip_ratio=0.2,
                behaviour_correction=True,
                normaliser=2.0,
                entropy_coef=0.1,
                group=group,
            )
            return loss + logprobs_from_logits(logits, targets, group=group).logprobs.sum()

        logits = torch.randn(6, 7, requires_grad=True)
        compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
        losses = [compiled(logits), whole(logits), whole(logits, None)]
        gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    finally:
        dist.destroy_process_group()
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(gradients[0], gradients[1])
    torch.testing.assert_close(losses[1], losses[2])
    torch.testing.assert_close(gradients[1], gradients[2])


def test_torch_compile_traces_through_logprobs_and_their_loss() -> None:
    targets, *data = operands()

    def whole(logits: Tensor) -> tuple[Tensor, Tensor]:
        chosen = logprobs_from_logits(logits, targets, temperature=0.7, want_entropy=True)
        loss, metrics = ppo_policy_loss(
            *(chosen.logprobs, *data),
            clip_ratio=0.2,
            behaviour_correction=True,
            normaliser=torch.tensor(2.0),
            entropy=chosen.entropy,
            entropy_coef=0.1,
        )
        return loss + chosen.logsumexp.sum(), metrics.clipped

    logits = torch.randn(6, 7, requires_grad=True)
    expected, found = whole(logits), torch.compile(whole, fullgraph=True, backend="aot_eager")(logits)
    assert torch.equal(torch.stack(found), torch.stack(expected))
    gradients = [torch.autograd.grad(loss, logits)[0] for loss, _ in (found, expected)]
    assert torch.equal(*gradients)


def test_the_operators_are_what_they_tell_torch() -> None:
    targets, old, behaviour, advantages, mask = operands()
    settings = (0.2, 0.2, None, True, 0.1, 0.0, "k3")
    logits = torch.randn(6, 7, requires_grad=True)
    logprobs, entropy = torch.randn(2, 6).unbind()
    data = (old, behaviour, advantages, mask, None, None, torch.tensor(2.0), 1.0)
    operators = torch.ops.rlef_kernels
    torch.library.opcheck(
        operators.ppo_policy_loss_from_logits.default,
        (logits, True, targets, None, *data, 0.7, True, "", *settings),
    )
    torch.library.opcheck(
        operators.ppo_policy_loss.default,
        (logprobs.requires_grad_(), entropy.clone().requires_grad_(), *data, *settings),
    )
    torch.library.opcheck(operators.logprobs_from_logits.default, (logits, targets, None, 0.7, True, ""))


def test_values_that_cannot_be_right_are_refused_on_a_cpu() -> None:
    targets, *data = operands()
    settings = {"clip_ratio": 0.2, "behaviour_correction": True}
    logits = torch.randn(6, 7)
    for wrong, message in (
        ({"normaliser": torch.tensor(-1.0)}, "normaliser is -1.0; it must be a finite number above 0"),
        ({"rows": torch.tensor([0, 1, 2, 4, 3, 5])}, "rows do not ascend; sort them"),
        ({"rows": torch.arange(1, 7)}, "rows reach from 1 to 6; they must lie within 0 and 5"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be a finite number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ppo_policy_loss_from_logits(logits, targets, *data, **settings | {"normaliser": 1.0} | wrong)
    with pytest.raises(ValueError, match="targets reach from 7 to 7; they must lie within 0 and 6"):
        ppo_policy_loss_from_logits(logits, torch.full((6,), 7), *data, **settings, normaliser=1.0)
