"""Make a chunk, doubt parts of it, make those anew with the rest as context: AsyncVLA's asynchronous flow matching.

The prefix is never encoded again. When nothing is doubted, nothing more is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor

from vlaflow.backbones.base import Prefix
from vlaflow.compute.base import ComputePolicy, Decoded, Requirements, Stopwatch
from vlaflow.compute.dense import Dense
from vlaflow.decoders.base import Given
from vlaflow.decoders.model import Model
from vlaflow.errors import CapabilityError, ConfigError


@dataclass(frozen=True)
class BelowThreshold:
    """Doubt the actions that the rater gives less than ``threshold`` (AsyncVLA eq. 3)."""

    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"A confidence threshold lies in [0, 1], got {self.threshold}.")


@dataclass(frozen=True)
class AtRandom:
    """Doubt each action with this probability: the paper's control for the rater."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"A probability lies in [0, 1], got {self.probability}.")


@dataclass(frozen=True)
class Refine:
    """One round of regeneration after any other compute policy.

    Args:
        doubt: which actions to make anew.
        steps: solver steps of the second round.
        inner: makes the first chunk.
        any_training: also run on a checkpoint that never saw mixed clocks, to measure what becomes of it (claim C2 of the
            paper: it collapses).
    """

    doubt: BelowThreshold | AtRandom = BelowThreshold()
    steps: int = 10
    inner: ComputePolicy = field(default_factory=Dense)
    any_training: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        own = "refine" if isinstance(self.doubt, BelowThreshold) else "refine-random"
        return own if isinstance(self.inner, Dense) else f"{own}({self.inner.name})"

    @property
    def needs(self) -> Requirements:
        """A rater where one is asked, unified training unless waived, and whatever the first round needs."""
        return replace(
            self.inner.needs,
            rater=isinstance(self.doubt, BelowThreshold) or self.inner.needs.rater,
            unified_masks=not self.any_training or self.inner.needs.unified_masks,
        )

    def decode(
        self, model: Model, prefix: Prefix, generators: Sequence[Generator], watch: Stopwatch, given: Given | None = None
    ) -> Decoded:
        """See ``ComputePolicy``. Actions given at clock 0 are never doubted."""
        first = self.inner.decode(model, prefix, generators, watch, given)
        prefix, draft_BLD, passes, confidence_BL = first.prefix, first.action_BLD, first.layer_passes, first.confidence_BL
        if isinstance(self.doubt, BelowThreshold):
            if model.rater is None:
                raise CapabilityError("Refinement by confidence needs a rater.")
            with watch.part("rater"):
                confidence_BL = model.rater(prefix, draft_BLD)
                doubted_BL = confidence_BL < self.doubt.threshold
            passes += model.rater.config.depth
        else:
            doubted_BL = self._at_random(generators, draft_BLD, self.doubt.probability)
        if given is not None:
            doubted_BL = doubted_BL & (given.clock_BL > 0)
        done = replace(first, layer_passes=passes, confidence_BL=confidence_BL, regenerated_BL=doubted_BL, draft_BLD=draft_BLD)
        if not bool(doubted_BL.any()):
            return done
        with watch.part("refine"):
            state = model.decoder.start(prefix, generators, self.steps, Given(draft_BLD, doubted_BL.float()))
            action_BLD = model.decoder.finish(model.decoder.advance(state, prefix, self.steps))
        return replace(
            done,
            action_BLD=action_BLD,
            evaluations=first.evaluations + self.steps,
            layer_passes=passes + self.steps * prefix.depth,
        )

    def _at_random(self, generators: Sequence[Generator], draft_BLD: Tensor, probability: float) -> Tensor:
        draws = [torch.rand(draft_BLD.shape[1], generator=g) < probability for g in generators]
        return torch.stack(draws).to(draft_BLD.device)
