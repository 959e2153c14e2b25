"""The mean of several chunks: ``averaged``, or ``averaged:4`` for so many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator

from vlaflow.backbones.base import Prefix
from vlaflow.compute.base import ComputePolicy, Decoded, Stopwatch
from vlaflow.compute.dense import Dense
from vlaflow.compute.spelling import ComputeKind, Spelling
from vlaflow.decoders.base import Conditioning
from vlaflow.decoders.model import Model
from vlaflow.errors import ConfigError
from vlaflow.flows.sampling import Sampling


@dataclass(frozen=True)
class Averaged(ComputePolicy):
    """The mean of ``chunks`` chunks of ``steps`` solver steps each."""

    chunks: int = 2
    steps: int = 10
    label: str = "averaged"

    @property
    def name(self) -> str:
        """For tables."""
        return self.label

    @property
    def averages(self) -> bool:
        """Nobody acts like a mean where there are two good ways."""
        return True

    def decode(
        self,
        model: Model,
        prefix: Prefix,
        generators: Sequence[Generator],
        watch: Stopwatch,
        conditioning: Conditioning | None = None,
    ) -> Decoded:
        """See ``ComputePolicy``. The first chunk runs the prefix, the others find it done."""
        first = Dense(self.steps).decode(model, prefix, generators, watch, conditioning)
        made, encoded = [first.action_BLD], first.groups[0].prefix
        with watch.part("first"):
            made += [
                model.decoder.sample(encoded, generators, Sampling(self.steps), conditioning) for _ in range(self.chunks - 1)
            ]
        nfe = tuple(count * self.chunks for count in first.nfe)
        more = [(total - once) * first.layers[0] for total, once in zip(nfe, first.nfe, strict=True)]
        passes = tuple(a + b for a, b in zip(first.layer_passes, more, strict=True))
        return replace(first, action_BLD=torch.stack(made).mean(0), nfe=nfe, layer_passes=passes)


def _parse(typed: Spelling) -> Averaged:
    typed.require(more=True, usage="averaged takes the number of chunks, as in averaged:4.")
    if typed.more and not (typed.more.isdecimal() and int(typed.more)):
        raise ConfigError(f"averaged takes the number of chunks, as in averaged:4, got '{typed.name}'.")
    return Averaged(int(typed.more or 2), typed.knobs.steps, typed.name)


AVERAGED = ComputeKind(_parse, example="averaged")
