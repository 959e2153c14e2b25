"""Whether draws for one observation form groups, as where demonstrations pass an obstacle on either side.

The mean of such draws lies between the groups, where nobody acted, and so may a chunk sampled with little noise; the medoid and
single draws do not. This module looks at the shape of the draws only; how far they are apart is ``Chunk.spread``.

Shape letters: B batch, K draws, L chunk size, D action dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlaflow.errors import ConfigError

FEWEST = 4
"""With fewer draws, two groups cannot be told from one."""


def multimodality(draw_BKLD: Tensor) -> Tensor:
    """How clearly the draws of each observation fall into two groups, (B,), 0 to 1.

    The draws are projected onto their main direction (first principal component), where two groups differ if there are any.
    With skewness s and kurtosis k of the projections, (s² + 1) / k is Sarle's bimodality coefficient: 1 if and only if there
    are just two values, in any proportion, and 1/3 for a normal distribution. It is rescaled so that K normal draws are at 0:

        m = (b − b₀) / (1 − b₀),  b = (s² + 1) / k
        b₀ = E[s² + 1] / E[k] = (K + 1) / (3 (K − 1)) · (1 + 6 (K − 2) / ((K + 1) (K + 3)))

    and clipped to [0, 1]. So one observation with few draws says little: for eight normal draws m is 0.12 on average with a
    standard deviation of 0.17, for two equal groups three standard deviations from their middle 0.5. Average it over
    observations. A uniform distribution has 1/3, three equal groups in a row 1/2. Draws that are all equal have 0.

    m depends neither on the order of the draws nor on their scale.

    >>> multimodality(torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0]).view(1, 5, 1, 1))
    tensor([1.])

    Args:
        draw_BKLD: normalised chunks, K at least 4.

    Raises:
        ConfigError: with fewer draws.
    """
    draws = draw_BKLD.shape[1]
    if draws < FEWEST:
        raise ConfigError(f"Multimodality needs at least {FEWEST} draws for an observation, got {draws}.")
    draw_BKN = draw_BKLD.flatten(2).double()
    offset_BKN = draw_BKN - draw_BKN.mean(1, keepdim=True)
    # eigenvectors of the K × K inner products are the projections of the draws, up to their scale
    variance_BK, direction_BKK = torch.linalg.eigh(offset_BKN @ offset_BKN.mT)
    value_BK = direction_BKK[..., -1] * draws**0.5
    skewness_B, kurtosis_B = value_BK.pow(3).mean(1), value_BK.pow(4).mean(1)
    normal = (draws + 1) / (3 * (draws - 1)) * (1 + 6 * (draws - 2) / ((draws + 1) * (draws + 3)))
    found_B = ((skewness_B.square() + 1) / kurtosis_B - normal) / (1 - normal)
    # below this, the offsets are rounding errors
    equal_B = variance_BK[:, -1] <= (1e-6 * draw_BKN.abs().amax((1, 2))).square()
    return torch.where(equal_B, 0.0, found_B.clamp(0, 1)).to(draw_BKLD.dtype)
