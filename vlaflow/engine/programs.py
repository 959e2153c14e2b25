"""A policy's networks cut into functions of tensors, which can be compiled: embed, run, step, answer.

    embed    images, instruction and state to prefix tokens
    run      prefix tokens through layers ``start`` … ``upto``, to hidden states and the keys and values of these layers
    step     one Euler step of a flow, or one velocity, through ``upto`` layers
    answer   the chunk of a regression, through ``upto`` layers
    rate     the rater's confidence in a chunk

Every compute policy is made of these, so one set of programs serves all of them at any number of steps, any grid of clocks and
with given actions. Shapes are fixed: a batch is filled up to the next program's, an instruction to the next length.

Shape letters: B batch, P prefix tokens, W width, L chunk size, X padded action dimension, S state dimension, T time tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlaflow.backbones.base import Backbone, Prefix
from vlaflow.backbones.inputs import Inputs
from vlaflow.decoders.flow import FlowDecoder
from vlaflow.decoders.rater import ConfidenceRater
from vlaflow.decoders.regression import RegressionDecoder
from vlaflow.nn.attention import KeyValues

Precision = Literal["f32", "bf16"]
Run = Callable[[Sequence[Tensor]], list[Tensor]]
"""A program that can be called: contiguous tensors of its shapes in, tensors out."""


@dataclass(frozen=True, order=True)
class ProgramKey:
    """Which part of a policy a program computes, and for which shapes.

    Args:
        part: see the module text.
        tokens: prefix tokens that it reads; ids of the instruction for ``embed``.
        start, upto: layers; 0 and 0 for ``embed``.
        batch: observations, times draws.
    """

    part: Literal["embed", "run", "step", "answer", "rate"]
    tokens: int
    start: int
    upto: int
    batch: int

    def __str__(self) -> str:
        """As its file is named."""
        return f"{self.part}-{self.tokens}-{self.start}-{self.upto}-{self.batch}"

    @staticmethod
    def named(name: str) -> ProgramKey:
        """The inverse of ``str``."""
        part, *numbers = name.split("-")
        return ProgramKey(part, *map(int, numbers))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Program:
    """A function of tensors that is to be compiled.

    Args:
        key: what it computes.
        module: computes it.
        examples: tensors of its shapes.
    """

    key: ProgramKey
    module: nn.Module
    examples: tuple[Tensor, ...]


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
        caches = (tensor for own in done.kv_cache[self.start :] for tensor in (own.key_CGPE, own.value_CGPE))
        return [done.hidden_BPW, *(tensor.contiguous() for tensor in caches)]


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


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """The tensors of inputs in the order of their fields, images by view."""
    found: list[Tensor] = []
    for field in dataclasses.fields(inputs):
        value = getattr(inputs, field.name)
        found += value.values() if isinstance(value, Mapping) else [] if value is None else [value]
    return found


def with_tensors(like: Inputs, tensors: Iterable[Tensor]) -> Inputs:
    """Inputs with other tensors, given in the order of ``tensors_of``."""
    left, changed = iter(tensors), dict[str, Any]()
    for field in dataclasses.fields(like):
        value = getattr(like, field.name)
        if isinstance(value, Mapping):
            changed[field.name] = {name: next(left) for name in value}
        elif value is not None:
            changed[field.name] = next(left)
    return replace(like, **changed)


def unmasked(inputs: Inputs) -> Inputs:
    """The same without the mask of the prefix tokens, which no embedding reads."""
    return replace(inputs, padding_mask_BP=None)


def embed_key(inputs: Inputs) -> ProgramKey:
    """What embeds these observations."""
    return ProgramKey("embed", inputs.id_BP.shape[1], 0, 0, len(inputs))


def run_key(prefix: Prefix, upto: int) -> ProgramKey:
    """What runs this prefix further."""
    return ProgramKey("run", prefix.hidden_BPW.shape[1], prefix.depth, upto, prefix.batch)


def rating_key(prefix: Prefix) -> ProgramKey:
    """What rates chunks on this prefix."""
    return ProgramKey("rate", prefix.hidden_BPW.shape[1], 0, prefix.depth, prefix.batch)


def reading_key(part: Literal["step", "answer"], prefix: Prefix) -> ProgramKey:
    """What reads this prefix."""
    key_CGPE = prefix.kv_cache[0].key_CGPE
    return ProgramKey(part, key_CGPE.shape[2], 0, prefix.depth, len(key_CGPE))


def run_inputs(prefix: Prefix) -> list[Tensor]:
    """What ``RunLayers`` takes, and the first two arguments of ``Rate``."""
    return [prefix.hidden_BPW.contiguous(), _mask(prefix.padding_mask_BP, prefix.hidden_BPW)]


def reading_inputs(prefix: Prefix) -> list[Tensor]:
    """What reads a prefix takes of it: its state, bool of the tokens that may be read, key and value of every layer."""
    assert prefix.state_BS is not None
    first, caches = prefix.kv_cache[0], (tensor for own in prefix.kv_cache for tensor in (own.key_CGPE, own.value_CGPE))
    visible_BP = _mask(first.mask_CP, first.key_CGPE[:, 0])
    return [prefix.state_BS.contiguous(), visible_BP, *(tensor.contiguous() for tensor in caches)]


def _mask(mask_BP: Tensor | None, token_BPW: Tensor) -> Tensor:
    """A mask where there was none: programs always read one."""
    return token_BPW.new_ones(token_BPW.shape[:2], dtype=torch.bool) if mask_BP is None else mask_BP.contiguous()


def _reading(backbone: Backbone, state_BS: Tensor, visible_BP: Tensor, cache: Sequence[Tensor]) -> Prefix:
    """The inverse of ``reading_inputs``."""
    kv_cache = tuple(KeyValues(k, v, visible_BP) for k, v in zip(cache[::2], cache[1::2], strict=True))
    return Prefix(backbone, cache[0], kv_cache=kv_cache, state_BS=state_BS)


class Programs:
    """Programs by what they compute; a batch that has none of its own takes the next larger one's.

    Attributes:
        missed: what was asked for and not there, so the networks computed it.
    """

    def __init__(self, programs: Mapping[ProgramKey, Run]) -> None:
        self.missed: set[ProgramKey] = set()
        self._by_batch: dict[ProgramKey, list[tuple[int, Run]]] = {}
        for key in sorted(programs):
            self._by_batch.setdefault(replace(key, batch=0), []).append((key.batch, programs[key]))

    def find(self, key: ProgramKey) -> Run | None:
        """The program for these shapes; None where none was built."""
        for batch, program in self._by_batch.get(replace(key, batch=0), ()):
            if batch == key.batch:
                return program
            if batch > key.batch:
                return _filling(program, key.batch, batch)
        self.missed.add(key)
        return None


def _filling(program: Run, rows: int, batch: int) -> Run:
    """The program on fewer rows: the first is repeated."""

    def filled(tensor: Tensor) -> Tensor:
        return torch.cat((tensor, tensor[:1].expand(batch - rows, *tensor.shape[1:])))

    return lambda tensors: [out[:rows] for out in program([filled(tensor) for tensor in tensors])]
