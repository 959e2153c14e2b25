"""What a compute policy's outcome says of each chunk, and whether it is one that a robot may be given."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlaflow.compute.base import Decoded
from vlaflow.decoders.base import Tokens
from vlaflow.errors import NotFiniteError


def token_report(tokens: Tokens | None, row: int) -> dict[str, Any]:
    """Fields of a ``Chunk`` on one row's tokens; empty where the decoder has none."""
    if tokens is None:
        return {}
    return {
        "tokens": tokens.id_BS[row].cpu().numpy(),
        "token_probability": tokens.probability_BS[row].float().cpu().numpy(),
        "revised": tuple(tokens.revised_BN[row].tolist()),
        "repaired": bool(tokens.repaired_B[row]),
    }


def require_finite(action_BLD: np.ndarray, out: Decoded) -> None:
    """Refuse a chunk, or a judgement of it, that is no number; tokens can describe finite actions when their logits are NaN."""
    judged = (out.confidence_BL, None if out.tokens is None else out.tokens.probability_BS)
    if not np.isfinite(action_BLD).all() or any(t is not None and not bool(t.isfinite().all()) for t in judged):
        raise NotFiniteError(
            "The policy computed NaN or an infinite value, which is no action. Look whether the observation's state is in "
            "the units of training; if it is, the training diverged."
        )
