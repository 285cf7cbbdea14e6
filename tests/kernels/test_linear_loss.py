"""The policy loss from hidden states equals that from logits, and holds no more logits than it is allowed."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlef_kernels import PolicyMetrics, linear_ppo_loss, ppo_policy_loss_from_logits

HIDDEN, VOCAB = 5, 7


def example(tokens: int, seed: int, *, rows: int | None = None) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    return {
        "hidden": numbers(rows or tokens, HIDDEN),
        "weight": numbers(VOCAB, HIDDEN),
        "targets": torch.randint(0, VOCAB, (tokens,), generator=random),
        "old_logprobs": numbers(tokens) / 2 - 2,
        "behaviour_logprobs": numbers(tokens) / 2 - 2,
        "advantages": numbers(tokens),
        "mask": torch.rand(tokens, generator=random) < 0.7,
        "weights": torch.rand(tokens, generator=random, dtype=torch.float64),
        "reference_logprobs": numbers(tokens) / 2 - 2,
    }


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


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_no_more_logits_are_in_memory_than_allowed() -> None:
    tokens, vocab, allowed = 64, 1000, 4000
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 2, generator=random, requires_grad=True)
    weight = torch.randn(vocab, 2, generator=random, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.int64)
    others = [torch.zeros(tokens)] * 3

    with Largest() as largest:
        loss, _ = linear_ppo_loss(
            hidden,
            weight,
            targets,
            *others,
            torch.ones(tokens, dtype=torch.bool),
            clip_ratio=0.2,
            behaviour_correction=True,
            normaliser=1.0,
            entropy_coef=0.1,
            chunk_elements=allowed,
        )
        loss.backward()

    assert vocab * 2 <= largest.elements <= allowed


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
