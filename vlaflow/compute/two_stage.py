"""Some stochastic steps, then some deterministic ones that may still revise every token (DFM-VLA §3: 14 + 2 of 16).

The solver's clock is divided into all the steps together: after 14 of 16 it stands at 1/8, and the deterministic steps take the
chunk from there to the end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator

from vlaflow.backbones.base import Prefix
from vlaflow.compute.base import ComputePolicy, Decoded, Group, Requirements, Stages, Stopwatch
from vlaflow.compute.dense import spent
from vlaflow.compute.spelling import ComputeKind, Spelling
from vlaflow.decoders.base import Conditioning
from vlaflow.decoders.capability import Capability
from vlaflow.decoders.model import Model
from vlaflow.errors import ConfigError
from vlaflow.flows.sampling import Sampling


@dataclass(frozen=True)
class TwoStage(ComputePolicy):
    """``stochastic`` solver steps and ``settling`` deterministic ones.

    Args:
        stochastic, settling: steps; together at least 1.
        refresh: share of the tokens that must have changed for the prefix to be run again (see ``DiscreteFlowConfig``); None
            leaves it to the checkpoint. With a prefix that is blind to the tokens, 0 is no cache at all: the same chunk, later.
        grid, temperature, expected: see ``Sampling``; all are of both stages together.
        label: for tables.
    """

    stochastic: int = 14
    settling: int = 2
    refresh: float | None = None
    grid: tuple[float, ...] | None = None
    temperature: float | None = None
    expected: bool = False
    label: str = "two-stage"

    def __post_init__(self) -> None:
        if min(self.stochastic, self.settling) < 0 or self.steps < 1:
            raise ConfigError(f"Two stages need steps ≥ 0 and one in all, got {self.stochastic} and {self.settling}.")
        if self.refresh is not None and not 0 <= self.refresh <= 1:
            raise ConfigError(f"refresh is a share of the tokens, in [0, 1], got {self.refresh}.")
        if self.sampling.steps != self.steps:
            raise ConfigError(
                f"A grid for two stages of {self.steps} steps has {self.steps + 1} clocks, got {list(self.grid or ())}."
            )

    @property
    def steps(self) -> int:
        """Of both stages."""
        return self.stochastic + self.settling

    @property
    def sampling(self) -> Sampling:
        """The settings of the sampler, both stages together."""
        return Sampling(self.steps, grid=self.grid, temperature=self.temperature, expected=self.expected)

    @property
    def name(self) -> str:
        """For tables."""
        return self.label

    @property
    def needs(self) -> Requirements:
        """A discrete flow: no other decoder's solver steps may be cut into two stages."""
        needs = Requirements(frozenset({Capability.DETERMINISTIC_STEPS})).sampled(self.sampling)
        return needs if self.refresh is None else needs.also(Capability.PREFIX_REFRESH)

    @property
    def stages(self) -> Stages:
        """Both."""
        return Stages(self.sampling, self.settling)

    def exact(self, model: Model) -> TwoStage | None:
        """The same with the prefix run at every step, where it reads the tokens."""
        return replace(self, refresh=0.0) if Capability.JOINT_ATTENTION in model.decoder.capabilities else None

    def read(self, model: Model, prefix: Prefix) -> Prefix:
        """Through all layers."""
        return model.read(prefix)

    def decode(
        self,
        model: Model,
        prefix: Prefix,
        generators: Sequence[Generator],
        watch: Stopwatch,
        conditioning: Conditioning | None = None,
    ) -> Decoded:
        """See ``ComputePolicy``."""
        decoder, depth = model.decoder, model.backbone.spec.depth
        with watch.part("prefix"):
            prefix = self.read(model, prefix)
        with watch.part("first"):
            state = decoder.start(prefix, generators, self.sampling, conditioning)
            if self.refresh is not None:
                state = decoder.refreshing(state, self.refresh)
            state = decoder.advance(state, prefix, self.stochastic)
        if self.settling:
            with watch.part("refine_deterministic"):
                state = decoder.refine_deterministic(state, prefix, self.settling)
        action_BLD, tokens, batch = decoder.finish(state), decoder.tokens(state), prefix.batch
        nfe = tokens.nfe if tokens else (decoder.nfe(self.sampling),) * batch
        return Decoded(
            action_BLD,
            groups=(Group(torch.arange(batch, device=action_BLD.device), prefix),),
            layers=(depth,) * batch,
            nfe=nfe,
            layer_passes=spent(decoder, prefix, depth, nfe, tokens),
            tokens=tokens,
        )


def _parse(typed: Spelling) -> TwoStage:
    found = re.fullmatch(r"(\d{1,9})\+(\d{1,9})(?:/(\d*\.?\d+))?(?:,temperature=(\d*\.?\d+))?(,expected)?", typed.more)
    if found is None or typed.inner is not None:
        raise ConfigError(
            "two-stage takes stochastic and deterministic steps, and may take a refresh, a temperature and 'expected', as in "
            f"two-stage:14+2/0.3,temperature=0 or two-stage:2+2,expected; got '{typed.name}'."
        )
    refresh, temperature = (float(number) if number else None for number in found.groups()[2:4])
    expected = found[5] is not None
    return TwoStage(int(found[1]), int(found[2]), refresh, temperature=temperature, expected=expected, label=typed.name)


TWO_STAGE = ComputeKind(_parse, example="two-stage:14+2")
