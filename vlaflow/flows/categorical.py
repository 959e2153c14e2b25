"""Sampling from categorical distributions, with one generator per observation.

Shape letters: B batch, S token slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def uniforms(
    generators: Sequence[Generator],
    shape: Sequence[int],
    device: torch.device | None = None,
    drawing_B: Tensor | None = None,
) -> Tensor:
    """Uniform numbers in [0, 1), (B, *shape): every observation has its own generator, so it does not depend on its batch.

    Args:
        generators: B of them.
        shape: of the numbers of one observation.
        device: where they go.
        drawing_B: bool, observations that are not done yet; the others get zeros, and their generators stay as they are, so
            that what they draw later does not depend on how long their neighbours take. None for all.
    """
    drawing = [True] * len(generators) if drawing_B is None else drawing_B.tolist()
    drawn = [
        torch.rand(tuple(shape), generator=g, device=g.device) if d else torch.zeros(tuple(shape), device=g.device)
        for g, d in zip(generators, drawing, strict=True)
    ]
    return torch.stack(drawn).to(device)


def pick(weight_BSV: Tensor, uniform_BS: Tensor) -> Tensor:
    """Inverse-transform sampling: token v with probability weight_v / Σ weight, one uniform number per token.

    Args:
        weight_BSV: weights ≥ 0, not necessarily normalised; a row of zeros gives token 0.
        uniform_BS: in [0, 1).

    Returns:
        int64 (B, S). A token of weight 0 is never drawn from a row that has any weight.
    """
    cumulative_BSV = weight_BSV.cumsum(-1)
    wanted_BS1 = (uniform_BS * cumulative_BSV[..., -1])[..., None]
    # Rounding must not carry the wanted mass to the end of the row, where searchsorted would return V.
    below_BS1 = torch.nextafter(cumulative_BSV[..., -1:], torch.zeros_like(wanted_BS1))
    index_BS1 = torch.searchsorted(cumulative_BSV, torch.minimum(wanted_BS1, below_BS1).clamp(min=0), right=True)
    return index_BS1[..., 0].clamp(max=weight_BSV.shape[-1] - 1) * (cumulative_BSV[..., -1] > 0)


def tempered(logits_BSV: Tensor, temperature: float) -> Tensor:
    """softmax(logits/temperature), float32 (B, S, V); at 0 all the weight is on the most probable token."""
    if temperature == 0:
        best_BS1 = logits_BSV.argmax(-1, keepdim=True)
        return torch.zeros_like(logits_BSV, dtype=torch.float32).scatter_(-1, best_BS1, 1.0)
    return (logits_BSV.float() / temperature).softmax(-1)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise −log(−log u), finite for u in [0, 1)."""
    tiny = torch.finfo(uniform.dtype).tiny
    return -(-(uniform.clamp(min=tiny).log())).clamp(min=tiny).log()
