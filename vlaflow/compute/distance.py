"""How far two normalised chunks are apart: what early exit decides by, and what calibration measures.

Only real action dimensions enter (a decoder's ``finish`` has dropped the padded ones). Every metric is one number per chunk,
so calibration and decision use the same statistic.

Shape letters: B batch, L chunk size, D action dimension.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Metric = Literal["cosine", "l2", "mean_abs", "max_abs"]


def distance(metric: Metric, one_BLD: Tensor, other_BLD: Tensor, eps: float = 1e-5) -> Tensor:
    """Distance per chunk, (B,), 0 for equal chunks.

    Args:
        metric: "cosine": mean over the actions of 1 − cos(a, b), in [0, 2], A1's default; "l2": mean over the actions of the
            root mean square difference over dimensions; "mean_abs" and "max_abs": over actions and dimensions.
        one_BLD, other_BLD: normalised chunks.
        eps: square of the norm below which an action loses its direction, so that two of about zero are equal. A1's code
            bounds the product of the norms by it, with which equal actions near zero are 1 apart.
    """
    if metric == "cosine":
        one_BLD, other_BLD = (x / x.norm(dim=-1, keepdim=True).clamp(min=eps**0.5) for x in (one_BLD, other_BLD))
        longer_BL = torch.maximum(one_BLD.square().sum(-1), other_BLD.square().sum(-1))  # 1 for all but those near zero
        return (longer_BL - (one_BLD * other_BLD).sum(-1)).clamp(min=0).mean(1)
    difference_BLD = one_BLD - other_BLD
    if metric == "l2":
        return difference_BLD.square().mean(-1).sqrt().mean(1)
    if metric == "mean_abs":
        return difference_BLD.abs().mean((1, 2))
    return difference_BLD.abs().amax((1, 2))
