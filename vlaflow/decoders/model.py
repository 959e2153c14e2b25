"""The networks of one policy side by side: backbone, decoder and, once it is trained, the rater."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlaflow.backbones.base import Backbone, Prefix
from vlaflow.backbones.inputs import Inputs
from vlaflow.decoders.base import Decoder
from vlaflow.decoders.rating import Rater


class Model(nn.Module):
    """What a compute policy works with.

    Args:
        backbone, decoder, rater: the networks.
        depths: at which exits were trained; none but the full depth by default.
    """

    def __init__(
        self,
        backbone: Backbone,
        decoder: Decoder[Any],
        rater: Rater | None = None,
        depths: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.depths = depths or (backbone.spec.depth,)
        self.backbone = backbone
        self.decoder = decoder
        self.rater = rater

    @property
    def device(self) -> torch.device:
        """Where the networks live."""
        return next(self.parameters()).device

    @property
    def engine(self) -> str:
        """What computes it, in words: "eager", or how its programs were compiled."""
        return "eager"

    def embed(self, inputs: Inputs) -> Prefix:
        """The tokens of observations, before the first layer."""
        return self.backbone.embed(inputs)

    def read(self, prefix: Prefix, depth: int | None = None) -> Prefix:
        """The prefix as far as the decoder reads it before its first step, by default through all layers (``Decoder.read``)."""
        return self.decoder.read(self.backbone, prefix, depth)
