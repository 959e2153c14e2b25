"""Multi-exit training: at which depths a network learns to answer, with one head for all of them (A1 §3.2).

Depth counts layers that have run: A1's layer index 27 is depth 28.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator

from vlaflow.decoders.losses import LossTerms
from vlaflow.errors import ConfigError


@dataclass(frozen=True)
class ExitTraining:
    """Where and how exits are trained.

    Args:
        depths: ascending; the last is the backbone's own depth.
        choose: "all" takes the mean loss over the depths, in one pass; "random" trains one depth a step, the same on every
            process, and runs no layer beyond it. A1's code has both and its paper does not say which one made its numbers.
        shallow: with "all", the share of the loss that the depths before the last have together; None counts all alike, as A1
            does. Small networks learn less at full depth when shallow answers count as much (docs/log.md).
    """

    depths: tuple[int, ...]
    choose: Literal["all", "random"] = "all"
    shallow: float | None = None

    def __post_init__(self) -> None:
        if not self.depths or self.depths[0] < 1 or list(self.depths) != sorted(set(self.depths)):
            raise ConfigError(f"Exit depths count layers and must ascend from at least 1, got {list(self.depths)}.")
        if self.shallow is not None and not (0 <= self.shallow < 1 and self.choose == "all"):
            raise ConfigError(f"shallow is a share in [0, 1) and goes with choose='all', got {self.shallow}.")

    def draw(self, shared: Generator) -> tuple[int, ...]:
        """The depth that a step trains, nothing where it trains all; evaluation does without it."""
        if self.choose == "all":
            return ()
        return (self.depths[int(torch.randint(len(self.depths), (), generator=shared))],)

    def total(self, terms: LossTerms) -> LossTerms:
        """The loss of all exits, weighted."""
        if self.shallow is None or len(terms.exits) < 2:
            return terms
        *before, last = terms.exits.values()
        return terms.answering((1 - self.shallow) * last + self.shallow * torch.stack(before).mean())


def every(step: int, depth: int) -> tuple[int, ...]:
    """Every so many layers, and the deepest always: with 2 of 28 it is 2, 4, …, 28, which are A1's layers 1, 3, …, 27."""
    return tuple(sorted({*range(step, depth + 1, step), depth}))
