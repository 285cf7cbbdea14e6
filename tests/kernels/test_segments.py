"""`interpreted_segments.py` runs these tests a second time, with the Triton kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlef_kernels import mean_weights, segment_count, segment_expand, segment_mean, segment_sum
from tests.kernels.segments_twin import (
    Segments,
    naive_counts,
    naive_expansion,
    naive_means,
    naive_sums,
    segments_of,
    some_segments,
)

NAN = torch.nan
TWO_TURNS = {
    "values": torch.tensor([1.0, 2.0, NAN, 8.0, 16.0]),
    "cu_seqlens": torch.tensor([0, 3, 5]),
    "mask": torch.tensor([True, True, False, True, True]),
}


def test_the_tokens_of_two_turns_are_summed_counted_and_averaged() -> None:
    assert segment_sum(**TWO_TURNS).tolist() == [3.0, 24.0]
    assert segment_mean(**TWO_TURNS).tolist() == [1.5, 12.0]
    assert segment_count(TWO_TURNS["cu_seqlens"], TWO_TURNS["mask"]).tolist() == [2, 2]


def test_a_number_per_turn_is_handed_to_its_tokens() -> None:
    expanded = segment_expand(torch.tensor([7.0, 9.0]), TWO_TURNS["cu_seqlens"], TWO_TURNS["mask"])
    assert expanded.tolist() == [7.0, 7.0, 0.0, 9.0, 9.0]


def test_weights_make_a_sum_of_means_out_of_a_sum() -> None:
    weights = mean_weights(torch.tensor([0, 3, 4]), torch.tensor([True, False, True, False]))
    assert weights.tolist() == [0.5, 0.0, 0.5, 0.0]


def test_without_a_mask_every_token_counts() -> None:
    values, borders = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 2, 2, 3])
    assert segment_sum(values, borders).tolist() == [3.0, 0.0, 6.0]
    assert segment_mean(values, borders).tolist() == [1.5, 0.0, 6.0]


@given(some_segments())
def test_equals_a_loop_over_each_segment(segments: Segments) -> None:
    values, borders, mask = segments.values, segments.cu_seqlens, segments.mask
    torch.testing.assert_close(segment_sum(values, borders, mask), naive_sums(segments), rtol=0, atol=1e-12)
    torch.testing.assert_close(segment_mean(values, borders, mask), naive_means(segments), rtol=0, atol=1e-12)
    assert segment_count(borders, mask).tolist() == naive_counts(segments)


@given(some_segments(), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_expanded_numbers_keep_their_type_and_their_bits(segments: Segments, dtype: torch.dtype) -> None:
    numbers = torch.arange(1, segments.number + 1, dtype=dtype)
    expanded = segment_expand(numbers, segments.cu_seqlens, segments.mask)
    assert expanded.dtype == dtype
    assert expanded.tolist() == naive_expansion(numbers.tolist(), segments)


@given(some_segments())
def test_weighted_by_mean_weights_a_sum_is_the_sum_of_the_means(segments: Segments) -> None:
    weights = mean_weights(segments.cu_seqlens, segments.mask)
    assert weights.dtype == torch.float32
    assert not weights[~segments.mask].any()
    weighted = (weights.double() * segments.values)[segments.mask].sum()
    torch.testing.assert_close(weighted, naive_means(segments).sum(), rtol=0, atol=segments.rounding())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@given(segments=some_segments())
def test_half_and_single_precision_are_summed_in_float32(segments: Segments, dtype: torch.dtype) -> None:
    rounded = segments.in_type(dtype)
    sums = segment_sum(rounded.values, rounded.cu_seqlens, rounded.mask)
    assert sums.dtype == torch.float32
    expected = naive_sums(rounded.in_type(torch.float64))
    torch.testing.assert_close(sums.double(), expected, rtol=0, atol=rounded.rounding())


def test_many_small_numbers_add_up_in_half_precision() -> None:
    many = torch.ones(5000, dtype=torch.bfloat16)
    assert segment_sum(many, torch.tensor([0, 5000])).tolist() == [5000.0]


@given(some_segments())
def test_a_segment_gets_the_same_bits_alone_as_among_others(segments: Segments) -> None:
    single = segments.in_type(torch.float32)
    together = segment_sum(single.values, single.cu_seqlens, single.mask)
    for number in range(single.number):
        alone = single.alone(number)
        assert torch.equal(
            segment_sum(alone.values, alone.cu_seqlens, alone.mask), together[number : number + 1]
        )


@given(some_segments())
def test_the_gradient_of_a_mean_is_the_weight_of_each_token(segments: Segments) -> None:
    values = segments.values.float().requires_grad_()
    segment_mean(values, segments.cu_seqlens, segments.mask).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, mean_weights(segments.cu_seqlens, segments.mask))


@pytest.mark.parametrize("masked", [True, False])
def test_gradients_equal_finite_differences_twice(masked: bool) -> None:
    segments = segments_of([3, 0, 2], seed=0, chosen=0.6 if masked else 1)
    borders, mask = segments.cu_seqlens, segments.mask
    values = segments.values.nan_to_num().requires_grad_()
    numbers = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def products(values: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        means = segment_mean(values, borders, mask if masked else None)
        return segment_sum(segment_expand(numbers * means, borders, mask) * values, borders, mask)

    assert torch.autograd.gradcheck(products, (values, numbers))
    assert torch.autograd.gradgradcheck(products, (values, numbers))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_come_in_the_type_of_what_they_are_of(dtype: torch.dtype) -> None:
    values, numbers = torch.ones(5, dtype=dtype, requires_grad=True), torch.ones(2, dtype=dtype)
    borders, mask = TWO_TURNS["cu_seqlens"], TWO_TURNS["mask"]
    (segment_sum(values, borders, mask) * torch.tensor([3.0, 5.0])).sum().backward()
    numbers.requires_grad_()
    (segment_expand(numbers, borders, mask) * torch.arange(5)).sum().backward()
    assert values.grad is not None
    assert numbers.grad is not None
    assert (values.grad.dtype, values.grad.tolist()) == (dtype, [3.0, 3.0, 0.0, 5.0, 5.0])
    assert (numbers.grad.dtype, numbers.grad.tolist()) == (dtype, [1.0, 7.0])


def test_a_nan_inside_the_mask_reaches_its_segment_alone() -> None:
    values = torch.tensor([1.0, NAN, 2.0, 4.0])
    borders, mask = torch.tensor([0, 1, 3, 4]), torch.ones(4, dtype=torch.bool)
    assert segment_sum(values, borders, mask).isnan().tolist() == [False, True, False]
    assert segment_mean(values, borders).isnan().tolist() == [False, True, False]


def test_a_nan_outside_the_mask_reaches_nothing() -> None:
    values = torch.tensor([1.0, NAN], requires_grad=True)
    mask = torch.tensor([True, False])
    means = segment_mean(values, torch.tensor([0, 2]), mask)
    means.sum().backward()
    assert values.grad is not None
    assert (means.tolist(), values.grad.tolist()) == ([1.0], [1.0, 0.0])


def test_a_number_of_a_segment_that_is_all_masked_reaches_nothing() -> None:
    mask = torch.tensor([True, False])
    assert segment_expand(torch.tensor([2.0, NAN]), torch.tensor([0, 1, 2]), mask).tolist() == [2.0, 0.0]


def test_nothing_is_0() -> None:
    nothing = torch.tensor([False, False])
    assert segment_sum(torch.full((2,), NAN), torch.tensor([0, 2]), nothing).tolist() == [0.0]
    assert segment_mean(torch.full((2,), NAN), torch.tensor([0, 2]), nothing).tolist() == [0.0]
    assert mean_weights(torch.tensor([0, 2]), nothing).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("borders", [[0], [0, 0, 0]])
def test_no_token_gives_a_zero_for_each_segment(borders: list[int]) -> None:
    values, cu_seqlens = torch.empty(0, requires_grad=True), torch.tensor(borders)
    means = segment_mean(values, cu_seqlens, values.bool())
    means.sum().backward()
    assert values.grad is not None
    assert (means.tolist(), values.grad.tolist()) == ([0.0] * (len(borders) - 1), [])
    assert segment_expand(means.detach(), cu_seqlens, values.bool()).tolist() == []


def test_strided_values_give_the_same_sums() -> None:
    table = torch.arange(10.0).view(5, 2)
    borders, mask = TWO_TURNS["cu_seqlens"], torch.ones(5, 2, dtype=torch.bool)[:, 0]
    assert segment_sum(table[:, 0], borders, mask).tolist() == [0.0 + 2 + 4, 6.0 + 8]
    assert segment_sum(table.flip(1)[:, 0], borders.int(), mask).tolist() == [1.0 + 3 + 5, 7.0 + 9]


def test_torch_compile_steps_over_all_without_a_break() -> None:
    segments = segments_of([3, 0, 5], seed=1)
    borders, mask = segments.cu_seqlens, segments.mask

    def whole(values: torch.Tensor) -> torch.Tensor:
        means = segment_mean(2 * values, borders, mask)
        weights = mean_weights(borders, mask)
        return (
            segment_expand(means, borders, mask) * weights * segment_sum(values, borders, mask).sum()
        ).sum()

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    values, same = (segments.values.nan_to_num().requires_grad_() for _ in range(2))
    found, expected = compiled(values), whole(same)
    found.backward()
    expected.backward()
    assert values.grad is not None
    assert torch.equal(found, expected)
    assert torch.equal(values.grad, same.grad)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_operators_keep_what_their_schemas_promise(dtype: torch.dtype, masked: bool) -> None:
    segments = segments_of([3, 0, 5], seed=2)
    values, borders = segments.values.nan_to_num().to(dtype).requires_grad_(), segments.cu_seqlens
    mask = segments.mask if masked else None
    numbers = torch.randn(3).to(dtype).requires_grad_()
    operators = torch.ops.rlef_kernels
    for operator, operands in (
        (operators.segment_sum, (values, borders, mask)),
        (operators.segment_count, (borders, segments.mask)),
        (operators.segment_expand, (numbers, borders, mask, 8)),
        (operators.running_sums, (values, borders, True)),
        (operators.turn_borders, (torch.tensor([1, 1, 4]),)),
    ):
        results = torch.library.opcheck(operator.default, operands)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"values": torch.zeros(2).int()}, r"^values is torch.int32; convert it to a floating type$"),
        ({"values": torch.zeros(1, 2)}, r"^values has shape \[1, 2\]; it must be one-dimensional$"),
        ({"mask": torch.ones(2)}, r"^mask is torch.float32; convert it to torch.bool$"),
        ({"mask": torch.ones(3).bool()}, r"^mask has shape \[3\] but values has \[2\]; make them equal$"),
        ({"cu_seqlens": torch.zeros(2)}, r"^cu_seqlens is torch.float32; convert it to torch.int32 or"),
        ({"cu_seqlens": torch.tensor(2)}, r"^cu_seqlens has shape \[\]; it must be \[sequences \+ 1\]$"),
        ({"mask": torch.ones(2, device="meta").bool()}, r"^mask is on meta but values on cpu; move one"),
    ],
)
@pytest.mark.parametrize("function", [segment_sum, segment_mean])
def test_what_cannot_be_right_is_refused_by_name(
    function: Any, changed: dict[str, Any], message: str
) -> None:
    right = {"values": torch.zeros(2), "cu_seqlens": torch.tensor([0, 2]), "mask": torch.ones(2).bool()}
    with pytest.raises(ValueError, match=message):
        function(**(right | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"numbers": torch.zeros(1).int()}, r"^numbers is torch.int32; convert it to a floating type$"),
        (
            {"numbers": torch.zeros(2)},
            r"^numbers has shape \[2\] but cu_seqlens has \[2\]; give one number per s",
        ),
        ({"mask": torch.ones(2)}, r"^mask is torch.float32; convert it to torch.bool$"),
        ({"mask": torch.ones(2, device="meta").bool()}, r"^mask is on meta but numbers on cpu; move one"),
    ],
)
def test_numbers_that_cannot_be_right_are_refused_by_name(changed: dict[str, Any], message: str) -> None:
    right = {"numbers": torch.zeros(1), "cu_seqlens": torch.tensor([0, 2]), "mask": torch.ones(2).bool()}
    with pytest.raises(ValueError, match=message):
        segment_expand(**(right | changed))


@pytest.mark.parametrize(
    ("borders", "message"),
    [
        ([1, 2], r"^cu_seqlens begins with 1; the first sequence begins at token 0$"),
        ([0, 3], r"^cu_seqlens ends with 3 but there are 2 tokens; end with their number$"),
        ([0, 5, 2], r"^cu_seqlens descends from 5 to 2; sequences cannot end before they begin$"),
    ],
)
def test_on_a_cpu_borders_that_cannot_be_right_are_refused_by_name(borders: list[int], message: str) -> None:
    values, mask = torch.zeros(2), torch.ones(2, dtype=torch.bool)
    cu_seqlens = torch.tensor(borders)
    with pytest.raises(ValueError, match=message):
        segment_sum(values, cu_seqlens)
    with pytest.raises(ValueError, match=message):
        mean_weights(cu_seqlens, mask)
    with pytest.raises(ValueError, match=message):
        segment_expand(torch.zeros(len(borders) - 1), cu_seqlens, mask)
