"""Consistency distillation of a straight-line flow: a network learns to reach in one step where a teacher's flow leads.

For a velocity network v the end estimate f(x, t) = x − t·v(x, t) is one Euler step to clock 0, and the identity at clock 0
whatever the network. Consistency distillation (Song et al., "Consistency Models", 2023) asks for the same estimate at two
points of one of the teacher's trajectories: f(x_t, t) = sg f(x_u, u), where u < t and the teacher's solver leads from x_t to
x_u. With several segments a step only leads to the lower end s of the segment that t is in (Heek et al., "Multistep
Consistency Models", 2024). Written as velocities, the target is

    v(x_t, t) = w · v̄ + (1 − w) · sg v(x_u, u)        w = (t − u) / (t − s) in [0, 1]

with v̄ the teacher's mean velocity between t and u: a mean over the whole way, of which the teacher walks the first part and
the network itself estimates the rest. Nothing is divided by a small clock, and errors are as large as in the training of the
flow. sg is the network with its current weights and no gradient; an averaged copy of them was found to be unnecessary (Song
and Dhariwal, "Improved Techniques for Training Consistency Models", 2024). With u = s the teacher walks all the way (as in Kim
et al., "Consistency Trajectory Models", 2024), and the target no longer depends on the network.

Shape letters: B batch, L chunk size, X action dimension, padded or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlaflow.errors import ConfigError
from vlaflow.flows.gaussian import step
from vlaflow.ranges import Count

VelocityField = Callable[[Tensor, Tensor], Tensor]
"""Tokens (B, L, X) and their clocks (B, L) to velocities (B, L, X), float32."""
Teaching = Callable[[Tensor, Tensor, VelocityField], Tensor]
"""Tokens, their clocks and the field of the network that learns, to the velocities that it should have."""


@dataclass(frozen=True)
class Consistency:
    """How a trained flow is distilled.

    Args:
        steps: solver steps of equal stride that a chunk is to take afterwards, 1 or a few.
        teacher_steps: Euler steps of the teacher from noise to actions; its chunks of so many steps are what is distilled.
        stride: steps of the teacher between a point and the one whose estimate it learns; with at least
            teacher_steps / steps the teacher walks all the way.
    """

    steps: Count = 1
    teacher_steps: Count = 10
    stride: Count = 1

    def __post_init__(self) -> None:
        if self.steps >= self.teacher_steps:
            raise ConfigError(
                f"consistency.steps must be fewer than the teacher's, got {self.steps} and teacher_steps {self.teacher_steps}."
            )

    @property
    def longest(self) -> int:
        """Steps of the teacher through a whole segment."""
        return math.ceil(self.teacher_steps / self.steps)

    def end(self, clock_BL: Tensor) -> Tensor:
        """The lower end (B, L) of each clock's segment, which a step from there leads to; 0 for clock 0."""
        return ((clock_BL * self.steps).ceil() - 1).clamp(min=0) / self.steps

    def target(
        self, x_BLX: Tensor, clock_BL: Tensor, own: VelocityField, teacher: VelocityField, *, whole: bool = False
    ) -> Tensor:
        """What the velocity (B, L, X) should be, without a gradient.

        Args:
            x_BLX: tokens at their clocks.
            clock_BL: in [0, 1]; a token at 0 is context, and its target is of no account.
            own: the network that learns; not called where the teacher walks all the way.
            teacher: whose trajectories are followed.
            whole: have the teacher walk all the way whatever ``stride`` is.
        """
        count = self.longest if whole else min(self.stride, self.longest)
        end_BL = self.end(clock_BL)
        way_BL = clock_BL - end_BL
        taught_BLX = torch.zeros_like(x_BLX)

        def share(part_BL: Tensor) -> Tensor:
            return (part_BL / way_BL.clamp(min=torch.finfo(way_BL.dtype).tiny))[..., None]

        with torch.no_grad():
            for _ in range(count):
                next_BL = torch.maximum(end_BL, clock_BL - 1 / self.teacher_steps)
                velocity_BLX = teacher(x_BLX, clock_BL)
                taught_BLX = taught_BLX + share(clock_BL - next_BL) * velocity_BLX
                x_BLX, clock_BL = step(x_BLX, velocity_BLX, clock_BL, next_BL), next_BL
        if count == self.longest:
            return taught_BLX
        # with gradients, which are not needed: autocast of older versions of torch would keep the weights it casts without
        return (taught_BLX + share(clock_BL - end_BL) * own(x_BLX, clock_BL)).detach()
