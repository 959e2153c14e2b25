"""The rows of a data set that is to be edited, by episode: which file they lie in, and what they contradict.

Rows are believed: their numbers, their order and their tasks. An episode whose rows are not whole is a problem.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vlaflow.data.lerobot_meta import is_modern, some
from vlaflow.data.row_numbers import about_recounted, about_uncounted, count_rows, is_regular, regular_rate
from vlaflow.data.tables import flat_numbers, is_filled, read_parquet, read_schema, whole_numbers
from vlaflow.data.video import START_TOLERANCE, TOLERANCE_S
from vlaflow.errors import DataError

KEYS = ("episode_index", "frame_index", "task_index", "timestamp")


@dataclass(frozen=True)
class FoundRows:
    """The rows of one episode.

    Args:
        path: their parquet file.
        places: int64 (T,), their places in the file, by frame.
        task: int64 (T,), their task index, by frame; -1 where the file has none.
    """

    path: Path
    places: np.ndarray
    task: np.ndarray


@dataclass
class AllRows:
    """The rows of a data set.

    Attributes:
        fps: frames per second: as meta states, or as all timestamps and videos say instead.
        episodes: by number.
        problems: why an episode cannot be used, in words that follow "Episode N of DIR", by number.
        changes: what is wrong with columns or files, one sentence each.
        schemas: of every file with rows.
    """

    fps: float
    episodes: dict[int, FoundRows] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    schemas: dict[Path, pa.Schema] = field(default_factory=dict)


def find_rows(root: Path, info: Mapping[str, Any], named: Mapping[int, Path], bears_out: Callable[[float], bool]) -> AllRows:
    """Find the rows of every episode.

    Args:
        root: the data set's folder.
        info: meta/info.json.
        named: the file that meta names for an episode, by number.
        bears_out: whether the videos can run at a rate, frames per second; asked where timestamps say another one than info.
    """
    return _Search(root, info, named, bears_out).run()


@dataclass(frozen=True)
class _Candidate:
    """Rows of one episode in one file, by frame: frame_index int64 (T,), timestamp (T,), NaN where it is absent."""

    rows: FoundRows
    frame: np.ndarray
    time: np.ndarray

    @property
    def counts(self) -> bool:
        """Whether its frame_index counts from 0."""
        return np.array_equal(self.frame, np.arange(len(self.frame)))

    def in_file(self, column: np.ndarray) -> np.ndarray:
        """One of its columns in the order of the rows in the file."""
        return column[np.argsort(self.rows.places)]


class _Search:
    def __init__(
        self, root: Path, info: Mapping[str, Any], named: Mapping[int, Path], bears_out: Callable[[float], bool]
    ) -> None:
        self.root, self.fps, self.modern, self.named = root, float(info["fps"]), is_modern(info), named
        self.filmed = any(feature["dtype"] == "video" for feature in info["features"].values())
        self.bears_out = bears_out
        self.found = AllRows(self.fps)
        self.candidates: dict[int, list[_Candidate]] = {}
        self.elsewhere: list[int] = []
        self.late: dict[int, float] = {}
        self.misnumbered: list[int] = []
        self.uncounted: list[Path] = []
        self.recounted: list[int] = []
        self.timeless = 0

    def run(self) -> AllRows:
        for path in sorted((self.root / "data").rglob("*.parquet")):
            try:
                self._file(path)
            except (DataError, pa.ArrowException, OSError) as error:
                self.found.changes.append(f"{path.relative_to(self.root)} cannot be read, so its rows are lost: {error}")
        chosen = {number: self._choose(number, candidates) for number, candidates in self.candidates.items()}
        taken = {number: one for number, one in chosen.items() if one is not None}
        rate = regular_rate([one.time if one.counts else one.in_file(one.time) for one in taken.values()], self.fps)
        if rate is not None and self.bears_out(rate):
            self.fps = self.found.fps = rate
        for number, one in taken.items():
            self._take(number, one)
        if self.elsewhere:
            self.found.changes.append(
                f"Rows of episode {some(self.elsewhere)} are not in the file that meta names; they were found in another one."
            )
        if self.misnumbered:
            self.found.changes.append(
                f"Rows of the files of episode {some(self.misnumbered)} name other episodes; the files' numbers count."
            )
        if self.uncounted:
            self.found.changes.append(about_uncounted(self.uncounted, self.root))
        if self.recounted:
            self.found.changes.append(about_recounted(self.recounted))
        if self.timeless:
            self.found.changes.append(f"Timestamps of {self.timeless} episodes are frame_index / fps; they had none.")
        if self.late:
            worst = max(self.late, key=lambda number: self.late[number])
            self.found.changes.append(
                f"Timestamps of {len(self.late)} episodes are set to frame_index / fps; they were up to "
                f"{self.late[worst] * 1000:.3g} ms away (episode {worst})."
            )
        return self.found

    def _file(self, path: Path) -> None:
        schema = read_schema(path)
        table = read_parquet(path, [], optional=KEYS)
        count = len(table)
        if not count:
            return
        if self.modern:
            owner = whole_numbers(table, "episode_index", path)
        else:
            digits = re.search(r"(\d+)$", path.stem)
            if digits is None:
                raise DataError("its name has no number.")
            owner = np.full(count, int(digits[1]))
            if is_filled(table, "episode_index") and (whole_numbers(table, "episode_index", path) != owner).any():
                self.misnumbered.append(int(digits[1]))
        if is_filled(table, "frame_index"):
            frame = whole_numbers(table, "frame_index", path)
        else:
            frame = count_rows(owner)
            self.uncounted.append(path)
        task = whole_numbers(table, "task_index", path) if is_filled(table, "task_index") else np.full(count, -1)
        time = np.full(count, np.nan)
        if is_filled(table, "timestamp"):
            numbers, widths = flat_numbers(table["timestamp"])
            time = numbers if (widths == 1).all() else time
        self.found.schemas[path] = schema
        order = np.lexsort((frame, owner))
        numbers, starts = np.unique(owner[order], return_index=True)
        for number, places in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
            candidate = _Candidate(FoundRows(path, places, task[places]), frame[places], time[places])
            self.candidates.setdefault(number, []).append(candidate)

    def _choose(self, number: int, candidates: Sequence[_Candidate]) -> _Candidate | None:
        """The rows of an episode: those in the file that meta names, if there are several; None if that leaves a doubt."""
        named = self.named.get(number)
        if len(candidates) == 1:
            if named is not None and candidates[0].rows.path != named:
                self.elsewhere.append(number)
            return candidates[0]
        chosen = [one for one in candidates if one.rows.path == named]
        others = [one for one in candidates if one.rows.path != named]
        names = [one.rows.path.relative_to(self.root).as_posix() for one in candidates]
        if not chosen or any(one.frame[0] != 0 for one in others):  # other rows, not the same ones once more
            self.found.problems[number] = f"has rows in several files ({', '.join(names)})"
            return None
        self.found.changes.append(f"Episode {number} is in {' and '.join(names)}; the file that meta names counts.")
        return chosen[0]

    def _take(self, number: int, chosen: _Candidate) -> None:
        rows, time = chosen.rows, chosen.time
        if not chosen.counts:
            time = chosen.in_file(time)
            if not is_regular(time, self.fps, START_TOLERANCE / self.fps, from_first=not self.filmed):
                self.found.problems[number] = (
                    "has rows that are not whole: frame_index does not count 0, 1, 2, ..., nor do the timestamps "
                    f"({rows.path.relative_to(self.root)})"
                )
                return
            rows = FoundRows(rows.path, chosen.in_file(rows.places), chosen.in_file(rows.task))
            self.recounted.append(number)
        if np.isnan(time).all():
            self.timeless += 1
        elif not is_regular(time, self.fps, TOLERANCE_S):
            off = np.abs(time.astype(np.float64) - np.arange(len(time)) / self.fps)
            self.late[number] = float(np.nanmax(off, initial=0.0))
        self.found.episodes[number] = rows
