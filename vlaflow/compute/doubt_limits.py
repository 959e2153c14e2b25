"""Limits of a doubt from measured scores: by the share of actions that are regenerated, or by the risk of keeping a wrong one.

Arithmetic on tables; what is measured is in ``evaluation.refinement``.

Shape letters: M actions, N chunks, L chunk size.
"""

from __future__ import annotations

import numpy as np

from vlaflow.compute.thresholds import LEVELS, require_risk
from vlaflow.errors import ConfigError

EVERYTHING = -np.inf
"""Limit that every score is above."""


def limit_for_share(score_M: np.ndarray, share: float) -> float:
    """Limit above which ``round(share · M)`` scores lie; of equal scores at the limit none is above it.

    Args:
        score_M: the larger the more doubtful.
        share: in [0, 1].

    Raises:
        ConfigError: another share, or no score.
    """
    _require_scores(score_M)
    if not 0 <= share <= 1:
        raise ConfigError(f"A share of actions lies in [0, 1], got {share}.")
    falling_M, count = np.sort(score_M)[::-1], round(share * len(score_M))
    return float(falling_M[count]) if count < len(falling_M) else EVERYTHING


def limit_for_risk(
    score_NL: np.ndarray,
    error_NL: np.ndarray,
    counts_NL: np.ndarray,
    *,
    max_error: float,
    risk: float,
    error: float = 0.05,
    tuning_N: np.ndarray,
) -> float:
    """Largest limit under which P(a chunk keeps an action with an error above ``max_error``) ≤ ``risk``.

    Learn-then-Test, as ``thresholds.risk_controlled``: the tuning chunks define a sequence of limits from "doubt everything" to
    "doubt nothing", the others test it in that order, and the last limit before the first that fails is taken. The bound holds
    with probability 1 − ``error`` for chunks of the same kind. It says nothing about the actions that are regenerated.

    Args:
        score_NL: the larger the more doubtful.
        error_NL: of the drafts' actions.
        counts_NL: bool, the actions that will be executed and are known.
        max_error: largest error of an action that may be kept.
        risk: in (0, 1).
        error: probability that the bound does not hold, in (0, 1).
        tuning_N: bool, the chunks that define the sequence.

    Raises:
        ConfigError: for impossible probabilities, or without chunks on either side.
    """
    from scipy.stats import binom

    _require_scores(score_NL[counts_NL])
    require_risk(risk, error)
    if not tuning_N.any() or tuning_N.all():
        raise ConfigError("Risk control tunes on some episodes and tests on others; take more episodes.")
    own_M, testing_N = np.sort(score_NL[tuning_N][counts_NL[tuning_N]]), ~tuning_N
    wrong_NL = (counts_NL & (error_NL > max_error))[testing_N]
    best = EVERYTHING
    for level in np.arange(1, LEVELS + 1) / LEVELS:
        limit = float(np.quantile(own_M, level, method="inverted_cdf"))
        bad = int((wrong_NL & (score_NL[testing_N] <= limit)).any(1).sum())
        if binom.cdf(bad, len(wrong_NL), risk) > error:
            break
        best = limit
    return best


def _require_scores(score_M: np.ndarray) -> None:
    if not score_M.size:
        raise ConfigError("A limit of doubt is made from scores, and there are none; take more frames.")
    if not np.isfinite(score_M).all():
        raise ConfigError("Some scores are not finite; the checkpoint computes what is no number.")
