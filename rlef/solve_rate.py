"""The n@k average solve rate (PAPER.md section 5): exact, with bootstrap intervals.

From k samples of one problem, those that pass the public tests are candidates; n of them, chosen at random,
are submitted; the problem counts as solved if one submission passes all tests. What a *sample* is, is the
caller's
choice: a single response, or a whole rollout of t turns, which spends t responses of the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What the samples of one problem came to."""

    samples: int
    passed_public: int  # samples whose code passes the public tests
    solved: int  # of these, samples whose code passes the private tests too

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}: a tally needs at least 1")
        if not 0 <= self.solved <= self.passed_public <= self.samples:
            raise ValueError(
                f"solved {self.solved}, passed_public {self.passed_public}, samples {self.samples}: "
                "each must be at most the next"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def n_at_k(tally: Tally, *, n: int, k: int) -> float:
    """The exact expectation of AlphaCode's estimator for one problem.

    e' ~ Hypergeometric(passed_public of samples, k) candidates; n' = min(e', n) submissions drawn from all
    that passed publicly; P(none solves | n') = C(passed_public - solved, n') / C(passed_public, n').

    Raises:
        ValueError: n or k is below 1, or k exceeds the samples.
    """
    return _n_at_k(tally.samples, tally.passed_public, tally.solved, n, k)


@lru_cache(maxsize=1 << 16)
def _n_at_k(samples: int, passed: int, solved: int, n: int, k: int) -> float:
    if n < 1:
        raise ValueError(f"n is {n}: at least 1 submission is needed")
    if not 1 <= k <= samples:
        raise ValueError(
            f"k is {k}, but the problem has {samples} samples: choose 1 <= k <= samples, or draw more"
        )
    unsolved = 0.0
    for candidates in range(max(0, k - (samples - passed)), min(k, passed) + 1):
        ways = math.comb(passed, candidates) * math.comb(samples - passed, k - candidates)
        submitted = min(candidates, n)
        misses = math.comb(passed - solved, submitted)
        unsolved += ways * misses / (math.comb(samples, k) * math.comb(passed, submitted))
    return max(0.0, 1.0 - unsolved)


def pass_at_k(tally: Tally, *, k: int) -> float:
    """P(at least one of k samples passes all tests): n@k for n = k, when nothing needs to be chosen."""
    if not 1 <= k <= tally.samples:
        raise ValueError(f"k is {k}, but the problem has {tally.samples} samples: choose 1 <= k <= samples")
    return 1.0 - math.comb(tally.samples - tally.solved, k) / math.comb(tally.samples, k)


def mean_n_at_k(tallies: Sequence[Tally], *, n: int, k: int) -> float:
    """n@k averaged over problems, every problem with the same weight."""
    if not tallies:
        raise ValueError("tallies is empty: a solve rate needs at least 1 problem")
    return math.fsum(n_at_k(tally, n=n, k=k) for tally in tallies) / len(tallies)


def estimate_n_at_k(
    tallies: Sequence[Tally],
    *,
    n: int,
    k: int,
    resamples: int,
    generator: np.random.Generator,
    resample_problems: bool = False,
) -> Estimate:
    """Mean n@k with the percentiles 2.5 and 97.5 of a bootstrap.

    Each resample draws, for every problem, as many samples as it has, with replacement; the problems stay
    (the paper's "over problems' rollouts"). The interval then answers "what if the same problems were
    attempted again". With `resample_problems` the problems are drawn with replacement first, and it answers
    "what if they were other problems of this kind"; a problem with one sample shows no spread by itself, so
    then this is the one to use.

    Raises:
        ValueError: no tallies or resamples, or k does not fit the samples.
    """
    value = mean_n_at_k(tallies, n=n, k=k)
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}: a bootstrap needs at least 1 (the paper's is 200)")
    means = np.empty(resamples)  # [resamples]
    samples = np.array([tally.samples for tally in tallies])  # [problems]
    shares = np.array([_shares(tally) for tally in tallies])  # [problems, 3]
    for index in range(resamples):
        chosen = generator.integers(len(tallies), size=len(tallies)) if resample_problems else slice(None)
        # A sample matters only through its kind, so drawing samples with replacement is a multinomial draw of
        # kinds.
        kinds = generator.multinomial(samples[chosen], shares[chosen])  # [problems, 3]
        rates = [
            _n_at_k(solved + public_only + failed, solved + public_only, solved, n, k)
            for solved, public_only, failed in kinds.tolist()
        ]
        means[index] = math.fsum(rates) / len(rates)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(value=value, low=float(low), high=float(high))


def _shares(tally: Tally) -> list[float]:
    solved, public_only = tally.solved, tally.passed_public - tally.solved
    return [kind / tally.samples for kind in (solved, public_only, tally.samples - tally.passed_public)]
