"""Discrete flow matching: probability paths over a vocabulary, their velocities, and the jumps of the Markov chain.

A token does not move continuously; it jumps, and may jump again at every step. Clock 1 is uniform noise, 0 is the target.
The papers (DFM-VLA, FUDOKI, the kinetic-optimal paths of Shaul et al. 2024) use t = 1 − clock, as the equations say.

Two paths from noise to a target token y:

    metric path    p(x | y) = softmax_x(−β · d(x, y)), β from 0 at clock 1 to ∞ at clock 0
    mixture path   p(x | y) = (1 − clock)·[x = y] + clock / V

Shape letters: B batch, S token slots, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from vlaflow.errors import ConfigError
from vlaflow.flows.categorical import pick
from vlaflow.ranges import Positive, Share

JumpRule = Literal["linear", "exponential"]
"""Probability of leaving a token whose rate is λ within a stride h: min(1, hλ), or 1 − exp(−hλ)."""


@dataclass(frozen=True)
class TrainingClocks:
    """How the clocks of training examples are drawn; uniformly by default.

    Args:
        power: k of the density k·clock^(k − 1) on (0, 1]; above 1 there is more noise in the examples.
        pure: share of the examples that are noise alone, at clock 1, where every chunk starts.
    """

    power: Positive = 1.0
    pure: Share = 0.0

    def __post_init__(self) -> None:
        if not (self.power > 0 and 0 <= self.pure <= 1):
            raise ConfigError(
                f"Training clocks need a power above 0 and a share pure in [0, 1], got {self.power} and {self.pure}."
            )

    def draw(self, batch: int, generator: Generator) -> Tensor:
        """Clocks (batch, 1) in (0, 1]; one of exactly 0 would have nothing to learn from."""
        clock_B1 = 1 - torch.rand(batch, 1, generator=generator)
        if self.power != 1:
            clock_B1 = (clock_B1 ** (1 / self.power)).clamp(min=torch.finfo(clock_B1.dtype).tiny)
        if self.pure > 0:
            clock_B1 = clock_B1.masked_fill(torch.rand(batch, 1, generator=generator) < self.pure, 1.0)
        return clock_B1


@dataclass(frozen=True)
class MetricSchedule:
    """β = c·(t/(1 − t))^α with t = 1 − clock: how strongly the path concentrates on the target.

    Args:
        c: β at clock 1/2; with larger values, tokens reach the target earlier.
        alpha: the initial rate, at clock 1, is finite for 1, infinite below 1 and 0 above 1.
    """

    c: Positive = 3.0
    alpha: Positive = 1.0

    def __post_init__(self) -> None:
        if not (self.c > 0 and self.alpha > 0):
            raise ConfigError(f"A metric path needs c and alpha above 0, got {self.c} and {self.alpha}.")

    def beta(self, clock: Tensor) -> Tensor:
        """β at these clocks, in [0, ∞]."""
        return self.c * ((1 - clock) / clock) ** self.alpha

    def rate(self, clock: Tensor, stride: Tensor) -> Tensor:
        """dβ/dt = c·α·(t/(1 − t))^(α−1)/(1 − t)² at t = 1 − clock.

        Where this is infinite (clock 1 with α < 1), it is the mean over the stride, (β(clock − stride) − β(clock))/stride, so
        that the first step has an effect.
        """
        slope = self.c * self.alpha * ((1 - clock) / clock) ** (self.alpha - 1) / clock**2
        if self.alpha >= 1:
            return slope
        mean = (self.beta((clock - stride).clamp(min=torch.finfo(clock.dtype).eps)) - self.beta(clock)) / stride
        return torch.where(clock >= 1, mean, slope)


def metric_path(distance_BSV: Tensor, beta_BS: Tensor) -> Tensor:
    """p(x | y) = softmax_x(−β·d(x, y)), rows (B, S, V) that sum to 1 (DFM-VLA's path, Shaul et al. eq. 13).

    Args:
        distance_BSV: d from every token x to the target y, ≥ 0 and 0 only at y.
        beta_BS: in [0, ∞]; 0 is uniform, ∞ is the target alone.
    """
    finite_BS1 = beta_BS.clamp(max=torch.finfo(distance_BSV.dtype).max / 1e6)[..., None]
    return (-finite_BS1 * distance_BSV).softmax(-1)


def metric_velocity(token_BS: Tensor, distance_BSV: Tensor, beta_BS: Tensor, rate_BS: Tensor) -> Tensor:
    """Kinetic-optimal velocity u(x) = p(x | y)·dβ/dt·[d(z, y) − d(x, y)]₊ from token z towards target y.

    It moves only to tokens closer to the target, is 0 at the current token, and vanishes once z = y (Shaul et al. eq. 17).

    Args:
        token_BS: current tokens, z.
        distance_BSV: d from every token x to the target y.
        beta_BS, rate_BS: β and dβ/dt.

    Returns:
        Rates (B, S, V) ≥ 0 per unit of t = 1 − clock.
    """
    here_BS1 = distance_BSV.gather(-1, token_BS[..., None])
    closer_BSV = (here_BS1 - distance_BSV).clamp(min=0)
    return metric_path(distance_BSV, beta_BS) * rate_BS[..., None] * closer_BSV


def mixture_path(target_BS: Tensor, vocabulary: int, clock_BS: Tensor) -> Tensor:
    """p(x | y) = (1 − clock)·[x = y] + clock/V, rows (B, S, V)."""
    one_hot_BSV = torch.nn.functional.one_hot(target_BS, vocabulary).to(clock_BS.dtype)
    return (1 - clock_BS)[..., None] * one_hot_BSV + (clock_BS / vocabulary)[..., None]


def jump(token_BS: Tensor, rate_BSV: Tensor, stride_BS: Tensor, uniform_2BS: Tensor, rule: JumpRule = "linear") -> Tensor:
    """One step of the continuous-time Markov chain: leave with the rule's probability, to x with probability u(x)/Σu.

    Args:
        token_BS: current tokens.
        rate_BSV: rates ≥ 0, 0 at the current token.
        stride_BS: decrease of the clock, ≥ 0; tokens with stride 0 stay.
        uniform_2BS: two uniform numbers per token: whether to jump, and where.
        rule: see ``JumpRule``.
    """
    total_BS = rate_BSV.sum(-1)
    # An infinite rate leaves with certainty, but 0 · ∞ must not become NaN when the stride is 0.
    expected_BS = torch.where(stride_BS > 0, stride_BS * total_BS, 0.0)
    leave_BS = expected_BS if rule == "linear" else -torch.expm1(-expected_BS)
    goes_BS = (uniform_2BS[0] < leave_BS) & (total_BS > 0)
    return torch.where(goes_BS, pick(rate_BSV, uniform_2BS[1]), token_BS)
