import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlef.solve_rate import (
    Resample,
    Tally,
    estimate_n_at_k,
    mean_n_at_k,
    n_at_k,
    paired_difference,
    pass_at_k,
    rollouts_within,
    sampled_n_at_k,
)


@st.composite
def tallies(draw: st.DrawFn, largest: int = 8) -> Tally:
    samples = draw(st.integers(1, largest))
    passed_public = draw(st.integers(0, samples))
    return Tally(samples=samples, passed_public=passed_public, solved=draw(st.integers(0, passed_public)))


def enumerated_n_at_k(tally: Tally, *, n: int, k: int) -> Fraction:
    """Every way to choose k samples, and in each every way to choose n of its candidates."""
    solved, passed, samples = tally.solved, tally.passed_public, tally.samples
    kinds = ["solved"] * solved + ["public"] * (passed - solved) + ["failed"] * (samples - passed)
    total = Fraction(0)
    for chosen in itertools.combinations(kinds, k):
        candidates = [kind for kind in chosen if kind != "failed"]
        submissions = list(itertools.combinations(candidates, min(n, len(candidates))))
        total += Fraction(sum("solved" in submission for submission in submissions), len(submissions))
    return total / math.comb(samples, k)


def test_one_of_two_samples_solves_and_the_other_fails_publicly() -> None:
    tally = Tally(samples=2, passed_public=1, solved=1)
    assert n_at_k(tally, n=1, k=1) == 0.5
    assert n_at_k(tally, n=1, k=2) == 1.0  # the public tests point at the right one


def test_the_public_tests_cannot_tell_two_candidates_apart() -> None:
    tally = Tally(samples=2, passed_public=2, solved=1)
    assert n_at_k(tally, n=1, k=2) == 0.5
    assert n_at_k(tally, n=2, k=2) == 1.0


def test_no_candidate_means_no_submission() -> None:
    assert n_at_k(Tally(samples=3, passed_public=0, solved=0), n=1, k=3) == 0.0


@given(tallies(), st.data())
def test_the_closed_form_equals_the_enumeration_of_all_choices(tally: Tally, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, tally.samples))
    n = data.draw(st.integers(1, k))
    assert n_at_k(tally, n=n, k=k) == pytest.approx(float(enumerated_n_at_k(tally, n=n, k=k)), abs=1e-12)


@settings(max_examples=12)
@given(tallies(largest=200), st.data(), st.integers(0, 2**32))
def test_the_closed_form_is_the_mean_of_a_million_samples_of_algorithm_1(
    tally: Tally, data: st.DataObject, seed: int
) -> None:
    k = data.draw(st.integers(1, tally.samples))
    n = data.draw(st.integers(1, k))
    exact, draws = n_at_k(tally, n=n, k=k), 1_000_000
    sampled = sampled_n_at_k(tally, n=n, k=k, draws=draws, generator=np.random.default_rng(seed))
    assert sampled == pytest.approx(exact, abs=3 * math.sqrt(exact * (1 - exact) / draws) + 1e-9)


@pytest.mark.parametrize(("n", "k"), [(1, 3), (3, 10), (10, 33)])
def test_the_closed_form_is_the_mean_of_algorithm_1_for_the_budgets_of_the_paper(n: int, k: int) -> None:
    tally = Tally(samples=200, passed_public=20, solved=6)
    exact, draws = n_at_k(tally, n=n, k=k), 1_000_000
    assert 0.05 < exact < 0.95
    sampled = sampled_n_at_k(tally, n=n, k=k, draws=draws, generator=np.random.default_rng(1))
    assert sampled == pytest.approx(exact, abs=3 * math.sqrt(exact * (1 - exact) / draws))


def test_a_budget_of_100_responses_is_33_dialogs_of_three_turns() -> None:
    assert [rollouts_within(100, turns=turns) for turns in (1, 3, 5, 10)] == [100, 33, 20, 10]
    assert [rollouts_within(3, turns=turns) for turns in (1, 3, 5)] == [3, 1, 0]


@given(tallies(largest=200), st.data())
def test_submitting_every_candidate_is_pass_at_k(tally: Tally, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, tally.samples))
    assert n_at_k(tally, n=k, k=k) == pytest.approx(pass_at_k(tally, k=k), abs=1e-9)


@given(tallies(largest=60), st.data())
def test_one_sample_submitted_is_the_share_that_solves(tally: Tally, data: st.DataObject) -> None:
    assert n_at_k(tally, n=1, k=1) == pytest.approx(tally.solved / tally.samples)


@given(tallies(largest=60), st.data())
def test_more_submissions_or_more_samples_never_hurt(tally: Tally, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, tally.samples))
    n = data.draw(st.integers(1, k))
    rate = n_at_k(tally, n=n, k=k)
    assert 0.0 <= rate <= 1.0
    assert n_at_k(tally, n=n + 1, k=k) >= rate - 1e-12
    if k < tally.samples:
        assert n_at_k(tally, n=n, k=k + 1) >= rate - 1e-12


def test_problems_weigh_the_same_however_many_samples_they_have() -> None:
    always, never = Tally(samples=1, passed_public=1, solved=1), Tally(samples=99, passed_public=0, solved=0)
    assert mean_n_at_k([always, never], n=1, k=1) == 0.5


def test_no_problem_has_no_solve_rate() -> None:
    with pytest.raises(ValueError, match="tallies is empty"):
        mean_n_at_k([], n=1, k=1)


@pytest.mark.parametrize(
    ("n", "k", "message"), [(0, 1, "n is 0"), (1, 0, "k is 0"), (1, 4, "k is 4, but .* 3 samples")]
)
def test_impossible_n_and_k_are_refused(n: int, k: int, message: str) -> None:
    tally = Tally(samples=3, passed_public=1, solved=1)
    with pytest.raises(ValueError, match=message):
        n_at_k(tally, n=n, k=k)
    with pytest.raises(ValueError, match=message):
        sampled_n_at_k(tally, n=n, k=k, draws=1, generator=np.random.default_rng(0))


def test_no_draws_are_refused() -> None:
    tally = Tally(samples=1, passed_public=1, solved=1)
    with pytest.raises(ValueError, match="draws is 0"):
        sampled_n_at_k(tally, n=1, k=1, draws=0, generator=np.random.default_rng(0))


def test_a_tally_whose_counts_do_not_nest_is_refused() -> None:
    with pytest.raises(
        ValueError, match="solved 2, passed_public 1, samples 3: each must be at most the next"
    ):
        Tally(samples=3, passed_public=1, solved=2)


def test_problems_that_are_always_or_never_solved_have_no_spread_of_their_own() -> None:
    certain = [Tally(samples=4, passed_public=4, solved=4), Tally(samples=4, passed_public=0, solved=0)]
    estimate = estimate_n_at_k(certain, n=1, k=1, resamples=50, generator=np.random.default_rng(0))
    assert (estimate.low, estimate.value, estimate.high) == (0.5, 0.5, 0.5)


def test_other_problems_of_the_same_kind_would_spread_even_then() -> None:
    certain = [Tally(samples=4, passed_public=4, solved=4), Tally(samples=4, passed_public=0, solved=0)]
    generator = np.random.default_rng(0)
    estimate = estimate_n_at_k(certain, n=1, k=1, resamples=50, generator=generator, resample="problems")
    assert (estimate.low, estimate.value, estimate.high) == (0.0, 0.5, 1.0)


@pytest.mark.parametrize("resample", ["rollouts", "problems"])
def test_the_interval_has_the_width_that_theory_gives(resample: Resample) -> None:
    problems = [Tally(samples=10, passed_public=solved, solved=solved) for solved in [2, 4, 6, 8] * 50]
    generator = np.random.default_rng(0)
    estimate = estimate_n_at_k(problems, n=1, k=1, resamples=2000, generator=generator, resample=resample)
    shares = np.array([problem.solved / 10 for problem in problems])  # [problems]
    variance = np.var(shares) if resample == "problems" else np.mean(shares * (1 - shares)) / 10
    expected = 2 * 1.96 * math.sqrt(variance / len(problems))
    assert estimate.high - estimate.low == pytest.approx(expected, rel=0.1)
    assert estimate.low < estimate.value < estimate.high


def test_the_interval_of_three_chosen_from_six_lies_around_the_value_though_resampling_repeats_samples() -> (
    None
):
    problems = [Tally(samples=6, passed_public=1, solved=1), Tally(samples=6, passed_public=2, solved=1)] * 50
    estimate = estimate_n_at_k(problems, n=1, k=3, resamples=500, generator=np.random.default_rng(0))
    assert (estimate.low + estimate.high) / 2 == pytest.approx(estimate.value, abs=0.01)


def test_the_same_generator_gives_the_same_interval() -> None:
    problems = [Tally(samples=5, passed_public=3, solved=2), Tally(samples=5, passed_public=2, solved=1)]
    first, second = (
        estimate_n_at_k(problems, n=1, k=3, resamples=20, generator=np.random.default_rng(9))
        for _ in range(2)
    )
    assert first == second


def difference(first: list[Tally], second: list[Tally], *, resamples: int = 2000):
    generator = np.random.default_rng(3)
    return paired_difference(first, second, n=1, k=1, resamples=resamples, generator=generator)


def test_a_difference_that_is_the_same_on_every_problem_has_no_spread() -> None:
    first = [Tally(samples=10, passed_public=solved, solved=solved) for solved in (1, 4, 7)]
    second = [Tally(samples=10, passed_public=solved, solved=solved) for solved in (3, 6, 9)]
    found = difference(first, second)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.2, 0.2))


def test_the_interval_of_a_difference_has_the_width_that_theory_gives() -> None:
    first = [Tally(samples=10, passed_public=5, solved=5)] * 200
    second = [Tally(samples=10, passed_public=solved, solved=solved) for solved in (3, 5, 7, 9)] * 50
    found = difference(first, second)
    assert found.value == pytest.approx(0.1)
    spread = math.sqrt(np.var([-0.2, 0.0, 0.2, 0.4]) / 200)
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    assert found.low < found.value < found.high


def test_what_does_not_pair_has_no_difference() -> None:
    one = [Tally(samples=1, passed_public=1, solved=1)]
    with pytest.raises(ValueError, match="1 and 2 tallies"):
        difference(one, one * 2)
    with pytest.raises(ValueError, match="resamples is 0"):
        difference(one, one, resamples=0)
