"""What paired episodes can show: the smallest difference they are likely to detect, and how many of them a difference needs.

Both follow from one approximation for McNemar's test (Connor 1987, Biometrics 43, 207–211): a difference δ between two policies
that disagree on a share ψ of the pairs is found with probability 1 − β at level α if the number of pairs is at least

    n = (z_{α/2} √ψ + z_β √(ψ − δ²))² / δ²

A difference cannot exceed the share of disagreements, so for a difference larger than the observed ψ, ψ = δ is used.
"""

from __future__ import annotations

import math

from vlaflow.evaluation.statistics import quantile

POWER = 0.8
"""Probability with which a difference should be found."""


def detectable_difference(disagreement: float, pairs: float, level: float = 0.95, power: float = POWER) -> float:
    """The smallest true difference in (0, 1] found with probability ``power``; 1 if there is none.

    Args:
        disagreement: share of the pairs on which exactly one of the policies succeeds.
        pairs: number of pairs; a fraction if repetitions count less (``clusters.effective_size``).
        level: 1 − α.
        power: 1 − β.
    """
    a, b = quantile(level), quantile(2 * power - 1)
    if pairs <= a * a:
        return 1.0
    # the formula solved for δ at the observed ψ: a quadratic
    root = b * math.sqrt(pairs + b * b - a * a)
    difference = math.sqrt(disagreement) * (a * math.sqrt(pairs) + root) / (pairs + b * b)
    if 0 < difference <= disagreement:
        return difference
    # with ψ = δ: a quadratic in √(1 − δ)
    side = (math.sqrt((a * b) ** 2 + (pairs + b * b) * (pairs - a * a)) - a * b) / (pairs + b * b)
    return 1 - side * side


def pairs_needed(disagreement: float, difference: float, level: float = 0.95, power: float = POWER) -> int | None:
    """Number of pairs at which a true difference is found with probability ``power``; None for a difference of 0.

    Args:
        disagreement: as in ``detectable_difference``.
        difference: in [−1, 1].
        level, power: as in ``detectable_difference``.
    """
    if difference == 0:
        return None
    share = max(disagreement, abs(difference))
    a, b = quantile(level), quantile(2 * power - 1)
    return math.ceil((a * math.sqrt(share) + b * math.sqrt(share - difference**2)) ** 2 / difference**2)
