"""Statistics for few episodes: intervals and paired tests for successes, percentiles for times.

All compute policies of an evaluation run on the same seeds, so all comparisons are paired. The functions take counts or plain
sequences; ``results`` decides what is compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlaflow.errors import ConfigError
from vlaflow.ranges import NotNegative


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


def wilson(successes: int, n: int, level: float = 0.95, effective: float | None = None) -> Interval:
    """Wilson's score interval for a success rate.

    The rates p that a score test would not reject: those with |s/n − p| ≤ z·√(p(1−p)/n), which is a quadratic in p.
    It lies within [0, 1] and keeps its level at n = 20, unlike s/n ± 1.96·standard error.

    >>> wilson(20, 20).low  # 0.839: twenty successes in a row do not rule out a failure rate of one in six

    Args:
        successes, n: counts.
        level: confidence level.
        effective: number of independent episodes that these are worth, if fewer (``clusters.effective_size``).
    """
    if not 0 <= successes <= n or n < 1:
        raise ConfigError(f"{successes} successes in {n} episodes is not a success rate.")
    z2 = quantile(level) ** 2
    rate, size = successes / n, n if effective is None else effective
    centre = (rate + z2 / (2 * size)) / (1 + z2 / size)
    half = math.sqrt(z2) / (1 + z2 / size) * math.sqrt(rate * (1 - rate) / size + z2 / (4 * size * size))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(low, high)


def mean_interval(rates: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """Interval for the mean of independent success rates, each counting the same.

    The margins of the single intervals are added as the legs of a right triangle and divided by the number of rates, below and
    above separately (Zou & Donner 2008). It lies within [0, 1], and of one rate it is that rate's own interval.

    Args:
        rates: success rates.
        intervals: of each, at the same confidence level.
    """
    n, mean = len(rates), sum(rates) / len(rates)
    below = math.hypot(*(rate - interval.low for rate, interval in zip(rates, intervals, strict=True)))
    above = math.hypot(*(interval.high - rate for rate, interval in zip(rates, intervals, strict=True)))
    return Interval(max(0.0, mean - below / n), min(1.0, mean + above / n))


@dataclass(frozen=True)
class PairedOutcomes:
    """Successes of two policies on the same seeds: how often both, only one, or neither succeeded."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @staticmethod
    def of(first: Sequence[bool], second: Sequence[bool]) -> PairedOutcomes:
        """Count pairs; position i of both sequences belongs to the same seed."""
        if len(first) != len(second) or not first:
            raise ConfigError(f"Paired outcomes need equally many of both, got {len(first)} and {len(second)}.")
        pairs = list(zip(map(bool, first), map(bool, second), strict=True))
        return PairedOutcomes(*(pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))))

    @property
    def n(self) -> int:
        """Number of pairs."""
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float:
        """Success rate of the second minus that of the first."""
        return (self.only_second - self.only_first) / self.n


def mcnemar(outcomes: PairedOutcomes) -> float:
    """Exact two-sided McNemar test: p-value of "neither policy wins more often than the other".

    Only the seeds on which the two disagree matter; under the null hypothesis each of them is a fair coin, so the p-value is
    that of a binomial test with probability one half. It is 1.0 if they never disagree.
    """
    return sign_test(outcomes.only_second, outcomes.only_first)


def sign_test(positive: int, negative: int) -> float:
    """Exact two-sided sign test: probability of a split at least as uneven as this from fair coins."""
    n, smaller = positive + negative, min(positive, negative)
    tail = sum(math.comb(n, k) for k in range(smaller + 1)) / 2**n
    return min(1.0, 2 * tail)


def paired_difference(outcomes: PairedOutcomes, level: float = 0.95, effective: float | None = None) -> Interval:
    """Interval for the difference of two paired success rates, second minus first.

    Newcombe (1998), method 10: the two Wilson intervals combined as the sides of a triangle whose angle is the correlation
    of the outcomes (continuity-corrected, so that few pairs do not suggest a high one). It lies within [−1, 1] and has a
    positive width even if the policies never disagree.

    Args:
        outcomes: the pairs.
        level: confidence level.
        effective: number of independent pairs that these are worth, if fewer (``clusters.effective_size``).
    """
    a, b, c, d = outcomes.both, outcomes.only_second, outcomes.only_first, outcomes.neither
    n = outcomes.n
    mine, theirs = (a + b) / n, (a + c) / n  # second, first
    own, other = wilson(a + b, n, level, effective), wilson(a + c, n, level, effective)
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    covariance = float(a * d - b * c)
    if covariance > 0:
        covariance = max(covariance - n * n / (2 * (effective or n)), 0.0)
    correlation = covariance / math.sqrt(margins) if margins else 0.0

    def side(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * correlation * x * y + y * y, 0.0))

    difference = mine - theirs
    return Interval(
        difference - side(mine - own.low, other.high - theirs), difference + side(own.high - mine, theirs - other.low)
    )


def student(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's interval of a mean, for independent values other than proportions (errors, steps, milliseconds).

    A percentile bootstrap of few values is too narrow: of two it is their range, which holds the true mean half of the time.
    A single value has no interval: both ends are the value itself.
    """
    from scipy.stats import t

    sample = np.asarray(values, np.float64)
    if not len(sample):
        raise ConfigError("A mean needs at least one value.")
    mean, half = float(sample.mean()), 0.0
    if len(sample) > 1:
        half = float(t.ppf((1 + level) / 2, len(sample) - 1) * sample.std(ddof=1) / np.sqrt(len(sample)))
    return Interval(mean - half, mean + half)


@dataclass(frozen=True)
class Percentiles:
    """Median and 99th percentile of times, in their unit."""

    p50: NotNegative
    p99: NotNegative

    def __post_init__(self) -> None:
        if self.p50 > self.p99:
            raise ConfigError(f"A median of {self.p50} exceeds the 99th percentile, {self.p99}.")

    @staticmethod
    def of(values: Sequence[float]) -> Percentiles:
        """Linear interpolation between order statistics. With fewer than 100 values p99 is close to the largest."""
        if not len(values):
            raise ConfigError("Percentiles need at least one value.")
        p50, p99 = np.quantile(np.asarray(values, np.float64), [0.5, 0.99])
        return Percentiles(float(p50), float(p99))


def quantile(level: float) -> float:
    """The number that a standard normal variable exceeds in absolute value with probability 1 − ``level``."""
    if not 0 < level < 1:
        raise ConfigError(f"A confidence level must lie between 0 and 1, got {level}.")
    from statistics import NormalDist

    return NormalDist().inv_cdf((1 + level) / 2)
