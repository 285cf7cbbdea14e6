"""The n@k average solve rate (PAPER section 5): exact and by sampling, with bootstrap intervals.

From k samples of one problem, those that pass the public tests are candidates; n of them, chosen at random,
are submitted; the problem counts as solved if one submission passes all tests. What a *sample* is, is the
caller's choice: a single response, or a whole rollout of t turns, which spends t responses of the budget
(`rollouts_within`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

Resample = Literal["rollouts", "problems"]


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


def rollouts_within(responses: int, *, turns: int) -> int:
    """How many whole dialogs of up to `turns` responses a budget of `responses` pays for.

    Every response counts as a sample: 100 of them are 33 dialogs of three turns. A dialog that ends early has
    spent its turns all the same. 0 where the budget is smaller than one dialog.
    """
    return responses // turns


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
    _check_budget(samples, n, k)
    unsolved = 0.0
    for candidates in range(max(0, k - (samples - passed)), min(k, passed) + 1):
        ways = math.comb(passed, candidates) * math.comb(samples - passed, k - candidates)
        submitted = min(candidates, n)
        misses = math.comb(passed - solved, submitted)
        unsolved += ways * misses / (math.comb(samples, k) * math.comb(passed, submitted))
    return max(0.0, 1.0 - unsolved)


def _check_budget(samples: int, n: int, k: int) -> None:
    if n < 1:
        raise ValueError(f"n is {n}: at least 1 submission is needed")
    if not 1 <= k <= samples:
        raise ValueError(
            f"k is {k}, but the problem has {samples} samples: choose 1 <= k <= samples, or draw more"
        )


def sampled_n_at_k(tally: Tally, *, n: int, k: int, draws: int, generator: np.random.Generator) -> float:
    """The estimator as AlphaCode's Algorithm 1 states it: the share of `draws` in which a submission solves.

    Its expectation is `n_at_k`, and its standard error sqrt(p (1 - p) / draws).

    Raises:
        ValueError: as `n_at_k`, or there are no draws.
    """
    _check_budget(tally.samples, n, k)
    if draws < 1:
        raise ValueError(f"draws is {draws}: at least 1 is needed")
    others = tally.samples - tally.passed_public
    candidates = generator.hypergeometric(tally.passed_public, others, k, size=draws)  # [draws]
    wrong = tally.passed_public - tally.solved
    solving = generator.hypergeometric(tally.solved, wrong, np.minimum(candidates, n))  # [draws]
    return float(np.mean(solving > 0))


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
    resample: Resample = "rollouts",
) -> Estimate:
    """Mean n@k with its 95 % interval: the percentiles 2.5 and 97.5 of a bootstrap.

    "rollouts" is the paper's: every problem stays and draws as many samples as it has, with replacement. The
    interval answers "what if the same problems were attempted again". It cannot see the spread of a problem
    with no more than k samples, and a resample repeats some of them, so that n@k of k > 1 comes out too low;
    the interval is moved by that bias, and is a little too narrow when samples are few. "problems" draws
    problems with replacement and leaves their samples alone. The interval answers "what if these were other
    problems of the kind", and holds for any number of samples.

    Raises:
        ValueError: no tallies or resamples, or k does not fit the samples.
    """
    value = mean_n_at_k(tallies, n=n, k=k)
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}: a bootstrap needs at least 1 (the paper's is 200)")
    if resample == "problems":
        rates = np.array([n_at_k(tally, n=n, k=k) for tally in tallies])  # [problems]
        means = rates[generator.integers(len(rates), size=(resamples, len(rates)))].mean(
            axis=1
        )  # [resamples]
        bias = 0.0
    else:
        means = _resampled_rollouts(tallies, n, k, resamples, generator)
        bias = means.mean() - value if k > 1 else 0.0
    low, high = np.clip(np.percentile(means, [2.5, 97.5]) - bias, 0.0, 1.0)
    return Estimate(value=value, low=float(low), high=float(high))


def paired_difference(
    first: Sequence[Tally],
    second: Sequence[Tally],
    *,
    n: int,
    k: int,
    resamples: int,
    generator: np.random.Generator,
) -> Estimate:
    """Mean n@k of `second` minus that of `first`, with the 95 % interval of a paired bootstrap.

    The two are of the same problems in the same order. Each resample draws problems with replacement, the
    same for both, so that what makes a problem hard for both does not widen the interval. It answers "what if
    these were other problems of the kind".

    Raises:
        ValueError: the two do not pair, there are no resamples, or k does not fit the samples.
    """
    if len(first) != len(second) or not first:
        raise ValueError(
            f"{len(first)} and {len(second)} tallies: a pair needs as many of one as of the other"
        )
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}: a bootstrap needs at least 1")
    gains = np.array(
        [
            n_at_k(after, n=n, k=k) - n_at_k(before, n=n, k=k)
            for before, after in zip(first, second, strict=True)
        ]
    )  # [problems]
    means = gains[generator.integers(len(gains), size=(resamples, len(gains)))].mean(axis=1)  # [resamples]
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(value=float(gains.mean()), low=float(low), high=float(high))


def _resampled_rollouts(
    tallies: Sequence[Tally], n: int, k: int, resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """Mean n@k of each resample, `[resamples]`.

    A sample matters only through its kind, so that drawing samples with replacement is one multinomial draw
    of kinds.
    """
    sizes = np.array([tally.samples for tally in tallies])  # [problems]
    shares = np.array([_shares(tally) for tally in tallies])  # [problems, 3]
    kinds = generator.multinomial(sizes, shares, size=(resamples, len(tallies)))  # [resamples, problems, 3]
    return np.array(
        [
            math.fsum(_n_at_k(sum(kind), kind[0] + kind[1], kind[0], n, k) for kind in draw) / len(draw)
            for draw in kinds.tolist()
        ]
    )


def _shares(tally: Tally) -> list[float]:
    solved, public_only = tally.solved, tally.passed_public - tally.solved
    return [kind / tally.samples for kind in (solved, public_only, tally.samples - tally.passed_public)]
