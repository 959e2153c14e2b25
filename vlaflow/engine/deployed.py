"""The model of a deployed policy: the same primitives as any other, computed by programs where there is one for the shapes.

Compute policies call ``embed``, ``read`` and the decoder's steps as ever and need not know. What has no program (a larger
batch, a longer instruction, guidance, which needs gradients) is computed by the folded networks: the chunk is the same, only
later. Nothing is ever compiled here.

Shape letters: B batch, L chunk size, X padded action dimension, N solver steps, T tokens, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from vlaflow.backbones.base import Prefix
from vlaflow.backbones.inputs import Inputs
from vlaflow.decoders.autoregressive import AutoregressiveDecoder
from vlaflow.decoders.base import Decoder
from vlaflow.decoders.discrete_flow import DiscreteFlowDecoder
from vlaflow.decoders.flow import FlowDecoder, FlowState, noise_velocity
from vlaflow.decoders.latent_flow import LatentFlowDecoder
from vlaflow.decoders.latent_reader import LatentReader, Written
from vlaflow.decoders.masked_diffusion import MaskedDiffusionDecoder
from vlaflow.decoders.model import Model
from vlaflow.decoders.rater import ConfidenceRater
from vlaflow.decoders.regression import RegressionDecoder, RegressionState
from vlaflow.decoders.tokens import TokenDecoder
from vlaflow.engine import programs
from vlaflow.flows import gaussian
from vlaflow.flows.sampling import Sampling
from vlaflow.nn.attention import KeyValues
from vlaflow.stacks.shared import Cache

Clocks = tuple[tuple[Tensor, Tensor, Tensor], ...]
"""For each step its clocks (B, L), their change, and what they add to the tokens (B, T, W)."""


class DeployedModel(Model):
    """See the module text.

    Args:
        model: folded networks (``fold.folded``), which the programs were made from; they become this model's own.
        deployed: the programs.
        engine: how they were compiled, in words.
    """

    def __init__(self, model: Model, deployed: programs.Programs, engine: str) -> None:
        rater = model.rater
        if isinstance(rater, ConfidenceRater):  # another kind of rater has no program
            rater = DeployedRater(rater, deployed)
        super().__init__(model.backbone, with_programs(model.decoder, deployed), rater, model.depths)
        self.programs, self._engine = deployed, engine

    @property
    def device(self) -> torch.device:
        """See ``Model``. Looking for the first of many parameters, several times a chunk, would take longer than a layer."""
        return torch.device("cpu")

    @property
    def engine(self) -> str:
        """See ``Model``."""
        return self._engine

    def embed(self, inputs: Inputs) -> Prefix:
        """See ``Model``."""
        program = self.programs.find(programs.embed_key(inputs))
        if program is None:
            return programs.embedded(self.backbone, inputs)
        (hidden_BPW,) = program([tensor.contiguous() for tensor in programs.tensors_of(inputs)])
        return Prefix(self.backbone, hidden_BPW, inputs.padding_mask_BP, state_BS=inputs.state_BS)

    def read(self, prefix: Prefix, depth: int | None = None) -> Prefix:
        """See ``Model``."""
        return self.decoder.read(self, prefix, depth)

    def run(self, prefix: Prefix, upto: int | None = None) -> Prefix:
        """See ``Backbone.run``."""
        upto = self.backbone.spec.depth if upto is None else upto
        if upto <= prefix.depth:
            return prefix
        program = self.programs.find(programs.run_key(prefix, upto))
        if program is None:
            return self.backbone.run(prefix, upto)
        hidden_BPW, *caches = program(programs.run_inputs(prefix))
        own = _pairs(caches, prefix.padding_mask_BP)
        embedded_BPW = prefix.hidden_BPW if prefix.depth == 0 else prefix.embedded_BPW
        return replace(prefix, hidden_BPW=hidden_BPW, kv_cache=(*prefix.kv_cache, *own), embedded_BPW=embedded_BPW)


class Deployed(nn.Module):
    """A part of a model that runs programs; the first base of its class, before the class of the part.

    Args:
        part: folded; its networks are shared.
        deployed: the programs.
    """

    def __init__(self, part: nn.Module, deployed: programs.Programs) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(part))
        self.programs = deployed


class DeployedFlow(Deployed, FlowDecoder):
    """A flow decoder whose steps are programs; what a clock adds to the tokens is kept for every sampler it was run with.

    Args:
        flow: folded; its networks are shared.
        deployed: the programs.
    """

    def __init__(self, flow: FlowDecoder, deployed: programs.Programs) -> None:
        super().__init__(flow, deployed)
        self._uniform = lru_cache(maxsize=32)(self._table)

    def advance(self, state: FlowState, prefix: Prefix, steps: int = 1) -> FlowState:
        """See ``Decoder``."""
        plain = state.guidance is None and len(state.x_BLX) == prefix.batch
        program = self.programs.find(programs.reading_key("step", prefix)) if plain else None
        if program is None:
            return super().advance(state, prefix, steps)
        count, read = state.sampling.steps, programs.reading_inputs(prefix)
        mask_BLX = None if prefix.action_mask_BLD is None else self._mask(prefix.action_mask_BLD, state.x_BLX)

        def step(from_BLX: Tensor, at_BLX: Tensor, clock_BL: Tensor, delta_BL: Tensor, time_BTW: Tensor) -> Tensor:
            (made_BLX,) = program([from_BLX, at_BLX, clock_BL, delta_BL, time_BTW, *read])
            if mask_BLX is None:
                return made_BLX
            return torch.where(mask_BLX, made_BLX, from_BLX + delta_BL[..., None] * noise_velocity(at_BLX, clock_BL))

        def velocity(x_BLX: Tensor, clock_BL: Tensor) -> Tensor:
            return step(torch.zeros_like(x_BLX), x_BLX, clock_BL, torch.ones_like(clock_BL), self.codec.times(clock_BL))

        x_BLX, last = state.x_BLX.contiguous(), min(state.done + steps, count)
        if state.sampling.solver == "euler":
            for clock_BL, delta_BL, time_BTW in self._clocks(state)[state.done : last]:
                x_BLX = step(x_BLX, x_BLX, clock_BL, delta_BL, time_BTW)
            return replace(state, x_BLX=x_BLX, done=last)
        for done in range(state.done, last):
            now_BL, next_BL = state.clock_at(done), state.clock_at(done + 1)
            x_BLX = gaussian.solver_step(state.sampling.solver, x_BLX, velocity, now_BL, next_BL, last=done + 1 == count)
        return replace(state, x_BLX=x_BLX, done=last)

    def _clocks(self, state: FlowState) -> Clocks:
        if bool((state.start_BL == 1).all()):
            return self._uniform(state.sampling, len(state.start_BL))
        return self._walk(state.sampling, state.start_BL)

    def _table(self, sampling: Sampling, batch: int) -> Clocks:
        """Those of tokens that all start as noise."""
        return self._walk(sampling, torch.ones(batch, self.chunk_size))

    def _walk(self, sampling: Sampling, start_BL: Tensor) -> Clocks:
        clock_NBL = torch.stack([start_BL * sampling.clock(done) for done in range(sampling.steps + 1)])
        delta_NBL = clock_NBL[1:] - clock_NBL[:-1]
        time_NBTW = self.codec.times(clock_NBL[:-1].flatten(0, 1)).unflatten(0, delta_NBL.shape[:2])
        return tuple(zip(clock_NBL[:-1], delta_NBL, time_NBTW, strict=True))


class DeployedRegression(Deployed, RegressionDecoder):
    """A regression decoder whose answer is a program."""

    def advance(self, state: RegressionState, prefix: Prefix, steps: int = 1) -> RegressionState:
        """See ``Decoder``."""
        program = self.programs.find(programs.reading_key("answer", prefix)) if state.action_BLD is None else None
        if program is None:
            return super().advance(state, prefix, steps)
        return RegressionState(self.masked(program(programs.reading_inputs(prefix))[0], prefix))


class DeployedTokens(Deployed, TokenDecoder[Any]):
    """A decoder of action tokens that all see one another, whose scores are a program."""

    def look(self, embedded_BTW: Tensor, prefix: Prefix) -> tuple[Tensor, Tensor]:
        """See ``TokenDecoder``."""
        program = None
        if len(embedded_BTW) == prefix.batch:
            program = self.programs.find(programs.reading_key("look", prefix))
        if program is None:
            return super().look(embedded_BTW, prefix)
        hidden_BSW, logits_BSV = program([embedded_BTW.contiguous(), *programs.reading_inputs(prefix)])
        return hidden_BSW, logits_BSV


class DeployedMaskedDiffusion(DeployedTokens, MaskedDiffusionDecoder):
    """See its bases."""


class DeployedDiscreteFlow(DeployedTokens, DiscreteFlowDecoder):
    """See its bases; where the prefix sees the tokens, both are run by one program."""

    def look_jointly(self, embedded_BTW: Tensor, prefix: Prefix, depth: int) -> tuple[Tensor, Prefix]:
        """See ``DiscreteFlowDecoder``."""
        start = prefix.restart()
        program = self.programs.find(programs.joint_key(start, depth))
        if program is None:
            return super().look_jointly(embedded_BTW, start, depth)
        hidden_BSW, hidden_BPW, *caches = program([embedded_BTW.contiguous(), *programs.run_inputs(start)])
        kv_cache = _pairs(caches, start.padding_mask_BP)
        return hidden_BSW, replace(start, hidden_BPW=hidden_BPW, kv_cache=kv_cache, embedded_BPW=start.hidden_BPW)


class DeployedAutoregressive(Deployed, AutoregressiveDecoder):
    """An autoregressive decoder that makes each token by a program, which reads buffers of the full length."""

    def following(self, token_B1W: Tensor, prefix: Prefix, cache: Cache) -> Tensor:
        """See ``AutoregressiveDecoder``."""
        made = _one_more(self.programs, token_B1W, prefix, cache)
        return super().following(token_B1W, prefix, cache) if made is None else made[1]


class DeployedLatentReader(Deployed, LatentReader):
    """A reader whose codes are written by a program: all at once, or one at a call."""

    def read(self, prefix: Prefix) -> Written:
        """See ``LatentReader``."""
        program = self.programs.find(programs.reading_key("codes", prefix)) if self.config.answer == "parallel" else None
        if program is None:
            return super().read(prefix)
        hidden_BKW, *own = program(programs.reading_inputs(prefix))
        return Written((hidden_BKW,), _pairs(own))

    def following(self, token_B1W: Tensor, prefix: Prefix, cache: Cache) -> tuple[Tensor, Tensor]:
        """See ``LatentReader``."""
        made = _one_more(self.programs, token_B1W, prefix, cache)
        return super().following(token_B1W, prefix, cache) if made is None else made


class DeployedRater(Deployed, ConfidenceRater):
    """A rater that is a program."""

    def forward(self, prefix: Prefix, action_BLD: Tensor) -> Tensor:
        """See ``ConfidenceRater``."""
        program = self.programs.find(programs.rating_key(prefix))
        if program is None:
            return super().forward(prefix, action_BLD)
        return program([*programs.run_inputs(prefix), action_BLD.contiguous()])[0]


def _one_more(deployed: programs.Programs, token_B1W: Tensor, prefix: Prefix, cache: Cache) -> tuple[Tensor, Tensor] | None:
    """Hidden states and scores after one more token, which is then in the cache; None where there is no program."""
    program = deployed.find(programs.next_key(cache))
    if program is None:
        return None
    placed_B1W, _ = prefix.backbone.place(token_B1W, prefix, cache.used - cache.prefix)
    hidden_B1W, logits_B1V, *own = program(programs.next_inputs(placed_B1W, cache))
    for index, pair in enumerate(_pairs(own)):
        cache.write(index, pair)
    cache.used += 1
    return hidden_B1W, logits_B1V


def _pairs(tensors: Sequence[Tensor], mask_BP: Tensor | None = None) -> tuple[KeyValues, ...]:
    """Keys and values by layer."""
    return tuple(KeyValues(key, value, mask_BP) for key, value in zip(tensors[::2], tensors[1::2], strict=True))


@singledispatch
def with_programs(decoder: Decoder[Any], deployed: programs.Programs) -> Decoder[Any]:
    """The decoder with programs for its steps; by default as it is, since nothing is known of its steps."""
    return decoder


@with_programs.register
def _(decoder: FlowDecoder, deployed: programs.Programs) -> Decoder[Any]:
    return DeployedFlow(decoder, deployed)


@with_programs.register
def _(decoder: RegressionDecoder, deployed: programs.Programs) -> Decoder[Any]:
    return DeployedRegression(decoder, deployed)


@with_programs.register
def _(decoder: MaskedDiffusionDecoder, deployed: programs.Programs) -> Decoder[Any]:
    return DeployedMaskedDiffusion(decoder, deployed)


@with_programs.register
def _(decoder: DiscreteFlowDecoder, deployed: programs.Programs) -> Decoder[Any]:
    return DeployedDiscreteFlow(decoder, deployed)


@with_programs.register
def _(decoder: AutoregressiveDecoder, deployed: programs.Programs) -> Decoder[Any]:
    return DeployedAutoregressive(decoder, deployed)


@with_programs.register
def _(decoder: LatentFlowDecoder, deployed: programs.Programs) -> Decoder[Any]:
    decoder.latent = DeployedLatentReader(decoder.latent, deployed)
    decoder.flow = DeployedFlow(decoder.flow, deployed)
    return decoder
