"""The Triton kernels of `linear_ppo_loss` against their slow twin, in Triton's interpreter.

pytest does not collect this file by itself: `test_interpreted.py` runs it in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlef_kernels import _linear_triton, linear_chunk, linear_ppo_loss
from rlef_kernels.linear_chunk import Chunk
from tests.kernels.interpreter import traffic
from tests.kernels.linear_twin import example, slow_linear_loss, with_gradients

SEGMENT = 8
TILES = {
    "sm_90": replace(_linear_triton.HOPPER, ROWS=4, COLUMNS=16, DEPTH=8, HALVINGS=2),
    "sm_100": replace(_linear_triton.BLACKWELL, ROWS=4, COLUMNS=16, DEPTH=8, HALVINGS=3, POLYNOMIAL=3),
    "others": replace(_linear_triton.OTHERS, ROWS=4, COLUMNS=8, DEPTH=4),
}
SETTINGS: dict[str, Any] = {"clip_ratio": (0.2, 0.3), "behaviour_correction": True, "normaliser": 3.0}


@contextmanager
def kernels(device: str = "sm_90") -> Iterator[None]:
    """Small tiles of this kind of device serve every type, on memory that is NaN where nobody wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_chunk, "_triton_serves", lambda *_: True)
        patch.setattr(_linear_triton, "SEGMENT", SEGMENT)
        patch.setattr(_linear_triton, "SEGMENTS", 2)
        patch.setattr(_linear_triton, "GROUP", 2)
        patch.setattr(_linear_triton, "OTHERS", TILES["others"])
        patch.setattr(_linear_triton, "tiles_for", lambda _: TILES[device])
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def in_type(arguments: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Hidden states and weight as a model would have them."""
    hidden, weight = arguments["hidden"], arguments["weight"]
    return arguments | {"hidden": hidden.to(dtype), "weight": (weight / hidden.shape[1] ** 0.5).to(dtype)}


def chunk_of(arguments: dict[str, Tensor], device: str = "sm_90", group: Any = None) -> Chunk:
    with kernels(device):
        return Chunk(
            *(arguments[name] for name in ("hidden", "weight", "targets")),
            1.0,
            group,
            want_entropy=True,
            want_gradient=True,
        )


@given(
    st.integers(0, 6),
    st.sampled_from([1, 7, 8, 9, 15, 16, 17, 24, 40]),
    st.sampled_from([1, 8, 20]),
    st.sampled_from(["sm_90", "sm_100", "others"]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([None, 2.0]),
    st.sampled_from([1.0, 0.7]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_equals_the_slow_twin_in_values_and_gradients(
    tokens: int,
    vocab: int,
    hidden_size: int,
    device: str,
    dtype: torch.dtype,
    entropy_coef: float,
    kl_coef: float,
    dual_clip: float | None,
    temperature: float,
    behaviour_correction: bool,
    with_rows: bool,
    seed: int,
) -> None:
    rows = 2 * torch.arange(tokens) if with_rows else None
    num_rows = 2 * tokens + 1 if with_rows else None
    given_arguments = in_type(
        example(tokens, seed, hidden_size=hidden_size, vocab=vocab, rows=num_rows), dtype
    )
    settings = SETTINGS | {
        "entropy_coef": entropy_coef,
        "kl_coef": kl_coef,
        "dual_clip": dual_clip,
        "temperature": temperature,
        "behaviour_correction": behaviour_correction,
        "rows": rows,
    }
    with kernels(device):
        loss, metrics, *gradients = with_gradients(
            linear_ppo_loss, given_arguments, **settings, want_entropy=True, chunk_elements=5 * vocab
        )
    exact = {
        name: each.double() if name in ("hidden", "weight") else each
        for name, each in given_arguments.items()
    }
    expected_loss, expected_metrics, *expected_gradients = with_gradients(slow_linear_loss, exact, **settings)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-4, atol=1e-5)
    for name, value in expected_metrics.items():
        torch.testing.assert_close(getattr(metrics, name).double(), value, rtol=1e-4, atol=1e-5)
    eps = max(torch.finfo(dtype).eps, 1e-5)
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        assert actual.dtype == dtype
        scale = float(expected.abs().max()) if expected.numel() else 0
        torch.testing.assert_close(actual.double(), expected, rtol=2 * eps, atol=eps * (2 * scale + 0.1))


@pytest.mark.parametrize("device", TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logprobs_are_within_two_millionths_and_gradients_within_a_unit_in_the_last_place(
    device: str, dtype: torch.dtype
) -> None:
    arguments = in_type(example(9, 0, hidden_size=16, vocab=37), dtype)
    chunk = chunk_of(arguments, device)
    logits = (arguments["hidden"].double() @ arguments["weight"].double().T).requires_grad_()
    every = logits.log_softmax(dim=1)
    logprobs, entropy = every.gather(1, arguments["targets"][:, None])[:, 0], -(every.exp() * every).sum(1)
    torch.testing.assert_close(chunk.logprobs.double(), logprobs, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(chunk.entropy.double(), entropy, rtol=2e-6, atol=2e-6)

    slopes = arguments["advantages"]
    (expected,) = torch.autograd.grad((slopes * logprobs).sum(), logits)
    with kernels(device):
        gradient = chunk.gradient(slopes.float(), None).double()
    eps = max(torch.finfo(dtype).eps, 4e-6)
    others = torch.ones_like(gradient, dtype=torch.bool).scatter_(1, arguments["targets"][:, None], False)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient[others], expected[others], rtol=eps, atol=smallest)
    # At a target, one is subtracted from a probability, whose own last place then counts.
    torch.testing.assert_close(gradient[~others], expected[~others], rtol=eps, atol=eps * slopes.abs().max())


@pytest.mark.parametrize("device", TILES)
def test_gradients_are_those_of_finite_differences(device: str) -> None:
    arguments = example(3, 4, hidden_size=2, vocab=11)
    hidden, weight = (arguments.pop(name).requires_grad_() for name in ("hidden", "weight"))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(TILES, device, replace(TILES[device], POLYNOMIAL=0))  # which is single precision
            with kernels(device):
                settings = SETTINGS | {"behaviour_correction": False, "entropy_coef": 0.2, "kl_coef": 0.3}
                return linear_ppo_loss(hidden, weight, **arguments, **settings)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("device", TILES)
@pytest.mark.parametrize(("tokens", "kept"), [(0, 0), (1, 1), (5, 0)])
def test_no_token_one_and_none_inside_the_mask(device: str, tokens: int, kept: int) -> None:
    arguments = in_type(example(tokens, 1, hidden_size=8, vocab=9), torch.bfloat16)
    arguments["mask"] = torch.arange(tokens) < kept
    arguments["hidden"][kept:] = torch.nan
    with kernels(device):
        loss, metrics, for_hidden, for_weight = with_gradients(
            linear_ppo_loss, arguments, **SETTINGS, entropy_coef=0.1
        )
    assert int(metrics.tokens) == kept
    assert bool(loss) == bool(for_hidden.any()) == bool(for_weight.any()) == bool(kept)
    assert not torch.cat([loss[None], for_hidden.flatten(), for_weight.flatten()]).isnan().any()


@pytest.mark.parametrize("device", TILES)
def test_a_nan_is_reported_by_its_own_token_alone(device: str) -> None:
    arguments = in_type(example(6, 0, hidden_size=8, vocab=21), torch.bfloat16)
    arguments["hidden"][2, 3] = torch.nan
    chunk = chunk_of(arguments, device)
    is_broken = [False, False, True, False, False, False]
    assert chunk.logprobs.isnan().tolist() == chunk.entropy.isnan().tolist() == is_broken
    with kernels(device):
        gradient = chunk.gradient(torch.ones(6), torch.ones(6))
    assert gradient.isnan().any(dim=1).tolist() == is_broken


@pytest.mark.parametrize("device", TILES)
def test_a_logit_of_minus_infinity_is_a_word_that_cannot_come(device: str) -> None:
    """Without entropy, of which the sums would be NaN. One segment of three has no other logits."""
    arguments = in_type(example(5, 0, hidden_size=1, vocab=20), torch.float32)
    arguments["hidden"].abs_()
    arguments["weight"][[3, *range(8, 16)]] = -torch.inf
    arguments["targets"] = torch.tensor([0, 5, 7, 16, 19])
    with kernels(device):
        chunk = Chunk(
            *(arguments[name] for name in ("hidden", "weight", "targets")),
            1.0,
            None,
            want_entropy=False,
            want_gradient=True,
        )
        gradient = chunk.gradient(torch.ones(5), None)
    logits = (arguments["hidden"] @ arguments["weight"].T).double()
    expected = logits.log_softmax(dim=1).gather(1, arguments["targets"][:, None])[:, 0]
    torch.testing.assert_close(chunk.logprobs.double(), expected, rtol=2e-6, atol=2e-6)
    assert not gradient[:, [3, *range(8, 16)]].any()


@pytest.mark.parametrize("device", TILES)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_an_offset_of_all_logits_changes_neither_logprobs_nor_entropy(device: str, offset: float) -> None:
    """A state that is 1 carries the offset; numbers so round that every sum is exact."""
    arguments = in_type(example(6, 0, hidden_size=4, vocab=21), torch.float32)
    arguments["hidden"], arguments["weight"] = (
        (4 * arguments[name]).round() / 4 for name in ("hidden", "weight")
    )
    arguments["hidden"][:, 0], arguments["weight"][:, 0] = 1, 0
    plain = chunk_of(arguments, device)
    arguments["weight"][:, 0] = offset
    moved = chunk_of(arguments, device)
    torch.testing.assert_close(moved.logprobs, plain.logprobs, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(moved.entropy, plain.entropy, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("device", TILES)
def test_shards_of_the_vocabulary_give_what_the_whole_gives(device: str) -> None:
    """What two processes would exchange is handed over here; `test_parallel.py` has real ones."""
    arguments = in_type(example(6, 0, hidden_size=8, vocab=42), torch.float32)
    slopes, of_entropy = torch.linspace(-1, 1, 6), torch.linspace(2, 1, 6)
    whole = chunk_of(arguments, device)
    sent: list[Tensor] = []

    def chunk_of_rank(rank: int, exchange: Any) -> Chunk:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear_chunk.dist, "get_rank", lambda _: rank)
            patch.setattr(linear_chunk, "_all_gather", exchange)
            return chunk_of(arguments | {"weight": arguments["weight"].chunk(2)[rank]}, device, "two")

    def send(statistics: Tensor, *_: object, **__: object) -> Tensor:
        sent.append(statistics)
        return statistics[:, None].expand(-1, 2, -1)

    for rank in (0, 1):
        chunk_of_rank(rank, send)
    shards = [chunk_of_rank(rank, lambda *_, **__: torch.stack(sent, dim=1)) for rank in (0, 1)]
    for shard in shards:
        torch.testing.assert_close(shard.logprobs, whole.logprobs, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(shard.entropy, whole.entropy, rtol=2e-6, atol=2e-6)
    with kernels(device):
        gradients = [each.gradient(slopes, of_entropy) for each in (*shards, whole)]
    torch.testing.assert_close(torch.cat(gradients[:2], dim=1), gradients[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "neither"])
def test_exponentials_are_written_only_for_a_gradient(wanted: str) -> None:
    arguments = in_type(example(6, 0, hidden_size=8, vocab=32), torch.bfloat16)
    arguments["mask"][:] = True
    for name in ("hidden", "weight"):
        arguments[name].requires_grad_(name == wanted)
    traffic.stored = 0
    with kernels():
        loss, _ = linear_ppo_loss(**arguments, **SETTINGS)
    statistics, powers = 6 * 4 * 16, 6 * 32 * 2
    assert traffic.stored == statistics + (0 if wanted == "neither" else 2 * powers)
    assert loss.requires_grad == (wanted != "neither")


@triton.jit
def powers_kernel(powers_ptr, exponents_ptr, size: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, size)
    tl.store(powers_ptr + places, _linear_triton._power_of_two(tl.load(exponents_ptr + places)))


def test_polynomials_are_powers_of_two() -> None:
    """Where they count, between the type's smallest and largest; below, 0, and a NaN is one."""
    exponents = torch.linspace(-126, 15, 1 << 14)
    exponents[:5] = torch.tensor([0.0, -127.0, -1e30, -torch.inf, torch.nan])
    powers = torch.empty_like(exponents)
    powers_kernel[(1,)](powers, exponents, size=1 << 14)
    assert powers[:4].tolist() == [1, 0, 0, 0]
    assert powers[4].isnan()
    torch.testing.assert_close(powers[5:].double(), exponents[5:].double().exp2(), rtol=2.5e-7, atol=0)
