"""The contract of a decoder: ``loss`` for training; ``start``, ``advance``, ``finish`` for inference.

Whatever a token is, it carries a clock: 1 is pure noise, 0 is done. What a decoder is given with clocks is in
``conditioning``, what it learns in ``targets``; both are importable from here.

Shape letters: B batch, R rows of it, L chunk size, D action dimension, S token slots, N steps, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor, nn

from vlaflow.actions.base import Tokenizer, TokenizerConfig
from vlaflow.backbones.base import Backbone, BackboneSpec, Prefix, RunsLayers
from vlaflow.decoders.capability import Capability
from vlaflow.decoders.conditioning import Conditioning, Guidance, TokenConditioning
from vlaflow.decoders.exits import ExitTraining
from vlaflow.decoders.losses import Draws, LossTerms
from vlaflow.decoders.targets import Targets
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.flows.consistency import VelocityField
from vlaflow.flows.sampling import Sampling
from vlaflow.registry import Group, Part

__all__ = [
    "Conditioning",
    "Decoder",
    "DecoderConfig",
    "Guidance",
    "LatentCodes",
    "Targets",
    "TokenConditioning",
    "Tokens",
]

State = TypeVar("State")


@dataclass(frozen=True)
class Tokens:
    """What a decoder of tokens knows of its chunks beyond the actions.

    Args:
        id_BS: the tokens, int64.
        probability_BS: what the network gave each when it last looked at it.
        repaired_B: bool, chunks whose tokens did not describe one exactly (see ``actions.base.Decoding``).
        revised_BN: int64, tokens that each of the N steps changed.
        nfe: network evaluations each chunk took.
        prefix_runs: how often the prefix was run beyond the once before the first step.
        masked_BS: bool, tokens that stand for nothing yet; None where there are never any.
    """

    id_BS: Tensor
    probability_BS: Tensor
    repaired_B: Tensor
    revised_BN: Tensor
    nfe: tuple[int, ...]
    prefix_runs: tuple[int, ...] = ()
    masked_BS: Tensor | None = None

    def select(self, row_R: Tensor) -> Tokens:
        """Rows of the batch."""
        rows = row_R.tolist()
        return Tokens(
            self.id_BS[row_R],
            self.probability_BS[row_R],
            self.repaired_B[row_R],
            self.revised_BN[row_R],
            tuple(self.nfe[row] for row in rows),
            tuple(self.prefix_runs[row] for row in rows) if self.prefix_runs else (),
            None if self.masked_BS is None else self.masked_BS[row_R],
        )

    @staticmethod
    def cat(parts: Sequence[Tokens]) -> Tokens:
        """One batch after the other; those that took fewer steps get steps that revised nothing."""
        most = max(part.revised_BN.shape[1] for part in parts)
        return Tokens(
            torch.cat([part.id_BS for part in parts]),
            torch.cat([part.probability_BS for part in parts]),
            torch.cat([part.repaired_B for part in parts]),
            torch.cat([nn.functional.pad(part.revised_BN, (0, most - part.revised_BN.shape[1])) for part in parts]),
            tuple(count for part in parts for count in part.nfe),
            tuple(count for part in parts for count in part.prefix_runs),
            None if parts[0].masked_BS is None else torch.cat([p.masked_BS for p in parts if p.masked_BS is not None]),
        )

    def passes(self, depth: int) -> tuple[int, ...]:
        """Network layers run at this depth over tokens and prefix together."""
        runs = self.prefix_runs or (0,) * len(self.nfe)
        return tuple(depth * (count + more) for count, more in zip(self.nfe, runs, strict=True))


@dataclass(frozen=True)
class LatentCodes:
    """Latent action codes that a decoder learns to name: ``codes`` per observation, out of a book of ``book``."""

    codes: int
    book: int


class DecoderConfig(Part, ABC):
    """All that is needed to build a decoder, weights aside; a checkpoint holds it as JSON.

    A kind is a frozen dataclass with ``action_dim`` and ``chunk_size``, registered by its class's name under
    ``vlaflow.decoders`` (docs/extending.md). It states what training must prepare for it.
    """

    group: ClassVar[Group] = "decoders"

    if TYPE_CHECKING:  # a dataclass would take an inherited property for the default of its field

        @property
        def action_dim(self) -> int:
            """Dimensions of an action, D."""

        @property
        def chunk_size(self) -> int:
            """Actions per chunk, L."""

    @abstractmethod
    def build(self, spec: BackboneSpec) -> Decoder[Any]:
        """The decoder for such a backbone, initialised from torch's global generator."""

    def with_chunk_size(self, chunk_size: int) -> Self:
        """The config of a decoder of longer or shorter chunks; kinds whose parts have chunk sizes of their own override it."""
        changed: Self = replace(self, chunk_size=chunk_size)  # type: ignore[type-var]  # every kind is a dataclass
        return changed

    @property
    def unfitted(self) -> bool:
        """Whether its action tokenizer is still to be fitted on the training data."""
        return False

    def fitted(self, action_NLD: np.ndarray) -> Self:
        """The config with a fitted tokenizer; one that is fitted already stays.

        Args:
            action_NLD: normalised chunks to fit on.
        """
        return self

    def with_tokenizer(self, tokenizer: TokenizerConfig) -> Self:
        """The config with this action tokenizer.

        Raises:
            ConfigError: for decoders that read and write no action tokens.
        """
        raise ConfigError(f"A {type(self).__name__} has no vocabulary for an action tokenizer; leave --tokenizer out.")

    @property
    def latent_codes(self) -> LatentCodes | None:
        """The latent action codes that training teaches it to name; None where it needs none."""
        return None

    def untruncated(self, noise_samples: int) -> Self:
        """The config of a later stage, in which the gradients of the actions reach the backbone.

        Args:
            noise_samples: per observation.

        Raises:
            CapabilityError: for decoders that truncate no gradients.
        """
        raise CapabilityError(
            f"A {type(self).__name__} truncates no gradients, so there is no later stage for it. This recipe "
            "continues a policy of iflybot.joint; train that first."
        )


class Decoder(nn.Module, ABC, Generic[State]):
    """Moves action tokens from noise to actions, reading a prefix at whatever depth it has reached."""

    chunk_size: int
    action_dim: int
    tokenizer: Tokenizer | None = None
    """The fitted action tokenizer, for decoders that have a vocabulary."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What this decoder can do, by construction and by training."""
        return frozenset()

    @property
    def max_action_prefix(self) -> int:
        """How many committed actions a chunk may begin with, which leave at least one to make; 0 where it can continue none."""
        return self.chunk_size - 1 if {Capability.CONDITIONING, Capability.REGENERATION} <= self.capabilities else 0

    @property
    def suffix_tokens(self) -> int:
        """Tokens that it runs through the backbone's own layers behind an observation's, which must have positions for them.

        By default none, as of a decoder with layers of its own.
        """
        return 0

    def begin_from(self, backbone: Backbone) -> None:
        """Take first values from a backbone's own weights, where the config asks for it; by default none."""

    def learn_exits(self, exits: ExitTraining) -> None:
        """Answer at several depths; called once, before training.

        Raises:
            ConfigError: they are to have heads or targets of their own, which this kind of decoder does not offer.
        """
        if not exits.alike:
            raise ConfigError(
                f"The exits of a {type(self).__name__} share its head and targets; leave own_heads, detached and distil out."
            )

    def forget_values(self) -> None:
        """Let zeros of the same shape stand for what is computed from values: a dry run has none. By default nothing is."""

    @abstractmethod
    def nfe(self, sampling: Sampling) -> int:
        """Network evaluations that a chunk costs."""

    def start_passes(self, depth: int) -> int:
        """Layers that ``start`` runs for each chunk, at this depth of the prefix; by default none."""
        return 0

    def prepare(self, targets: Targets) -> Targets:
        """Targets with what the loss needs of them and only the CPU can compute; by default there is nothing."""
        return targets

    @abstractmethod
    def draw(self, batch: int, generator: Generator) -> Draws:
        """The random numbers of a training loss on so many samples, on the CPU; nothing else in ``loss_of`` is random."""

    @abstractmethod
    def loss_of(self, prefix: Prefix, targets: Targets, draws: Draws, depths: Sequence[int] | None = None) -> LossTerms:
        """Training loss on one batch, the mean over exits at these depths (by default only where the prefix ends).

        Every exit sees the same noise. With several depths, ``parts`` names the loss of each: "velocity@2".

        Args:
            prefix: of B observations.
            targets: to be learned.
            draws: what ``draw`` made for B samples, on the networks' device.
            depths: of the exits, ascending.
        """

    def loss(self, prefix: Prefix, targets: Targets, generator: Generator, depths: Sequence[int] | None = None) -> LossTerms:
        """``loss_of`` with numbers drawn from ``generator``."""
        device = targets.action_BLD.device
        draws = tuple(drawn.to(device) for drawn in self.draw(prefix.batch, generator))
        return self.loss_of(prefix, targets, draws, depths)

    def velocity_field(self, prefix: Prefix) -> VelocityField:
        """The flow that its solver steps follow for these observations, at ``prefix.depth``.

        Raises:
            CapabilityError: for decoders that follow none.
        """
        raise CapabilityError(f"A {type(self).__name__} has no velocity that another could learn; use a flow decoder.")

    @abstractmethod
    def start(
        self,
        prefix: Prefix,
        generators: Sequence[Generator],
        sampling: Sampling,
        conditioning: Conditioning | TokenConditioning | None = None,
    ) -> State:
        """Initial tokens for B observations, to be finished as ``sampling`` says; one generator per observation."""

    @abstractmethod
    def advance(self, state: State, prefix: Prefix, steps: int = 1) -> State:
        """``steps`` solver steps at ``prefix.depth``."""

    @abstractmethod
    def finish(self, state: State) -> Tensor:
        """Normalised actions, (B, L, D) float32."""

    def continued(self, action_BLD: Tensor, known_B: Tensor, committed_B: Tensor, *, guided: bool = False) -> Conditioning:
        """What ``start`` is given so that chunks continue the chunks before them (real-time chunking).

        Args:
            action_BLD: normalised actions of the earlier chunks, from the one that the new chunk's first describes.
            known_B: how many of them there are; the rest is ignored.
            committed_B: how many are executed whatever comes. They have clock 0, the others 1.
            guided: bend the flow towards them instead, as for decoders that are not trained for it.

        Raises:
            CapabilityError: for decoders that can continue no chunk, or not so.
        """
        if not self.max_action_prefix or guided:
            raise CapabilityError(
                f"A {type(self).__name__} like this cannot continue committed actions{' by guidance' * guided}. Use a flow "
                "decoder, or a discrete flow over bins trained with masks='unified'."
            )
        place_1L = torch.arange(self.chunk_size, device=action_BLD.device)[None]
        return Conditioning(action_BLD, (place_1L >= committed_B[:, None]).float())

    def tokens(self, state: State) -> Tokens | None:
        """What is known of the tokens, for decoders that have a vocabulary."""
        return None

    def distance(self) -> Tensor | None:
        """Distances between all tokens, (V, V) or (S, V, V), where training or sampling uses a metric; otherwise None."""
        return None

    def refine_deterministic(self, state: State, prefix: Prefix, steps: int = 1) -> State:
        """Deterministic steps that may still revise every token.

        Raises:
            CapabilityError: without ``Capability.DETERMINISTIC_STEPS``.
        """
        raise CapabilityError(f"A {type(self).__name__} has no deterministic steps that revise tokens; use a discrete flow.")

    def refreshing(self, state: State, share: float) -> State:
        """The same chunk under way, its prefix to be run again whenever more than this share of the tokens has changed.

        Args:
            state: before its first step.
            share: in [0, 1]; at 0 the prefix is run at every step.

        Raises:
            CapabilityError: without ``Capability.PREFIX_REFRESH``.
        """
        raise CapabilityError(f"A {type(self).__name__} never runs the prefix again; use a discrete flow.")

    def token_conditioning(self, conditioning: Conditioning | TokenConditioning) -> TokenConditioning:
        """Given actions as tokens.

        Raises:
            CapabilityError: without a vocabulary, or when no token belongs to one action.
        """
        raise CapabilityError(f"A {type(self).__name__} has no vocabulary; use a decoder of tokens.")

    def read(self, backbone: RunsLayers, prefix: Prefix, depth: int | None = None) -> Prefix:
        """Run the prefix as far as this decoder needs it before its first step; by default through ``depth`` layers."""
        return backbone.run(prefix, depth)

    def solve(
        self,
        prefix: Prefix,
        generators: Sequence[Generator],
        sampling: Sampling,
        conditioning: Conditioning | TokenConditioning | None = None,
    ) -> State:
        """Start, and all steps at ``prefix.depth``."""
        return self.advance(self.start(prefix, generators, sampling, conditioning), prefix, sampling.steps)

    def sample(
        self,
        prefix: Prefix,
        generators: Sequence[Generator],
        sampling: Sampling,
        conditioning: Conditioning | TokenConditioning | None = None,
    ) -> Tensor:
        """A whole chunk (B, L, D): start, all steps, finish."""
        return self.finish(self.solve(prefix, generators, sampling, conditioning))
