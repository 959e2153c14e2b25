"""The regression decoder: query tokens read the prefix once, a residual network turns them into actions (OFT, A1-MLP).

Nothing is sampled and there are no clocks to walk: a chunk costs one evaluation whatever number of steps is asked, and the
decoder can start from nothing given.

Shape letters: B batch, L chunk size, D action dimension, T query tokens, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from vlaflow.backbones.base import BackboneSpec, Prefix
from vlaflow.decoders.base import Conditioning, Decoder, DecoderConfig, Targets, TokenConditioning
from vlaflow.decoders.exits import ExitHeads, ExitTraining
from vlaflow.decoders.losses import Draws, LossTerms, mean_over_exits
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.drawn import drawn
from vlaflow.nn.resnet import ResidualMLP
from vlaflow.ranges import Number, Width
from vlaflow.stacks.base import Stack
from vlaflow.stacks.expert import ExpertConfig
from vlaflow.stacks.shared import SharedStack


@dataclass(frozen=True)
class RegressionConfig(DecoderConfig):
    """The regression decoder.

    Args:
        action_dim: D.
        chunk_size: actions per chunk, L.
        queries: one token per "dimension" of every action (OFT, A1: T = L·D), or one per "action" (T = L).
        hidden: width of the head; None for the stack's.
        head_layers: residual layers of the head.
        expert: a stack of its own for the queries; None runs them through the backbone's layers.
    """

    action_dim: Width
    chunk_size: Width = 16
    queries: Literal["dimension", "action"] = "dimension"
    hidden: int | None = None
    head_layers: Number = 2
    expert: ExpertConfig | None = None

    def __post_init__(self) -> None:
        if min(self.action_dim, self.chunk_size) < 1:
            raise ConfigError(f"action_dim and chunk_size must be at least 1, got {self.action_dim} and {self.chunk_size}.")

    @property
    def tokens(self) -> int:
        """Query tokens, T."""
        return self.chunk_size * (self.action_dim if self.queries == "dimension" else 1)

    def build(self, spec: BackboneSpec) -> RegressionDecoder:
        """The decoder for such a backbone, randomly initialised."""
        return RegressionDecoder(self, spec)


@dataclass(frozen=True)
class RegressionState:
    """The chunk, once it is made."""

    action_BLD: Tensor | None = None


class RegressionDecoder(Decoder[RegressionState]):
    """See the module text."""

    def __init__(self, config: RegressionConfig, spec: BackboneSpec) -> None:
        super().__init__()
        self.config = config
        self.chunk_size, self.action_dim = config.chunk_size, config.action_dim
        self.stack: Stack = config.expert.build(spec, config.tokens) if config.expert else SharedStack(spec.width)
        width = self.stack.width
        self.query = drawn(config.tokens, width)
        self._reads, self._hidden = config.tokens // config.chunk_size * width, config.hidden or width
        self.head = ResidualMLP(self._reads, self._hidden, config.action_dim, config.head_layers)
        self.exits = ExitTraining((spec.depth,))
        self.exit_heads: ExitHeads | None = None

    def learn_exits(self, exits: ExitTraining) -> None:
        """See ``Decoder``."""
        self.exits = exits
        if exits.own_heads:
            self.exit_heads = ExitHeads(exits, self._reads, self._hidden, self.action_dim)

    @property
    def suffix_tokens(self) -> int:
        """The queries, unless an expert has layers for them."""
        return 0 if self.stack.own_layers else self.config.tokens

    def nfe(self, sampling: Sampling) -> int:
        """One, whatever number of steps."""
        return 1

    def answers(self, prefix: Prefix, depths: Sequence[int]) -> list[Tensor]:
        """Normalised chunks (B, L, D) at each of the depths."""
        hidden = self._hidden_states(prefix, depths)
        made = [self.answer(hidden_BLW, depth) for hidden_BLW, depth in zip(hidden, depths, strict=True)]
        return [self.masked(made_BLD, prefix) for made_BLD in made]

    @staticmethod
    def masked(action_BLD: Tensor, prefix: Prefix) -> Tensor:
        """The chunk with 0 in the dimensions and steps that the observation's robot lacks."""
        mask_BLD = prefix.action_mask_BLD
        return action_BLD if mask_BLD is None else torch.where(mask_BLD, action_BLD, 0.0)

    def answer(self, hidden_BLW: Tensor, depth: int) -> Tensor:
        """Normalised chunk (B, L, D) that the head of a depth makes of the queries' hidden states."""
        if self.exit_heads is None or depth not in self.exit_heads:
            return self.head(hidden_BLW).float()
        return self.exit_heads(hidden_BLW, depth).float()

    def _hidden_states(self, prefix: Prefix, depths: Sequence[int]) -> list[Tensor]:
        """Of the queries of each action, (B, L, T/L·W), at each of the depths."""
        query_BTW = self.query.expand(prefix.batch, -1, -1)
        hidden = self.stack.exits(query_BTW, prefix, depths)
        return [hidden_BTW.reshape(prefix.batch, self.chunk_size, -1) for hidden_BTW in hidden]

    def draw(self, batch: int, generator: Generator) -> Draws:
        """Nothing."""
        return ()

    def loss_of(self, prefix: Prefix, targets: Targets, draws: Draws, depths: Sequence[int] | None = None) -> LossTerms:
        """Mean absolute error over valid actions and the dimensions that their robots have."""
        depths = depths or (prefix.depth,)
        weight_BL1 = targets.valid_BL[..., None].float()
        count = (weight_BL1.sum() * self.action_dim).clamp(min=1)
        if targets.mask_BLD is not None:  # each action counts by the mean over its own dimensions
            count = targets.valid_BL.sum().clamp(min=1)
            weight_BL1 = weight_BL1 * targets.mask_BLD / targets.mask_BLD.sum(-1, keepdim=True).clamp(min=1)

        def loss(made_BLD: Tensor, target_BLD: Tensor) -> Tensor:
            return ((made_BLD - target_BLD).abs() * weight_BL1).sum() / count

        hidden = self._hidden_states(prefix, depths)
        target_BLD = targets.action_BLD.float()
        losses = self.exits.losses(hidden, depths, self.answer, loss, target_BLD, training=self.training)
        return mean_over_exits("absolute", losses)

    def start(
        self,
        prefix: Prefix,
        generators: Sequence[Generator],
        sampling: Sampling,
        conditioning: Conditioning | TokenConditioning | None = None,
    ) -> RegressionState:
        """Nothing to prepare.

        Raises:
            CapabilityError: when tokens are given.
        """
        if conditioning is not None:
            raise CapabilityError("A regression decoder cannot start from given actions; use a flow decoder for that.")
        return RegressionState()

    def advance(self, state: RegressionState, prefix: Prefix, steps: int = 1) -> RegressionState:
        """The first step makes the chunk at ``prefix.depth``; more change nothing."""
        return state if state.action_BLD is not None else RegressionState(self.answers(prefix, (prefix.depth,))[0])

    def finish(self, state: RegressionState) -> Tensor:
        """The chunk.

        Raises:
            CapabilityError: when no step was taken.
        """
        if state.action_BLD is None:
            raise CapabilityError("This chunk was never advanced; take at least one step before finish.")
        return state.action_BLD
