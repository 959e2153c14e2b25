"""The networks of one policy side by side: backbone, decoder and, once it is trained, the rater."""

from __future__ import annotations

from torch import nn

from vlaflow.backbones.base import Backbone
from vlaflow.decoders.flow import FlowDecoder
from vlaflow.decoders.rater import ConfidenceRater


class Model(nn.Module):
    """What a compute policy works with."""

    def __init__(self, backbone: Backbone, decoder: FlowDecoder, rater: ConfidenceRater | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.rater = rater
