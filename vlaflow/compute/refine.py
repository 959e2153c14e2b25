"""Make a chunk, doubt parts of it, regenerate those with the rest as context: AsyncVLA's asynchronous flow matching.

The prefix is never encoded again. When nothing is doubted, nothing more is computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor

from vlaflow.backbones.base import Prefix
from vlaflow.compute.base import ComputePolicy, Decoded, Passes, Requirements, Stopwatch
from vlaflow.compute.consensus import Consensus
from vlaflow.compute.dense import Dense
from vlaflow.compute.spelling import ComputeKind, Spelling
from vlaflow.decoders.base import Capability, Conditioning, Tokens
from vlaflow.decoders.model import Model
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.flows.sampling import Sampling


@dataclass(frozen=True)
class Draft:
    """What a doubt looks at: first chunks of R observations.

    Args:
        model, watch: as in ``ComputePolicy.decode``.
        prefix: at full depth.
        generators: one per observation.
        action_RLD: normalised.
        spread_RL: of the draws they were made from, where there were several.
    """

    model: Model
    prefix: Prefix
    generators: Sequence[Generator]
    action_RLD: Tensor
    spread_RL: Tensor | None
    watch: Stopwatch


class TokenDoubt(ABC):
    """Which tokens of a draft to regenerate. A kind is a frozen dataclass.

    Attributes:
        rater, spread: whether it needs the rater; whether it needs several draws.
    """

    rater: bool = False
    spread: bool = False

    @abstractmethod
    def judge_tokens(self, draft: Draft, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """Doubted tokens, bool (R, S), and the rater's confidence in the actions, (R, L), where the rater was run."""


class Doubt(TokenDoubt):
    """Which actions of a draft to regenerate, or which tokens where each token belongs to one action.

    Attributes:
        name: of the refinement, for tables.
    """

    name: str

    @abstractmethod
    def judge(self, draft: Draft) -> tuple[Tensor, Tensor | None]:
        """Doubted actions, bool (R, L), and the rater's confidence, (R, L), where the rater was run."""

    def judge_tokens(self, draft: Draft, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """All tokens of the doubted actions; see ``TokenDoubt``."""
        tokenizer = draft.model.decoder.tokenizer
        if tokenizer is None or not tokenizer.local:
            raise CapabilityError(
                f"{type(self).__name__} doubts actions, but in this checkpoint a token belongs to several actions. Doubt "
                "tokens instead: RefineTokens(Improbable(0.5))."
            )
        doubted_RL, confidence_RL = self.judge(draft)
        return doubted_RL.repeat_interleave(tokenizer.dim, 1), confidence_RL


@dataclass(frozen=True)
class BelowThreshold(Doubt):
    """Doubt the actions that the rater gives less than ``threshold`` (AsyncVLA eq. 3)."""

    threshold: float = 0.5

    name = "refine"
    rater = True

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"A confidence threshold lies in [0, 1], got {self.threshold}.")

    def judge(self, draft: Draft) -> tuple[Tensor, Tensor | None]:
        """See ``Doubt``."""
        if draft.model.rater is None:
            raise CapabilityError("Refinement by confidence needs a rater.")
        with draft.watch.part("rater"):
            confidence_RL = draft.model.rater(draft.prefix, draft.action_RLD)
            return confidence_RL < self.threshold, confidence_RL


@dataclass(frozen=True)
class AtRandom(Doubt):
    """Doubt each action with this probability: the paper's control for the rater."""

    probability: float = 0.5

    name = "refine-random"

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"A probability lies in [0, 1], got {self.probability}.")

    def judge(self, draft: Draft) -> tuple[Tensor, Tensor | None]:
        """See ``Doubt``."""
        draws = [torch.rand(draft.action_RLD.shape[1], generator=g) < self.probability for g in draft.generators]
        return torch.stack(draws).to(draft.action_RLD.device), None


@dataclass(frozen=True)
class Spread(Doubt):
    """Doubt the actions on which several draws lie more than ``threshold`` apart, in the units of ``Chunk.spread``."""

    threshold: float = 0.5

    name = "refine-spread"
    spread = True

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ConfigError(f"A spread is 0 or more, got {self.threshold}.")

    def judge(self, draft: Draft) -> tuple[Tensor, Tensor | None]:
        """See ``Doubt``."""
        if draft.spread_RL is None:
            raise CapabilityError("Refinement by spread needs several draws.")
        return draft.spread_RL > self.threshold, None


@dataclass(frozen=True)
class Refine(ComputePolicy):
    """One round of regeneration after any other compute policy.

    Args:
        doubt: which actions to regenerate.
        sampling: of the second round.
        inner: makes the first chunk.
        any_training: also run on a checkpoint that never saw mixed clocks, to measure what becomes of it (claim C2 of the
            paper: it collapses).
        label: of the round itself, for tables; by default that of the doubt.
    """

    doubt: Doubt = BelowThreshold()
    sampling: Sampling = field(default_factory=Sampling)
    inner: ComputePolicy = field(default_factory=Dense)
    any_training: bool = False
    label: str = ""

    def __post_init__(self) -> None:
        require_spread(self.name, self.doubt, self.inner)

    @property
    def name(self) -> str:
        """For tables."""
        own = self.label or self.doubt.name
        return own if self.inner.name == "dense" else f"{own}({self.inner.name})"

    @property
    def needs(self) -> Requirements:
        """A rater where the doubt needs one, unified training unless waived, and whatever the first round needs."""
        needs = self.inner.needs.sampled(self.sampling).also(Capability.CONDITIONING, rater=self.doubt.rater)
        return needs if self.any_training else needs.also(Capability.REGENERATION)

    def read(self, model: Model, prefix: Prefix) -> Prefix:
        """As the first round does."""
        return self.inner.read(model, prefix)

    def passes(self, depth: int) -> Passes:
        """Those of the first round, then those of doubt and regeneration."""
        return self.inner.passes(depth).then(depth, rated=self.doubt.rater)

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
        confidence_BL = torch.zeros_like(doubted_BL, dtype=torch.float32) if self.doubt.rater else None
        each = model.decoder.nfe(self.sampling)
        layers, passes, nfe, groups = list(first.layers), list(first.layer_passes), list(first.nfe), []
        depth = model.backbone.spec.depth
        for group in first.groups:
            row_R, mine = group.row_R, [generators[row] for row in group.row_R.tolist()]
            with watch.part("prefix"):
                prefix = model.read(group.prefix)
            groups.append(replace(group, prefix=prefix))
            draft_RLD = draft_BLD[row_R]
            spread_RL = None if first.spread_BL is None else first.spread_BL[row_R]
            doubt_RL, rating_RL = self.doubt.judge(Draft(model, prefix, mine, draft_RLD, spread_RL, watch))
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
            spread_BL=first.spread_BL,
        )


def require_spread(name: str, doubt: TokenDoubt, inner: ComputePolicy) -> None:
    """Refuse a doubt about the spread of draws where the first round makes one draw."""
    if doubt.spread and not inner.reports_spread:
        raise ConfigError(
            f"{name} doubts actions on which several draws differ, and its first round makes one chunk. Give it a "
            "consensus, as in refine-spread+mean:8."
        )


def _parse(typed: Spelling, doubt: Doubt) -> Refine:
    sampling, label = typed.sampling(), typed.own if typed.more else ""
    inner = typed.inner or (Consensus(inner=Dense.by(sampling)) if doubt.spread else Dense.by(sampling))
    return Refine(doubt, sampling, inner, typed.knobs.any_training, label)


REFINE = ComputeKind(lambda typed: _parse(typed, BelowThreshold(typed.knobs.threshold)), example="refine")
REFINE_RANDOM = ComputeKind(lambda typed: _parse(typed, AtRandom()), example="refine-random")
REFINE_SPREAD = ComputeKind(lambda typed: _parse(typed, Spread(typed.knobs.threshold)), example="refine-spread+mean:2")
