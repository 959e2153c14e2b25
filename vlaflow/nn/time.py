"""Sinusoidal embedding of a clock."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clock_embedding(clock_BL: Tensor, width: int, shortest: float = 4e-3, longest: float = 4.0) -> Tensor:
    """[sin | cos] of 2π·clock/period for periods spaced geometrically from ``shortest`` to ``longest``.

    As in π0, EO-1 and LeRobot. (With a base-10 000 embedding of an unscaled clock, as in A1's code, most channels are nearly
    constant over [0, 1].)

    Args:
        clock_BL: noise level per token in [0, 1], any shape.
        width: even number of channels, W.

    Returns:
        (..., W) float32. The row of a clean token (clock 0) does not depend on the other clocks.
    """
    half = width // 2
    period = shortest * (longest / shortest) ** torch.linspace(0, 1, half, device=clock_BL.device)
    angle = clock_BL.float()[..., None] * (2 * math.pi / period)
    return torch.cat((angle.sin(), angle.cos()), -1)
