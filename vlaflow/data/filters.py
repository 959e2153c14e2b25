"""Frames that are left out of training because they teach little or are wrong: A1's filters, and outliers.

A1 removes "static frames and low-velocity segments", "overly redundant segments (e.g., long idle prefixes)" and "extreme
outliers" without giving its rules; those here are our choice, and each can be changed or left out. What is redundant begins no
chunk, but is still learned where the chunk of an earlier frame reaches it; the time between actions never changes. An outlier
begins no chunk and is left out of the loss and of the statistics.

How fast the robot moves is read from its state, or from its actions where there is none, relative to the data set itself: a
dimension's fast movement is the 95 % quantile of its change from frame to frame, where it changes at all.

Shape letters: N rows of the data set, T frames of an episode, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlaflow.data.draft import stated
from vlaflow.data.exclusions import paused
from vlaflow.data.lerobot import Dataset
from vlaflow.data.quality import FAST, PauseRule
from vlaflow.errors import ConfigError

KINDS = ("static", "slow", "idle", "outliers")


@dataclass(frozen=True)
class Filters:
    """Which frames are left out; None switches a rule off.

    Args:
        static: a frame is static if no dimension moves faster than this share of its fast movement, neither from the frame
            before nor to the frame after.
        slow: a segment is slow if, on average over ``slow_s``, no dimension moves faster than this share.
        slow_s: duration of a segment in seconds.
        idle: the idle prefix of an episode ends where a dimension is this share of its range away from where it began.
        idle_s: an idle prefix of at most so many seconds is kept, and so much of a longer one before its end.
        outliers: a number is an outlier if it is outside the range between the dimension's 1 % and 99 % quantiles by more than
            so many times that range.
    """

    static: float | None = 0.005
    slow: float | None = 0.05
    slow_s: float = 1.0
    idle: float | None = 0.02
    idle_s: float = 0.5
    outliers: float | None = 3.0

    def __post_init__(self) -> None:
        shares = {"static": self.static, "slow": self.slow, "idle": self.idle}
        for name, share in shares.items():
            if share is not None and not 0 < share < 1:
                raise ConfigError(f"filters.{name} is a share between 0 and 1, got {share}. Leave the rule out with none.")
        if min(self.slow_s, self.idle_s) <= 0 or (self.outliers is not None and self.outliers <= 0):
            found = f"{self.slow_s}, {self.idle_s} and {self.outliers}"
            raise ConfigError(f"filters.slow_s, filters.idle_s and filters.outliers must be above 0, got {found}.")


@dataclass(frozen=True)
class Filtered:
    """What filters found in a data set.

    Args:
        by_kind: rows, (N,) bool, by ``KINDS``.
    """

    by_kind: dict[str, np.ndarray]

    @property
    def no_start_N(self) -> np.ndarray:
        """Rows that begin no chunk."""
        return np.logical_or.reduce(list(self.by_kind.values()))

    @property
    def outlier_N(self) -> np.ndarray:
        """Rows that are left out of the loss and of the statistics."""
        return self.by_kind["outliers"]

    def outliers_alone(self) -> Filtered:
        """For held-out episodes, whose loss is to be compared with other trainings': redundant frames stay."""
        return Filtered({"outliers": self.outlier_N})

    def words(self, episodes: Sequence[int], dataset: Dataset) -> str:
        """What they take away from these episodes, as shares of the frames; empty if nothing."""
        chosen_N = np.isin(dataset.columns().episode, np.asarray(episodes, np.int64))
        names = {"static": "static", "slow": "in slow segments", "idle": "in idle prefixes", "outliers": "outliers"}
        shares = {names[kind]: found_N[chosen_N].mean() for kind, found_N in self.by_kind.items()}
        parts = [f"{share:.1%} {name}" for name, share in shares.items() if share > 0]
        return f"{self.no_start_N[chosen_N].mean():.1%} of the frames begin no chunk ({', '.join(parts)})" if parts else ""


def filtered(dataset: Dataset, filters: Filters | None) -> Filtered:
    """Apply the rules to a whole data set."""
    columns, none_N = dataset.columns(), np.zeros(len(dataset), bool)
    found = {kind: none_N.copy() for kind in KINDS}
    if filters is None:
        return Filtered(found)
    if filters.outliers is not None:
        found["outliers"] = _outliers(columns.action, filters.outliers) | _outliers(columns.state, filters.outliers)
    moved_ND = columns.state if columns.state.shape[1] else columns.action
    if not moved_ND.shape[1]:
        return Filtered(found)
    slices = [dataset.episode_slice(episode.index) for episode in dataset.episodes]
    sound_N = ~found["outliers"]
    change = np.concatenate([np.abs(np.diff(moved_ND[rows], axis=0)) for rows in slices])
    fast_D = np.array([_fast(change[:, d]) for d in range(change.shape[1])])
    low_D, high_D = np.quantile(moved_ND[sound_N] if sound_N.any() else moved_ND, (0.01, 0.99), axis=0)
    steps = max(1, round(filters.slow_s * dataset.fps))
    for rows in slices:
        own_TD = moved_ND[rows].astype(np.float64)
        if filters.static is not None:
            found["static"][rows] = _still(own_TD, filters.static * fast_D)
        if filters.slow is not None:
            found["slow"][rows] = _segments(own_TD, steps, filters.slow * fast_D)
        if filters.idle is not None:
            margin = max(1, round(filters.idle_s * dataset.fps))
            found["idle"][rows] = _prefix(own_TD, margin, filters.idle * (high_D - low_D))
    return Filtered(found)


def _fast(change_N: np.ndarray) -> float:
    """The fast movement of a dimension; infinite where it never moves, which is then no movement at any speed."""
    moving: np.ndarray = change_N[np.flatnonzero(change_N)]
    return float(np.quantile(moving, FAST)) if moving.size else np.inf


def left_out(dataset: Dataset) -> dict[str, np.ndarray]:
    """Rows, (N,) bool, that pauses and filters mark by their default rules, by name; without an action spec, by a draft."""
    return {"pause": paused(stated(dataset), PauseRule())} | filtered(dataset, Filters()).by_kind


def _outliers(values_ND: np.ndarray, times: float) -> np.ndarray:
    """Rows (N,) with a number far outside the range of its dimension; a dimension without a range has none."""
    if not values_ND.shape[1]:
        return np.zeros(len(values_ND), bool)
    low_D, high_D = np.quantile(values_ND.astype(np.float64), (0.01, 0.99), axis=0)
    range_D = np.where(high_D > low_D, high_D - low_D, np.inf)
    return ((values_ND < low_D - times * range_D) | (values_ND > high_D + times * range_D)).any(1)


def _still(path_TD: np.ndarray, limit_D: np.ndarray) -> np.ndarray:
    """Frames (T,) from and to which nothing moves by more than the limit per frame; the ends of an episode have one side."""
    quiet_T = (np.abs(np.diff(path_TD, axis=0)) <= limit_D).all(1)
    if len(path_TD) < 2:
        return np.zeros(len(path_TD), bool)
    return np.append(True, quiet_T) & np.append(quiet_T, True)


def _segments(path_TD: np.ndarray, steps: int, limit_D: np.ndarray) -> np.ndarray:
    """Frames (T,) of segments of so many steps in which nothing moves by more than the limit per frame, on average."""
    marked_T = np.zeros(len(path_TD), bool)
    if len(path_TD) <= steps:
        return marked_T
    way_TD = np.cumsum(np.pad(np.abs(np.diff(path_TD, axis=0)), ((1, 0), (0, 0))), axis=0)
    slow_W = ((way_TD[steps:] - way_TD[:-steps]) / steps <= limit_D).all(1)
    edge_T = np.zeros(len(path_TD) + 1, int)
    np.add.at(edge_T, np.flatnonzero(slow_W), 1)
    np.add.at(edge_T, np.flatnonzero(slow_W) + steps + 1, -1)
    return np.cumsum(edge_T)[:-1] > 0


def _prefix(path_TD: np.ndarray, margin: int, limit_D: np.ndarray) -> np.ndarray:
    """Frames (T,) before the robot has left where it began, but for the last ``margin`` of them."""
    left_T = (np.abs(path_TD - path_TD[0]) > limit_D).any(1)
    end = int(left_T.argmax()) if left_T.any() else len(path_TD)
    return np.arange(len(path_TD)) < end - margin
