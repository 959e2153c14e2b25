"""A rater that looks at the clock: the later an action of a chunk, the less sure, as fast as the observation says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlaflow.backbones.base import BackboneSpec, Prefix
from vlaflow.decoders.rating import BaseRaterConfig, Rater


@dataclass(frozen=True)
class HorizonRaterConfig(BaseRaterConfig):
    """The rater.

    Args:
        steepest: largest fall of the confidence's logit from the first action to the last.
    """

    steepest: float = 8.0

    def build(self, spec: BackboneSpec, action_dim: int, chunk_size: int) -> HorizonRater:
        """The network."""
        return HorizonRater(self, spec, chunk_size)


class HorizonRater(Rater):
    """See the module text."""

    share_L: Tensor

    def __init__(self, config: HorizonRaterConfig, spec: BackboneSpec, chunk_size: int) -> None:
        super().__init__()
        self.config = config
        self.judge = nn.Linear(spec.width, 2)
        self.register_buffer("share_L", torch.linspace(0, 1, chunk_size), persistent=False)

    def forward(self, prefix: Prefix, action_BLD: Tensor) -> Tensor:
        """Where the confidence begins, and how fast it falls; the actions themselves are not looked at."""
        state_BPW = prefix.backbone.finish(prefix.hidden_BPW).detach()
        mask_BP = state_BPW.new_ones(state_BPW.shape[:2]) if prefix.padding_mask_BP is None else prefix.padding_mask_BP
        mean_BW = (state_BPW * mask_BP[..., None]).sum(1) / mask_BP.sum(1, keepdim=True)
        first_B1, fall_B1 = self.judge(mean_BW).float().split(1, 1)
        falling_BL = functional.sigmoid(fall_B1) * self.config.steepest * self.share_L
        return functional.sigmoid(first_B1 - falling_BL)
