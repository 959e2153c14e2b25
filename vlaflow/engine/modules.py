"""What programs are compiled from: a policy's networks as modules whose arguments and results are tensors alone.

Each module here is the body of one kind of program; ``programs`` says which kinds there are, and gathers their arguments.

Shape letters: B batch, P prefix tokens, W width, L chunk size, X padded action dimension, S state dimension or token slots, T
tokens, V vocabulary, K codes, N prefix tokens and room for the tokens behind them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlaflow.backbones.base import Backbone, Prefix
from vlaflow.backbones.inputs import Inputs
from vlaflow.decoders.discrete_flow import DiscreteFlowDecoder
from vlaflow.decoders.flow import FlowDecoder
from vlaflow.decoders.latent_reader import LatentReader
from vlaflow.decoders.rater import ConfidenceRater
from vlaflow.decoders.regression import RegressionDecoder
from vlaflow.decoders.tokens import TokenDecoder
from vlaflow.engine.programs import with_tensors
from vlaflow.nn.attention import KeyValues


class Embed(nn.Module):
    """The tokens of observations before the first layer."""

    def __init__(self, backbone: Backbone, like: Inputs) -> None:
        super().__init__()
        self.backbone, self.like = backbone, like

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """What ``tensors_of`` gives of the inputs, to hidden states (B, P, W)."""
        return [self.backbone.embed(with_tensors(self.like, tensors)).hidden_BPW]


class RunLayers(nn.Module):
    """The prefix through some layers."""

    def __init__(self, backbone: Backbone, start: int, upto: int) -> None:
        super().__init__()
        self.backbone, self.start, self.upto = backbone, start, upto

    def forward(self, hidden_BPW: Tensor, padding_mask_BP: Tensor) -> list[Tensor]:
        """Hidden states, then key and value of every layer."""
        nothing = KeyValues(hidden_BPW, hidden_BPW)  # stands for layers that have run, which none reads
        prefix = Prefix(self.backbone, hidden_BPW, padding_mask_BP, kv_cache=(nothing,) * self.start)
        done = self.backbone.run(prefix, self.upto)
        return [done.hidden_BPW, *_flat(done.kv_cache[self.start :])]


class SolverStep(nn.Module):
    """from + delta · velocity(at): an Euler step where ``from`` is ``at``, and half of a second-order one where it is not."""

    def __init__(self, backbone: Backbone, decoder: FlowDecoder) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, decoder

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """Tokens after the step, (B, L, X), of

        from_BLX, at_BLX: where the step begins, and where the velocity is taken.
        clock_BL: of ``at_BLX``.
        delta_BL: change of the clock; a token whose clock does not move is returned unchanged to the bit.
        time_BTW: the codec's ``times`` of the clock.
        state_BS, visible_BP, cache: see ``reading_inputs``.
        """
        from_BLX, at_BLX, clock_BL, delta_BL, time_BTW, state_BS, visible_BP, *cache = tensors
        prefix = _reading(self.backbone, state_BS, visible_BP, cache)
        velocity_BLX = self.decoder.velocity(at_BLX, clock_BL, prefix, time_BTW).float()
        delta_BL1 = delta_BL[..., None]
        return [torch.where(delta_BL1 == 0, from_BLX, from_BLX + delta_BL1 * velocity_BLX)]


class AnswerAtOnce(nn.Module):
    """The chunk of a regression decoder."""

    def __init__(self, backbone: Backbone, decoder: RegressionDecoder) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, decoder

    def forward(self, state_BS: Tensor, visible_BP: Tensor, *cache: Tensor) -> list[Tensor]:
        """Normalised actions (B, L, D); arguments as ``reading_inputs`` gives them."""
        prefix = _reading(self.backbone, state_BS, visible_BP, cache)
        return self.decoder.answers(prefix, (prefix.depth,))


class Rate(nn.Module):
    """The rater's confidence."""

    def __init__(self, backbone: Backbone, rater: ConfidenceRater) -> None:
        super().__init__()
        self.backbone, self.rater = backbone, rater

    def forward(self, hidden_BPW: Tensor, padding_mask_BP: Tensor, action_BLD: Tensor) -> list[Tensor]:
        """Confidence (B, L) in normalised actions, on hidden states of the full depth."""
        return [self.rater(Prefix(self.backbone, hidden_BPW, padding_mask_BP), action_BLD)]


class Look(nn.Module):
    """What a decoder of action tokens sees in tokens that all see one another: a step of masked diffusion or discrete flow."""

    def __init__(self, backbone: Backbone, decoder: TokenDecoder[Any]) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, decoder

    def forward(self, embedded_BTW: Tensor, state_BS: Tensor, visible_BP: Tensor, *cache: Tensor) -> list[Tensor]:
        """Hidden states (B, S, W) and scores (B, S, V); the other arguments as ``reading_inputs`` gives them."""
        return list(self.decoder.look(embedded_BTW, _reading(self.backbone, state_BS, visible_BP, cache)))


class LookJointly(nn.Module):
    """A step of a discrete flow where prefix and tokens see one another."""

    def __init__(self, backbone: Backbone, decoder: DiscreteFlowDecoder, depth: int) -> None:
        super().__init__()
        self.backbone, self.decoder, self.depth = backbone, decoder, depth

    def forward(self, embedded_BTW: Tensor, hidden_BPW: Tensor, padding_mask_BP: Tensor) -> list[Tensor]:
        """Hidden states (B, S, W) of the tokens and (B, P, W) of the prefix, then its key and value in every layer."""
        prefix = Prefix(self.backbone, hidden_BPW, padding_mask_BP)
        hidden_BSW, latest = self.decoder.look_jointly(embedded_BTW, prefix, self.depth)
        return [hidden_BSW, latest.hidden_BPW.contiguous(), *_flat(latest.kv_cache)]


class NextToken(nn.Module):
    """One more token of what answers one after the other: of actions, or latent ones."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, token_B1W: Tensor, visible_BN: Tensor, *cache: Tensor) -> list[Tensor]:
        """Hidden states (B, 1, W) and scores (B, 1, V) of the next token; this one's key and value in every layer.

        Args:
            token_B1W: embedded, with its position.
            visible_BN: bool, the tokens so far; the rest of the buffers is not read.
            cache: key and value buffer (B, G, N, E) of every layer.
        """
        hidden_B1W, found = token_B1W, []
        for index, before in enumerate(_pairs(cache, visible_BN)):
            hidden_B1W, own = self.backbone.layer(index, hidden_B1W, None, before)
            found.append(own)
        hidden_B1W = self.backbone.finish(hidden_B1W)
        return [hidden_B1W, self.head(hidden_B1W), *_flat(found)]


class WriteCodes(nn.Module):
    """The latent action tokens that are written in one pass, and read by an expert."""

    def __init__(self, backbone: Backbone, reader: LatentReader) -> None:
        super().__init__()
        self.backbone, self.reader = backbone, reader

    def forward(self, state_BS: Tensor, visible_BP: Tensor, *cache: Tensor) -> list[Tensor]:
        """Hidden states (B, K, W), then key and value of every layer; arguments as ``reading_inputs`` gives them."""
        written = self.reader.read(_reading(self.backbone, state_BS, visible_BP, cache))
        return [*written.hidden, *_flat(written.kv_cache)]


def _reading(backbone: Backbone, state_BS: Tensor, visible_BP: Tensor, cache: Sequence[Tensor]) -> Prefix:
    """The inverse of ``reading_inputs``."""
    return Prefix(backbone, cache[0], kv_cache=_pairs(cache, visible_BP), state_BS=state_BS)


def _pairs(cache: Sequence[Tensor], visible_BP: Tensor) -> tuple[KeyValues, ...]:
    return tuple(KeyValues(k, v, visible_BP) for k, v in zip(cache[::2], cache[1::2], strict=True))


def _flat(kv_cache: Iterable[KeyValues]) -> list[Tensor]:
    return [tensor.contiguous() for own in kv_cache for tensor in (own.key_CGPE, own.value_CGPE)]
