"""Thresholds of an early exit from measured discrepancies: by a share of exits (A1) or by a bound on the risk.

Everything here is arithmetic on two tables: how far each exit's chunk is from the one before it, and how far from the
chunk of full depth. At decision time the first exit whose discrepancy is at most its threshold is taken.

Shape letters: N samples (one observation, one whole chunk), K exits, the last of them the full depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from vlaflow.errors import ConfigError, nearest

Distribution = Literal["exponential", "gaussian", "gamma"]
NEVER, ALWAYS = -np.inf, np.inf
LEVELS = 200
"""Members of the family of thresholds that risk control tests."""


@dataclass(frozen=True)
class ExitMeasurements:
    """What every depth answered.

    Args:
        discrepancy_NK: to the depth before, by the plan's metric.
        deviation_NK: to the full depth, by the metric of the request.
        largest_NK: to the full depth, largest absolute difference.
        error_NK: mean absolute distance to the demonstrated actions, normalised.
        choose_N: bool, the half that thresholds are made from.
        tuning_N: bool, the part of ``choose_N`` that risk control tunes on.
    """

    discrepancy_NK: np.ndarray
    deviation_NK: np.ndarray
    largest_NK: np.ndarray
    error_NK: np.ndarray
    choose_N: np.ndarray
    tuning_N: np.ndarray


def exit_shares(distribution: Distribution, budget: float, exits: int, *, first_exit: bool = True) -> np.ndarray:
    """Target share of every exit (K,), adding up to 1; a smaller budget leaves earlier (A1 §3.2 and its code).

    exponential: p_k ∝ c^k, k = 1 … K; gaussian: p_k ∝ exp(−(k − c)² / 2), k = 0 … K − 1; gamma: p_k ∝ the Gamma density of
    shape c and scale 2 at k = 1 … K.

    Args:
        distribution: family.
        budget: c, > 0.
        exits: K.
        first_exit: False gives the first exit no share, as A1 does for its 7B model.
    """
    if not budget > 0 or not np.isfinite(budget):
        raise ConfigError(f"An exit budget is a positive number, got {budget}.")
    if distribution not in get_args(Distribution):
        raise ConfigError(f"There is no distribution '{distribution}'; {nearest(distribution, get_args(Distribution))}")
    if exits < 1 or (exits < 2 and not first_exit):
        raise ConfigError(f"{exits} exit{'s' if exits != 1 else ''} leave none to choose from.")
    k_K = np.arange(1, exits + 1, dtype=np.float64)
    if distribution == "exponential":
        log_K = k_K * np.log(budget)
    elif distribution == "gaussian":
        log_K = -((k_K - 1 - budget) ** 2) / 2
    else:
        from scipy.stats import gamma

        log_K = gamma.logpdf(k_K, budget, scale=2)
    share_K = np.exp(log_K - log_K.max())
    if not first_exit:
        share_K[0] = 0
    return share_K / share_K.sum()


def taken(discrepancy_NK: np.ndarray, threshold_K: Sequence[float] | np.ndarray) -> np.ndarray:
    """Index of the exit that each sample takes (N,)."""
    return (discrepancy_NK <= np.asarray(threshold_K)).argmax(1)


def filtered_quantiles(discrepancy_NK: np.ndarray, share_K: np.ndarray) -> np.ndarray:
    """Thresholds (K,) that let the target shares leave, exit by exit among those still there (A1 Alg. 1).

    All samples at a threshold leave, so ties may let more leave than asked; later exits then let fewer. An exit
    without a share, or whose share was already used up, is never taken; the last always.
    """
    require_finite(discrepancy_NK)
    samples, exits = discrepancy_NK.shape
    threshold_K, gone_N = np.full(exits, NEVER), np.zeros(samples, bool)
    for exit_ in range(exits - 1):
        wanted = int(np.floor(samples * share_K[: exit_ + 1].sum() + 1e-9)) - int(gone_N.sum())
        there = np.sort(discrepancy_NK[~gone_N, exit_])
        if share_K[exit_] <= 0 or wanted < 1 or not len(there):
            continue
        threshold_K[exit_] = there[min(wanted, len(there)) - 1]
        gone_N |= discrepancy_NK[:, exit_] <= threshold_K[exit_]
    threshold_K[-1] = ALWAYS
    return threshold_K


def risk_controlled(
    discrepancy_NK: np.ndarray,
    deviation_NK: np.ndarray,
    *,
    max_deviation: float,
    risk: float,
    error: float = 0.05,
    tuning_N: np.ndarray,
) -> np.ndarray:
    """Thresholds (K,) under which P(deviation of the chunk taken > ``max_deviation``) ≤ ``risk``.

    Learn-then-Test (Angelopoulos et al. 2021): the tuning samples define a sequence of thresholds from "never leave early" to
    "always"; the others test it in that order, each with the exact binomial p-value of "the risk is above ``risk``", and the
    last one before the first that cannot be rejected at level ``error`` is taken. So with probability 1 − ``error`` over the
    samples the bound holds for new samples of the same kind. The sequence needs no monotone risk and no correction for its
    length, which conformal risk control would need, or would trade for a bound on the average.

    The guarantee counts samples as independent. Frames of one episode are alike; take few of each, from many episodes, and
    look at the share that fresh episodes show.

    Args:
        discrepancy_NK: to the exit before.
        deviation_NK: to the full depth; the last column is 0.
        max_deviation: ε.
        risk: largest probability of a deviation above ε, in (0, 1).
        error: probability that the guarantee itself fails, in (0, 1).
        tuning_N: bool, which samples define the sequence; the others test it.
    """
    from scipy.stats import binom

    require_finite(discrepancy_NK)
    require_risk(risk, error)
    if deviation_NK[:, -1].any():
        raise ConfigError("The full depth must not deviate from itself: the last column of the deviations is not 0.")
    testing_N = ~tuning_N
    if not tuning_N.any() or not testing_N.any():
        raise ConfigError("Risk control tunes on some episodes and tests on others; take more episodes.")
    exits, tests = discrepancy_NK.shape[1], int(testing_N.sum())
    best_K = np.full(exits, NEVER)
    best_K[-1] = ALWAYS
    rows = np.arange(tests)
    for level in np.arange(1, LEVELS + 1) / LEVELS:
        threshold_K = np.quantile(discrepancy_NK[tuning_N], level, axis=0, method="inverted_cdf")
        threshold_K[-1] = ALWAYS
        exit_N = taken(discrepancy_NK[testing_N], threshold_K)
        bad = int((deviation_NK[testing_N][rows, exit_N] > max_deviation).sum())
        if binom.cdf(bad, tests, risk) > error:
            break
        best_K = threshold_K
    return best_K


def require_risk(risk: float, error: float) -> None:
    """Refuse a bound that nothing, or everything, keeps.

    Raises:
        ConfigError: for a probability of 0 or 1, or none at all.
    """
    if not (0 < risk < 1 and 0 < error < 1):
        raise ConfigError(
            f"risk and error are probabilities between 0 and 1, got {risk:g} and {error:g}; the risk is 1 − --confidence."
        )


def require_finite(discrepancy_NK: np.ndarray) -> None:
    """Refuse what is no table of numbers.

    Raises:
        ConfigError: for an empty table, or chunks that are not finite.
    """
    if discrepancy_NK.ndim != 2 or 0 in discrepancy_NK.shape:
        raise ConfigError(f"Discrepancies are a table of samples and exits, got the shape {discrepancy_NK.shape}.")
    if not np.isfinite(discrepancy_NK).all():
        raise ConfigError("Some discrepancies are not finite; the checkpoint makes chunks that are no numbers.")
