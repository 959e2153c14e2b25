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

import torch
from torch import Generator, Tensor, nn

from vlaflow.backbones.base import Prefix

State = TypeVar("State")


@dataclass(frozen=True)
class LossTerms:
    """A training loss and its named parts (detached, for the log); ``exits`` are the losses of the depths it is the mean of."""

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    exits: Mapping[int, Tensor] = field(default_factory=dict)


def mean_over_exits(name: str, losses: Mapping[int, Tensor]) -> LossTerms:
    """One loss from those of several depths; each is named in the parts where there is more than one."""
    total = torch.stack(tuple(losses.values())).mean()
    deepest = losses[max(losses)].detach()
    parts = {f"{name}@{depth}": loss.detach() for depth, loss in losses.items()} if len(losses) > 1 else {}
    return LossTerms(total, {name: deepest, **parts}, losses)


@dataclass(frozen=True)
class Targets:
    """What to learn: normalised actions (B, L, D), and which of them count, bool (B, L)."""

    action_BLD: Tensor
    valid_BL: Tensor


@dataclass(frozen=True)
class Given:
    """Tokens known beforehand, and the clock each starts from.

    Args:
        action_BLD: normalised actions.
        clock_BL: in [0, 1].
        noised: the actions already are what a token at that clock looks like; nothing is mixed into them. By default they
            are clean, and fresh noise brings them to their clock.
    """

    action_BLD: Tensor
    clock_BL: Tensor
    noised: bool = False


class Decoder(nn.Module, ABC, Generic[State]):
    """Moves action tokens from noise to actions, reading a prefix at whatever depth it has reached."""

    horizon: int
    action_dim: int

    @property
    @abstractmethod
    def regenerates(self) -> bool:
        """Whether it was trained to make some actions anew with the others as context."""

    @property
    @abstractmethod
    def takes_given(self) -> bool:
        """Whether ``start`` can begin from given tokens."""

    @abstractmethod
    def evaluations(self, steps: int) -> int:
        """Network evaluations that ``steps`` solver steps cost."""

    @abstractmethod
    def loss(self, prefix: Prefix, targets: Targets, generator: Generator, depths: Sequence[int] | None = None) -> LossTerms:
        """Training loss on one batch, the mean over exits at these depths (by default only where the prefix ends).

        All randomness comes from ``generator``; every exit sees the same noise. With several depths, ``parts`` names the
        loss of each: "velocity@2".
        """

    @abstractmethod
    def start(self, prefix: Prefix, generators: Sequence[Generator], steps: int, given: Given | None = None) -> State:
        """Initial tokens for B observations, to be finished in ``steps`` solver steps; one generator per observation."""

    @abstractmethod
    def advance(self, state: State, prefix: Prefix, steps: int = 1) -> State:
        """``steps`` solver steps at ``prefix.depth``."""

    @abstractmethod
    def finish(self, state: State) -> Tensor:
        """Normalised actions, (B, L, D) float32."""

    def sample(self, prefix: Prefix, generators: Sequence[Generator], steps: int, given: Given | None = None) -> Tensor:
        """A whole chunk at ``prefix.depth``: start, all steps, finish."""
        return self.finish(self.advance(self.start(prefix, generators, steps, given), prefix, steps))
