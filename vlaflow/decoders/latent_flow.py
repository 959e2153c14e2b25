"""iFlyBot-VLA's decoder: latent action tokens and FAST tokens teach the backbone, a flow expert reads the latent ones.

A composition of three that exist on their own: a ``LatentReader`` (what will happen, in K codes), an autoregressive decoder of
FAST tokens that sees prefix and codes (only while training, for what it teaches the backbone), and a flow decoder with an
expert of its own that reads the codes' keys and values: those alone ("latent", the paper) or with the prefix ("prefix+latent",
the public code). FAST tokens never are in what the expert reads. With ``truncate`` the expert reads them detached, so that the
flow loss leaves the backbone as its language targets make it (the paper's second stage).

Shape letters: B batch, L chunk size, D action dimension, K codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import numpy as np
import torch
from torch import Generator, Tensor

from vlaflow.actions.base import TokenizerConfig
from vlaflow.backbones.base import BackboneSpec, Prefix
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.base import Conditioning, Decoder, DecoderConfig, LatentCodes, Targets, TokenConditioning
from vlaflow.decoders.capability import Capability
from vlaflow.decoders.exits import ExitTraining
from vlaflow.decoders.flow import FlowConfig, FlowState
from vlaflow.decoders.latent_reader import LatentTokensConfig, Written
from vlaflow.decoders.losses import Draws, LossTerms
from vlaflow.errors import ConfigError
from vlaflow.flows.consistency import VelocityField
from vlaflow.flows.sampling import Sampling
from vlaflow.ranges import NotNegative


@dataclass(frozen=True)
class LatentFlowConfig(DecoderConfig):
    """The three parts, and how they hang together.

    Args:
        flow: makes the actions; has an expert.
        latent: the codes that are predicted first.
        fast: FAST tokens as further targets of the backbone; None for none.
        sees: what the expert reads.
        truncate: no gradient from the flow loss into the backbone.
        teaches: whether codes and FAST tokens are targets at all; without, the K tokens are only room to think.
        latent_weight, fast_weight: of their losses relative to the flow's, which has 1.
    """

    flow: FlowConfig
    latent: LatentTokensConfig = field(default_factory=LatentTokensConfig)
    fast: AutoregressiveConfig | None = None
    sees: Literal["latent", "prefix+latent"] = "latent"
    truncate: bool = True
    teaches: bool = True
    latent_weight: NotNegative = 1.0
    fast_weight: NotNegative = 1.0

    def __post_init__(self) -> None:
        if self.flow.expert is None:
            raise ConfigError("A latent flow needs an expert; set decoder.flow.expert.")
        if not self.teaches and self.latent.answer == "autoregressive":
            raise ConfigError("Codes that are predicted one after the other cannot be left untaught; use answer='parallel'.")
        if self.fast is not None and (self.fast.chunk_size, self.fast.action_dim) != (self.chunk_size, self.action_dim):
            raise ConfigError(
                f"FAST tokens of {self.fast.chunk_size} actions of {self.fast.action_dim} dimensions do not describe "
                f"the flow's chunks of {self.chunk_size} of {self.action_dim}; give both the same."
            )

    @property
    def chunk_size(self) -> int:
        """Actions per chunk, L."""
        return self.flow.chunk_size

    @property
    def action_dim(self) -> int:
        """D."""
        return self.flow.action_dim

    def with_chunk_size(self, chunk_size: int) -> Self:
        """See ``DecoderConfig``: of all parts."""
        fast = self.fast and self.fast.with_chunk_size(chunk_size)
        return replace(self, flow=self.flow.with_chunk_size(chunk_size), fast=fast)

    @property
    def unfitted(self) -> bool:
        """Whether the FAST tokenizer is to be fitted first."""
        return self.fast is not None and self.fast.unfitted

    def with_tokenizer(self, tokenizer: TokenizerConfig) -> Self:
        """The config with this tokenizer.

        Raises:
            ConfigError: without FAST targets.
        """
        if self.fast is None:
            raise ConfigError("This decoder has no FAST targets, so it cannot use an action tokenizer; leave --tokenizer out.")
        return replace(self, fast=self.fast.with_tokenizer(tokenizer))

    def fitted(self, action_NLD: np.ndarray) -> Self:
        """The config with a fitted tokenizer."""
        return replace(self, fast=self.fast and self.fast.fitted(action_NLD))

    @property
    def latent_codes(self) -> LatentCodes | None:
        """Those that are predicted first, where they are targets at all."""
        return LatentCodes(self.latent.codes, self.latent.book) if self.teaches else None

    def untruncated(self, noise_samples: int) -> Self:
        """See ``DecoderConfig``."""
        return replace(self, truncate=False, flow=replace(self.flow, noise_samples=noise_samples))

    def build(self, spec: BackboneSpec) -> LatentFlowDecoder:
        """The decoder for such a backbone, randomly initialised."""
        return LatentFlowDecoder(self, spec)


@dataclass(frozen=True)
class LatentFlowState:
    """A chunk under way, and what its expert reads."""

    flow: FlowState
    context: Prefix


class LatentFlowDecoder(Decoder[LatentFlowState]):
    """See the module text."""

    def __init__(self, config: LatentFlowConfig, spec: BackboneSpec) -> None:
        super().__init__()
        self.config = config
        self.chunk_size, self.action_dim = config.chunk_size, config.action_dim
        self.latent = config.latent.build(spec)
        self.flow = config.flow.build(spec)
        self.fast = config.fast.build(spec) if config.fast else None

    @property
    def capabilities(self) -> frozenset[Capability]:
        """As its flow."""
        return self.flow.capabilities

    @property
    def max_action_prefix(self) -> int:
        """As its flow."""
        return self.flow.max_action_prefix

    def learn_exits(self, exits: ExitTraining) -> None:
        """See ``Decoder``: those of its flow."""
        self.flow.learn_exits(exits)

    @property
    def suffix_tokens(self) -> int:
        """The latent tokens, and the FAST tokens behind them; the expert has layers for the actions."""
        fast = 0 if self.fast is None else self.config.latent.codes + self.fast.suffix_tokens
        return max(self.latent.suffix_tokens, fast)

    def nfe(self, sampling: Sampling) -> int:
        """Of the expert, whatever the latent tokens take."""
        return self.flow.nfe(sampling)

    def start_passes(self, depth: int) -> int:
        """See ``Decoder``: of the latent tokens."""
        return self.latent.passes * depth

    def prepare(self, targets: Targets) -> Targets:
        """See ``Decoder``: the FAST tokens, where these are targets."""
        return targets if self.fast is None else self.fast.prepare(targets)

    def draw(self, batch: int, generator: Generator) -> Draws:
        """Those of the flow, then those of the FAST tokens."""
        return (*self.flow.draw(batch, generator), *(self.fast.draw(batch, generator) if self.fast is not None else ()))

    def loss_of(self, prefix: Prefix, targets: Targets, draws: Draws, depths: Sequence[int] | None = None) -> LossTerms:
        """Flow loss, and the cross-entropies of codes and FAST tokens at the deepest exit.

        Codes that are answered one after the other are learned at every exit, for what is read next depends on the answer.

        Raises:
            ConfigError: when the batch holds no codes to learn.
        """
        c, depths = self.config, tuple(depths or (prefix.depth,))
        if not c.teaches:
            written = self.latent.teach(prefix, None, depths)
            return self.flow.loss_of(self._context(prefix, written), targets, draws[: self.flow.DRAWS], depths)
        if targets.code_BK is None:
            raise ConfigError(
                "This decoder learns latent actions and the batch has none; train with --latent (docs/latent.md)."
            )
        written = self.latent.teach(prefix, targets.code_BK, depths)
        flow = self.flow.loss_of(self._context(prefix, written), targets, draws[: self.flow.DRAWS], depths)
        answered = written.hidden if c.latent.answer == "autoregressive" else written.hidden[-1:]
        latent = torch.stack([self.latent.loss(hidden_BKW, targets.code_BK) for hidden_BKW in answered]).mean()
        auxiliary, parts = c.latent_weight * latent, {**flow.parts, "latent": latent.detach()}
        if self.fast is not None:
            fast = self.fast.loss_of(written.after(prefix), targets, draws[self.flow.DRAWS :], depths[-1:])
            auxiliary, parts = auxiliary + c.fast_weight * fast.total, {**parts, "fast": fast.total.detach()}
        return LossTerms(flow.total + auxiliary, parts, flow.exits, auxiliary)

    def velocity_field(self, prefix: Prefix) -> VelocityField:
        """See ``Decoder``: of its flow, given the latent tokens that it predicts."""
        return self.flow.velocity_field(self._context(prefix, self.latent.read(prefix)))

    def start(
        self,
        prefix: Prefix,
        generators: Sequence[Generator],
        sampling: Sampling,
        conditioning: Conditioning | TokenConditioning | None = None,
    ) -> LatentFlowState:
        """The latent tokens, then the flow's noise."""
        context = self._context(prefix, self.latent.read(prefix))
        return LatentFlowState(self.flow.start(context, generators, sampling, conditioning), context)

    def advance(self, state: LatentFlowState, prefix: Prefix, steps: int = 1) -> LatentFlowState:
        """Solver steps of the expert."""
        return replace(state, flow=self.flow.advance(state.flow, state.context, steps))

    def finish(self, state: LatentFlowState) -> Tensor:
        """The chunk."""
        return self.flow.finish(state.flow)

    def continued(self, action_BLD: Tensor, known_B: Tensor, committed_B: Tensor, *, guided: bool = False) -> Conditioning:
        """As its flow."""
        return self.flow.continued(action_BLD, known_B, committed_B, guided=guided)

    def codes(self, prefix: Prefix) -> Tensor:
        """The codes that the backbone predicts, int64 (B, K)."""
        with torch.no_grad():
            return self.latent.logits(self.latent.read(prefix).hidden[-1]).argmax(-1)

    def _context(self, prefix: Prefix, written: Written) -> Prefix:
        context = written.alone(prefix) if self.config.sees == "latent" else written.after(prefix)
        return context.detach() if self.config.truncate else context
