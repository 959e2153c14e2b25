"""Which recorded steps are worth learning from: pauses, where the demonstrator did nothing, and departures, where the robot
did something else than it should have done.

AsyncVLA "marks pause intervals and excludes them from the loss" without giving the rule; this one is our choice, and a
config field wherever it is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlaflow.errors import ConfigError, SpecError
from vlaflow.spec import ActionSpec


@dataclass(frozen=True)
class PauseRule:
    """When a step is a pause.

    Args:
        threshold: largest movement that still counts as none, as a share of half the dimension's range
            (0.02 of a delta in [-1, 1] is 0.02).
        minimum_length: shorter runs of still steps are kept: a demonstrator who turns round stands still for a moment.
    """

    threshold: float = 0.02
    minimum_length: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ConfigError(f"The pause threshold must lie between 0 and 1, got {self.threshold}.")
        if self.minimum_length < 1:
            raise ConfigError(f"A pause is at least one step long, got minimum_length = {self.minimum_length}.")


def pauses(action_ND: np.ndarray, action_spec: ActionSpec, rule: PauseRule) -> np.ndarray:
    """Mark the pauses in one episode.

    A step is still when every delta dimension is below the threshold, every absolute dimension changed by less than it
    since the step before, and the gripper command (any dimension with "gripper" in its name, delta or absolute) did not
    change. The first step has no step before and is never a pause.

    Args:
        action_ND: one episode's actions, (N, D), robot units.
        action_spec: tells delta from absolute dimensions, and their ranges.
        rule: threshold and shortest length.

    Returns:
        bool (N,), True on pauses.
    """
    if action_ND.ndim != 2 or action_ND.shape[1] != action_spec.dim:
        raise SpecError(f"Actions must have shape (N, {action_spec.dim}) for this action spec, got {action_ND.shape}.")
    if not len(action_ND):
        return np.zeros(0, bool)
    half_range_D = (action_spec.high.astype(np.float64) - action_spec.low) / 2
    compared = [d.mode == "absolute" or "gripper" in d.name.lower() for d in action_spec.dimensions]
    change_ND = np.diff(action_ND, axis=0, prepend=action_ND[:1])
    moved_ND = np.where(compared, change_ND, action_ND)
    still_N = (np.abs(moved_ND) < rule.threshold * half_range_D).all(axis=1)
    still_N[0] = False
    edges = np.flatnonzero(np.diff(still_N.astype(np.int8), prepend=0, append=0))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if end - start < rule.minimum_length:
            still_N[start:end] = False
    return still_N


@dataclass(frozen=True)
class DepartureRule:
    """When the robot departs from what is to be learned; see ``batch.Executed``.

    Args:
        threshold: largest mean difference between executed and noted action that is none, as a share of half of what the
            dimension spans between its 1 % and 99 % quantile.
        steps: over which the difference is averaged, so that noise, which averages out, is no departure.
    """

    threshold: float = 0.5
    steps: int = 5

    def __post_init__(self) -> None:
        if not self.threshold > 0 or self.steps < 1:
            raise ConfigError(f"A departure needs a threshold above 0 and at least one step, got {self}.")


DEPARTURES = DepartureRule()
"""The rule that holds unless another is given."""


def departures(action_ND: np.ndarray, executed_ND: np.ndarray, half_span_D: np.ndarray, rule: DepartureRule) -> np.ndarray:
    """Mark the departures in one episode.

    Args:
        action_ND, executed_ND: one episode's noted and executed actions, robot units.
        half_span_D: half of what each dimension spans; one that spans nothing says nothing.
        rule: threshold, and the steps centred on each over which the difference is averaged (fewer at the ends).

    Returns:
        bool (N,), True where the robot was given something else.
    """
    before = np.cumsum(np.pad(executed_ND.astype(np.float64) - action_ND, ((1, 0), (0, 0))), axis=0)
    place_N = np.arange(len(action_ND))
    first_N = np.maximum(place_N - rule.steps // 2, 0)
    end_N = np.minimum(place_N + (rule.steps + 1) // 2, len(action_ND))
    mean_ND = (before[end_N] - before[first_N]) / (end_N - first_N)[:, None]
    return (np.abs(mean_ND[:, half_span_D > 0]) > rule.threshold * half_span_D[half_span_D > 0]).any(axis=1)
