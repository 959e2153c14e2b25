"""What is known of the frames of a data set without decoding them: hashes, counts of pixel values, statistics of each episode.

An edit copies videos packet by packet, so what was known of an episode's frames remains true. Counts (``pixel_counts``) give
exact statistics of any set of episodes. Other recorders leave statistics of each episode (the columns ``stats/...`` of
meta/episodes; meta/episodes_stats.jsonl in v2.1), which LeRobot puts together and which are put together here in the same way.
What contradicts itself is not used: then the frames are decoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlaflow.data.edit_survey import SourceEpisode
from vlaflow.data.features import channels, is_image, marked_as_depth
from vlaflow.data.hashes import stored_hashes
from vlaflow.data.lerobot_meta import is_modern, some
from vlaflow.data.pixel_counts import stored_counts
from vlaflow.data.stats import QUANTILES, ROUNDING
from vlaflow.data.tables import read_jsonl, read_parquet, read_schema
from vlaflow.data.writer_meta import Stat
from vlaflow.errors import DataError
from vlaflow.ranges import Number

EPISODES_STATS = "meta/episodes_stats.jsonl"
MOMENTS = ("min", "max", "mean", "std")


@dataclass(frozen=True)
class StatsForm:
    """A line of meta/episodes_stats.jsonl."""

    episode_index: Number
    stats: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class KnownFrames:
    """What is known of the frames of one episode and camera.

    Args:
        digest: their hash (``video.FrameDigest``), if it is stored.
        histogram: int64 (3, 256), how often each pixel value occurs, if it is stored.
        stats: LeRobot's statistics, if they are stated and can be true.
    """

    digest: str | None = None
    histogram: np.ndarray | None = None
    stats: Stat | None = None

    @property
    def suffices(self) -> bool:
        """Whether statistics can be written without decoding the frames."""
        return self.histogram is not None or self.stats is not None


class FrameRecords:
    """All that is known of a data set's frames.

    Args:
        root: the data set's folder.
        info: meta/info.json.
    """

    def __init__(self, root: Path, info: Mapping[str, Any]) -> None:
        self._root, self._features = root, info["features"]
        self._cameras = [key for key, feature in self._features.items() if is_image(feature)]
        self._wrong: dict[str, list[int]] = {}
        self._damage = ""
        self._hashes: Mapping[str, Sequence[str]] = {}
        self._counts: Mapping[str, np.ndarray] = {}
        self._stats: Mapping[tuple[str, int], Any] = {}
        try:
            self._hashes, self._counts = stored_hashes(root), stored_counts(root)
            self._stats = self._v3() if is_modern(info) else self._v2()
        except DataError as error:
            self._damage = f"What is stored about the frames of {root} is computed again from the frames: {error}"
            self._hashes, self._counts = {}, {}

    @property
    def hashed(self) -> frozenset[str]:
        """The cameras with hashes, by feature key."""
        return frozenset(self._hashes)

    @property
    def changes(self) -> list[str]:
        """What is stored but cannot be used, and so is computed from the frames; one sentence each."""
        return ([self._damage] if self._damage else []) + [
            f"Statistics of '{key}' of episode {some(numbers)} of {self._root} cannot be those of pictures; they are computed "
            "from the frames."
            for key, numbers in self._wrong.items()
        ]

    def of(self, key: str, episode: SourceEpisode) -> KnownFrames:
        """What is known of the frames of an episode and camera (its feature key)."""
        if not episode.described:
            return KnownFrames()
        number, length, clip = episode.number, len(episode.places), episode.clips.get(key)
        hashes, counts = self._hashes.get(key, ()), self._counts.get(key, ())
        digest = hashes[number] if number < len(hashes) else None
        histogram = counts[number] if number < len(counts) else None
        if histogram is not None and not (clip is not None and _add_up(histogram, length, clip.timeline.size)):
            histogram = None
        stats, stated = None, self._stats.get((key, number))
        if stated is not None and histogram is None:
            depth = marked_as_depth(self._features[key]) or (clip is not None and clip.timeline.deep)
            stats = sound_stats(stated, length, channels(self._features[key]) if depth else None)
            if stats is None and not depth:
                self._wrong.setdefault(key, []).append(number)
        return KnownFrames(digest, histogram, stats)

    def _v3(self) -> dict[tuple[str, int], Any]:
        """What meta/episodes states, by camera and episode."""
        found: dict[tuple[str, int], Any] = {}
        for path in sorted((self._root / "meta/episodes").glob("chunk-*/file-*.parquet")):
            names = set(read_schema(path).names)
            columns = {
                (key, name): column
                for key in self._cameras
                for name in (*MOMENTS, "count", *QUANTILES)
                if (column := f"stats/{key}/{name}") in names
            }
            if not columns or "episode_index" not in names:
                continue
            table = read_parquet(path, ["episode_index", *columns.values()])
            numbers = table["episode_index"].to_pylist()
            for (key, name), column in columns.items():
                for number, value in zip(numbers, table[column].to_pylist(), strict=True):
                    if value is not None:
                        found.setdefault((key, number), {})[name] = value
        return found

    def _v2(self) -> dict[tuple[str, int], Any]:
        """What meta/episodes_stats.jsonl of v2.1 states, by camera and episode."""
        path = self._root / EPISODES_STATS
        lines = read_jsonl(path, StatsForm) if path.exists() else []
        return {
            (key, line["episode_index"]): line["stats"][key] for line in lines for key in self._cameras if key in line["stats"]
        }


def _add_up(histogram: np.ndarray, length: int, size: tuple[int, int]) -> bool:
    """Whether counts are those of so many frames."""
    return bool((histogram >= 0).all() and (histogram.sum(1) == length * size[0] * size[1]).all())


def sound_stats(stated: Any, length: int, depth: int | None = None) -> Stat | None:
    """Statistics of pictures as a recorder states them, in LeRobot's shape (channels, 1, 1); None where they cannot be true.

    Args:
        stated: "min", "max", "mean", "std" and "count", a list of one number per channel each, nested or not; quantiles.
        length: frames of the episode; recorders count those that they looked at, at most all.
        depth: channels of depth maps, which hold distances; None for colours, which are three channels in [0, 1].
    """
    try:
        count = np.asarray(stated["count"]).reshape(-1)
        values = {name: np.asarray(stated[name], np.float64).reshape(-1) for name in MOMENTS}
        values |= {name: np.asarray(stated[name], np.float64).reshape(-1) for name in QUANTILES if name in stated}
    except (KeyError, TypeError, ValueError):
        return None
    wanted = 3 if depth is None else depth
    if count.shape != (1,) or not 1 <= count[0] <= length or count[0] != int(count[0]):
        return None
    if any(len(each) != wanted or not np.isfinite(each).all() for each in values.values()):
        return None
    low, high, mean, std = (values[name] for name in MOMENTS)
    slack = ROUNDING * np.maximum(np.abs(low), np.abs(high))
    ordered = np.array([low, *(values[name] for name in QUANTILES if name in values), high])
    if (np.diff(ordered, axis=0) < -slack).any() or (mean < low - slack).any() or (mean > high + slack).any():
        return None
    # Popoviciu's inequality: nothing between two ends deviates by more than half their distance
    if (std < 0).any() or (std > (high - low) / 2 + slack).any():
        return None
    if depth is None and (low.min() < -ROUNDING or high.max() > 1 + ROUNDING):
        return None
    return {name: [[[float(v)]] for v in each] for name, each in values.items()} | {"count": [int(count[0])]}


def combined(parts: Sequence[Stat]) -> Stat:
    """Statistics of pictures over several episodes, from those of each, weighted by their counts.

    Minimum, maximum, mean and deviation are those of all that was counted. Quantiles do not follow from quantiles: their mean
    is an estimate, the one that LeRobot makes, and absent where an episode states none.
    """
    counts = np.array([part["count"][0] for part in parts], np.float64)
    weights = counts / counts.sum()

    def stacked(name: str) -> np.ndarray:
        return np.array([np.ravel(part[name]) for part in parts])

    mean = weights @ stacked("mean")
    spread = weights @ (stacked("std") ** 2 + (stacked("mean") - mean) ** 2)
    values = {"min": stacked("min").min(0), "max": stacked("max").max(0), "mean": mean, "std": np.sqrt(spread)}
    values |= {name: weights @ stacked(name) for name in QUANTILES if all(name in part for part in parts)}
    return {name: [[[float(v)]] for v in each] for name, each in values.items()} | {"count": [int(counts.sum())]}
