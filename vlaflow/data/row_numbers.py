"""The numbers of frames and the times of rows, for reading and editing alike.

LeRobot needs no frame numbers, and times only to find frames in videos; here they are what tells missing rows and a wrong rate
from sound data, so each stands in for the other where one is absent or odd.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlaflow.data.lerobot_info import FASTEST
from vlaflow.data.lerobot_meta import some
from vlaflow.data.video import START_TOLERANCE, TOLERANCE_S

ROUNDING = float(np.finfo(np.float32).eps)
"""Times are float32 seconds: after half an hour within one episode, half a unit in the last place exceeds ``TOLERANCE_S``."""

NTSC = 1000 / 1001
"""Rates of television are this much below whole numbers: 29.97, 59.94."""


def count_rows(episode: np.ndarray) -> np.ndarray:
    """The place of every row among those of its episode, in their order: int64 (N,).

    >>> count_rows(np.array([3, 3, 0, 3, 0])).tolist()
    [0, 1, 0, 2, 1]
    """
    order = np.argsort(episode, kind="stable")
    _, starts, lengths = np.unique(episode[order], return_index=True, return_counts=True)
    frame = np.empty(len(episode), np.int64)
    frame[order] = np.arange(len(episode)) - np.repeat(starts, lengths)
    return frame


def about_uncounted(paths: Sequence[Path], root: Path) -> str:
    """The sentence about files whose rows have no frame numbers."""
    first = paths[0].relative_to(root).as_posix()
    which = f"{first} has" if len(paths) == 1 else f"{len(paths)} files, {first} first, have"
    return f"{which} no 'frame_index'; frames are counted in the order of the rows."


def about_recounted(numbers: Sequence[int]) -> str:
    """The sentence about episodes whose frame numbers are something else."""
    return (
        f"'frame_index' of episode {some(numbers)} does not count from 0; by the timestamps no row is missing, so frames "
        "are counted in the order of the rows."
    )


def is_regular(time: np.ndarray, fps: float, limit_s: float, *, from_first: bool = False) -> bool:
    """Whether the rows of an episode, in their order, are at 0, 1 / fps, 2 / fps, ... seconds.

    Args:
        time: float (T,), seconds.
        fps: frames per second.
        limit_s: how far each may be from its place.
        from_first: whether the first may be at any time, and the others count from it.
    """
    seconds = time.astype(np.float64)
    with np.errstate(invalid="ignore"):  # of infinite times
        off = np.abs(seconds - (seconds[0] if from_first else 0.0) - np.arange(len(time)) / fps)
    return bool(np.all(off < limit_s + np.abs(time) * ROUNDING))


def mean_rate(times: Sequence[np.ndarray]) -> float | None:
    """How many rows of all episodes there are per second, by their times; None where these say nothing.

    Args:
        times: of the rows of every episode, in their order, seconds.
    """
    whole_s = sum(float(time[-1]) - float(time[0]) for time in times if len(time))
    found = sum(len(time) - 1 for time in times if len(time)) / whole_s if whole_s > 0 else 0.0
    return found if 0 < found <= FASTEST else None


def regular_rate(times: Sequence[np.ndarray], fps: float) -> float | None:
    """The rate that the times of all episodes have in common, if it is another one than stated and leaves no doubt.

    That is a rate at which all are exact, or a whole number of frames per second at which all are nearest to their own frame.

    Args:
        times: of the rows of every episode, in their order, seconds.
        fps: the stated rate.
    """

    def fits(rate: float, limit_s: float) -> bool:
        return all(is_regular(time, rate, limit_s, from_first=True) for time in times)

    times = [time for time in times if len(time) > 1]
    found = mean_rate(times)
    if found is None or fits(fps, START_TOLERANCE / fps):
        return None
    whole = round(found)
    for rate in (whole, round(found / NTSC) * NTSC, float(f"{found:.6g}")):
        if rate > 0 and fits(rate, TOLERANCE_S):
            return float(rate)
    return float(whole) if whole > 0 and fits(whole, START_TOLERANCE / whole) else None
