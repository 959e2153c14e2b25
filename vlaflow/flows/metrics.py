"""Distances between the tokens of a vocabulary, for metric-induced paths.

Distances are divided by their mean over pairs of different tokens, so that β has the same meaning for every table: without it,
the nearly parallel rows of untrained ids (distances of 0.005) would keep the path at uniform noise forever.

Shape letters: V vocabulary, W width.
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
