"""The policy loss from hidden states equals that from logits, and holds no more logits than it is allowed."""

from __future__ import annotations

from dataclasses import fields
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity

from rlef_kernels import PolicyMetrics, linear_ppo_loss, ppo_policy_loss_from_logits
from rlef_kernels.linear_chunk import CPU_BLOCK_ELEMENTS
from tests.kernels.linear_twin import example, slow_linear_loss, with_gradients

VOCAB = 7


def both(arguments: dict[str, Any], **settings: Any) -> list[tuple[Tensor, PolicyMetrics, Tensor, Tensor]]:
    """Loss, metrics and gradients, of the logits that are made and of those that are not."""
    settings = {"clip_ratio": (0.2, 0.3), "behaviour_correction": True, "normaliser": 3.0} | settings
    chunk_elements = settings.pop("chunk_elements", None)
    results = []
    for has_logits in (True, False):
        given_arguments = dict(arguments)
        hidden = given_arguments.pop("hidden").clone().requires_grad_()
        weight = given_arguments.pop("weight").clone().requires_grad_()
        if has_logits:
            loss, metrics = ppo_policy_loss_from_logits(hidden @ weight.T, **given_arguments, **settings)
        else:
            loss, metrics = linear_ppo_loss(
                hidden, weight, **given_arguments, **settings, chunk_elements=chunk_elements
            )
        gradients = torch.autograd.grad(2 * loss, (hidden, weight))
        results.append((loss.detach(), metrics, *gradients))
    return results


def assert_equal(results: list[tuple[Tensor, PolicyMetrics, Tensor, Tensor]], tolerance: float) -> None:
    expected, actual = results
    for index in (0, 2, 3):
        torch.testing.assert_close(actual[index], expected[index], rtol=tolerance, atol=tolerance)
    for field in fields(PolicyMetrics):
        torch.testing.assert_close(
            getattr(actual[1], field.name),
            getattr(expected[1], field.name),
            rtol=tolerance,
            atol=tolerance,
            msg=field.name,
        )


@given(
    st.integers(0, 9),
    st.sampled_from([1, VOCAB, 2 * VOCAB, 3 * VOCAB + 1, None]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([None, 2.0]),
    st.sampled_from([1.0, 0.7]),
    st.integers(0, 99),
)
def test_equals_the_loss_from_logits_in_values_gradients_and_metrics(
    tokens: int,
    chunk_elements: int | None,
    entropy_coef: float,
    kl_coef: float,
    dual_clip: float | None,
    temperature: float,
    seed: int,
) -> None:
    results = both(
        example(tokens, seed),
        chunk_elements=chunk_elements,
        entropy_coef=entropy_coef,
        want_entropy=True,
        kl_coef=kl_coef,
        dual_clip=dual_clip,
        temperature=temperature,
    )

    assert_equal(results, 1e-12)


@given(st.integers(0, 9), st.sampled_from([None, 2.0]), st.booleans(), st.booleans(), st.integers(0, 99))
def test_equals_the_slow_twin_of_all_logits_and_autograd(
    tokens: int, dual_clip: float | None, behaviour_correction: bool, has_tensor: bool, seed: int
) -> None:
    settings = {
        "clip_ratio": (0.2, 0.3),
        "behaviour_correction": behaviour_correction,
        "normaliser": torch.tensor(3) if has_tensor else 3.0,
        "entropy_coef": 0.1,
        "kl_coef": 0.5,
        "dual_clip": dual_clip,
        "temperature": 0.7,
    }
    arguments = example(tokens, seed)
    loss, metrics, *gradients = with_gradients(
        linear_ppo_loss, arguments, **settings, chunk_elements=2 * VOCAB
    )
    expected_loss, expected_metrics, *expected_gradients = with_gradients(
        slow_linear_loss, arguments, **settings
    )
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=1e-12)
    for name, value in expected_metrics.items():
        torch.testing.assert_close(getattr(metrics, name), value, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    arguments = example(4, 3)
    hidden, weight = (arguments.pop(name).requires_grad_() for name in ("hidden", "weight"))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        settings = {"clip_ratio": 0.2, "behaviour_correction": False, "normaliser": 2.0}
        return linear_ppo_loss(
            hidden, weight, **arguments, **settings, entropy_coef=0.2, kl_coef=0.3, chunk_elements=VOCAB
        )[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def operator_arguments(arguments: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """What the public function hands to the operator."""
    seen: list[tuple[Any, ...]] = []
    operator = torch.ops.rlef_kernels.linear_ppo_loss.default

    def record(*given_arguments: Any) -> Any:
        seen.append(given_arguments)
        return operator(*given_arguments)

    monkeypatch.setattr(torch.ops.rlef_kernels, "linear_ppo_loss", record)
    linear_ppo_loss(
        **arguments,
        clip_ratio=0.2,
        behaviour_correction=True,
        normaliser=torch.tensor(2.0),
        entropy_coef=0.1,
        chunk_elements=2 * VOCAB,
    )
    monkeypatch.undo()
    return seen[0]


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_the_operator_keeps_its_promises_to_torch(
    needed: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = example(5, 2)
    for name, is_needed in zip(("hidden", "weight"), needed, strict=True):
        arguments[name].requires_grad_(is_needed)
    torch.library.opcheck(
        torch.ops.rlef_kernels.linear_ppo_loss.default, operator_arguments(arguments, monkeypatch)
    )


def test_compiled_in_one_graph_it_gives_the_same_values_and_gradients() -> None:
    settings = {"clip_ratio": 0.2, "behaviour_correction": True, "entropy_coef": 0.1}
    settings |= {"normaliser": torch.tensor(2.0), "chunk_elements": 2 * VOCAB}
    compiled = torch.compile(linear_ppo_loss, fullgraph=True, backend="aot_eager")
    for arguments in (example(5, 2), example(8, 4)):
        expected = with_gradients(linear_ppo_loss, arguments, **settings)
        actual = with_gradients(compiled, arguments, **settings)
        for index in (0, 2, 3):
            torch.testing.assert_close(actual[index], expected[index], rtol=0, atol=0)
        assert actual[1].clipped == expected[1].clipped


def products_of(function: Any) -> list[list[int]]:
    """The sizes n, k, m of all products of n x k and k x m matrices."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profile:
        function()
    shapes = [
        each.input_shapes[-2:] if each.name == "aten::mm" else each.input_shapes[1:3]
        for each in profile.events()
        if each.name in ("aten::mm", "aten::addmm_")
    ]
    return [[*left, right[1]] for left, right in shapes]


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True), (False, False)])
def test_only_the_products_of_gradients_that_are_needed_are_made(needed: tuple[bool, bool]) -> None:
    arguments = example(4, 0) | {"mask": torch.ones(4, dtype=torch.bool)}
    for name, is_needed in zip(("hidden", "weight"), needed, strict=True):
        arguments[name].requires_grad_(is_needed)

    def forward() -> None:
        loss, _ = linear_ppo_loss(**arguments, clip_ratio=0.2, behaviour_correction=True, normaliser=1.0)
        assert loss.requires_grad == (any(needed) and torch.is_grad_enabled())

    of_logits, of_hidden, of_weight = [4, 5, VOCAB], [4, VOCAB, 5], [VOCAB, 4, 5]
    assert products_of(forward) == [of_logits, *[of_hidden] * needed[0], *[of_weight] * needed[1]]
    with torch.no_grad():
        assert products_of(forward) == [of_logits]


def test_a_second_derivative_is_refused() -> None:
    arguments = example(4, 0)
    hidden = arguments["hidden"].requires_grad_()
    loss, _ = linear_ppo_loss(**arguments, clip_ratio=0.2, behaviour_correction=True, normaliser=1.0)
    (gradient,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_rows_are_those_that_predict_the_targets() -> None:
    rows = torch.tensor([0, 2, 3, 7])

    assert_equal(both(example(4, 1, rows=9), rows=rows, chunk_elements=2 * VOCAB), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_lower_precision_are_summed_in_single(dtype: torch.dtype) -> None:
    arguments = example(64, 2)
    low = {
        name: value.to(dtype) if name in ("hidden", "weight") else value for name, value in arguments.items()
    }
    high = {name: value.double() if name in ("hidden", "weight") else value for name, value in low.items()}
    low["mask"] = high["mask"] = torch.ones(64, dtype=torch.bool)

    _, (loss, _, for_hidden, for_weight) = both(low, chunk_elements=VOCAB)
    (expected_loss, _, expected_for_hidden, expected_for_weight), _ = both(high)

    accuracy = 4 * torch.finfo(dtype).eps
    assert (for_hidden.dtype, for_weight.dtype, loss.dtype) == (dtype, dtype, torch.float32)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=10 * accuracy, atol=10 * accuracy)
    for actual, expected in ((for_hidden, expected_for_hidden), (for_weight, expected_for_weight)):
        error = (actual.double() - expected).abs().max()
        assert error <= 8 * accuracy * expected.abs().max()


def peak_of(function: Any) -> int:
    """The most bytes of tensors that live at a time while the function runs, beyond those from before."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    changes = [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]
    return max(accumulate(changes))


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_memory_is_a_chunk_and_the_gradients(entropy_coef: float) -> None:
    tokens, vocab, size, rows_of_chunk = 512, 8192, 32, 64
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, size, generator=random) / 6 for n in (tokens, vocab))
    targets = torch.randint(0, vocab, (tokens,), generator=random)
    of_tokens = [torch.zeros(tokens)] * 3

    def forward() -> Tensor:
        return linear_ppo_loss(
            *(hidden.requires_grad_(), weight.requires_grad_(), targets, *of_tokens),
            torch.ones(tokens, dtype=torch.bool),
            clip_ratio=0.2,
            behaviour_correction=True,
            normaliser=1.0,
            entropy_coef=entropy_coef,
            chunk_elements=rows_of_chunk * vocab,
        )[0]

    chunk, block = 4 * rows_of_chunk * vocab, 4 * CPU_BLOCK_ELEMENTS if entropy_coef else 0
    gradients = 4 * size * (tokens + vocab)
    peak = peak_of(forward)
    assert chunk + gradients < peak < 1.1 * chunk + gradients + block


def test_a_row_outside_the_mask_is_not_read() -> None:
    arguments = example(3, 0) | {"mask": torch.tensor([True, False, True])}
    poisoned = dict(arguments)
    poisoned["hidden"] = torch.where(arguments["mask"][:, None], arguments["hidden"], torch.nan)

    _, clean = both(arguments)
    _, dirty = both(poisoned)

    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[2], dirty[2])
    assert not dirty[2][1].any()


def test_a_nan_inside_the_mask_is_reported() -> None:
    arguments = example(3, 0) | {"mask": torch.ones(3, dtype=torch.bool)}
    arguments["hidden"][1, 2] = torch.nan

    _, (loss, _, for_hidden, _) = both(arguments, chunk_elements=VOCAB)

    assert loss.isnan()
    assert for_hidden[1].isnan().all()
    assert not for_hidden[0].isnan().any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": torch.zeros(2, 4)}, r"hidden has shape \[2, 4\] and weight \[7, 5\]; they must"),
        ({"weight": torch.zeros(0, 5)}, r"weight \[0, 5\]; they must be .*, vocab at least 1"),
        ({"weight": torch.zeros(7, 5)}, r"hidden is torch.float64 on cpu but weight torch.float32 on cpu"),
        ({"hidden": torch.zeros(2, 5).long()}, r"hidden is torch.int64; convert it to a floating"),
        ({"targets": torch.tensor([0, 7])}, r"targets reach from 0 to 7; they must lie within"),
        ({"rows": torch.tensor([1, 0])}, r"rows do not ascend; sort them, each row of hidden states"),
        ({"advantages": torch.zeros(3)}, r"advantages has shape \[3\] but targets has \[2\]"),
        ({"temperature": 0.0}, r"temperature is 0.0; it must be a finite number above 0"),
        ({"entropy_coef": -1.0}, r"entropy_coef is -1.0; it must be a finite number of at least 0"),
        ({"chunk_elements": 0}, r"chunk_elements is 0; it must be a finite number above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    settings = {"clip_ratio": 0.2, "behaviour_correction": True, "normaliser": 1.0}
    with pytest.raises(ValueError, match=message):
        linear_ppo_loss(**(example(2, 0) | settings | arguments))
