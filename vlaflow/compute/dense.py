"""A fixed number of layers and steps: the baseline of all compute policies (AsyncVLA's synchronous flow matching)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator

from vlaflow.backbones.base import Prefix
from vlaflow.compute.base import ComputePolicy, Decoded, Group, Requirements, Stages, Stopwatch
from vlaflow.compute.spelling import ComputeKind, Spelling
from vlaflow.decoders.base import Conditioning, Tokens
from vlaflow.decoders.model import Model
from vlaflow.errors import ConfigError


@dataclass(frozen=True)
class Dense(ComputePolicy):
    """``steps`` solver steps through all layers, or through the first ``depth`` of a multi-exit checkpoint.

    Args:
        steps: at least 1.
        depth: layers to run; None for all.
        label: for tables.
    """

    steps: int = 10
    depth: int | None = None
    label: str = "dense"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"A flow needs at least one solver step, got {self.steps}.")

    @property
    def name(self) -> str:
        """For tables."""
        return self.label

    @property
    def needs(self) -> Requirements:
        """Nothing beyond a trained decoder, for all layers."""
        return Requirements(exits=() if self.depth is None else (self.depth,))

    @property
    def stages(self) -> Stages | None:
        """All stochastic."""
        return Stages(self.steps) if self.depth is None else None

    def decode(
        self,
        model: Model,
        prefix: Prefix,
        generators: Sequence[Generator],
        watch: Stopwatch,
        conditioning: Conditioning | None = None,
    ) -> Decoded:
        """See ``ComputePolicy``."""
        depth = self.depth or model.backbone.spec.depth
        with watch.part("prefix"):
            prefix = model.read(prefix, depth)
        with watch.part("first"):
            state = model.decoder.solve(prefix, generators, self.steps, conditioning)
            action_BLD, tokens = model.decoder.finish(state), model.decoder.tokens(state)
        batch = prefix.batch
        nfe = tokens.nfe if tokens else (model.decoder.nfe(self.steps),) * batch
        return Decoded(
            action_BLD,
            groups=(Group(torch.arange(batch, device=action_BLD.device), prefix),),
            layers=(depth,) * batch,
            nfe=nfe,
            layer_passes=spent(prefix, depth, nfe, tokens),
            tokens=tokens,
        )


def spent(prefix: Prefix, depth: int, nfe: Sequence[int], tokens: Tokens | None) -> tuple[int, ...]:
    """Layers run over the prefix (where it was run before the first step) and over the evaluations, per observation."""
    before = prefix.depth
    after = tokens.passes(depth) if tokens else tuple(depth * count for count in nfe)
    return tuple(before + count for count in after)


def _parse(typed: Spelling) -> Dense:
    typed.require(more=True, usage="dense takes steps and layers as in dense:2 or dense:2@3.")
    if not typed.more:
        return Dense(typed.knobs.steps)
    found = re.fullmatch(r"(\d+)(?:@(\d+))?", typed.more)
    if found is None:
        raise ConfigError(f"dense takes steps and layers as in dense:2 or dense:2@3, got '{typed.name}'.")
    return Dense(int(found[1]), int(found[2]) if found[2] else None, label=typed.name)


DENSE = ComputeKind(_parse, example="dense")
