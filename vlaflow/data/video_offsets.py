"""Offsets of episodes within the videos of a LeRobot v3.0 data set, as stated in meta/episodes, checked without decoding.

A wrong offset would silently give an episode the images of another one. What only decoding can show (a missing frame, a
video that ends too early) is checked in ``video``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlaflow.data.video import START_TOLERANCE
from vlaflow.errors import DataError
from vlaflow.strict import finite_number
from vlaflow.text import shown


def rewrite(root: Path) -> str:
    """How to get a meta folder that agrees with rows and videos."""
    return f"copy the meta folder again, or write it again from rows and videos: vlaflow data repair {root} --out DIR"


def seconds(root: Path, row: Mapping[str, Any], column: str) -> float:
    """Read a time in seconds from a row of meta/episodes.

    Raises:
        DataError: it is not a finite number, or it is negative.
    """
    value = row[column]
    if not finite_number(value) or value < 0:
        raise DataError(
            f"Episode {row['episode_index']} of {root}: '{column}' is {shown(value)}; it must be a time ≥ 0 in seconds. "
            f"Correct it in meta/episodes, {rewrite(root)}"
        )
    return float(value)


def require_sound_offsets(
    root: Path, fps: float, rows: Sequence[Mapping[str, Any]], videos: Sequence[Mapping[str, tuple[Path, float]]]
) -> None:
    """Refuse offsets that are inconsistent.

    The time between 'from_timestamp' and 'to_timestamp' (where stated) must hold the episode's frames, and episodes must not
    overlap within a file. Rounding of less than half a frame (``START_TOLERANCE`` on either side) is allowed, and so are
    gaps: episodes may have been removed, and a video may hold more frames than its episode has rows.

    Args:
        root: the data set's folder.
        fps: frames per second.
        rows: of meta/episodes, one per episode.
        videos: in the order of ``rows``, by feature key: the episode's mp4 file and its start within it in seconds.

    Raises:
        DataError: naming file and episode.
    """
    slack_s = 2 * START_TOLERANCE / fps
    by_file: dict[tuple[str, Path], list[tuple[float, int, float]]] = {}
    for row, places in zip(rows, videos, strict=True):
        length_s = int(row["length"]) / fps
        for key, (path, start_s) in places.items():
            end = f"videos/{key}/to_timestamp"
            available_s = length_s if row.get(end) is None else seconds(root, row, end) - start_s
            if available_s <= length_s - slack_s:
                raise DataError(
                    f"Episode {row['episode_index']} of {root} has {row['length']} frames ({length_s:.4f} s at fps = {fps:g}), "
                    f"but meta/episodes gives it {available_s:.4f} s of video '{key}' ({path.relative_to(root)}), from "
                    f"{start_s:.4f} to {start_s + available_s:.4f} s. Correct these times, or fps in "
                    f"meta/info.json, {rewrite(root)}"
                )
            if row["length"]:
                by_file.setdefault((key, path), []).append((start_s, int(row["episode_index"]), start_s + length_s))
    for (key, path), spans in by_file.items():
        spans.sort()
        for (_, before, end_s), (start_s, after, _) in itertools.pairwise(spans):
            if start_s <= end_s - slack_s:
                raise DataError(
                    f"Episodes {before} and {after} of {root} overlap in video '{key}' ({path.relative_to(root)}): {before} "
                    f"ends at {end_s:.4f} s, {after} begins at {start_s:.4f} s. Correct the offset that is wrong "
                    f"('videos/{key}/from_timestamp' in meta/episodes, or 'video_path' in meta/info.json), {rewrite(root)}"
                )


def largest_drift_s(fps: float, videos: Sequence[Mapping[str, tuple[Path, float]]]) -> float:
    """Largest distance of an episode's start from a multiple of 1 / fps, in seconds."""
    starts = [start_s for places in videos for _, start_s in places.values()]
    return max((abs(start_s * fps - round(start_s * fps)) / fps for start_s in starts), default=0.0)
