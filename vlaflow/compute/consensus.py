"""Several draws on one observation: their mean, or the draw that is nearest to the others.

The prefix is read once and shared; the draws are one batch. How far they lie apart is reported per action (``Chunk.spread``),
and refinement can regenerate by it (``compute.doubts.Spread``). A mean of two ways around an obstacle leads into it: where
demonstrations disagree the medoid keeps to one of them.

Shape letters: B batch, K draws, L chunk size, D action dimension.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Generator, Tensor

from vlaflow.backbones.base import Prefix
from vlaflow.compute.base import ComputePolicy, Decoded, Group, Passes, Requirements, Stopwatch
from vlaflow.compute.dense import Dense
from vlaflow.compute.distance import distance
from vlaflow.compute.spelling import ComputeKind, Spelling
from vlaflow.decoders.base import Conditioning, Tokens
from vlaflow.decoders.model import Model
from vlaflow.errors import ConfigError
from vlaflow.ranges import require_words

_SEEDS = 2**62
_APART = 0x1E3779B97F4A7C15
"""Between the seeds of one level of nested consensuses and those of the next (odd, and without a pattern in its bits)."""


@dataclass(frozen=True)
class Consensus(ComputePolicy):
    """``draws`` chunks of each observation, made one.

    Args:
        draws: K, at least 1.
        choose: "mean" of the draws, action by action; or "medoid", the draw with the smallest sum of distances to the others
            (the mean over actions of the root mean square difference over dimensions), the first of equal ones.
        inner: makes the draws.
    """

    draws: int = 8
    choose: Literal["mean", "medoid"] = "mean"
    inner: ComputePolicy = field(default_factory=Dense)

    def __post_init__(self) -> None:
        require_words(self)
        if self.draws < 1:
            raise ConfigError(f"A consensus needs at least one draw, got {self.draws}.")

    @property
    def name(self) -> str:
        """As it is typed."""
        own = f"{self.choose}:{self.draws}"
        return own if self.inner.name == "dense" else f"{own}+{self.inner.name}"

    @property
    def needs(self) -> Requirements:
        """What one draw needs."""
        return self.inner.needs

    @property
    def reports_spread(self) -> bool:
        """Whether it reports the spread, which it always does."""
        return True

    @property
    def averages(self) -> bool:
        """Whether it, or what makes its draws, takes means."""
        return self.choose == "mean" or self.inner.averages

    @property
    def levels(self) -> int:
        """One more than what makes its draws."""
        return 1 + self.inner.levels

    def read(self, model: Model, prefix: Prefix) -> Prefix:
        """As far as a draw reads it."""
        return self.inner.read(model, prefix)

    def passes(self, depth: int) -> Passes:
        """Those of every draw; what all of them read is read once."""
        return self.inner.passes(depth).drawn(self.draws)

    def executing(self, n_action_steps: int) -> Consensus:
        """See ``ComputePolicy``; of its draws."""
        return replace(self, inner=self.inner.executing(n_action_steps))

    def exact(self, model: Model) -> Consensus | None:
        """That of exact draws."""
        exact = self.inner.exact(model)
        return None if exact is None else replace(self, inner=exact)

    def decode(
        self,
        model: Model,
        prefix: Prefix,
        generators: Sequence[Generator],
        watch: Stopwatch,
        conditioning: Conditioning | None = None,
    ) -> Decoded:
        """See ``ComputePolicy``. The first draw comes from the observation's own generator, so it is the inner policy's chunk.

        Actions given at clock 0 are equal in all draws and stay to the bit. Layers are those of the deepest draw; nfe and layer
        passes count all of them.
        """
        k, batch = self.draws, prefix.batch
        with watch.part("prefix"):
            shared = self.read(model, prefix)
        row_N = torch.arange(batch, device=shared.hidden_BPW.device).repeat_interleave(k)
        out = self.inner.decode(
            model,
            shared if k == 1 else shared.select(row_N),
            [each for generator in generators for each in _generators(generator, k, self.inner.levels)],
            watch,
            None if conditioning is None else conditioning.select(row_N),
        )
        draw_BKLD = out.action_BLD.unflatten(0, (batch, k))
        mean_BLD, spread_BL = mean_and_spread(draw_BKLD)
        nfe = _sums(out.nfe, k)
        counted = replace(
            out,
            action_BLD=mean_BLD,
            groups=tuple(_first_draws(out.groups, k)),
            layers=tuple(max(out.layers[row * k : (row + 1) * k]) for row in range(batch)),
            nfe=nfe,
            layer_passes=tuple(passes - (k - 1) * shared.depth for passes in _sums(out.layer_passes, k)),
            spread_BL=spread_BL,
        )
        if self.choose == "mean":  # what is known of a single draw does not hold for the mean
            return replace(counted, confidence_BL=None, regenerated_BL=None, draft_BLD=None, tokens=None)
        chosen_B = torch.arange(batch, device=row_N.device) * k + medoid(draw_BKLD)
        return replace(
            counted,
            action_BLD=out.action_BLD[chosen_B],
            confidence_BL=None if out.confidence_BL is None else out.confidence_BL[chosen_B],
            regenerated_BL=None if out.regenerated_BL is None else out.regenerated_BL[chosen_B],
            draft_BLD=None if out.draft_BLD is None else out.draft_BLD[chosen_B],
            tokens=None if out.tokens is None else _chosen(out.tokens, chosen_B, nfe, k),
        )


def mean_and_spread(draw_BKLD: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the draws (B, L, D), and their root mean square distance to it over draws and dimensions (B, L).

    Both are summed as differences to the first draw: equal draws have exactly themselves as their mean, and no spread.
    """
    first_B1LD = draw_BKLD[:, :1]
    mean_B1LD = first_B1LD + (draw_BKLD - first_B1LD).mean(1, keepdim=True)
    return mean_B1LD[:, 0], (draw_BKLD - mean_B1LD).square().mean((1, 3)).sqrt()


def medoid(draw_BKLD: Tensor) -> Tensor:
    """Index of the draw with the smallest sum of distances to the others, int64 (B,)."""
    batch, k = draw_BKLD.shape[:2]
    one, other = (x.expand(batch, k, k, *draw_BKLD.shape[2:]) for x in (draw_BKLD[:, :, None], draw_BKLD[:, None]))
    return distance("l2", one.flatten(0, 2), other.flatten(0, 2)).view(batch, k, k).sum(2).argmin(1)


def _generators(generator: Generator, draws: int, level: int) -> list[Generator]:
    """The generator itself and others, seeded by a copy of it so that it is not disturbed.

    Args:
        generator: of an observation.
        draws: how many generators.
        level: levels of draws inside this one: the one inside is given the same generator for its first draw, and must seed
            other ones.
    """
    copy = Generator(generator.device)
    copy.set_state(generator.get_state())
    drawn = torch.randint(_SEEDS, (draws - 1,), generator=copy, device=generator.device).tolist()
    seeds = ((number + level * _APART) % _SEEDS for number in drawn)
    return [generator, *(Generator(generator.device).manual_seed(seed) for seed in seeds)]


def _sums(counts: Sequence[int], draws: int) -> tuple[int, ...]:
    """Per observation over its draws."""
    return tuple(sum(counts[begin : begin + draws]) for begin in range(0, len(counts), draws))


def _first_draws(groups: Sequence[Group], draws: int) -> list[Group]:
    """The observations as deep as their first draws were encoded."""
    found = []
    for group in groups:
        mine_M = (group.row_R % draws == 0).nonzero()[:, 0]
        if len(mine_M):
            found.append(Group(group.row_R[mine_M] // draws, group.prefix if draws == 1 else group.prefix.select(mine_M)))
    return found


def _chosen(tokens: Tokens, chosen_B: Tensor, nfe: tuple[int, ...], draws: int) -> Tokens:
    """Those of the chosen draws, with what all of them cost."""
    return replace(tokens.select(chosen_B), nfe=nfe, prefix_runs=_sums(tokens.prefix_runs, draws))


def _parse(typed: Spelling, choose: Literal["mean", "medoid"]) -> Consensus:
    if re.fullmatch(r"[1-9]\d{0,8}", typed.more) is None:
        raise ConfigError(
            f"{choose} takes a number of draws, and may take what makes them: {choose}:8 or {choose}:8+dense:2@0.5, not "
            f"'{typed.name}'."
        )
    return Consensus(int(typed.more), choose, typed.inner or Dense(typed.knobs.steps))


MEAN = ComputeKind(lambda typed: _parse(typed, "mean"), example="mean:2")
MEDOID = ComputeKind(lambda typed: _parse(typed, "medoid"), example="medoid:2")
