"""Statistics for values that come in clusters: episodes of one scene, or questions about one episode.

Every environment seed may be played R times, each time with different policy noise.

Repetitions of one environment seed share its scene, so they carry less information than episodes in as many different scenes.
Here each environment seed is a cluster. Intervals are those for independent episodes (``statistics``), computed with a smaller,
effective number of them; a paired test flips the signs of whole clusters. With R = 1 both are the methods for independent
episodes, to the bit.

A bootstrap over clusters was tried first and rejected (docs/decisions/015-repetitions-are-clusters.md): at 20 clusters and high
success rates its intervals miss the true rate far too often, and they have no width if all episodes succeed.

Shape letters: S environment seeds (clusters), R noise seeds (repetitions).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from vlaflow.errors import ConfigError
from vlaflow.evaluation.statistics import quantile


class Played(Protocol):
    """An episode that was played in a scene: the seed of an environment."""

    @property
    def env(self) -> str:
        """suite/task."""
        ...

    @property
    def seed(self) -> int:
        """Of the environment."""
        ...

    @property
    def success(self) -> bool:
        """Whether any step succeeded."""
        ...


def success_SR(episodes: Sequence[Played]) -> np.ndarray:
    """Successes as integers, a row per environment and seed, in the order of the episodes.

    Raises:
        ConfigError: the environment seeds were not played with equally many noise seeds.
    """
    rows: dict[tuple[str, int], list[int]] = {}
    for episode in episodes:
        rows.setdefault((episode.env, episode.seed), []).append(int(episode.success))
    if len({len(row) for row in rows.values()}) > 1:
        raise ConfigError("Every environment seed must be played with the same number of noise seeds to be counted.")
    return np.array(list(rows.values()))


def effective_size(clusters: np.ndarray | Sequence[Sequence[float]], level: float = 0.95) -> float:
    """Number of independent episodes that would determine the mean as precisely as these do.

    n / deff · (z / t)², at least S and at most n, the number of values (Korn & Graubard 1998). The design effect deff is the
    variance of the mean from the spread of the S clusters, divided by that for n independent values (Kish 1965), and t,
    Student's quantile with S − 1 degrees of freedom, accounts for having estimated it from S clusters. Clusters of different
    sizes, as of questions, are weighted by their size (the linearised variance of a ratio).

    Repetitions that never differ give S: they add nothing. So do values that are all equal, which say nothing about what the
    repetitions share, and a single cluster.

    Args:
        clusters: successes as 0 and 1, or paired differences as −1, 0 and 1, by cluster: (S, R), or S rows of any length.
        level: confidence level of the interval in which the number is used.
    """
    from scipy.stats import t

    value_N, seeds = np.concatenate([np.asarray(row, np.float64) for row in clusters]), len(clusters)
    n, variance = len(value_N), float(value_N.var())
    if seeds < 2 or n == seeds or variance == 0:
        return float(seeds)
    mean = float(value_N.mean())
    residual_S = np.array([float(np.sum(row)) - len(row) * mean for row in clusters])
    of_mean = float((residual_S**2).sum()) * seeds / (seeds - 1) / n**2
    if of_mean < 1e-12 * variance:
        return float(n)
    shrink = quantile(level) / float(t.ppf((1 + level) / 2, seeds - 1))
    return min(max(variance / of_mean * shrink**2, float(seeds)), float(n))


def sign_flip_test(differences: Iterable[int]) -> float:
    """Exact two-sided permutation test over clusters: p-value of "neither policy wins more often than the other".

    If the policies are exchangeable, the difference of every cluster has either sign with equal probability. The p-value is the
    share of all assignments of signs whose total is at least as far from 0 as the observed one; these are counted, not sampled.
    With one repetition this is McNemar's exact test, and with R identical ones it is the same as with one.

    Args:
        differences: successes of the second policy minus those of the first, per cluster.
    """
    sizes, observed = [], 0
    for difference in differences:
        observed += difference
        sizes += [abs(difference)] if difference else []
    ways = {0: 1}  # number of assignments by their total of the positive differences
    for size in sizes:
        after = dict(ways)
        for total, count in ways.items():
            after[total + size] = after.get(total + size, 0) + count
        ways = after
    extreme = sum(count for total, count in ways.items() if abs(2 * total - sum(sizes)) >= abs(observed))
    return int(extreme) / 2 ** len(sizes)
