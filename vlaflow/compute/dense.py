"""A fixed number of layers and steps: the baseline of all compute policies (AsyncVLA's synchronous flow matching)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator

from vlaflow.backbones.base import Prefix
from vlaflow.compute.base import ComputePolicy, Decoded, Group, Passes, Requirements, Stages, Stopwatch
from vlaflow.compute.spelling import ComputeKind, Spelling
from vlaflow.decoders.base import Conditioning, Decoder, Tokens
from vlaflow.decoders.model import Model
from vlaflow.flows.sampling import Sampling, Solver


@dataclass(frozen=True)
class Dense(ComputePolicy):
    """``steps`` solver steps through all layers, or through the first ``depth`` of a multi-exit checkpoint.

    Args:
        steps, noise_scale, grid, solver, temperature, expected: see ``Sampling``.
        depth: layers to run; None for all.
        label: for tables.
    """

    steps: int = 10
    noise_scale: float = 1.0
    grid: tuple[float, ...] | None = None
    solver: Solver = "euler"
    temperature: float | None = None
    expected: bool = False
    depth: int | None = None
    label: str = "dense"

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", self.sampling.steps)  # those of a stated grid

    @staticmethod
    def by(sampling: Sampling, depth: int | None = None, label: str = "dense") -> Dense:
        """With these settings."""
        return Dense(**vars(sampling), depth=depth, label=label)

    @property
    def sampling(self) -> Sampling:
        """The settings of the sampler."""
        return Sampling(self.steps, self.noise_scale, self.grid, self.solver, self.temperature, self.expected)

    @property
    def name(self) -> str:
        """For tables."""
        return self.label

    @property
    def needs(self) -> Requirements:
        """For all layers, only what the settings of the sampler need."""
        return Requirements(exits=() if self.depth is None else (self.depth,)).sampled(self.sampling)

    @property
    def stages(self) -> Stages | None:
        """All stochastic."""
        return Stages(self.sampling) if self.depth is None else None

    def read(self, model: Model, prefix: Prefix) -> Prefix:
        """Through all its layers."""
        return model.read(prefix, self.depth)

    def passes(self, depth: int) -> Passes:
        """Those of its depth."""
        return Passes.at(self.depth or depth)

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
            prefix = self.read(model, prefix)
        with watch.part("first"):
            state = model.decoder.solve(prefix, generators, self.sampling, conditioning)
            action_BLD, tokens = model.decoder.finish(state), model.decoder.tokens(state)
        batch = prefix.batch
        nfe = tokens.nfe if tokens else (model.decoder.nfe(self.sampling),) * batch
        return Decoded(
            action_BLD,
            groups=(Group(torch.arange(batch, device=action_BLD.device), prefix),),
            layers=(depth,) * batch,
            nfe=nfe,
            layer_passes=spent(model.decoder, prefix, depth, nfe, tokens),
            tokens=tokens,
        )


def named_after(own: str, inner: ComputePolicy, sampling: Sampling) -> str:
    """Name of a round that follows another compute policy: its own alone after a dense chunk of the same settings.

    Args:
        own: name of the round.
        inner: what comes before it.
        sampling: of the round.
    """
    return own if inner == Dense.by(sampling) else f"{own}({inner.name})"


def spent(decoder: Decoder[Any], prefix: Prefix, depth: int, nfe: Sequence[int], tokens: Tokens | None) -> tuple[int, ...]:
    """Layers run over the prefix (where it was run before the first step) and for the chunk, per observation."""
    return tuple(prefix.depth + count for count in solved(decoder, depth, nfe, tokens))


def solved(decoder: Decoder[Any], depth: int, nfe: Sequence[int], tokens: Tokens | None) -> tuple[int, ...]:
    """Layers that ``Decoder.solve`` ran, per observation, those over a prefix that reads the tokens included."""
    evaluated = tokens.passes(depth) if tokens else tuple(depth * count for count in nfe)
    return tuple(decoder.start_passes(depth) + count for count in evaluated)


def _parse(typed: Spelling) -> Dense:
    typed.require(more=True, usage="dense takes settings of the sampler as in dense:2@0.5, and layers as in dense:2,depth=3.")
    found = re.fullmatch(r"(.*?)(?:,depth=(\d{1,9}))?", typed.more)
    settings, depth = found.groups() if found else (typed.more, None)
    return Dense.by(typed.sampling(settings), int(depth) if depth else None, label=typed.name)


DENSE = ComputeKind(_parse, example="dense")
