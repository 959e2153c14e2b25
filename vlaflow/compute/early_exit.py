"""Early exit: answer at growing depth until two answers in a row agree (A1 §3.2), with truncated flow matching (§3.3).

The backbone's layers run a few at a time and only as far as needed. At each depth of the plan the decoder makes a whole
chunk; when it is as close to the previous depth's as the calibrated threshold allows, it is taken. The first depth has no
previous answer, so it is only a reference; the last depth is always taken. Every observation decides for itself, and
nothing is kept from one observation to the next.

Shape letters: B batch, R observations still under way, L chunk size, D action dimension, K exits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import inf
from typing import Literal

import torch
from torch import Generator, Tensor

from vlaflow.backbones.base import Prefix
from vlaflow.compute.base import ComputePolicy, Decoded, Group, Passes, Requirements, Stopwatch
from vlaflow.compute.distance import Metric, distance
from vlaflow.decoders.base import Conditioning, Tokens
from vlaflow.decoders.capability import Capability
from vlaflow.decoders.model import Model
from vlaflow.errors import ConfigError
from vlaflow.flows.sampling import Sampling
from vlaflow.ranges import require_words

WarmStart = Literal["fresh", "same", "anchor", "renoise"]


@dataclass(frozen=True)
class ExitPlan:
    """Where an early exit may answer, and how. What a calibration is made for, and valid for nothing else.

    Args:
        depths: numbers of layers at which a chunk is made, ascending; the last is the full depth. The first is the reference
            that the second is compared with, so exits are ``depths[1:]``.
        metric: see ``distance``.
        sampling: settings of the sampler at each depth (A1: 10 steps, truncated 2), the full one included.
        warm_start: where the chunk of the next depth starts. "fresh": new noise every time (A1's plain early exit, where a
            part of the discrepancy is sampling noise); "same": the observation's one noise; "anchor": the previous depth's
            chunk with the clock set back to 1, as A1's code does, off the training distribution; "renoise": the previous
            chunk brought to the clock ``restart`` with new noise.
        restart: clock that "renoise" starts from, in (0, 1].
    """

    depths: tuple[int, ...]
    metric: Metric = "cosine"
    sampling: Sampling = field(default_factory=lambda: Sampling(2))
    warm_start: WarmStart = "same"
    restart: float = 0.5

    def __post_init__(self) -> None:
        require_words(self)
        if len(self.depths) < 2 or self.depths[0] < 1 or list(self.depths) != sorted(set(self.depths)):
            raise ConfigError(f"An early exit compares at least two ascending depths from 1 on, got {list(self.depths)}.")
        if not 0 < self.restart <= 1:
            raise ConfigError(f"restart lies in (0, 1], got {self.restart}.")

    @property
    def exits(self) -> tuple[int, ...]:
        """Depths at which a chunk may be taken, K of them."""
        return self.depths[1:]

    def answers(
        self,
        model: Model,
        prefix: Prefix,
        generators: Sequence[Generator],
        watch: Stopwatch,
        conditioning: Conditioning | None = None,
    ) -> ExitAnswers:
        """The chunks of these observations, one depth after the other."""
        return ExitAnswers(self, model, prefix, generators, watch=watch, conditioning=conditioning)


class ExitAnswers:
    """Chunks of growing depth for observations under way; ``keep`` drops those that are done."""

    def __init__(
        self,
        plan: ExitPlan,
        model: Model,
        prefix: Prefix,
        generators: Sequence[Generator],
        *,
        watch: Stopwatch,
        conditioning: Conditioning | None,
    ) -> None:
        self.plan, self.model, self.prefix, self.watch, self.conditioning = plan, model, prefix, watch, conditioning
        self.generators = list(generators)
        # One noise for all depths: each generator is put back to where it was before the chunk.
        self._noise = [g.get_state() for g in self.generators] if plan.warm_start == "same" else None
        self.previous_RLD: Tensor | None = None
        self.current_RLD: Tensor | None = None
        self.tokens: Tokens | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """(depth, chunks (R, L, D)), deeper and deeper."""
        for depth in self.plan.depths:
            with self.watch.part("prefix"):
                self.prefix = self.model.read(self.prefix, depth)
            with self.watch.part("first"):
                if self._noise is not None:
                    for generator, begin in zip(self.generators, self._noise, strict=True):
                        generator.set_state(begin)
                self.previous_RLD = self.current_RLD
                decoder = self.model.decoder
                state = decoder.solve(self.prefix, self.generators, self.plan.sampling, self._given())
                action_RLD, self.tokens = decoder.finish(state), decoder.tokens(state)
                self.current_RLD = action_RLD
            yield depth, action_RLD

    def keep(self, row_R: Tensor) -> None:
        """Continue with these of the observations under way, int64."""
        rows = row_R.tolist()
        self.prefix = self.prefix.select(row_R)
        self.current_RLD = None if self.current_RLD is None else self.current_RLD[row_R]
        self.generators = [self.generators[row] for row in rows]
        if self._noise is not None:
            self._noise = [self._noise[row] for row in rows]
        if self.conditioning is not None:
            self.conditioning = self.conditioning.select(row_R)

    def _given(self) -> Conditioning | None:
        """What the next depth starts from; tokens that the caller committed (clock 0) stay as they are."""
        previous_RLD, plan = self.previous_RLD, self.plan
        if previous_RLD is None or plan.warm_start in ("fresh", "same"):
            return self.conditioning
        clock_RL = previous_RLD.new_full(previous_RLD.shape[:2], 1.0 if plan.warm_start == "anchor" else plan.restart)
        return Conditioning.around(self.conditioning, previous_RLD, clock_RL, noised=plan.warm_start == "anchor")


@dataclass(frozen=True)
class EarlyExit(ComputePolicy):
    """Take the first chunk that agrees with the one before it.

    Args:
        plan: where and how to answer.
        thresholds: largest discrepancy at which each exit is taken, one per ``plan.exits``: −inf never, the last +inf.
        label: for tables.
    """

    plan: ExitPlan
    thresholds: tuple[float, ...]
    label: str = "exit"

    def __post_init__(self) -> None:
        if len(self.thresholds) != len(self.plan.exits) or self.thresholds[-1] != inf:
            raise ConfigError(
                f"Exits {list(self.plan.exits)} need a threshold each and the last one +inf, got {list(self.thresholds)}."
            )

    @property
    def name(self) -> str:
        """For tables."""
        return self.label

    @property
    def needs(self) -> Requirements:
        """A checkpoint that learned to answer at every depth of the plan."""
        needs = Requirements(exits=self.plan.depths).sampled(self.plan.sampling)
        return needs.also(Capability.CONDITIONING) if self.plan.warm_start in ("anchor", "renoise") else needs

    def read(self, model: Model, prefix: Prefix) -> Prefix:
        """Through the first depth; the others are for those that stay."""
        return model.read(prefix, self.plan.depths[0])

    def passes(self, depth: int) -> Passes:
        """From each depth of the plan to the next, with a chunk at each."""
        depths = self.plan.depths
        reads = frozenset((start, upto, 1) for start, upto in pairwise((0, *depths)))
        return Passes(reads, frozenset((at, 1) for at in depths))

    def decode(
        self,
        model: Model,
        prefix: Prefix,
        generators: Sequence[Generator],
        watch: Stopwatch,
        conditioning: Conditioning | None = None,
    ) -> Decoded:
        """See ``ComputePolicy``."""
        batch, device = prefix.batch, prefix.hidden_BPW.device
        row_R, rows = torch.arange(batch, device=device), list(range(batch))
        done: list[Tensor] = []
        groups: list[Group] = []
        tokens: list[Tokens] = []
        layers, passes, nfe, each = [0] * batch, [0] * batch, [0] * batch, model.decoder.nfe(self.plan.sampling)
        answers = self.plan.answers(model, prefix, generators, watch, conditioning)
        for number, (depth, action_RLD) in enumerate(answers):
            took_R = answers.tokens.nfe if answers.tokens else (each,) * len(rows)
            for row, took in zip(rows, took_R, strict=True):
                layers[row], nfe[row] = depth, nfe[row] + took
                passes[row] += depth * took + model.decoder.start_passes(depth)
            if answers.previous_RLD is None:
                continue
            if number == len(self.plan.exits):  # however far it is, even if it is no number
                leave_R = torch.ones_like(row_R, dtype=torch.bool)
            else:
                leave_R = distance(self.plan.metric, action_RLD, answers.previous_RLD) <= self.thresholds[number - 1]
            if not bool(leave_R.any()):
                continue
            gone_G = leave_R.nonzero()[:, 0]
            everybody = len(gone_G) == len(row_R)
            done.append(action_RLD[gone_G])
            groups.append(Group(row_R[gone_G], answers.prefix if everybody else answers.prefix.select(gone_G)))
            if answers.tokens is not None:
                tokens.append(answers.tokens.select(gone_G))
            if everybody:
                break
            stay_S = (~leave_R).nonzero()[:, 0]
            answers.keep(stay_S)
            row_R = row_R[stay_S]
            rows = row_R.tolist()
        passes = [ran + depth for ran, depth in zip(passes, layers, strict=True)]
        order = torch.cat([g.row_R for g in groups]).argsort()
        found = replace(Tokens.cat(tokens).select(order), nfe=tuple(nfe)) if tokens else None
        return Decoded(torch.cat(done)[order], tuple(groups), tuple(layers), tuple(nfe), tuple(passes), tokens=found)
