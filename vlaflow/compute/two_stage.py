"""Some stochastic steps, then some deterministic ones that may still revise every token (DFM-VLA §3: 14 + 2 of 16).

The solver's clock is divided into all the steps together: after 14 of 16 it stands at 1/8, and the deterministic steps take the
chunk from there to the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator

from vlaflow.backbones.base import Prefix
from vlaflow.compute.base import Decoded, Group, Requirements, Stopwatch
from vlaflow.compute.dense import spent
from vlaflow.decoders.base import Given
from vlaflow.decoders.discrete_flow import DiscreteFlowState
from vlaflow.decoders.model import Model
from vlaflow.errors import ConfigError


@dataclass(frozen=True)
class TwoStage:
    """``stochastic`` solver steps and ``settling`` deterministic ones.

    Args:
        stochastic, settling: steps; together at least 1.
        refresh: share of the tokens that must have changed for the prefix to be run again (see ``DiscreteFlowConfig``); None
            leaves it to the checkpoint. With a prefix that is blind to the tokens, 0 is no cache at all: the same chunk, later.
        label: for tables.
    """

    stochastic: int = 14
    settling: int = 2
    refresh: float | None = None
    label: str = "two-stage"

    def __post_init__(self) -> None:
        if min(self.stochastic, self.settling) < 0 or self.steps < 1:
            raise ConfigError(f"Two stages need steps ≥ 0 and one in all, got {self.stochastic} and {self.settling}.")
        if self.refresh is not None and not 0 <= self.refresh <= 1:
            raise ConfigError(f"refresh is a share of the tokens, in [0, 1], got {self.refresh}.")

    @property
    def steps(self) -> int:
        """Of both stages."""
        return self.stochastic + self.settling

    @property
    def name(self) -> str:
        """For tables."""
        return self.label

    @property
    def needs(self) -> Requirements:
        """A discrete flow: no other decoder's solver steps may be cut into two stages."""
        return Requirements(settles=True)

    def decode(
        self, model: Model, prefix: Prefix, generators: Sequence[Generator], watch: Stopwatch, given: Given | None = None
    ) -> Decoded:
        """See ``ComputePolicy``."""
        decoder, depth = model.decoder, model.backbone.spec.depth
        with watch.part("prefix"):
            prefix = model.read(prefix)
        with watch.part("first"):
            state = decoder.start(prefix, generators, self.steps, given)
            if self.refresh is not None:
                assert isinstance(state, DiscreteFlowState)  # see needs
                state = replace(state, refresh=self.refresh)
            state = decoder.advance(state, prefix, self.stochastic)
        if self.settling:
            with watch.part("settle"):
                state = decoder.settle(state, prefix, self.settling)
        action_BLD, tokens, batch = decoder.finish(state), decoder.tokens(state), prefix.batch
        evaluations = tokens.evaluations if tokens else (decoder.evaluations(self.steps),) * batch
        return Decoded(
            action_BLD,
            groups=(Group(torch.arange(batch, device=action_BLD.device), prefix),),
            layers=(depth,) * batch,
            evaluations=evaluations,
            layer_passes=spent(prefix, depth, evaluations, tokens),
            tokens=tokens,
        )
