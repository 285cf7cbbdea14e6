from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlef_kernels import masked_mean, masked_variance, masked_whiten


def test_three_numbers_by_hand() -> None:
    whitened = masked_whiten(torch.tensor([1.0, 2.0, 3.0]))
    assert whitened.tolist() == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5])


def test_mean_is_taken_inside_the_mask() -> None:
    values, mask = torch.tensor([1.0, torch.nan, 3.0]), torch.tensor([True, False, True])
    assert float(masked_mean(values, mask)) == 2.0


@given(st.lists(st.tuples(st.floats(-100, 100), st.booleans()), max_size=12))
def test_equals_the_slow_twin(pairs: list[tuple[float, bool]]) -> None:
    values = torch.tensor([value for value, _ in pairs], dtype=torch.float64)
    mask = torch.tensor([chosen for _, chosen in pairs], dtype=torch.bool)
    kept = [value for value, chosen in pairs if chosen]
    mean = sum(kept) / max(len(kept), 1)
    variance = sum((value - mean) ** 2 for value in kept) / max(len(kept), 1)
    expected = [(value - mean) / (variance + 1e-8) ** 0.5 if chosen else 0.0 for value, chosen in pairs]
    assert masked_whiten(values, mask).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert float(masked_mean(values, mask)) == pytest.approx(mean, rel=1e-12, abs=1e-12)
    assert float(masked_variance(values, mask)) == pytest.approx(variance, rel=1e-9, abs=1e-12)


def test_poison_outside_the_mask_reaches_nothing_and_becomes_zero() -> None:
    values = torch.tensor([1.0, torch.nan, 3.0, torch.inf])
    whitened = masked_whiten(values, torch.tensor([True, False, True, False]))
    assert whitened.tolist() == pytest.approx([-1.0, 0.0, 1.0, 0.0])


def test_a_large_offset_costs_no_precision() -> None:
    values = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(masked_whiten(values + 2**20), masked_whiten(values))


@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0], []])
def test_values_without_spread_become_zero(values: list[float]) -> None:
    assert masked_whiten(torch.tensor(values)).tolist() == [0.0] * len(values)


def test_all_masked_is_all_zero() -> None:
    nothing = torch.tensor([False, False])
    assert masked_whiten(torch.tensor([1.0, 2.0]), nothing).tolist() == [0.0, 0.0]
    assert float(masked_mean(torch.tensor([1.0, 2.0]), nothing)) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": torch.zeros(2, 2)}, r"values has shape \[2, 2\]; it must be one-dimensional"),
        ({"values": torch.zeros(2).long()}, r"values is torch.int64; convert it to a floating type"),
        ({"mask": torch.ones(2)}, r"mask is torch.float32; convert it to torch.bool"),
        (
            {"mask": torch.ones(3, dtype=torch.bool)},
            r"mask has shape \[3\] but values has \[2\]; make them equal",
        ),
        ({"eps": 0.0}, r"eps is 0.0; it must be a finite number above 0"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_whiten(**({"values": torch.zeros(2)} | arguments))  # type: ignore[arg-type]
