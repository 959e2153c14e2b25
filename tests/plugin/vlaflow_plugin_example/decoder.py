"""A decoder of straight lines: it names the first and the last action of a chunk, and the others lie between.

Shape letters: B batch, L actions of a chunk, D action dimension, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from vlaflow.backbones.base import BackboneSpec, Prefix
from vlaflow.decoders.base import Conditioning, Decoder, DecoderConfig, Targets, TokenConditioning
from vlaflow.decoders.losses import Draws, LossTerms, mean_over_exits
from vlaflow.flows.sampling import Sampling
from vlaflow.stacks.shared import SharedStack


@dataclass(frozen=True)
class LineConfig(DecoderConfig):
    """The line.

    Args:
        action_dim: D.
        chunk_size: L.
    """

    action_dim: int
    chunk_size: int = 4

    def build(self, spec: BackboneSpec) -> LineDecoder:
        """The network."""
        return LineDecoder(self, spec)


class LineDecoder(Decoder[Tensor | None]):
    """See the module text. It starts from nothing, so it declares no capabilities; its state is the chunk."""

    share_L1: Tensor

    def __init__(self, config: LineConfig, spec: BackboneSpec) -> None:
        super().__init__()
        self.chunk_size, self.action_dim = config.chunk_size, config.action_dim
        self.stack = SharedStack(spec.width)
        self.ends = nn.Parameter(torch.randn(2, spec.width) * 0.02)
        self.head = nn.Linear(spec.width, config.action_dim)
        self.register_buffer("share_L1", torch.linspace(0, 1, config.chunk_size)[:, None], persistent=False)

    def lines(self, prefix: Prefix, depths: Sequence[int]) -> list[Tensor]:
        """Chunks (B, L, D) at each of the depths."""
        found = []
        for hidden_B2W in self.stack.exits(self.ends.expand(prefix.batch, -1, -1), prefix, depths):
            first_BD, last_BD = self.head(hidden_B2W).float().unbind(1)
            found.append(torch.lerp(first_BD[:, None], last_BD[:, None], self.share_L1))
        return found

    @property
    def suffix_tokens(self) -> int:
        """The two ends."""
        return 2

    def nfe(self, sampling: Sampling) -> int:
        """One, whatever number of steps."""
        return 1

    def draw(self, batch: int, generator: Generator) -> Draws:
        """Nothing."""
        return ()

    def loss_of(self, prefix: Prefix, targets: Targets, draws: Draws, depths: Sequence[int] | None = None) -> LossTerms:
        """Mean absolute error over valid actions."""
        depths = depths or (prefix.depth,)
        weight_BL1 = targets.valid_BL[..., None].float()
        count = (weight_BL1.sum() * self.action_dim).clamp(min=1)
        made = dict(zip(depths, self.lines(prefix, depths), strict=True))
        errors = {depth: ((line_BLD - targets.action_BLD).abs() * weight_BL1).sum() / count for depth, line_BLD in made.items()}
        return mean_over_exits("line", errors)

    def start(
        self,
        prefix: Prefix,
        generators: Sequence[Generator],
        sampling: Sampling,
        conditioning: Conditioning | TokenConditioning | None = None,
    ) -> None:
        """Nothing yet."""

    def advance(self, state: Tensor | None, prefix: Prefix, steps: int = 1) -> Tensor:
        """The whole line."""
        return self.lines(prefix, (prefix.depth,))[0]

    def finish(self, state: Tensor | None) -> Tensor:
        """The line."""
        assert state is not None
        return state
