"""Distances between the tokens of a vocabulary, for metric-induced paths.

Distances between embeddings or ids are divided by their mean over pairs of different tokens, so that β has the same meaning for
every table: without it, the nearly parallel rows of untrained ids (distances of 0.005) would keep the path at uniform noise
forever. Distances on the lines of slots are measured in units of how far apart the data lies there.

Shape letters: N chunks, S token slots, V vocabulary, W width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vlaflow.errors import ConfigError

Power = Literal[1, 2, 4]

INDISTINCT = 1e-6
"""A mean distance below this is only float32 rounding."""


def embedding_distance(table_VW: Tensor, power: Power = 2) -> Tensor:
    """‖ē_x − ē_y‖^power of the unit-norm rows, rescaled to mean 1 off the diagonal and 0 on it; (V, V) float32.

    The papers use the Euclidean distance, FUDOKI's code its fourth power. The power acts as a hidden schedule: the larger it
    is, the earlier the chain reaches the target.
    """
    with torch.autocast(table_VW.device.type, enabled=False):  # in bfloat16 close rows would coincide
        unit_VW = torch.nn.functional.normalize(table_VW.float(), dim=-1)
        square_VV = (2 - 2 * unit_VW @ unit_VW.T).clamp(min=0)
        return _rescaled(square_VV ** (power / 2))


def bin_distance(bins: int, others: int = 0, power: Power = 1) -> Tensor:
    """|i − j|^power between ordered bins, rescaled; (V, V) with V = bins + others.

    Args:
        bins: ids 0 … bins − 1 are intervals in ascending order.
        others: number of further ids without an order, such as an end token, at the mean distance from all others.
        power: exponent of the difference.
    """
    place_K = torch.arange(bins, dtype=torch.float32)
    near_KK = (place_K[:, None] - place_K).abs() ** power
    distance_VV = torch.full((bins + others,) * 2, _mean_off_diagonal(near_KK))
    distance_VV[:bins, :bins] = near_KK
    return _rescaled(distance_VV)


def line_distance(value_SV: Tensor, spread_S: Tensor, power: Power = 1) -> Tensor:
    """(|v_x − v_y| / scale)^power between the values that the ids stand for in each slot; (S, V, V) float32.

    Every slot has its own scale, its spread in the data, so that at one β noise is equally wide compared with the data in all
    of them: coefficients of high frequencies vary less than those of low ones. The scale is at least one step from an id to
    the next. Ids that stand for one value are kept a thousandth of a step apart, because a path must lead to each of them.

    Args:
        value_SV: ascending in V.
        spread_S: ≥ 0, such as ``mean_difference``.
        power: exponent of the scaled difference.
    """
    value_SV = value_SV.double()
    if value_SV.shape[1] < 2:
        raise ConfigError("A distance needs at least two tokens.")
    step_S1 = (value_SV[:, -1:] - value_SV[:, :1]) / (value_SV.shape[1] - 1)
    step_S1 = torch.where(step_S1 > 0, step_S1, 1.0)
    gap_SV = torch.maximum(value_SV.diff(dim=1), step_S1 / 1000)
    place_SV = torch.cat((torch.zeros_like(step_S1), gap_SV.cumsum(1)), 1) / torch.maximum(spread_S.double()[:, None], step_S1)
    return ((place_SV[:, :, None] - place_SV[:, None]).abs() ** power).float()


def mean_difference(value_NS: Tensor) -> Tensor:
    """Mean of |v − w| over all pairs of different rows, for each column; (S,) float64, 0 for a single row."""
    count = len(value_NS)
    if count < 2:
        return value_NS.new_zeros(value_NS.shape[1], dtype=torch.float64)
    # How often each of the sorted values is the larger of a pair, less how often it is the smaller.
    weight_N = 2 * torch.arange(count, dtype=torch.float64) - (count - 1)
    return 2 * (weight_N[:, None] * value_NS.double().sort(0).values).sum(0) / (count * (count - 1))


def _rescaled(distance_VV: Tensor) -> Tensor:
    distance_VV = distance_VV.clone().fill_diagonal_(0.0)
    return distance_VV / _mean_off_diagonal(distance_VV)


def _mean_off_diagonal(distance_VV: Tensor) -> float:
    count = len(distance_VV)
    if count < 2:
        raise ConfigError("A distance needs at least two tokens.")
    mean = float(distance_VV.sum()) / (count * (count - 1))
    if not mean > INDISTINCT:
        raise ConfigError("All tokens have the same embedding, so no path leads from one to another; train the table first.")
    return mean
