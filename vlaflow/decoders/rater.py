"""AsyncVLA's confidence rater: one probability per action of a finished chunk, from the observation and the chunk.

As published it learns relative errors: within each chunk the best action is labelled 1 − α and the worst 1 − α − β. So a low
rating says "worse than its neighbours", not "wrong". With an error scale it learns absolute errors, and ratings of different
chunks compare.

Shape letters: B batch, P prefix tokens, L chunk size, D action dimension, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from vlaflow.backbones.base import BackboneSpec, Prefix
from vlaflow.decoders.rating import BaseRaterConfig, Rater, rater_labels
from vlaflow.errors import ConfigError
from vlaflow.nn.block import Block, BlockConfig, make_norm
from vlaflow.nn.drawn import drawn
from vlaflow.ranges import Positive


@dataclass(frozen=True)
class RaterConfig(BaseRaterConfig):
    """The rater.

    Args:
        block: its transformer blocks; their width is that of the backbone.
        depth: number of blocks.
        alpha, beta: labels lie in [1 − alpha − beta, 1 − alpha].
        error_scale: squared error (normalised actions) at which an absolute label is in the middle of its range; None for
            relative labels.
    """

    block: BlockConfig
    depth: int = 2
    alpha: float = 0.01
    beta: float = 0.98
    error_scale: Positive | None = None

    def labels(self, error_BL: Tensor, valid_BL: Tensor) -> Tensor:
        """See ``BaseRaterConfig``: relative to the chunk's other errors, or by the error itself where a scale is stated."""
        if self.error_scale is None:
            return rater_labels(error_BL, valid_BL, self.alpha, self.beta)
        return absolute_labels(error_BL, self.error_scale, self.alpha, self.beta)

    def with_error_scale(self, scale: float) -> Self:
        """See ``BaseRaterConfig``."""
        return replace(self, error_scale=scale)

    def build(self, spec: BackboneSpec, action_dim: int, chunk_size: int) -> ConfidenceRater:
        """The network, randomly initialised.

        Raises:
            ConfigError: its blocks are not as wide as the backbone.
        """
        if self.block.width != spec.width:
            raise ConfigError(
                f"A rater reads the backbone's hidden states, which are {spec.width} wide; set rater.block.width to that "
                f"instead of {self.block.width}."
            )
        return ConfidenceRater(self, action_dim, chunk_size)


def absolute_labels(error_BL: Tensor, scale: float, alpha: float = 0.01, beta: float = 0.98) -> Tensor:
    """q = 1 − α − β·e/(e + s): the same error has the same label in every chunk, and e = s the middle one.

    A rating q of a rater that learned them stands for the error e = s·(1 − α − q)/(q − 1 + α + β).

    Args:
        error_BL: squared error per action, ≥ 0, (B, L).
        scale: s > 0.

    Returns:
        (B, L) in (1 − α − β, 1 − α], falling as the error grows.
    """
    return 1 - alpha - beta * error_BL / (error_BL + scale)


class ConfidenceRater(Rater):
    """Full attention over the prefix's hidden states and the chunk's actions, then a sigmoid per action."""

    def __init__(self, config: RaterConfig, action_dim: int, chunk_size: int) -> None:
        super().__init__()
        self.config, width = config, config.block.width
        self.project = nn.Linear(action_dim, width)
        self.position = drawn(chunk_size, width)
        self.blocks = nn.ModuleList(Block(config.block) for _ in range(config.depth))
        self.norm = make_norm(config.block.norm, width, config.block.eps)
        self.rate = nn.Linear(width, 1)

    @property
    def layers(self) -> int:
        """Its blocks."""
        return len(self.blocks)

    def logits(self, prefix: Prefix, action_BLD: Tensor) -> Tensor:
        """Confidence before the sigmoid, (B, L); the backbone gets no gradient."""
        prefix_BPW = prefix.backbone.finish(prefix.hidden_BPW).detach().to(self.rate.weight.dtype)
        token_BLW = self.project(action_BLD.to(prefix_BPW.dtype)) + self.position
        x_BTW = torch.cat((prefix_BPW, token_BLW), 1)
        padding_mask_BT = None
        if prefix.padding_mask_BP is not None:
            padding_mask_BT = torch.cat((prefix.padding_mask_BP, prefix.padding_mask_BP.new_ones(token_BLW.shape[:2])), 1)
        for block in self.blocks:
            x_BTW, _ = block(x_BTW, None, padding_mask_BT)
        return self.rate(self.norm(x_BTW[:, -token_BLW.shape[1] :]))[..., 0]

    def forward(self, prefix: Prefix, action_BLD: Tensor) -> Tensor:
        """See ``Rater``; in (0, 1)."""
        return self.logits(prefix, action_BLD).float().sigmoid()
