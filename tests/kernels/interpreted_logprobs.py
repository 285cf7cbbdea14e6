"""The Triton kernels of `logprobs_from_logits` against its slow twin, in Triton's interpreter.

pytest does not collect this file by itself: `test_interpreted.py` runs it in a process of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from rlef_kernels import _logprobs_triton, logprobs, logprobs_from_logits
from rlef_kernels._logprobs_triton import shard_gradient, shard_statistics
from tests.kernels.interpreter import traffic

# The kernels' first maximum, the lowest number there is, overflows beside a logit, and is clamped thereafter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered in multiply:RuntimeWarning",
    "ignore:invalid value encountered:RuntimeWarning",
)

SHIPPED = {name: getattr(_logprobs_triton, name) for name in ("THREADS", "LOADS_OF_STATISTICS")}
THREADS, LOADS = 16, 2  # a tile is 256 logits of two bytes, or 128 of four; a row has at most 14 edges
SIZES = [1, 2, 7, 8, 9, 15, 16, 17, 127, 128, 129, 192, 255, 256, 257, 271, 300]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, scope="module")
def _small_tiles_on_poisoned_memory() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "_triton_serves", lambda logits: True)
        patch.setattr(_logprobs_triton, "THREADS", THREADS)
        patch.setattr(_logprobs_triton, "LOADS_OF_STATISTICS", LOADS)
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)  # with which torch.empty is full of NaN
        yield
        torch.use_deterministic_algorithms(False)


def in_tiles_that_ship(patch: pytest.MonkeyPatch) -> None:
    for name, value in SHIPPED.items():
        patch.setattr(_logprobs_triton, name, value)


def poisoned(logits: Tensor, rows: Tensor | None = None, margins: tuple[int, int] = (8, 16)) -> Tensor:
    """The same logits, as rows of a longer matrix of NaN: all of them, or as the given rows of more."""
    num_rows = logits.shape[0] if rows is None else 2 * logits.shape[0] + 1
    left, right = margins
    around = torch.full((num_rows, left + logits.shape[1] + right), torch.nan, dtype=logits.dtype)
    inside = around[:, left : left + logits.shape[1]]
    inside[slice(None) if rows is None else rows] = logits
    return inside.requires_grad_()


def outputs(
    logits: Tensor,
    targets: Tensor,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    *,
    entropy: bool = True,
) -> Tensor:
    found = logprobs_from_logits(logits, targets, rows=rows, temperature=temperature, want_entropy=entropy)
    assert (found.entropy is not None) == entropy
    return torch.stack(
        [part for part in (found.logprobs, found.logsumexp, found.entropy) if part is not None]
    )


def slow(logits: Tensor, targets: Tensor, temperature: float, *, entropy: bool) -> Tensor:
    """The same, as one would write it down; float64."""
    scaled = logits / temperature
    every = scaled.log_softmax(dim=1)
    parts = [every.gather(1, targets[:, None])[:, 0], scaled.logsumexp(dim=1)]
    return torch.stack([*parts, -(every.exp() * every).sum(dim=1)] if entropy else parts)


def gradient_of(outputs: Tensor, logits: Tensor) -> Tensor:
    """Of a sum in which each output of each token has a weight of its own."""
    weights = torch.linspace(-1, 2, outputs.numel(), dtype=torch.float64).view(outputs.shape)
    (gradient,) = torch.autograd.grad((weights * outputs).sum(), logits)
    return gradient


def sample(tokens: int, vocab: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, vocab, generator=random, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, vocab, (tokens,), generator=random)


PLAIN: dict[str, Any] = {
    "tokens": 2,
    "vocab": 256,
    "dtype": torch.bfloat16,
    "temperature": 1.0,
    "with_rows": False,
    "entropy": True,
    "margins": (8, 8),
    "seed": 0,
}


@given(
    st.integers(0, 3),
    st.sampled_from(SIZES),
    st.sampled_from(DTYPES),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.booleans(),
    st.booleans(),
    st.tuples(st.integers(0, 8), st.integers(0, 8)),
    st.integers(0, 99),
)
@example(**PLAIN | {"tokens": 0})
@example(**PLAIN | {"tokens": 0, "with_rows": True})
@example(**PLAIN)
@example(**PLAIN | {"vocab": 257, "margins": (0, 0)})  # every other row begins elsewhere
@example(**PLAIN | {"vocab": 257, "margins": (1, 0)})  # logits and gradient lie differently
def test_equals_the_slow_twin_in_values_and_gradients(
    tokens: int,
    vocab: int,
    dtype: torch.dtype,
    temperature: float,
    with_rows: bool,
    entropy: bool,
    margins: tuple[int, int],
    seed: int,
) -> None:
    logits, targets = sample(tokens, vocab, seed, dtype)
    rows = 2 * torch.arange(tokens) + 1 if with_rows else None
    held = poisoned(logits, rows, margins)
    exact = logits.double().requires_grad_()
    actual = outputs(held, targets, rows, temperature, entropy=entropy)
    expected = slow(exact, targets, temperature, entropy=entropy)
    double = dtype == torch.float64
    assert actual.dtype == (torch.float64 if double else torch.float32)
    rtol, atol = (1e-13, 1e-12) if double else (2e-6, 4e-6)
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)

    gradient, expected_gradient = gradient_of(actual, held), gradient_of(expected, exact)
    assert gradient.dtype == dtype
    if rows is not None:
        asked = gradient[rows]
        assert torch.count_nonzero(gradient) == torch.count_nonzero(asked)
        gradient = asked
    rtol, atol = (1e-12, 1e-12) if double else (max(torch.finfo(dtype).eps, 1e-5), 1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
def test_each_shard_gives_what_the_reference_gives(
    dtype: torch.dtype, entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard of three is all -inf; targets lie in every one."""
    logits, _ = sample(6, 3 * 130, 0, dtype)
    logits[:, 130:260] = -torch.inf
    targets = torch.tensor([0, 129, 130, 259, 260, 389])
    sums = logprobs.accumulation_dtype(logits)
    coefficients, maximum = (
        torch.linspace(-1, 1, 18, dtype=sums).view(3, 6),
        torch.full((6,), 9.0, dtype=sums),
    )
    for first in (0, 130, 260):
        shard = logprobs.Shard(poisoned(logits[:, first : first + 130]).detach(), targets, None, 0.7, None)
        shard.columns = targets - first
        found = (
            shard.statistics(entropy),
            shard.gradient(maximum, coefficients[0], coefficients[1] if entropy else None, coefficients[2]),
        )
        with monkeypatch.context() as patch:
            patch.setattr(logprobs, "_triton_serves", lambda logits: False)
            expected = (
                shard.statistics(entropy),
                shard.gradient(
                    maximum,
                    coefficients[0],
                    coefficients[1] if entropy else None,
                    coefficients[2],
                ),
            )
        is_ours = (shard.columns >= 0) & (shard.columns < 130)
        expected[0][2] = torch.where(is_ours, expected[0][2], 0)
        eps = torch.finfo(sums).eps
        torch.testing.assert_close(found[0], expected[0], rtol=16 * eps, atol=8 * eps)
        torch.testing.assert_close(
            found[1], expected[1], rtol=max(torch.finfo(dtype).eps, 16 * eps), atol=8 * eps
        )


@pytest.mark.parametrize("output", ["logprobs", "entropy", "logsumexp"])
def test_gradients_of_doubles_are_those_of_finite_differences(output: str) -> None:
    logits, targets = sample(2, 19, 0, torch.float64)

    def value(logits: Tensor) -> Tensor:
        found = logprobs_from_logits(logits, targets, temperature=0.7, want_entropy=output == "entropy")
        return getattr(found, output)

    assert torch.autograd.gradcheck(value, poisoned(logits, margins=(3, 2)))


@pytest.mark.parametrize("vocab", [400, 31_999, 32_000])
def test_values_of_single_precision_are_within_two_millionths(
    vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the tiles that ship; the targets are the most and the least probable word, and any."""
    in_tiles_that_ship(monkeypatch)
    logits, targets = sample(3, vocab, 1, torch.float32)
    targets[0], targets[1] = logits[0].argmax(), logits[1].argmin()
    found, expected = outputs(logits, targets), slow(logits.double(), targets, 1.0, entropy=True)
    assert float((found - expected).abs().max()) <= 2e-6


@pytest.mark.parametrize("vocab", [400, 31_999, 32_000])
@pytest.mark.parametrize("entropy", [False, True])
def test_gradients_of_bfloat16_are_within_its_last_bit(
    vocab: int, entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of each output; a sum of several may cancel, and has the error of its terms."""
    in_tiles_that_ship(monkeypatch)
    logits, targets = sample(3, vocab, 1, torch.bfloat16)
    targets[0], targets[1] = logits[0].argmax(), logits[1].argmin()
    held, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found, expected = (
        outputs(held, targets, entropy=entropy),
        slow(exact, targets, 1.0, entropy=entropy),
    )
    for actual, twin in zip(found.unbind(), expected.unbind(), strict=True):
        (gradient,) = torch.autograd.grad(actual.sum(), held, retain_graph=True)
        (expected_gradient,) = torch.autograd.grad(twin.sum(), exact, retain_graph=True)
        _, exponent = expected_gradient.frexp()
        last_bit = torch.ldexp(torch.ones_like(expected_gradient), exponent - 8)
        assert bool(((gradient.double() - expected_gradient).abs() <= last_bit).all())


def test_a_row_of_minus_infinity_alone_is_reported_and_spares_its_neighbours() -> None:
    logits, targets = sample(3, 70, 0, torch.float32)
    logits[1] = -torch.inf
    found = outputs(poisoned(logits), targets)
    assert found.isfinite().all(dim=0).tolist() == [True, False, True]


def test_a_nan_is_reported_by_its_own_token_alone() -> None:
    logits, targets = sample(3, 200, 0, torch.bfloat16)
    for column in (0, 100, 199):
        broken = logits.clone()
        broken[1, column] = torch.nan
        assert outputs(poisoned(broken), targets).isnan().tolist() == [[False, True, False]] * 3


def test_a_logit_of_minus_infinity_is_a_word_that_cannot_come() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0]], requires_grad=True)
    found = outputs(logits, torch.tensor([2]))
    half = math.log(2)
    assert found[:, 0].tolist() == pytest.approx([-half, half, half])
    (gradient,) = torch.autograd.grad(found[0].sum() + found[2].sum(), logits)
    assert gradient.tolist() == [[pytest.approx(-0.5), 0.0, pytest.approx(0.5)]]


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_an_offset_of_all_logits_changes_neither_logprobs_nor_entropy(offset: float) -> None:
    logits, targets = sample(4, 150, 0, torch.float32)
    logits = (logits * 64).round() / 64  # so that the offset itself is exact
    plain, moved = outputs(poisoned(logits), targets), outputs(poisoned(logits + offset), targets)
    assert torch.equal(plain[[0, 2]], moved[[0, 2]])


@pytest.mark.parametrize("entropy", [False, True])
def test_logits_of_ten_thousand_overflow_nothing(entropy: bool) -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    found = outputs(logits, torch.tensor([0, 0]), entropy=entropy)[0]
    assert found.tolist() == [0.0, -2e4]
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient.tolist() == [[0.0, 0.0], [1.0, -1.0]]


def test_a_row_that_logits_do_not_have_is_reported_and_not_read() -> None:
    logits, _ = sample(2, 10, 0, torch.float32)
    found = shard_statistics(
        logits, torch.tensor([0, 0, 0]), torch.tensor([-1, 1, 2]), 1.0, want_entropy=False
    )
    assert found[0].isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("rows", [None, torch.arange(3)], ids=["every_row", "given_rows"])
def test_rows_further_than_int32_are_found(rows: Tensor | None, tmp_path: Path) -> None:
    """Three rows a billion logits apart, in a sparse file."""
    apart, vocab = 2**30, 70
    storage = torch.UntypedStorage.from_file(
        str(tmp_path / "sparse"), shared=True, nbytes=2 * (2 * apart + vocab)
    )
    logits = torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (3, vocab), (apart, 1))
    logits[:], targets = sample(3, vocab, 0, torch.bfloat16)
    exact = logits.double().requires_grad_()
    found, expected = outputs(logits.requires_grad_(), targets, rows), slow(exact, targets, 1.0, entropy=True)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=4e-6)
    gradient, expected_gradient = gradient_of(found, logits), gradient_of(expected, exact)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("with_rows", [False, True])
def test_each_logit_that_matters_is_read_once_a_pass_and_each_gradient_written_once(
    with_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the size of a real vocabulary, everything counted, and in the tiles that ship."""
    in_tiles_that_ship(monkeypatch)
    tokens, vocab, size = 2, 32_000, 2
    logits, targets = sample(tokens, vocab, 0, torch.bfloat16)
    rows = torch.tensor([1, 3]) if with_rows else None
    held = poisoned(logits, rows).detach()
    traffic.loaded = traffic.stored = 0
    statistics = shard_statistics(held, targets, rows, 1.0, want_entropy=True)
    assert size <= traffic.loaded / (tokens * vocab) <= size * 1.01
    assert traffic.stored == 16 * tokens

    traffic.loaded = traffic.stored = 0
    shard_gradient(
        held,
        targets,
        rows,
        1.0,
        maximum=statistics[0],
        for_every=statistics[1],
        for_shifted=statistics[3],
        for_target=statistics[2],
    )
    assert size <= traffic.loaded / (tokens * vocab) <= size * 1.01
    assert traffic.stored == held.numel() * size
