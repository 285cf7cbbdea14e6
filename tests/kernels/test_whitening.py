"""`interpreted_whitening.py` runs these tests a second time, with the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from rlef_kernels import masked_mean, masked_variance, masked_whiten


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """Of this process alone; `test_parallel.py` has more."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@given(count=st.integers(1, 40), seed=st.integers(0, 2**32), offset=st.sampled_from([0.0, -1e4, 1e4]))
def test_lower_precision_costs_only_the_last_rounding(
    count: int, seed: int, offset: float, dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(seed)
    values = (offset + torch.randn(count, generator=random)).to(dtype)
    mask = torch.rand(count, generator=random) < 0.7
    whitened, expected = masked_whiten(values, mask), masked_whiten(values.double(), mask)
    assert whitened.dtype == dtype
    torch.testing.assert_close(whitened.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
    torch.testing.assert_close(masked_mean(values, mask), masked_mean(values.double(), mask))
    torch.testing.assert_close(masked_variance(values, mask), masked_variance(values.double(), mask))


def test_a_variance_of_1_around_10000_keeps_seven_digits_in_single_precision() -> None:
    values = 1e4 + torch.randn(5000, generator=torch.Generator().manual_seed(0))
    exact = values.double()
    expected = (exact - exact.mean()) / (exact.var(correction=0) + 1e-8).sqrt()
    torch.testing.assert_close(masked_whiten(values).double(), expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(masked_variance(values), exact.var(correction=0), rtol=1e-10, atol=0)


@pytest.mark.parametrize("written", [torch.nan, torch.inf])
def test_a_number_inside_the_mask_that_is_none_is_reported_everywhere(written: float) -> None:
    values, mask = torch.tensor([1.0, written, 2.0, 5.0]), torch.tensor([True, True, True, False])
    assert masked_whiten(values, mask).isnan().tolist() == [True, True, True, False]
    assert not masked_mean(values, mask).isfinite()
    assert masked_variance(values, mask).isnan()


def test_no_gradient_flows_and_inputs_stay_as_they_are() -> None:
    values = torch.tensor([1.0, 3.0], requires_grad=True)
    for result in (masked_whiten(values), masked_mean(values), masked_variance(values)):
        assert not result.requires_grad
    assert values.tolist() == [1.0, 3.0]


def test_strided_values_are_whitened_as_others() -> None:
    table = torch.tensor([[1.0, 9.0], [2.0, 9.0], [3.0, 9.0]])
    assert torch.equal(masked_whiten(table[:, 0]), masked_whiten(torch.tensor([1.0, 2.0, 3.0])))


def test_torch_compile_steps_over_all_without_a_break() -> None:
    mask = torch.tensor([True, False, True, True])

    def whole(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return masked_whiten(2 * values, mask) + 1, masked_mean(values) + masked_variance(values, mask)

    values = torch.arange(4.0)
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(values), whole(values), strict=True):
        assert torch.equal(found, expected)


def test_torch_compile_steps_over_the_exchange_between_processes_too(group: dist.ProcessGroup) -> None:
    def whole(values: torch.Tensor) -> torch.Tensor:
        return masked_whiten(2 * values, group=group) + 1

    values = torch.arange(4.0)
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values), masked_whiten(2 * values) + 1)


def test_processes_exchange_two_numbers_and_then_one(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def recorded(tensor: torch.Tensor, **settings: object) -> None:
        sent.append(tensor.numel() * tensor.element_size())
        all_reduce(tensor, **settings)

    monkeypatch.setattr(dist, "all_reduce", recorded)
    masked_whiten(torch.arange(40.0), group=group)
    masked_mean(torch.arange(40.0), group=group)
    assert sent == [16, 8, 16]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_operators_keep_what_their_schemas_promise(dtype: torch.dtype, masked: bool) -> None:
    values, mask = torch.randn(5).to(dtype), torch.tensor([True, False, True, True, False])
    operators = torch.ops.rlef_kernels
    for operator, settings in (
        (operators.masked_mean, ("",)),
        (operators.masked_moments, ("",)),
        (operators.masked_whiten, (1e-8, "")),
    ):
        operands = (values, mask if masked else None, *settings)
        results = torch.library.opcheck(operator.default, operands)
        assert set(results.values()) == {"SUCCESS"}


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
