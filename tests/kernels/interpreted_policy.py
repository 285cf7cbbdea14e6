"""The Triton kernels of the policy loss against its slow twin, in Triton's interpreter.

pytest does not collect this file by itself: `test_interpreted.py` runs it in a process of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import example as such_as
from hypothesis import strategies as st
from torch import Tensor

from rlef_kernels import (
    PolicyMetrics,
    _logprobs_triton,
    _policy_rows_triton,
    _policy_shards_triton,
    _policy_triton,
    policy_logits,
    ppo_policy_loss_from_logits,
)
from rlef_kernels._policy_rows_triton import scale_in_triton
from rlef_kernels._policy_triton import loss_in_triton, of_tokens, total
from rlef_kernels.policy import divisors
from rlef_kernels.policy_terms import PolicySettings, TokenData, metrics_of
from tests.kernels.interpreter import traffic
from tests.kernels.policy_twin import SETTINGS, example, optional_data, slow, slow_from_logits

# The kernels' first maximum, the lowest number there is, overflows beside a logit, and is clamped thereafter;
# and a branch that is not taken, of a series or of a clip, may overflow.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning",
    "ignore:invalid value encountered:RuntimeWarning",
    "ignore:divide by zero encountered:RuntimeWarning",
)

SHIPPED = (_policy_rows_triton.THREADS, _policy_rows_triton.LOADS)
SHIPPED_THREADS_OF_SHARDS = _logprobs_triton.THREADS
THREADS, LOADS, BLOCK = 16, 2, 4  # a tile is 256 logits of two bytes, 128 of four, 64 of eight
SIZES = [1, 2, 7, 8, 15, 16, 17, 64, 65, 128, 129, 256, 257, 300]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
GENERATE = (Phase.explicit, Phase.reuse, Phase.generate)  # to shrink an example takes minutes here
CLIP: dict[str, Any] = {"clip_ratio": (0.2, 0.2), "behaviour_correction": False, "normaliser": 1.0}


@pytest.fixture(autouse=True, scope="module")
def _small_tiles_on_poisoned_memory() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_logits, "_triton_serves", lambda logits: True)
        for module in (_policy_rows_triton, _logprobs_triton):
            patch.setattr(module, "THREADS", THREADS)
        patch.setattr(_policy_rows_triton, "LOADS", LOADS)
        patch.setattr(_policy_rows_triton, "SCALE_BLOCK", 64)
        for module in (_policy_triton, _policy_shards_triton):
            patch.setattr(module, "BLOCK", BLOCK)
        patch.setattr(_policy_triton, "TOTAL_BLOCK", 2)
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)  # with which torch.empty is full of NaN
        yield
        torch.use_deterministic_algorithms(False)


def in_tiles_that_ship(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_policy_rows_triton, "THREADS", SHIPPED[0])
    patch.setattr(_policy_rows_triton, "LOADS", SHIPPED[1])
    patch.setattr(_logprobs_triton, "THREADS", SHIPPED_THREADS_OF_SHARDS)


def sample(tokens: int, vocab: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits, and data in float64 of tokens whose ratios and behaviour weights lie around 1."""
    random = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(tokens, vocab, generator=random, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=random)
    now = logits.double().log_softmax(1).gather(1, targets[:, None])[:, 0]
    old, behaviour = (now + 0.4 * torch.randn(2, tokens, generator=random)).float().double().unbind()
    advantages = torch.randn(tokens, generator=random).double()
    mask = torch.rand(tokens, generator=random) < 0.7
    return logits, (targets, old, behaviour, advantages, mask)


def poisoned(logits: Tensor, mask: Tensor, rows: Tensor | None = None) -> Tensor:
    """The logits inside the mask, as rows of a longer matrix of NaN: of all of them, or of the given ones."""
    num_rows = logits.shape[0] if rows is None else 2 * logits.shape[0] + 1
    around = torch.full((num_rows, logits.shape[1] + 24), torch.nan, dtype=logits.dtype)
    inside = around[:, 8 : 8 + logits.shape[1]]
    inside[(torch.arange(logits.shape[0]) if rows is None else rows)[mask]] = logits[mask]
    return inside


def assert_close_to(actual: Tensor, exact: Tensor) -> None:
    """Within one unit in the last place of the type, and what single precision loses of a difference."""
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-12)
        return
    unit = torch.finfo(actual.dtype).eps * torch.exp2(exact.abs().clamp(min=2**-14).log2().floor())
    if actual.dtype == torch.float32:
        unit = 4e-6 * (exact.abs() + exact.abs().max())
    assert ((actual.double() - exact).abs() <= unit + 2e-6 * exact.abs().amax(dim=1, keepdim=True)).all()


def assert_metrics(metrics: PolicyMetrics, counts: dict[str, float], rel: float) -> None:
    for name, count in counts.items():
        assert float(getattr(metrics, name)) == pytest.approx(count, rel=rel, abs=rel), name


@settings(max_examples=25, phases=GENERATE)
@given(
    st.integers(0, 3),
    st.sampled_from(SIZES),
    st.sampled_from(DTYPES),
    st.sampled_from([0.5, 1.0, 2.5]),
    st.sampled_from([0.0, 0.25]),
    st.booleans(),
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
    with_rows: bool,
    with_data: bool,
    in_place: bool,
    options: dict[str, Any],
    seed: int,
) -> None:
    logits, data = sample(tokens, vocab, seed, dtype)
    more = optional_data(
        tokens, has_weights=with_data, has_reference=with_data, seed=seed, dtype=torch.float64
    )
    options = options | more | {"temperature": temperature, "entropy_coef": entropy_coef}
    options["kl_coef"] = options["kl_coef"] if with_data else 0.0
    rows = 2 * torch.arange(tokens) + 1 if with_rows else None
    held = poisoned(logits, data[4], rows).requires_grad_()
    loss, metrics = ppo_policy_loss_from_logits(
        held, *data, rows=rows, want_entropy=True, in_place=in_place, **options
    )
    (gradient,) = torch.autograd.grad(loss, held)
    assert (gradient.data_ptr() == held.data_ptr()) == (in_place or not held.numel())

    exact = logits.double().requires_grad_()
    expected, counts = slow_from_logits(exact, *data, **options)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=tolerance, abs=tolerance)
    assert_metrics(metrics, counts, tolerance)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    if rows is not None:
        assert torch.count_nonzero(gradient) == torch.count_nonzero(gradient[rows])
        gradient = gradient[rows]
    if tokens:
        assert_close_to(gradient, expected_gradient)
    assert not gradient[~data[4]].any()


@settings(max_examples=25, phases=GENERATE)
@given(
    st.integers(0, 3),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([5, 64, 129]),
    st.sampled_from([torch.float64, torch.bfloat16]),
    st.sampled_from([0.0, 0.25]),
    st.booleans(),
    SETTINGS,
    st.integers(0, 99),
)
def test_shards_of_the_vocabulary_equal_the_slow_twin_of_the_whole(
    tokens: int,
    ranks: int,
    vocab: int,
    dtype: torch.dtype,
    entropy_coef: float,
    one_is_impossible: bool,
    options: dict[str, Any],
    seed: int,
) -> None:
    """The steps as each of the processes takes them; what they gather is put together here."""
    logits, data = sample(tokens, ranks * vocab, seed, dtype)
    targets, old, behaviour, advantages, mask = data
    if one_is_impossible and ranks > 1:
        logits[:, :vocab] = -torch.inf
        data[0].clamp_(min=vocab)
    tokens_data = TokenData(
        old_logprobs=old,
        behaviour_logprobs=behaviour,
        advantages=advantages,
        weights=None,
        reference_logprobs=None,
    )
    normaliser = options.pop("normaliser")
    checked = PolicySettings.checked(
        **options | {"kl_coef": 0.0}, entropy_coef=entropy_coef, reference_logprobs=None
    )
    shards = [part.clone() for part in logits.split(vocab, dim=1)]
    of_mask, inverse = mask.view(torch.uint8), 1 / 0.8
    gathered = torch.stack(
        [
            _policy_shards_triton.shard_statistics(
                shard, targets, None, of_mask, rank * vocab, inverse, want_entropy=True
            )
            for rank, shard in enumerate(shards)
        ]
    )
    sums, coefficients = _policy_shards_triton.shard_tokens(
        gathered, targets, of_tokens(mask, tokens_data, checked, None), checked, normaliser, inverse, vocab
    )
    loss, metrics = total(sums, None, normaliser)
    for rank, shard in enumerate(shards):
        _policy_shards_triton.shard_gradient(
            *(shard, shard, coefficients, targets, None, of_mask, rank * vocab, inverse),
            has_bonus=entropy_coef > 0,
        )
    exact = logits.double().requires_grad_()
    expected, counts = slow_from_logits(
        exact, *data, **options | {"kl_coef": 0.0}, normaliser=normaliser, temperature=0.8
    )
    every = (exact / 0.8).log_softmax(1)
    entropy = -(every.exp() * every.masked_fill(every == -math.inf, 0)).sum(1)[mask].sum()
    expected = expected - entropy_coef * entropy / normaliser
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert float(loss) == pytest.approx(float(expected.detach()), rel=tolerance, abs=tolerance)
    assert_metrics(metrics_of(metrics), counts, tolerance)
    if tokens:
        (expected_gradient,) = torch.autograd.grad(expected, exact)
        assert_close_to(torch.cat(shards, dim=1), expected_gradient.nan_to_num())


@settings(max_examples=25, phases=GENERATE)
@given(st.integers(0, 9), st.sampled_from(DTYPES), st.booleans(), st.booleans(), SETTINGS, st.integers(0, 99))
@such_as(tokens=0, dtype=torch.float32, has_entropy=True, with_data=True, options={**CLIP}, seed=0)
def test_from_logprobs_equals_the_slow_twin_in_loss_gradients_and_metrics(
    tokens: int, dtype: torch.dtype, has_entropy: bool, with_data: bool, options: dict[str, Any], seed: int
) -> None:
    logprobs, old, behaviour, advantages, mask = (
        each if each.dtype == torch.bool else each.to(dtype) for each in example(tokens, seed)
    )
    more = optional_data(tokens, has_weights=with_data, has_reference=with_data, seed=seed, dtype=dtype)
    entropy = torch.rand(tokens).to(dtype) if has_entropy else None
    options = options | {"kl_coef": options.get("kl_coef", 0.0) if with_data else 0.0}
    normaliser, clip = options.pop("normaliser"), options.pop("clip_ratio")
    correction = options.pop("behaviour_correction")
    checked = PolicySettings.checked(
        clip_ratio=clip,
        behaviour_correction=correction,
        entropy_coef=0.25 if has_entropy else 0.0,
        reference_logprobs=more.get("reference_logprobs"),
        **{"dual_clip": None, "kl_estimator": "k3"} | options,
    )
    masked = [torch.where(mask, each, torch.nan) for each in (logprobs, old, behaviour, advantages)]
    loss, metrics, gradient, of_entropy = loss_in_triton(
        masked[0],
        entropy,
        *masked[1:],
        mask,
        more.get("weights"),
        more.get("reference_logprobs"),
        *divisors(torch.tensor(normaliser), logprobs),
        *checked.for_operator(),
    )

    exact = logprobs.double().requires_grad_()
    doubles = {name: each.double() for name, each in more.items()}
    expected, counts = slow(
        *(exact, old.double(), behaviour.double(), advantages.double(), mask, *clip, correction),
        **options,
        **doubles,
    )
    weights = doubles.get("weights", torch.ones(tokens, dtype=torch.float64))
    bonus = 0.25 * weights * mask if entropy is not None else torch.zeros(tokens)
    counts["entropy"] = 0.0 if entropy is None else float(entropy.double()[mask].sum())
    value = float(expected.detach()) - (0.0 if entropy is None else float((bonus * entropy.double()).sum()))
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    assert float(loss) == pytest.approx(value / normaliser, rel=tolerance, abs=tolerance)
    assert_metrics(metrics_of(metrics), counts, tolerance)
    if entropy is not None:
        torch.testing.assert_close(of_entropy.double(), -bonus / normaliser, rtol=1e-6, atol=1e-9)
    of_exact = torch.zeros_like(exact)
    if expected.requires_grad:
        (of_exact,) = torch.autograd.grad(expected / normaliser, exact)
    torch.testing.assert_close(gradient.double(), of_exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_equal_finite_differences(in_place: bool) -> None:
    logits, (targets, old, _, advantages, _) = sample(3, 70, 0, torch.float64)
    mask = torch.tensor([True, False, True])

    def loss(logits: Tensor) -> Tensor:
        written = logits * 1  # so that in place, the input stays
        value, _ = ppo_policy_loss_from_logits(
            *(written, targets, old, old, advantages, mask),
            **CLIP,
            temperature=0.5,
            entropy_coef=0.25,
            reference_logprobs=old,
            kl_coef=0.5,
            in_place=in_place,
        )
        return value

    logits.requires_grad_()
    if not in_place:
        assert torch.autograd.gradcheck(loss, (logits,), fast_mode=True)
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    step = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    difference = (loss(logits + 1e-6 * step) - loss(logits - 1e-6 * step)) / 2e-6
    assert float((gradient * step).sum()) == pytest.approx(float(difference.detach()), rel=1e-6)


def run(logits: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor, PolicyMetrics]:
    """Loss and gradient of tokens that want the first word, and were as likely before."""
    held = logits.clone().requires_grad_()
    zeros = torch.zeros(logits.shape[0])
    loss, metrics = ppo_policy_loss_from_logits(
        *(held, torch.zeros(logits.shape[0], dtype=torch.int64), zeros, zeros, zeros + 1, mask),
        **CLIP | {"want_entropy": True} | options,
    )
    (gradient,) = torch.autograd.grad(loss, held)
    return loss.detach(), gradient, metrics


def test_all_masked_is_a_loss_of_zero_and_reads_nothing() -> None:
    loss, gradient, metrics = run(torch.full((3, 70), torch.nan), torch.zeros(3, dtype=torch.bool))
    assert float(loss) == 0
    assert not gradient.any()
    assert (float(metrics.tokens), float(metrics.ratio_max), float(metrics.ratio_min)) == (0, 0, math.inf)


@pytest.mark.parametrize("column", [0, 100, 199])
def test_a_nan_inside_the_mask_is_reported(column: int) -> None:
    logits = torch.zeros(2, 200)
    logits[1, column] = torch.nan
    loss, gradient, metrics = run(logits, torch.tensor([True, True]))
    assert all(number.isnan() for number in (loss, metrics.entropy, metrics.ratio_max, metrics.ratio_min))
    assert gradient[0].isfinite().all()
    assert gradient[1].isnan().all()


def test_a_nan_among_the_data_is_reported() -> None:
    logits, data = sample(2, 70, 0, torch.float32)
    for broken in (1, 2, 3):
        held = [*data[:4], torch.tensor([True, True])]
        held[broken] = torch.tensor([0.0, torch.nan])
        loss, _ = ppo_policy_loss_from_logits(logits, *held, **CLIP | {"behaviour_correction": True})
        assert loss.isnan()


def test_a_logit_of_minus_infinity_is_a_word_that_cannot_come() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    mask = torch.tensor([True])
    loss, gradient, metrics = run(logits, mask, entropy_coef=0.5)
    ratio, entropy = 0.5, math.log(2)
    assert float(loss) == pytest.approx(-ratio - 0.5 * entropy)
    assert gradient.tolist() == [[pytest.approx(-0.25), 0.0, pytest.approx(0.25)]]
    assert float(metrics.entropy) == pytest.approx(entropy)


def test_a_row_of_minus_infinity_alone_is_reported() -> None:
    loss, _, _ = run(torch.full((1, 70), -torch.inf), torch.tensor([True]))
    assert loss.isnan()


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_an_offset_of_all_logits_changes_nothing(offset: float) -> None:
    logits, _ = sample(3, 150, 0, torch.float32)
    logits = (logits * 64).round() / 64  # so that the offset itself is exact
    mask = torch.ones(3, dtype=torch.bool)
    for plain, moved in zip(run(logits, mask)[:2], run(logits + offset, mask)[:2], strict=True):
        assert torch.equal(plain, moved)


def test_the_logprob_is_within_two_millionths_of_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """k1 against a reference of 0 is the log-probability itself; in the tiles that ship."""
    in_tiles_that_ship(monkeypatch)
    for vocab in (300, 32_000):
        logits, (targets, *_) = sample(4, vocab, vocab, torch.float32)
        exact = logits.double().log_softmax(1).gather(1, targets[:, None])[:, 0]
        zeros = torch.zeros(1)
        for token in range(4):
            loss, _ = ppo_policy_loss_from_logits(
                *(logits[token : token + 1], targets[token : token + 1], zeros, zeros, zeros),
                torch.tensor([True]),
                **CLIP | {"reference_logprobs": zeros, "kl_coef": 1.0, "kl_estimator": "k1"},
            )
            assert float(loss) == pytest.approx(float(exact[token]), rel=0, abs=2e-6)


@pytest.mark.parametrize("rows", [None, torch.arange(3)], ids=["every_row", "given_rows"])
def test_rows_further_than_int32_are_found_and_written(rows: Tensor | None, tmp_path: Path) -> None:
    """Three rows a billion logits apart, in a sparse file; the gradient is written over them."""
    apart, vocab = 2**30, 70
    storage = torch.UntypedStorage.from_file(
        str(tmp_path / "sparse"), shared=True, nbytes=2 * (2 * apart + vocab)
    )
    logits = torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (3, vocab), (apart, 1))
    logits[:], data = sample(3, vocab, 0, torch.bfloat16)
    data[4][:] = True
    exact = logits.double().requires_grad_()
    expected, _ = slow_from_logits(exact, *data, **CLIP)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    logits.requires_grad_()
    loss, _ = ppo_policy_loss_from_logits(logits, *data, rows=rows, in_place=True, **CLIP)
    (2 * loss).backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_close_to(logits.detach(), 2 * expected_gradient)


@pytest.mark.parametrize("with_rows", [False, True])
def test_each_logit_that_matters_is_read_twice_and_each_gradient_written_once(
    with_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the size of a real vocabulary, in the tiles that ship, everything counted; one token is masked."""
    in_tiles_that_ship(monkeypatch)
    vocab, size = 32_000, 2
    logits, data = sample(3, vocab, 0, torch.bfloat16)
    data[4][:] = torch.tensor([True, False, True])
    rows = torch.tensor([1, 3, 4]) if with_rows else None
    held = poisoned(logits, data[4], rows).requires_grad_()
    traffic.loaded = traffic.stored = 0
    loss, _ = ppo_policy_loss_from_logits(held, *data, rows=rows, entropy_coef=0.1, in_place=True, **CLIP)
    loss.backward()
    assert 2 * size <= traffic.loaded / (2 * vocab) <= 4.05
    assert size <= traffic.stored / held.numel() <= 2.02

    traffic.loaded = traffic.stored = 0
    ppo_policy_loss_from_logits(
        poisoned(logits, data[4], rows), *data, rows=rows, entropy_coef=0.1, want_entropy=True, **CLIP
    )
    assert size <= traffic.loaded / (2 * vocab) <= 2.05
    assert traffic.stored <= 200 * held.shape[0]


def test_a_shard_reads_its_logits_twice_and_writes_its_gradient_once(monkeypatch: pytest.MonkeyPatch) -> None:
    in_tiles_that_ship(monkeypatch)
    tokens, vocab = 2, 32_000
    logits, (targets, *_) = sample(tokens, vocab, 0, torch.bfloat16)
    of_mask = torch.ones(tokens, dtype=torch.uint8)
    traffic.loaded = traffic.stored = 0
    own = _policy_shards_triton.shard_statistics(logits, targets, None, of_mask, 0, 1.0, want_entropy=True)
    assert own.numel() * own.element_size() == 16 * tokens  # what the processes gather
    _policy_shards_triton.shard_gradient(
        *(logits, torch.empty_like(logits), torch.ones(4, tokens), targets, None, of_mask, 0, 1.0),
        has_bonus=True,
    )
    assert (traffic.loaded + traffic.stored) / logits.numel() <= 6.05


def test_a_gradient_is_multiplied_in_place_unless_by_one() -> None:
    gradient = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    twice = 2 * gradient
    traffic.loaded = traffic.stored = 0
    scale_in_triton(gradient, torch.tensor(1.0))
    programs = 3 * math.ceil(200 / 64)
    assert (traffic.loaded, traffic.stored) == (4 * programs, 0)
    scale_in_triton(gradient, torch.tensor(2.0))
    assert torch.equal(gradient, twice)
