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


DEPARTURE = 0.5
"""Share of half a dimension's range by which an executed action differs from the one to be learned when the robot departs.
Five standard deviations of the noise that ``vlaflow record`` adds by default, so that noise alone is no departure."""


def departures(action_ND: np.ndarray, executed_ND: np.ndarray, action_spec: ActionSpec) -> np.ndarray:
    """Mark the steps, (N,) bool, at which an executed action differs from the one to be learned by more than ``DEPARTURE``."""
    half_range_D = (action_spec.high.astype(np.float64) - action_spec.low) / 2
    return (np.abs(executed_ND.astype(np.float64) - action_ND) > DEPARTURE * half_range_D).any(axis=1)
