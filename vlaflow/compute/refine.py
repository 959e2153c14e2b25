"""Make a chunk, doubt parts of it, regenerate those with the rest as context: AsyncVLA's asynchronous flow matching.

The prefix is never encoded again. When nothing is doubted, nothing more is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor

from vlaflow.backbones.base import Prefix
from vlaflow.compute.base import ComputePolicy, Decoded, Passes, Requirements, Stopwatch
from vlaflow.compute.dense import Dense, named_after, solved
from vlaflow.compute.doubts import BelowThreshold, Doubt, Draft, require_spread
from vlaflow.decoders.base import Conditioning
from vlaflow.decoders.capability import Capability
from vlaflow.decoders.model import Model
from vlaflow.errors import ConfigError
from vlaflow.flows.sampling import Sampling

DRAWS = Sampling(2)
"""How the draws of ``refine-spread:draws=K`` are made: two steps of unit noise, the cheapest that differ much."""


@dataclass(frozen=True)
class Regenerated:
    """Chunks of a second round.

    Args:
        action_RLD: normalised.
        nfe, layer_passes: what each cost.
    """

    action_RLD: Tensor
    nfe: tuple[int, ...]
    layer_passes: tuple[int, ...]


@dataclass(frozen=True)
class Refine(ComputePolicy):
    """One round of regeneration after any other compute policy.

    Only actions that will be executed are regenerated: what is doubted of the later ones stays as the first round made it, for
    the next chunk replaces them.

    Args:
        doubt: which actions to regenerate.
        sampling: of the second round.
        inner: makes the first chunk.
        clock: that doubted actions go back to, in (0, 1]: 1 makes them from noise, less keeps a part of the draft.
        executed: number of actions, after the committed ones, that count; None for those that ``Policy.act`` or an evaluation
            executes, or for the whole chunk where neither says so.
        any_training: also run on a checkpoint that never saw mixed clocks, to measure what becomes of it (claim C2 of the
            paper: it collapses).
        label: of the round itself, for tables; by default that of the doubt.
        alias: name of both rounds together, as of a calibration; by default it is composed of theirs.
    """

    doubt: Doubt = field(default_factory=BelowThreshold)
    sampling: Sampling = field(default_factory=Sampling)
    inner: ComputePolicy = field(default_factory=Dense)
    clock: float = 1.0
    executed: int | None = None
    any_training: bool = False
    label: str = ""
    alias: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.clock <= 1:
            raise ConfigError(f"Doubted actions go back to a clock in (0, 1], got {self.clock}.")
        if self.executed is not None and self.executed < 1:
            raise ConfigError(f"At least one action of a chunk is executed, got {self.executed}.")
        require_spread(self.name, self.doubt, self.inner.reports_spread)

    def executing(self, n_action_steps: int) -> Refine:
        """See ``ComputePolicy``; a number of its own stays."""
        inner = self.inner.executing(n_action_steps)
        return replace(self, inner=inner, executed=n_action_steps if self.executed is None else self.executed)

    @property
    def name(self) -> str:
        """For tables."""
        if self.alias:
            return self.alias
        return named_after(self.label or self.doubt.name, self.inner, self.sampling)

    @property
    def needs(self) -> Requirements:
        """A rater where the doubt needs one, unified training unless waived, and whatever the first round needs."""
        needs = self.inner.needs.sampled(self.sampling).also(Capability.CONDITIONING, rater=self.doubt.rater)
        return needs if self.any_training else needs.also(Capability.REGENERATION)

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
        """See ``ComputePolicy``. Committed actions are never doubted, and what bends the first round bends the second.

        Where the first round ended early, doubt and regeneration have the whole depth: what was not sure gets everything.
        """
        first = self.inner.decode(model, prefix, generators, watch, conditioning)
        draft_BLD, device = first.action_BLD, first.action_BLD.device
        action_BLD, doubted_BL = draft_BLD.clone(), torch.zeros(draft_BLD.shape[:2], dtype=torch.bool, device=device)
        confidence_BL, spread_BL = first.confidence_BL, first.spread_BL
        layers, passes, nfe, groups = list(first.layers), list(first.layer_passes), list(first.nfe), []
        depth = model.backbone.spec.depth
        for group in first.groups:
            row_R, mine = group.row_R, [generators[row] for row in group.row_R.tolist()]
            with watch.part("prefix"):
                prefix = model.read(group.prefix)
            groups.append(replace(group, prefix=prefix))
            draft_RLD = draft_BLD[row_R]
            spread_RL = None if first.spread_BL is None else first.spread_BL[row_R]
            kept = conditioning.select(row_R) if conditioning is not None else None
            judged = self.doubt.judge(Draft(model, prefix, mine, draft_RLD, spread_RL, watch, kept))
            doubt_RL = judged.doubted & self._countable(judged.doubted, kept)
            doubted_BL[row_R] = doubt_RL
            confidence_BL = _filled(confidence_BL, judged.confidence_RL, row_R, doubted_BL)
            spread_BL = _filled(spread_BL, judged.spread_RL, row_R, doubted_BL)
            for row, (looked, judging) in zip(row_R.tolist(), judged.cost(model), strict=True):
                nfe[row] += looked
                passes[row] += prefix.depth - group.prefix.depth + judging
            again_A = doubt_RL.any(1).nonzero()[:, 0]
            if len(again_A):  # only chunks with a doubt cost anything more
                with watch.part("refine"):
                    part = prefix if len(again_A) == len(row_R) else prefix.select(again_A)
                    theirs = [mine[place] for place in again_A.tolist()]
                    again = self.regenerate(
                        model, part, theirs, draft_RLD[again_A], doubt_RL[again_A], kept and kept.select(again_A)
                    )
                action_BLD[row_R[again_A]] = again.action_RLD
                for row, more, ran in zip(row_R[again_A].tolist(), again.nfe, again.layer_passes, strict=True):
                    nfe[row], passes[row], layers[row] = nfe[row] + more, passes[row] + ran, depth
        return Decoded(
            action_BLD,
            groups=tuple(groups),
            layers=tuple(layers),
            nfe=tuple(nfe),
            layer_passes=tuple(passes),
            confidence_BL=confidence_BL,
            regenerated_BL=doubted_BL,
            draft_BLD=draft_BLD,
            spread_BL=spread_BL,
        )

    def regenerate(  # noqa: PLR0917
        self,
        model: Model,
        prefix: Prefix,
        generators: Sequence[Generator],
        draft_RLD: Tensor,
        doubted_RL: Tensor,
        kept: Conditioning | None = None,
    ) -> Regenerated:
        """The second round alone: drafts whose doubted actions are made again from ``clock``, with the others as context.

        Args:
            model: the networks.
            prefix: at full depth.
            generators: one per observation.
            draft_RLD: normalised.
            doubted_RL: bool; the others stay to the bit, also those of which a decoder of tokens only sees the nearest ones.
            kept: what the drafts were conditioned on.
        """
        begin = Conditioning.around(kept, draft_RLD, self.clock * doubted_RL.float())
        state = model.decoder.solve(prefix, generators, self.sampling, begin)
        tokens = model.decoder.tokens(state)
        nfe = tokens.nfe if tokens else (model.decoder.nfe(self.sampling),) * len(draft_RLD)
        action_RLD = torch.where(doubted_RL[..., None], model.decoder.finish(state), draft_RLD)
        return Regenerated(action_RLD, nfe, solved(model.decoder, model.backbone.spec.depth, nfe, tokens))

    def _countable(self, like_RL: Tensor, kept: Conditioning | None) -> Tensor:
        """Bool (R, L): the actions that will be executed because they are in this chunk."""
        free_RL = torch.ones_like(like_RL) if kept is None else ~kept.settled_BL
        if self.executed is None:
            return free_RL
        return free_RL & (
            torch.arange(like_RL.shape[1], device=like_RL.device) < self.executed + (~free_RL).sum(1, keepdim=True)
        )


def _filled(into_BL: Tensor | None, value_RL: Tensor | None, row_R: Tensor, like_BL: Tensor) -> Tensor | None:
    """Values of some observations put among those of all; as before where there are none."""
    if value_RL is None:
        return into_BL
    into_BL = torch.zeros_like(like_BL, dtype=value_RL.dtype) if into_BL is None else into_BL.clone()
    into_BL[row_R] = value_RL
    return into_BL
