"""What a decoder is given beforehand: actions or tokens with clocks, and actions to be bent towards.

Committed or confident ones have clock 0, ones to be made 1, warm-started ones something in between. A compute policy makes
them (``compute``), a decoder's ``start`` takes them (``base``).

Shape letters: B batch, R rows of it, L chunk size, D action dimension, S token slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """Known actions that a flow is bent towards (``flows.guidance``) where it was not trained to be given them.

    Args:
        action_BLD: normalised actions.
        weight_BL: how strongly each counts, in [0, 1].
    """

    action_BLD: Tensor
    weight_BL: Tensor


@dataclass(frozen=True)
class Conditioning:
    """Tokens known beforehand, and the clock each starts from.

    Args:
        action_BLD: normalised actions.
        clock_BL: in [0, 1].
        noised: the actions already are what a token at that clock looks like; nothing is mixed into them. By default they
            are clean, and fresh noise brings them to their clock.
        guidance: actions to be bent towards on the way, whatever the clocks.
    """

    action_BLD: Tensor
    clock_BL: Tensor
    noised: bool = False
    guidance: Guidance | None = None

    def select(self, row_R: Tensor) -> Conditioning:
        """Rows of the batch."""
        guidance = self.guidance and Guidance(self.guidance.action_BLD[row_R], self.guidance.weight_BL[row_R])
        return Conditioning(self.action_BLD[row_R], self.clock_BL[row_R], self.noised, guidance)

    @property
    def committed_BL(self) -> Tensor:
        """bool, actions at clock 0, which nothing changes."""
        return self.clock_BL == 0

    @property
    def settled_BL(self) -> Tensor:
        """bool, actions that are executed whatever the chunk says: at clock 0, or with the full weight of guidance."""
        return self.committed_BL if self.guidance is None else self.committed_BL | (self.guidance.weight_BL == 1)

    @staticmethod
    def around(conditioning: Conditioning | None, draft_BLD: Tensor, clock_BL: Tensor, *, noised: bool = False) -> Conditioning:
        """What a chunk starts from that is made from a draft of itself: what was committed stays, and so does the guidance.

        Args:
            conditioning: that the draft was made with.
            draft_BLD: normalised actions.
            clock_BL: of the draft's actions, in [0, 1].
            noised: see the class.
        """
        if conditioning is None:
            return Conditioning(draft_BLD, clock_BL, noised)
        kept_BL = conditioning.committed_BL
        draft_BLD = torch.where(kept_BL[..., None], conditioning.action_BLD, draft_BLD)
        return Conditioning(draft_BLD, clock_BL.masked_fill(kept_BL, 0), noised, conditioning.guidance)


@dataclass(frozen=True)
class TokenConditioning:
    """Tokens of a vocabulary known beforehand, and the clock each starts from.

    Args:
        id_BS: int64 ids.
        clock_BS: in [0, 1]; a token at clock 0 is never changed.
    """

    id_BS: Tensor
    clock_BS: Tensor
