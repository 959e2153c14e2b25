"""Refinement in token space: tokens that are doubted get clock 1 again and are regenerated with the others as context.

Doubt is the network's own (a low probability) or a rater's, whose verdict on an action holds for the action's tokens.

Shape letters: B batch, S token slots, L chunk size, D action dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from vlaflow.backbones.base import Prefix
from vlaflow.compute.base import ComputePolicy, Decoded, Passes, Requirements, Stopwatch
from vlaflow.compute.dense import Dense, named_after
from vlaflow.compute.doubts import Draft, Judged, TokenDoubt, require_spread
from vlaflow.compute.spelling import ComputeKind, Spelling
from vlaflow.decoders.base import Conditioning, Decoder, TokenConditioning, Tokens
from vlaflow.decoders.capability import Capability
from vlaflow.decoders.model import Model
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.flows.sampling import Sampling


@dataclass(frozen=True)
class Improbable(TokenDoubt):
    """Doubt the tokens to which the network gave less than ``threshold`` when it last looked at them."""

    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"A probability lies in [0, 1], got {self.threshold}.")

    def judge_tokens(self, draft: Draft, tokens: Tokens) -> Judged:
        """See ``TokenDoubt``."""
        return Judged(tokens.probability_BS < self.threshold)


@dataclass(frozen=True)
class RefineTokens(ComputePolicy):
    """One round of regeneration of single tokens after any other compute policy that reports tokens.

    Args:
        doubt: which tokens; those that judge actions, such as ``BelowThreshold``, need a tokenizer whose tokens belong to one
            action each.
        sampling: of the second round.
        inner: makes the first chunk.
        label: for tables.
    """

    doubt: TokenDoubt = Improbable()
    sampling: Sampling = field(default_factory=lambda: Sampling(8))
    inner: ComputePolicy = field(default_factory=Dense)
    label: str = "refine-tokens"

    def __post_init__(self) -> None:
        require_spread(self.name, self.doubt, self.inner.reports_spread)

    @property
    def name(self) -> str:
        """For tables."""
        return named_after(self.label, self.inner, self.sampling)

    @property
    def needs(self) -> Requirements:
        """A decoder trained to start from clean tokens among noise, a rater where the doubt needs one, and whatever the first
        round needs.
        """
        needs = self.inner.needs.sampled(self.sampling)
        return needs.also(Capability.TOKEN_CONDITIONING, Capability.REGENERATION, rater=self.doubt.rater)

    @property
    def levels(self) -> int:
        """Those of the first round."""
        return self.inner.levels

    def read(self, model: Model, prefix: Prefix) -> Prefix:
        """As the first round does."""
        return self.inner.read(model, prefix)

    def passes(self, depth: int) -> Passes:
        """Those of the first round, then those of doubt and regeneration."""
        return self.inner.passes(depth).then(depth, rated=self.doubt.rater) | self.doubt.passes(depth)

    def decode(
        self,
        model: Model,
        prefix: Prefix,
        generators: Sequence[Generator],
        watch: Stopwatch,
        conditioning: Conditioning | None = None,
    ) -> Decoded:
        """See ``ComputePolicy``. As with ``Refine``, what was doubted gets the whole depth."""
        first = self.inner.decode(model, prefix, generators, watch, conditioning)
        decoder = model.decoder
        if first.tokens is None:
            raise CapabilityError(f"{self.inner.name} reports no tokens, so there are none to regenerate.")
        action_BLD, parts, groups = first.action_BLD.clone(), [], []
        layers, passes, nfe = list(first.layers), list(first.layer_passes), list(first.nfe)
        confidence_BL = first.confidence_BL
        for group in first.groups:
            row_R, mine = group.row_R, [generators[row] for row in group.row_R.tolist()]
            with watch.part("prefix"):
                whole = model.read(group.prefix)
            groups.append(replace(group, prefix=whole))
            before = first.tokens.select(row_R)
            spread_RL = None if first.spread_BL is None else first.spread_BL[row_R]
            kept = None if conditioning is None else conditioning.select(row_R)
            draft = Draft(model, whole, mine, action_BLD[row_R], spread_RL, watch, kept)
            judged = self.doubt.judge_tokens(draft, before)
            doubt_RS, rating_RL = judged.doubted, judged.confidence_RL
            if kept is not None:
                doubt_RS &= decoder.token_conditioning(kept).clock_BS > 0
            if rating_RL is not None:
                if confidence_BL is None:
                    confidence_BL = action_BLD.new_zeros(action_BLD.shape[:2])
                confidence_BL[row_R] = rating_RL
            again_R, after = doubt_RS.any(1), before
            if bool(again_R.any()):  # only chunks with a doubt cost anything more
                again_A, sure_N = again_R.nonzero()[:, 0], (~again_R).nonzero()[:, 0]
                part = whole if not len(sure_N) else whole.select(again_A)
                theirs = [mine[place] for place in again_A.tolist()]
                with watch.part("refine"):
                    made, remade_ALD = self._again(decoder, part, before.select(again_A), doubt_RS[again_A], theirs)
                action_BLD[row_R[again_A]] = remade_ALD
                after = Tokens.cat((before.select(sure_N), made)).select(torch.cat((sure_N, again_A)).argsort())
            parts.append(after)
            depth = model.backbone.spec.depth
            more = [a - b for a, b in zip(after.passes(depth), before.passes(depth), strict=True)]
            for place, (row, (looked, judging)) in enumerate(zip(row_R.tolist(), judged.cost(model), strict=True)):
                passes[row] += whole.depth - group.prefix.depth + judging + more[place]
                nfe[row] = after.nfe[place] + looked
                layers[row] = depth if again_R[place] else layers[row]
        order = torch.cat([group.row_R for group in first.groups]).argsort()
        tokens = Tokens.cat(parts).select(order)
        return replace(
            first,
            action_BLD=action_BLD,
            groups=tuple(groups),
            layers=tuple(layers),
            nfe=tuple(nfe),
            layer_passes=tuple(passes),
            confidence_BL=confidence_BL,
            regenerated_BL=(action_BLD != first.action_BLD).any(-1),
            draft_BLD=first.action_BLD,
            tokens=tokens,
        )

    def _again(
        self, decoder: Decoder[Any], prefix: Prefix, before: Tokens, doubt_RS: Tensor, generators: Sequence[Generator]
    ) -> tuple[Tokens, Tensor]:
        """The second round of R chunks: their tokens with what both rounds cost, and normalised actions (R, L, D)."""
        state = decoder.solve(prefix, generators, self.sampling, TokenConditioning(before.id_BS, doubt_RS.float()))
        after = decoder.tokens(state)
        assert after is not None  # the first round reported some
        probability_RS = torch.where(doubt_RS, after.probability_BS, before.probability_BS)
        counts = tuple(a + b for a, b in zip(before.nfe, after.nfe, strict=True))
        revised_RN = torch.cat((before.revised_BN, after.revised_BN), 1)
        runs = tuple(a + b for a, b in zip(before.prefix_runs, after.prefix_runs, strict=True))
        made = replace(after, probability_BS=probability_RS, revised_BN=revised_RN, nfe=counts, prefix_runs=runs)
        return made, decoder.finish(state)


def _parse(typed: Spelling) -> RefineTokens:
    sampling = typed.sampling()
    return RefineTokens(Improbable(typed.knobs.threshold), sampling, typed.inner or Dense.by(sampling), typed.own)


REFINE_TOKENS = ComputeKind(_parse, example="refine-tokens")
