from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlef_kernels import TokenLogprobs, logprobs, logprobs_from_logits


def slow(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and logsumexp, as one would write them down; float64."""
    scaled = logits.double() / temperature
    every = scaled.log_softmax(dim=1)
    chosen = every.gather(1, targets[:, None])[:, 0]
    return chosen, -(every.exp() * every).sum(dim=1), scaled.logsumexp(dim=1)


def parts(result: TokenLogprobs) -> tuple[Tensor, Tensor, Tensor]:
    assert result.entropy is not None
    return result.logprobs, result.entropy, result.logsumexp


def example(
    tokens: int, vocab: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, vocab, generator=random, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, vocab, (tokens,), generator=random)


def gradient(outputs: tuple[Tensor, Tensor, Tensor], logits: Tensor) -> Tensor:
    """Of a sum in which each output of each token has a weight of its own."""
    weights = torch.linspace(-1, 2, 3 * logits.shape[0], dtype=torch.float64).view(3, -1)
    total = sum((weight * output.double()).sum() for weight, output in zip(weights, outputs, strict=True))
    (result,) = torch.autograd.grad(total, logits)
    return result


def test_one_token_of_two_words_by_hand() -> None:
    """Logits 0 and ln 3 are probabilities 1/4 and 3/4."""
    result = logprobs_from_logits(torch.tensor([[0.0, math.log(3)]]), torch.tensor([1]), want_entropy=True)
    entropy = math.log(4) / 4 + math.log(4 / 3) * 3 / 4
    assert torch.cat(parts(result)).tolist() == pytest.approx([math.log(3 / 4), entropy, math.log(4)])


@given(st.integers(0, 5), st.integers(1, 9), st.sampled_from([0.3, 1.0, 2.5]), st.integers(0, 99))
def test_equals_the_slow_twin_in_values_and_gradients(
    tokens: int, vocab: int, temperature: float, seed: int
) -> None:
    logits, targets = example(tokens, vocab, seed)
    logits.requires_grad_()
    fast = parts(logprobs_from_logits(logits, targets, temperature=temperature, want_entropy=True))
    twin = slow(logits, targets, temperature)
    for actual, expected in zip(fast, twin, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(fast, logits), gradient(twin, logits), rtol=1e-12, atol=1e-12)


def test_gradients_equal_finite_differences() -> None:
    logits, targets = example(4, 6)
    rows = torch.tensor([0, 2, 3])

    def chosen(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return parts(
            logprobs_from_logits(logits, targets[rows], rows=rows, temperature=0.7, want_entropy=True)
        )

    assert torch.autograd.gradcheck(chosen, (logits.requires_grad_(),))


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("with_rows", [False, True])
def test_the_border_of_a_chunk_does_not_show(
    tokens: int, with_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "CPU_CHUNK_ELEMENTS", 4 * 5)  # four rows
    logits, targets = example(2 * tokens, 5)
    logits.requires_grad_()
    rows = torch.arange(1, 2 * tokens, 2) if with_rows else None
    asked, expected_logits = (targets[1::2], logits[1::2]) if with_rows else (targets, logits)
    fast = parts(logprobs_from_logits(logits, asked, rows=rows, want_entropy=True))
    twin = slow(expected_logits, asked)
    for actual, expected in zip(fast, twin, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 2, asked.shape[0], dtype=torch.float64)
    (actual,) = torch.autograd.grad((weights * (fast[0] + fast[1])).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((weights * (twin[0] + twin[1])).sum(), logits)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_single_precision_errs_by_less_than_two_millionths() -> None:
    logits, targets = example(256, 512, dtype=torch.float32)
    result = logprobs_from_logits(logits, targets, want_entropy=True)
    for actual, expected in zip(parts(result), slow(logits, targets), strict=True):
        assert (actual - expected).abs().max() < 2e-6


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_an_offset_of_all_logits_changes_neither_logprobs_nor_entropy(offset: float) -> None:
    logits, targets = example(8, 16, dtype=torch.float32)
    logits = (logits * 64).round() / 64  # so that the offset itself is exact
    plain = logprobs_from_logits(logits, targets, want_entropy=True)
    moved = logprobs_from_logits(logits + offset, targets, want_entropy=True)
    assert torch.equal(plain.logprobs, moved.logprobs)
    assert torch.equal(parts(plain)[1], parts(moved)[1])


@pytest.mark.parametrize("want_entropy", [False, True])
def test_logits_of_ten_thousand_overflow_nothing(want_entropy: bool) -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    result = logprobs_from_logits(logits, torch.tensor([0, 0]), want_entropy=want_entropy)
    assert result.logprobs.tolist() == [0.0, -2e4]
    result.logprobs.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0, 0.0], [1.0, -1.0]]


def test_a_logit_of_minus_infinity_is_a_word_that_cannot_come() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0]], requires_grad=True)
    result = logprobs_from_logits(logits, torch.tensor([2]), want_entropy=True)
    half = 0.693147
    assert [float(part.detach()) for part in parts(result)] == pytest.approx([-half, half, half], abs=1e-6)
    (result.logprobs + parts(result)[1]).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-0.5, 0.0, 0.5]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_single_precision(dtype: torch.dtype) -> None:
    logits, targets = example(16, 300, dtype=dtype)
    logits.requires_grad_()
    result = logprobs_from_logits(logits, targets, want_entropy=True)
    exact = logits.detach().double().requires_grad_()
    twin = slow(exact, targets)
    for actual, expected in zip(parts(result), twin, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-6)
    (actual,) = torch.autograd.grad(result.logprobs.sum(), logits)
    (expected,) = torch.autograd.grad(twin[0].sum(), exact)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_rows_that_nothing_asks_for_may_hold_anything() -> None:
    logits, targets = example(4, 5)
    poisoned = logits.clone()
    poisoned[[0, 2]] = torch.nan
    rows = torch.tensor([1, 3])
    poisoned.requires_grad_()
    result = logprobs_from_logits(poisoned, targets[rows], rows=rows, want_entropy=True)
    torch.testing.assert_close(result.logprobs, slow(logits[rows], targets[rows])[0])
    (parts(result)[1] + result.logprobs).sum().backward()
    assert poisoned.grad is not None
    assert poisoned.grad.isfinite().all()
    assert not poisoned.grad[[0, 2]].any()


def test_a_nan_is_reported_by_its_own_token_alone() -> None:
    logits, targets = example(3, 5)
    logits[1, 4] = torch.nan
    result = logprobs_from_logits(logits, targets, want_entropy=True)
    for part in parts(result):
        assert part.isnan().tolist() == [False, True, False]


def test_logits_are_left_as_they_were() -> None:
    logits, targets = example(6, 9, dtype=torch.float32)
    before = logits.clone()
    logits.requires_grad_()
    result = logprobs_from_logits(logits, targets, temperature=0.5, want_entropy=True)
    (result.logprobs + parts(result)[1]).sum().backward()
    assert torch.equal(logits.detach(), before)


def test_nothing_of_the_size_of_the_vocabulary_is_kept_but_the_logits() -> None:
    logits, targets = example(6, 900, dtype=torch.float32)
    logits.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        logprobs_from_logits(logits, targets, want_entropy=True)
    assert kept
    assert all(tensor.data_ptr() == logits.data_ptr() or tensor.numel() <= 3 * 6 for tensor in kept)


def test_strided_logits_give_the_same_as_contiguous_ones() -> None:
    logits, targets = example(8, 6)
    strided = logits.T.contiguous().T.requires_grad_()
    assert not strided.is_contiguous()
    fast = parts(logprobs_from_logits(strided, targets, want_entropy=True))
    twin = slow(logits, targets)
    torch.testing.assert_close(torch.stack(fast), torch.stack(twin))
    torch.testing.assert_close(gradient(fast, strided), gradient(slow(strided, targets), strided))


def test_entropy_is_not_computed_unless_asked_for() -> None:
    assert logprobs_from_logits(*example(2, 3)).entropy is None


def test_no_token_gives_empty_results_and_a_zero_gradient() -> None:
    logits, _ = example(3, 5)
    none = torch.empty(0, dtype=torch.int64)
    result = logprobs_from_logits(logits.requires_grad_(), none, rows=none, want_entropy=True)
    assert [part.shape for part in parts(result)] == [(0,)] * 3
    result.logprobs.sum().backward()
    assert logits.grad is not None
    assert not logits.grad.any()


LOGITS, TARGETS = example(3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": LOGITS.long()}, r"logits is torch.int64; convert it to a floating type"),
        ({"logits": LOGITS[0]}, r"logits have shape \[4\]; they must be \[rows, vocab\]"),
        (
            {"logits": LOGITS[:, :0]},
            r"logits have shape \[3, 0\]; they must be \[rows, vocab\], vocab at least 1",
        ),
        ({"targets": TARGETS.int()}, r"targets is torch.int32; convert it to torch.int64"),
        ({"targets": TARGETS[:2]}, r"targets has shape \[2\] but .* logits has \[3\]; make them equal"),
        ({"targets": TARGETS - 9}, r"targets reach from .* they must lie within 0 and 3"),
        ({"targets": torch.tensor([0, 1, 4])}, r"targets reach from 0 to 4; they must lie within 0 and 3"),
        ({"rows": torch.tensor([0, 1, 3])}, r"rows reach from 0 to 3; they must lie within 0 and 2"),
        ({"rows": torch.tensor([0, 1, 1])}, r"rows do not ascend; sort them"),
        ({"rows": torch.tensor([0, 1])}, r"rows has shape \[2\] but targets has \[3\]; make them equal"),
        ({"temperature": 0.0}, r"temperature is 0.0; it must be a finite number above 0"),
        ({"temperature": float("nan")}, r"temperature is nan; it must be a finite number above 0"),
        ({"targets": TARGETS.to("meta")}, r"targets is on meta but .* on cpu; move one of them"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logprobs_from_logits(**{"logits": LOGITS, "targets": TARGETS, **arguments})  # type: ignore[arg-type]
