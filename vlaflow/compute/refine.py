"""Make a chunk, doubt parts of it, regenerate those with the rest as context: AsyncVLA's asynchronous flow matching.

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
from vlaflow.compute.spelling import ComputeKind, Spelling
from vlaflow.decoders.base import Capability, Conditioning
from vlaflow.decoders.model import Model
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.flows.sampling import Sampling


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
class Refine(ComputePolicy):
    """One round of regeneration after any other compute policy.

    Args:
        doubt: which actions to regenerate.
        sampling: of the second round.
        inner: makes the first chunk.
        any_training: also run on a checkpoint that never saw mixed clocks, to measure what becomes of it (claim C2 of the
            paper: it collapses).
    """

    doubt: BelowThreshold | AtRandom = BelowThreshold()
    sampling: Sampling = field(default_factory=Sampling)
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
        needs = self.inner.needs.sampled(self.sampling).also(
            Capability.CONDITIONING, rater=isinstance(self.doubt, BelowThreshold)
        )
        return needs if self.any_training else needs.also(Capability.REGENERATION)

    def decode(
        self,
        model: Model,
        prefix: Prefix,
        generators: Sequence[Generator],
        watch: Stopwatch,
        conditioning: Conditioning | None = None,
    ) -> Decoded:
        """See ``ComputePolicy``. Actions given at clock 0 are never doubted, and what bends the first round bends the second.

        Where the first round ended early, doubt and regeneration have the whole depth: what was not sure gets everything.
        """
        first = self.inner.decode(model, prefix, generators, watch, conditioning)
        draft_BLD, device = first.action_BLD, first.action_BLD.device
        action_BLD, doubted_BL = draft_BLD.clone(), torch.zeros(draft_BLD.shape[:2], dtype=torch.bool, device=device)
        confidence_BL = torch.zeros_like(doubted_BL, dtype=torch.float32) if isinstance(self.doubt, BelowThreshold) else None
        each = model.decoder.nfe(self.sampling)
        layers, passes, nfe, groups = list(first.layers), list(first.layer_passes), list(first.nfe), []
        depth = model.backbone.spec.depth
        for group in first.groups:
            row_R, mine = group.row_R, [generators[row] for row in group.row_R.tolist()]
            with watch.part("prefix"):
                prefix = model.read(group.prefix)
            groups.append(replace(group, prefix=prefix))
            draft_RLD = draft_BLD[row_R]
            doubt_RL, rating_RL = self._doubted(model, prefix, mine, draft_RLD, watch)
            kept = conditioning.select(row_R) if conditioning is not None else None
            if kept is not None:
                doubt_RL = doubt_RL & ~kept.committed_BL
            doubted_BL[row_R] = doubt_RL
            if confidence_BL is not None and rating_RL is not None:
                confidence_BL[row_R] = rating_RL
            extra = (
                prefix.depth - group.prefix.depth + (model.rater.config.depth if model.rater and rating_RL is not None else 0)
            )
            again_A = doubt_RL.any(1).nonzero()[:, 0]
            if len(again_A):  # only chunks with a doubt cost anything more
                with watch.part("refine"):
                    begin = Conditioning.around(kept, draft_RLD, doubt_RL.float())
                    part = prefix if len(again_A) == len(row_R) else prefix.select(again_A)
                    theirs = [mine[place] for place in again_A.tolist()]
                    action_BLD[row_R[again_A]] = model.decoder.sample(part, theirs, self.sampling, begin.select(again_A))
            for row in row_R.tolist():
                passes[row] += extra
            for row in row_R[again_A].tolist():
                passes[row] += each * depth
                nfe[row] += each
                layers[row] = depth
        return Decoded(
            action_BLD,
            groups=tuple(groups),
            layers=tuple(layers),
            nfe=tuple(nfe),
            layer_passes=tuple(passes),
            confidence_BL=confidence_BL if confidence_BL is not None else first.confidence_BL,
            regenerated_BL=doubted_BL,
            draft_BLD=draft_BLD,
        )

    def _doubted(
        self, model: Model, prefix: Prefix, generators: Sequence[Generator], draft_BLD: Tensor, watch: Stopwatch
    ) -> tuple[Tensor, Tensor | None]:
        """Which actions to regenerate, bool (B, L), and the rater's confidence where it was asked."""
        if isinstance(self.doubt, AtRandom):
            draws = [torch.rand(draft_BLD.shape[1], generator=g) < self.doubt.probability for g in generators]
            return torch.stack(draws).to(draft_BLD.device), None
        if model.rater is None:
            raise CapabilityError("Refinement by confidence needs a rater.")
        with watch.part("rater"):
            confidence_BL = model.rater(prefix, draft_BLD)
            return confidence_BL < self.doubt.threshold, confidence_BL


def _parse(typed: Spelling, doubt: BelowThreshold | AtRandom) -> Refine:
    sampling = typed.sampling()
    return Refine(doubt, sampling, typed.inner or Dense.by(sampling), typed.knobs.any_training)


REFINE = ComputeKind(lambda typed: _parse(typed, BelowThreshold(typed.knobs.threshold)), example="refine")
REFINE_RANDOM = ComputeKind(lambda typed: _parse(typed, AtRandom()), example="refine-random")
