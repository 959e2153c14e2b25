"""How one chunk is sampled: the clocks of the solver's steps, the solver, and how much chance there is.

A value that every decoder's ``start`` takes. What a decoder has no use for (a temperature without tokens, a noise scale without
Gaussian noise) is refused before anything runs (``compute.base.Requirements``). Written as ``2``, ``2@0.5``, ``1-0.3-0``,
``5,midpoint``, ``16,temperature=0``, ``16,expected`` (docs/sampling.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from vlaflow.errors import ConfigError
from vlaflow.ranges import require_words

Solver = Literal["euler", "midpoint", "heun"]
"""First order, and two of second order, which evaluate the network twice a step. Heun's last step is Euler's: it would need the
velocity at clock 0, which no training shows; the order stays two."""


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampler.

    Args:
        steps: solver steps; a stated grid has its own number, which takes the place of this one.
        noise_scale: factor of the starting noise of a continuous flow, in [0, 1]; 1 is the papers' sampler, 0 starts from the
            mean and depends on no generator.
        grid: clocks that the steps go through, from 1 down to 0; None for equal strides. A token that starts at another clock
            walks through the same shares of it.
        solver: of a continuous flow.
        temperature: of the tokens a discrete decoder draws (in a discrete flow, of the predicted final chunk); 0 takes the most
            probable ones, None is the checkpoint's own.
        expected: a discrete decoder takes the token nearest to the mean of its distribution, in place of drawing one; for ids
            that are ordered by value. The temperature is then that of the distribution, 1 by default.
    """

    steps: int = 10
    noise_scale: float = 1.0
    grid: tuple[float, ...] | None = None
    solver: Solver = "euler"
    temperature: float | None = None
    expected: bool = False

    def __post_init__(self) -> None:
        require_words(self)
        if self.grid is not None:
            falling = all(later < before for before, later in pairwise(self.grid))
            if len(self.grid) < 2 or (self.grid[0], self.grid[-1]) != (1, 0) or not falling:
                raise ConfigError(f"A grid of clocks falls from 1 to 0, as in 1-0.3-0, got {list(self.grid)}.")
            object.__setattr__(self, "steps", len(self.grid) - 1)
        if self.steps < 1:
            raise ConfigError(f"A chunk takes at least one solver step, got {self.steps}.")
        if not 0 <= self.noise_scale <= 1:
            raise ConfigError(f"noise_scale lies in [0, 1], got {self.noise_scale}.")
        if self.temperature is not None and not self.temperature >= 0:
            raise ConfigError(f"A temperature is 0 (greedy) or more, got {self.temperature}.")

    def __str__(self) -> str:
        """As it is typed."""
        clocks = "-".join(map(_typed, self.grid)) if self.grid else str(self.steps)
        noise = "" if self.noise_scale == 1 else f"@{_typed(self.noise_scale)}"
        solver = "" if self.solver == "euler" else f",{self.solver}"
        temperature = "" if self.temperature is None else f",temperature={_typed(self.temperature)}"
        return clocks + noise + solver + temperature + ",expected" * self.expected

    @property
    def evaluations(self) -> int:
        """Evaluations of the velocity over all steps."""
        return {"euler": self.steps, "midpoint": 2 * self.steps, "heun": 2 * self.steps - 1}[self.solver]

    def clock(self, done: int) -> float:
        """Clock after ``done`` steps of a token that starts at 1."""
        return 1 - done / self.steps if self.grid is None else self.grid[done]

    def progress(self, done: int) -> float:
        """Share of the way from clock 1 to 0 after ``done`` steps."""
        return done / self.steps if self.grid is None else 1 - self.grid[done]


def _typed(number: float) -> str:
    """The shortest decimal that reads back as this number, without an exponent."""
    return np.format_float_positional(number, trim="-")
