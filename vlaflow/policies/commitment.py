"""Committed actions of robots, as what a decoder starts from.

Shape letters: B batch, N actions known, L horizon, D action dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from vlaflow.data.transforms import Normalizer
from vlaflow.decoders.base import Decoder, Given
from vlaflow.errors import SpecError
from vlaflow.spec import Commitment


def given_of(
    commitments: Sequence[Commitment | None], decoder: Decoder, normalizer: Normalizer, *, device: torch.device, guided: bool
) -> Given | None:
    """What the decoder is given of the chunks before; None where nothing is committed.

    Raises:
        SpecError: for actions of another dimension, or so many that none is left to make.
        CapabilityError: for a decoder that can continue no chunk.
    """
    if not any(commitments):
        return None
    horizon, dim, longest = decoder.horizon, decoder.action_dim, decoder.longest_commitment
    rows = []
    for commitment in commitments:
        action_ND = np.zeros((0, dim), np.float32) if commitment is None else commitment.actions[:horizon].astype(np.float32)
        if action_ND.shape[1] != dim:
            raise SpecError(f"Committed actions have {dim} dimensions here, got {action_ND.shape[1]}.")
        if commitment is not None and longest and commitment.count > longest:
            raise SpecError(
                f"This policy continues at most {longest} committed actions of a chunk of {horizon}, got {commitment.count}."
            )
        rows.append(normalizer.forward(torch.from_numpy(action_ND)))
    action_BLD = torch.stack([functional.pad(row, (0, 0, 0, horizon - len(row))) for row in rows]).to(device)
    known_B = torch.tensor([len(row) for row in rows], device=device)
    committed_B = torch.tensor([c.count if c else 0 for c in commitments], device=device)
    return decoder.continued(action_BLD, known_B, committed_B, guided=guided)
