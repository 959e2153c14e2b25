"""What a decoder learns: a batch of normalised actions, and which of them count.

Shape letters: B batch, L chunk size, D action dimension, K latent codes, S token slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlaflow.data.batch import Executed, moved
from vlaflow.flows.consistency import Teaching


@dataclass(frozen=True)
class Targets:
    """What to learn.

    Args:
        action_BLD: normalised actions.
        valid_BL: bool, which of them count.
        code_BK: latent action codes; one of −1 is unknown and teaches nothing.
        executed: what the robot was given instead, normalised: a committed beginning consists of it. None when it was
            ``action_BLD``.
        mask_BLD: bool, the dimensions and steps that the robot's chunks have; the others are padding. None for all.
        id_BS: int64, the actions as tokens of the decoder's vocabulary; None where it has none or makes them itself.
        teaching: the velocity to learn in place of the data's, for decoders with a ``velocity_field``.
    """

    action_BLD: Tensor
    valid_BL: Tensor
    code_BK: Tensor | None = None
    executed: Executed | None = None
    mask_BLD: Tensor | None = None
    id_BS: Tensor | None = None
    teaching: Teaching | None = None

    def mean_over_dimensions(self, value_BLD: Tensor) -> Tensor:
        """Mean over the dimensions that the robot has, (B, L); 0 on steps that it does not have."""
        if self.mask_BLD is None:
            return value_BLD.mean(-1)
        return (value_BLD * self.mask_BLD).sum(-1) / self.mask_BLD.sum(-1).clamp(min=1)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Targets:
        """The same on another device."""
        return Targets(
            moved(self.action_BLD, device, non_blocking=non_blocking),
            moved(self.valid_BL, device, non_blocking=non_blocking),
            moved(self.code_BK, device, non_blocking=non_blocking),
            None if self.executed is None else self.executed.to(device, non_blocking=non_blocking),
            moved(self.mask_BLD, device, non_blocking=non_blocking),
            moved(self.id_BS, device, non_blocking=non_blocking),
            self.teaching,
        )
