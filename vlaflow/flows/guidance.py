"""Guiding a flow towards known actions without training for it: inpainting for real-time chunking.

At every step the velocity is corrected so that the predicted chunk agrees with the known actions, each with its weight:
u' = u − min(bound, s_t) · Jᵀ·W·(known − â), with â = x − t·u the predicted chunk, J = ∂â/∂x and
s_t = ((1 − t)² + t²) / (t·(1 − t)) (pseudo-inverse guidance with the clipping of "Real-Time Execution of Action Chunking
Flow Policies", eqs. 2-4, where time runs in the opposite direction).

Shape letters: B batch, L chunk size, X action dimension, padded or not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BOUND = 5.0


def soft_mask(chunk_size: int, committed_B: Tensor, known_B: Tensor) -> Tensor:
    """Weight of each action: 1 for committed ones, decreasing over the other known ones, 0 beyond (ibid. eq. 5).

    w_i = c_i·(e^{c_i} − 1)/(e − 1) with c_i = (known − i)/(known − committed + 1) between the two.

    Args:
        chunk_size: L.
        committed_B: number of actions that will be executed in any case.
        known_B: number of known actions, at least as many.

    Returns:
        float32 (B, L) in [0, 1].
    """
    place_1L = torch.arange(chunk_size, device=known_B.device)[None]
    committed_B1, known_B1 = committed_B[:, None], known_B[:, None]
    left_BL = ((known_B1 - place_1L) / (known_B1 - committed_B1 + 1)).clamp(0, 1)
    return torch.where(place_1L < committed_B1, 1.0, left_BL * torch.expm1(left_BL) / math.expm1(1))


def strength(clock_BL: Tensor, bound: float = BOUND) -> Tensor:
    """min(bound, ((1 − t)² + t²) / (t·(1 − t))), per token; ``bound`` at both ends."""
    t_BL = clock_BL.float()
    return (((1 - t_BL).square() + t_BL.square()) / (t_BL * (1 - t_BL)).clamp(min=1e-9)).clamp(max=bound)


def guided(
    x_BLX: Tensor, velocity_BLX: Tensor, clock_BL: Tensor, known_BLX: Tensor, weight_BL: Tensor, *, bound: float = BOUND
) -> Tensor:
    """The corrected velocity, detached.

    Args:
        x_BLX: tokens at their clocks; ``velocity_BLX`` must have been computed from it with gradients on.
        velocity_BLX: the prediction of the network.
        clock_BL: noise level per token.
        known_BLX, weight_BL: actions to agree with, and their weights in [0, 1].
        bound: largest strength.
    """
    clean_BLX = x_BLX - clock_BL[..., None] * velocity_BLX
    error_BLX = (weight_BL[..., None] * (known_BLX - clean_BLX)).detach()
    (correction_BLX,) = torch.autograd.grad(clean_BLX, x_BLX, error_BLX)
    return velocity_BLX.detach() - strength(clock_BL, bound)[..., None] * correction_BLX
