"""The contract of a decoder: ``loss`` for training; ``start``, ``advance``, ``finish`` for inference.

Whatever a token is, it carries a clock: 1 is pure noise, 0 is done. What a decoder is given (``Given``) are tokens with
clocks: committed or confident ones at 0, ones to be made at 1, warm-started ones in between.

Shape letters: B batch, L horizon, D action dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Generator, Tensor, nn

from vlaflow.backbones.base import Prefix

State = TypeVar("State")


@dataclass(frozen=True)
class LossTerms:
    """A training loss and its named parts (detached, for the log)."""

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Targets:
    """What to learn: normalised actions (B, L, D), and which of them count, bool (B, L)."""

    action_BLD: Tensor
    valid_BL: Tensor


@dataclass(frozen=True)
class Given:
    """Tokens known beforehand: normalised actions (B, L, D) and the clock each starts from (B, L)."""

    action_BLD: Tensor
    clock_BL: Tensor


class Decoder(nn.Module, ABC, Generic[State]):
    """Moves action tokens from noise to actions, reading a prefix at whatever depth it has reached."""

    horizon: int
    action_dim: int

    @abstractmethod
    def loss(self, prefix: Prefix, targets: Targets, generator: Generator) -> LossTerms:
        """Training loss on one batch; all randomness comes from ``generator``."""

    @abstractmethod
    def start(self, prefix: Prefix, generators: Sequence[Generator], steps: int, given: Given | None = None) -> State:
        """Initial tokens for B observations, to be finished in ``steps`` solver steps; one generator per observation."""

    @abstractmethod
    def advance(self, state: State, prefix: Prefix, steps: int = 1) -> State:
        """``steps`` solver steps at ``prefix.depth``."""

    @abstractmethod
    def finish(self, state: State) -> Tensor:
        """Normalised actions, (B, L, D) float32."""
