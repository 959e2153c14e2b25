"""What a compute policy decoded, as one chunk per observation in robot units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vlaflow.compute.base import Decoded
from vlaflow.decoders.base import Tokens
from vlaflow.errors import NotFiniteError, SpecError
from vlaflow.spec import ActionSpec, Chunk


def chunks(
    out: Decoded,
    action_BLD: np.ndarray,
    draft_BLD: np.ndarray | None,
    action_spec: ActionSpec,
    milliseconds: Sequence[Mapping[str, float]],
) -> list[Chunk]:
    """Chunks clipped to the action spec's range.

    Args:
        out: what was decoded.
        action_BLD, draft_BLD: of it, in robot units.
        action_spec: of the robot.
        milliseconds: of each chunk.

    Raises:
        NotFiniteError: an action, or a judgement of it, is no number.
        SpecError: chunks of another shape than the config and the action spec say.
    """
    _require_shape(action_BLD, action_spec)
    _require_finite(action_BLD, out)  # before the range is clipped, which would make a bound of an infinite value
    low, high, steps = action_spec.low, action_spec.high, action_BLD.shape[1]

    def row(values_BL: Tensor | None, i: int) -> Any:
        return None if values_BL is None else values_BL[i, :steps].float().cpu().numpy()

    return [
        Chunk(
            actions=action_BLD[i].clip(low, high),
            confidence=row(out.confidence_BL, i),
            spread=row(out.spread_BL, i),
            regenerated=None if out.regenerated_BL is None else out.regenerated_BL[i, :steps].cpu().numpy(),
            draft=None if draft_BLD is None else draft_BLD[i].clip(low, high),
            layers=out.layers[i],
            layer_passes=out.layer_passes[i],
            nfe=out.nfe[i],
            milliseconds=dict(milliseconds[i]),
            **_token_report(out.tokens, i),
        )
        for i in range(len(action_BLD))
    ]


def _token_report(tokens: Tokens | None, row: int) -> dict[str, Any]:
    if tokens is None:
        return {}
    return {
        "tokens": tokens.id_BS[row].cpu().numpy(),
        "token_probability": tokens.probability_BS[row].float().cpu().numpy(),
        "revised": tuple(tokens.revised_BN[row].tolist()),
        "repaired": bool(tokens.repaired_B[row]),
    }


def _require_shape(action_BLD: np.ndarray, action_spec: ActionSpec) -> None:
    made, stated = action_BLD.shape[1:], (action_spec.chunk_size or action_BLD.shape[1], action_spec.dim)
    if made != stated:
        raise SpecError(
            f"The policy made a chunk of shape {made}, and its config and action spec say {stated}: actions, and numbers of "
            "each. Correct what its decoder's finish or the compute policy's decode returns."
        )


def _require_finite(action_BLD: np.ndarray, out: Decoded) -> None:
    """Refuse a chunk, or a judgement of it, that is no number; tokens can describe finite actions when their logits are NaN."""
    judged = (out.confidence_BL, None if out.tokens is None else out.tokens.probability_BS)
    if not np.isfinite(action_BLD).all() or any(t is not None and not bool(t.isfinite().all()) for t in judged):
        raise NotFiniteError(
            "The policy computed NaN or an infinite value, which is no action. Look whether the observation's state is in "
            "the units of training; if it is, the training diverged."
        )
