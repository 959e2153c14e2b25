"""Multi-exit training: at which depths a network learns to answer, with one head for all of them (A1 §3.2).

Depth counts layers that have run: A1's layer index 27 is depth 28.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlaflow.errors import ConfigError


@dataclass(frozen=True)
class ExitTraining:
    """Where and how exits are trained.

    Args:
        depths: ascending; the last is the backbone's own depth.
        choose: "all" takes the mean loss over the depths, in one pass; "random" trains one depth a step, the same on every
            process, and runs no layer beyond it. A1's code has both and its paper does not say which one made its numbers.
    """

    depths: tuple[int, ...]
    choose: Literal["all", "random"] = "all"

    def __post_init__(self) -> None:
        if not self.depths or self.depths[0] < 1 or list(self.depths) != sorted(set(self.depths)):
            raise ConfigError(f"Exit depths count layers and must ascend from at least 1, got {list(self.depths)}.")


def every(step: int, depth: int) -> tuple[int, ...]:
    """Every so many layers, and the deepest always: with 2 of 28 it is 2, 4, …, 28, which are A1's layers 1, 3, …, 27."""
    return tuple(sorted({*range(step, depth + 1, step), depth}))
