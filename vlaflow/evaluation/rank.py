"""How well a score orders things: rank correlation, and the area under the ROC curve."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def ranks(value_M: np.ndarray) -> np.ndarray:
    """Ranks from 1, float (M,); equal values share the mean of theirs."""
    _, place_M, count_V = np.unique(value_M, return_inverse=True, return_counts=True)
    last_V = np.cumsum(count_V)
    return (last_V - (count_V - 1) / 2)[place_M]


def rank_correlation(one_M: np.ndarray, other_M: np.ndarray) -> float:
    """Spearman's: the correlation of the ranks, in [−1, 1]; 0 where one of the two is constant.

    >>> rank_correlation(np.array([1, 2, 4]), np.array([0, 10, 11]))
    1.0
    """
    one_M, other_M = ranks(one_M), ranks(other_M)
    one_M, other_M = one_M - one_M.mean(), other_M - other_M.mean()
    scale = float(np.sqrt((one_M**2).sum() * (other_M**2).sum()))
    return float((one_M * other_M).sum() / scale) if scale else 0.0


def auc(score_M: np.ndarray, positive_M: np.ndarray) -> float:
    """Probability that a positive has a higher score than a negative, ties counting half; 1/2 where there is only one kind.

    It is the area under the ROC curve, and Mann and Whitney's statistic over the number of pairs.

    >>> auc(np.array([0.1, 0.9, 0.8]), np.array([False, True, False]))
    1.0
    """
    positives = int(positive_M.sum())
    negatives = len(positive_M) - positives
    if not positives or not negatives:
        return 0.5
    total = float(ranks(score_M)[positive_M].sum())
    return (total - positives * (positives + 1) / 2) / (positives * negatives)


def auc_interval(area: float, positives: float, negatives: float) -> tuple[float, float]:
    """95 % interval of an area under the curve (Newcombe 2006, part 2, method 5); [0, 1] where there is only one kind.

    Like Wilson's interval of a proportion, it consists of the areas that are compatible with the observed one, by the variance
    (Hanley and McNeil 1982) that they would have themselves. So it has a width where all pairs are in order.

    Args:
        area: observed.
        positives, negatives: their numbers, or effective numbers.
    """
    if not positives or not negatives:
        return 0.0, 1.0

    def excess(true: float) -> float:
        """How much further the observed area is than 1.96 deviations; below 0 where they are compatible."""
        more = max(0.0, (positives + negatives) / 2 - 1)
        variance = true * (1 - true) * (1 + more * (1 - true) / (2 - true) + more * true / (1 + true)) / (positives * negatives)
        return abs(area - true) - 1.96 * float(np.sqrt(variance))

    return _edge(excess, 0.0, area), _edge(excess, 1.0, area)


def _edge(excess: Callable[[float], float], outside: float, inside: float) -> float:
    """Where ``excess`` falls to 0 between an end of the range and the observed area."""
    for _ in range(60):
        middle = (outside + inside) / 2
        outside, inside = (middle, inside) if excess(middle) > 0 else (outside, middle)
    return inside
