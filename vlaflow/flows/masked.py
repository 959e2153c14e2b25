"""Masked discrete diffusion: how many tokens remain masked, and which are unmasked (MaskGIT's cosine schedule).

Clocks are binary here: 1 is masked, 0 is unmasked.

Shape letters: B batch, S token slots.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor


def masked_share(progress: Tensor | float) -> Tensor:
    """cos(π·progress/2): the share of tokens still masked, from 1 at progress 0 to 0 at 1."""
    return torch.cos(torch.as_tensor(progress, dtype=torch.float64) * (math.pi / 2)).clamp(min=0)


def still_masked(count_B: Tensor, done: int, steps: int, progress: float | None = None) -> Tensor:
    """Number of tokens that remain masked after ``done`` of ``steps`` steps, int64 (B,): ⌊N·cos(π·progress/2)⌋.

    Every step unmasks at least one token as long as any is masked; after the last step none is.

    Args:
        count_B: tokens that were masked at the start, N.
        done: 1 … steps.
        progress: share of the way that these steps are; None for done/steps.
    """
    if done >= steps:
        return torch.zeros_like(count_B)
    planned_B = (count_B * masked_share(done / steps if progress is None else progress).to(count_B.device)).floor().long()
    return torch.minimum(planned_B, (count_B - done).clamp(min=0))


def training_mask(batch: int, slots: int, generator: Generator, floor: float = 0.1) -> Tensor:
    """bool (B, S): every token is masked with probability max(cos(πr/2), floor), r ~ U(0, 1) per sample.

    Because of the floor, samples without masked tokens are rare.
    """
    share_B1 = masked_share(torch.rand(batch, 1, generator=generator)).clamp(min=floor)
    return torch.rand(batch, slots, generator=generator) < share_B1


def lowest(confidence_BS: Tensor, count_B: Tensor) -> Tensor:
    """bool (B, S): the ``count_B`` slots of lowest confidence of each row; +inf is never among them before the others."""
    rank_BS = confidence_BS.argsort(dim=-1, stable=True).argsort(dim=-1)
    return rank_BS < count_B[:, None]
