"""Recorded steps that should not be learned: pauses, where the demonstrator did nothing, and what follows interventions, where
the robot did not do what was recorded as the action.

AsyncVLA "marks pause intervals and excludes them from the loss" without giving the rule; the rule here is our choice,
and a config field wherever it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlaflow.errors import ConfigError, SpecError
from vlaflow.spec import UNSTATED, ActionSpec, Dimension

FAST = 0.95
"""Quantile of a dimension's movement in the data set that counts as fast."""


@dataclass(frozen=True)
class PauseRule:
    """Defines a pause of the demonstrator: nothing moves for a while.

    Movement is measured relative to the data set itself, over windows of a fixed duration, so the rule depends
    neither on the frame rate nor on the range of a dimension (joint limits are far wider than what one step covers, and a
    step at 50 Hz covers a fifth of one at 10 Hz).

    Args:
        threshold: largest movement that still counts as standing still, as a share of the dimension's fast movement: the 95 %
            quantile, over the whole data set, of the distance moved within ``minimum_s``.
        minimum_s: shortest pause in seconds; shorter stops are kept, because a demonstrator who reverses direction stops
            briefly.
    """

    threshold: float = 0.02
    minimum_s: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ConfigError(f"The pause threshold must lie between 0 and 1, got {self.threshold}.")
        if not 0 < self.minimum_s < float("inf"):
            raise ConfigError(f"A pause needs a positive, finite duration in seconds, got minimum_s = {self.minimum_s}.")

    def steps(self, rate_hz: float) -> int:
        """Steps of the shortest pause at this rate, K >= 1."""
        return max(1, round(self.minimum_s * rate_hz))


def pauses(episodes: Sequence[np.ndarray], action_spec: ActionSpec, rule: PauseRule) -> list[np.ndarray]:
    """Mark the pauses in a data set.

    A step belongs to a pause when it lies in some window of K steps (``rule.steps``) within which no dimension moves by more
    than its tolerance. The movement of an absolute dimension is its range within the window, that of a delta dimension
    the range of its running sum; jitter that averages out is therefore not a movement. The tolerance is
    ``rule.threshold`` times the dimension's fast movement. A gripper (any dimension with "gripper" in its name, delta or
    absolute) holds a command and changes it rarely, so the tolerance is relative to half of its range between the 1 % and
    99 % quantiles instead. A dimension whose mode is unstated must stand still in either sense. The first step of an episode
    has no predecessor and is never a pause.

    Args:
        episodes: the actions of every episode of the data set, (N, D) each, robot units; they determine the tolerances.
        action_spec: states which dimensions are deltas, absolute or grippers, and the rate.
        rule: threshold and shortest duration.

    Returns:
        bool (N,) per episode, True on pauses.
    """
    for action_ND in episodes:
        if action_ND.ndim != 2 or action_ND.shape[1] != action_spec.dim:
            raise SpecError(f"Actions must have shape (N, {action_spec.dim}) for this action spec, got {action_ND.shape}.")
    episodes, action_spec = _both_ways(episodes, action_spec)
    steps = rule.steps(action_spec.rate_hz)
    movements = [_movement(action_ND, action_spec, steps) for action_ND in episodes]
    marked = [np.zeros(len(action_ND), bool) for action_ND in episodes]
    if not any(map(len, movements)):
        return marked
    fast_D = np.quantile(np.concatenate(movements), FAST, axis=0)
    for d, dimension in enumerate(action_spec.dimensions):
        if _is_gripper(dimension):
            low, high = np.quantile(np.concatenate([action_ND[:, d] for action_ND in episodes]), (0.01, 0.99))
            fast_D[d] = (high - low) / 2
    for mark_N, movement_WD in zip(marked, movements, strict=True):
        still_W = (movement_WD <= rule.threshold * fast_D).all(axis=1)
        for step in range(steps):  # window w holds the steps w + 1 to w + K
            mark_N[1 + step : 1 + step + len(still_W)] |= still_W
    return marked


def _both_ways(episodes: Sequence[np.ndarray], action_spec: ActionSpec) -> tuple[Sequence[np.ndarray], ActionSpec]:
    """With each dimension whose mode is unstated twice: as an absolute one and, at the end, as a delta."""
    dimensions = action_spec.dimensions
    unstated = [d for d, each in enumerate(dimensions) if each.mode == UNSTATED and not _is_gripper(each)]
    if not unstated:
        return episodes, action_spec
    added = (replace(dimensions[d], name=f"{dimensions[d].name} as a delta", mode="delta") for d in unstated)
    return (
        [np.concatenate((action_ND, action_ND[:, unstated]), axis=1) for action_ND in episodes],
        replace(action_spec, dimensions=(*dimensions, *added)),
    )


def _movement(action_ND: np.ndarray, action_spec: ActionSpec, steps: int) -> np.ndarray:
    """Movement of each dimension in every window of ``steps`` steps, float32 (W, D); W is 0 for shorter episodes."""
    if len(action_ND) <= steps:
        return np.zeros((0, action_spec.dim), np.float32)
    summed_D = [d.mode == "delta" and not _is_gripper(d) for d in action_spec.dimensions]
    path_ND = np.where(summed_D, np.cumsum(action_ND, axis=0, dtype=np.float64), action_ND)
    window_WDK = np.lib.stride_tricks.sliding_window_view(path_ND, steps + 1, axis=0)
    return (window_WDK.max(axis=2) - window_WDK.min(axis=2)).astype(np.float32)


def _is_gripper(dimension: Dimension) -> bool:
    return "gripper" in dimension.name.lower()


@dataclass(frozen=True)
class InterventionRule:
    """Defines an intervention: the robot did not execute the action to be learned; see ``batch.Executed``.

    Args:
        threshold: largest mean difference between the executed and the recorded action that is not an intervention, as a
            share of half the dimension's range between its 1 % and 99 % quantiles.
        least: the threshold is at least this, in the action's units. Where a dimension hardly ever moves, a share of its range
            is less than ordinary noise.
        steps: number of steps over which the difference is averaged, so that noise does not count as an intervention.
    """

    threshold: float = 0.5
    steps: int = 5
    least: float = 0.0

    def __post_init__(self) -> None:
        if not self.threshold > 0 or self.steps < 1 or not self.least >= 0:
            raise ConfigError(
                f"An intervention needs a threshold above 0, at least one step, and a least difference from 0, got {self}."
            )


INTERVENTIONS = InterventionRule()
"""The default rule."""


def interventions(
    action_ND: np.ndarray, executed_ND: np.ndarray, half_span_D: np.ndarray, rule: InterventionRule
) -> np.ndarray:
    """Mark the interventions in one episode.

    Args:
        action_ND, executed_ND: the recorded and the executed actions of one episode, robot units.
        half_span_D: half the range of each dimension; dimensions with range 0 are ignored.
        rule: threshold and length of the averaging window, which is centred on each step and shorter at the ends.

    Returns:
        bool (N,), True at interventions.
    """
    before = np.cumsum(np.pad(executed_ND.astype(np.float64) - action_ND, ((1, 0), (0, 0))), axis=0)
    place_N = np.arange(len(action_ND))
    first_N = np.maximum(place_N - rule.steps // 2, 0)
    end_N = np.minimum(place_N + (rule.steps + 1) // 2, len(action_ND))
    mean_ND = (before[end_N] - before[first_N]) / (end_N - first_N)[:, None]
    limit_D = np.where(half_span_D > 0, np.maximum(rule.threshold * half_span_D, rule.least), np.inf)
    return (np.abs(mean_ND) > limit_D).any(axis=1)
