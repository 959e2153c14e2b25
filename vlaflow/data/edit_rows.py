"""The rows of a data set that is to be edited, by episode: which file they lie in, and what they contradict.

Rows are believed: their numbers, their order and their tasks. An episode whose rows are not whole is a problem.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlaflow.data.lerobot_meta import some
from vlaflow.data.tables import flat_numbers, read_parquet, whole_numbers
from vlaflow.data.video import TOLERANCE_S
from vlaflow.errors import DataError

KEYS = ("episode_index", "frame_index", "task_index", "timestamp")


@dataclass(frozen=True)
class FoundRows:
    """The rows of one episode.

    Args:
        path: their parquet file.
        places: int64 (T,), their places in the file, by frame.
        task: int64 (T,), their task index; -1 where the file has none.
    """

    path: Path
    places: np.ndarray
    task: np.ndarray


@dataclass
class AllRows:
    """The rows of a data set.

    Attributes:
        episodes: by number.
        problems: why an episode cannot be used, in words that follow "Episode N of DIR", by number.
        changes: what is wrong with columns or files, one sentence each.
        schemas: of every file with rows.
    """

    episodes: dict[int, FoundRows] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    schemas: dict[Path, pa.Schema] = field(default_factory=dict)


def find_rows(root: Path, fps: float, modern: bool, named: Mapping[int, Path]) -> AllRows:
    """Find the rows of every episode.

    Args:
        root: the data set's folder.
        fps: frames per second.
        modern: whether episodes share files; otherwise the number in a file's name is its episode's.
        named: the file that meta names for an episode, by number.
    """
    return _Search(root, fps, modern, named).run()


@dataclass(frozen=True)
class _Candidate:
    """Rows of one episode in one file, by frame: frame_index int64 (T,), timestamp float32 (T,)."""

    rows: FoundRows
    frame: np.ndarray
    time: np.ndarray


class _Search:
    def __init__(self, root: Path, fps: float, modern: bool, named: Mapping[int, Path]) -> None:
        self.root, self.fps, self.modern, self.named = root, fps, modern, named
        self.found = AllRows()
        self.candidates: dict[int, list[_Candidate]] = {}
        self.elsewhere: list[int] = []
        self.late: dict[int, float] = {}
        self.misnumbered: list[int] = []
        self.uncounted: list[Path] = []

    def run(self) -> AllRows:
        for path in sorted((self.root / "data").rglob("*.parquet")):
            try:
                self._file(path)
            except (DataError, pa.ArrowException, OSError) as error:
                self.found.changes.append(f"{path.relative_to(self.root)} cannot be read, so its rows are lost: {error}")
        for number, candidates in self.candidates.items():
            chosen = self._choose(number, candidates)
            if chosen is not None:
                self._take(number, chosen)
        if self.elsewhere:
            self.found.changes.append(
                f"Rows of episode {some(self.elsewhere)} are not in the file that meta names; they were found in another one."
            )
        if self.misnumbered:
            self.found.changes.append(
                f"Rows of the files of episode {some(self.misnumbered)} name other episodes; the files' numbers count."
            )
        if self.uncounted:
            self.found.changes.append(
                f"{len(self.uncounted)} files, {self.uncounted[0].relative_to(self.root)} first, have no 'frame_index'; frames "
                "are counted in the order of the rows."
            )
        if self.late:
            worst = max(self.late, key=lambda number: self.late[number])
            self.found.changes.append(
                f"Timestamps of {len(self.late)} episodes are set to frame_index / fps; they were up to "
                f"{self.late[worst] * 1000:.3g} ms away (episode {worst})."
            )
        return self.found

    def _file(self, path: Path) -> None:
        schema = pq.read_schema(path)
        table = read_parquet(path, [name for name in KEYS if name in schema.names])
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
            if "episode_index" in table.column_names and (whole_numbers(table, "episode_index", path) != owner).any():
                self.misnumbered.append(int(digits[1]))
        if "frame_index" in table.column_names:
            frame = whole_numbers(table, "frame_index", path)
        else:
            frame = _counted(owner)
            self.uncounted.append(path)
        task = whole_numbers(table, "task_index", path) if "task_index" in table.column_names else np.full(count, -1)
        time = flat_numbers(table["timestamp"])[0] if "timestamp" in table.column_names else np.full(count, np.nan)
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
        rows, frame, time = chosen.rows, chosen.frame, chosen.time
        if not np.array_equal(frame, np.arange(len(frame))):
            self.found.problems[number] = (
                f"has rows that are not whole: frame_index does not count 0, 1, 2, ... ({rows.path.relative_to(self.root)})"
            )
            return
        off = np.abs(time.astype(np.float64) - frame / self.fps)
        exact = off < TOLERANCE_S + np.abs(time) * np.finfo(np.float32).eps  # float32 seconds
        if not exact.all():
            self.late[number] = float(np.nanmax(off, initial=0.0))
        self.found.episodes[number] = rows


def _counted(owner: np.ndarray) -> np.ndarray:
    """The place of every row among those of its episode, in their order: int64, as ``owner``."""
    order = np.argsort(owner, kind="stable")
    _, starts, lengths = np.unique(owner[order], return_index=True, return_counts=True)
    frame = np.empty_like(owner)
    frame[order] = np.arange(len(owner)) - np.repeat(starts, lengths)
    return frame
