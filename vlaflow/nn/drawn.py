"""Parameters that begin at random."""

from __future__ import annotations

import torch
from torch import nn


def drawn(*shape: int, std: float = 0.02) -> nn.Parameter:
    """A normally distributed parameter, from torch's global generator; see ``nn.meta`` for why ``torch.randn`` is not used.

    Args:
        shape: of the parameter.
        std: standard deviation; the default is usual for position embeddings.
    """
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=std))
