"""The rows of a LeRobot data set: all numeric columns at once, compared with what the meta folder says.

Where the rows know better (which file they lie in, which task a frame has, a clock that is a little off), they are believed,
and a note says so. Where a row would be given the wrong meaning, it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from vlaflow.data.features import LARGEST, Feature, width
from vlaflow.data.lerobot_meta import Meta, some
from vlaflow.data.row_numbers import ROUNDING, about_recounted, about_uncounted, count_rows, is_regular, mean_rate, regular_rate
from vlaflow.data.tables import flat_numbers, is_filled, plain_numbers, read_parquet, switches_as_numbers, whole_numbers
from vlaflow.data.video import START_TOLERANCE, TOLERANCE_S
from vlaflow.errors import DataError

KEYS = {"episode": "episode_index", "frame": "frame_index", "task": "task_index", "time": "timestamp"}


@dataclass(frozen=True)
class Columns:
    """The numeric columns of all rows, in episode order.

    Args:
        state: float32 (N, S), robot units; S is 0 if the data set has no state.
        action: float32 (N, D), robot units; the actions to be learned.
        executed: float32 (N, D), the actions that the robot executed, with noise and corrections if the data set records them
            (``lerobot.EXECUTED_KEY``); otherwise ``action`` itself.
        episode: int64 (N,), the episode's number.
        frame: int64 (N,), counted from 0 within the episode.
        task: int64 (N,), index into ``Dataset.tasks``.
    """

    state: np.ndarray
    action: np.ndarray
    executed: np.ndarray
    episode: np.ndarray
    frame: np.ndarray
    task: np.ndarray


@dataclass(frozen=True)
class Vector:
    """Columns that are joined to one vector.

    Args:
        keys: their feature keys, in order.
        names: one name per number.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]


class RowsError(DataError):
    """Rows that are refused: the error of the first, and in ``sentences`` those of all episodes whose rows are.

    Timestamps that disagree with the rate are one sentence for all episodes, because they have one cause and one cure.
    """

    def __init__(self, sentences: Sequence[str]) -> None:
        super().__init__(sentences[0])
        self.sentences = tuple(sentences)


@dataclass(frozen=True)
class CheckedRows:
    """All rows, checked.

    Args:
        columns: what they hold.
        notes: where they and the meta folder disagree, or the clock is not exact.
    """

    columns: Columns
    notes: tuple[str, ...]


def read_rows(meta: Meta, vectors: Mapping[str, Vector], tolerance_s: float | None = None) -> CheckedRows:
    """Read all rows and check them.

    Args:
        meta: of the data set.
        vectors: by name in ``Columns`` ("action", "executed", "state"); vectors without columns are (N, 0).
        tolerance_s: largest distance of a timestamp from its frame; a quarter of a frame by default.

    Raises:
        DataError: see ``Dataset.columns``.
    """
    return _Reader(meta, vectors, tolerance_s).read()


class _Reader:
    def __init__(self, meta: Meta, vectors: Mapping[str, Vector], tolerance_s: float | None) -> None:
        self.meta, self.root, self.fps = meta, meta.root, float(meta.info["fps"])
        self.features: Mapping[str, Feature] = meta.info["features"]
        self.vectors = vectors
        self.numbers = np.array([e.index for e in meta.episodes])
        self.lengths = np.array([e.length for e in meta.episodes])
        self.starts = np.array([e.start for e in meta.episodes])
        self.limit_s = START_TOLERANCE / self.fps if tolerance_s is None else tolerance_s
        self.repair = f"vlaflow data repair {self.root} --out DIR"
        self.filmed = any(feature["dtype"] == "video" for feature in self.features.values())
        self.notes: list[str] = []
        self.uncounted: list[Path] = []

    def read(self) -> CheckedRows:
        owner = {files.data: episode.index for files, episode in zip(self.meta.files, self.meta.episodes, strict=True)}
        alone = not self.meta.modern and len(owner) == len(self.meta.episodes)
        parts = [self._part(path, number if alone else None) for path, number in owner.items()]
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if self.meta.modern and len(rows["episode"]) < self.lengths.sum():
            rows = self._with_strays(rows)
        if self.uncounted:
            self.notes.append(about_uncounted(self.uncounted, self.root))
        self._check_counts(rows)
        rows = self._ordered(rows)
        self._check_rows(rows)
        whole = {name: rows[name].astype(np.int64, copy=False) for name in ("episode", "frame", "task")}
        columns = Columns(rows["state"], rows["action"], rows.get("executed", rows["action"]), **whole)
        return CheckedRows(columns, tuple(self.notes))

    # -- reading -----------------------------------------------------------------------------------------------------

    def _part(self, path: Path, number: int | None = None) -> dict[str, np.ndarray]:
        """The rows of one file; the number of the episode that it belongs to alone, as before v3.0."""
        vectors = [key for vector in self.vectors.values() for key in vector.keys]
        needed = [*([KEYS["episode"]] if number is None else []), *vectors]
        table = read_parquet(path, needed, optional=tuple(KEYS.values()))
        part = self._numbering(table, path, number)
        for name, vector in self.vectors.items():
            columns = [self._vector(table, key, path, part) for key in vector.keys]
            part[name] = np.concatenate(columns, axis=1) if columns else np.zeros((len(table), 0), np.float32)
        return part

    def _numbering(self, table: pa.Table, path: Path, number: int | None) -> dict[str, np.ndarray]:
        """Episode, frame, task and time of every row; what LeRobot does without may be absent."""
        if not is_filled(table, KEYS["task"]):
            raise DataError(
                f"{path} has no column 'task_index'. Copy the file again, or have the tasks written that meta lists for its "
                f"episodes: {self.repair}"
            )
        if number is None or is_filled(table, KEYS["episode"]):
            episode = whole_numbers(table, KEYS["episode"], path)
            episode = episode if number is None else self._own_number(episode, number, path)
        else:
            episode = np.full(len(table), number)
        if is_filled(table, KEYS["frame"]):
            frame = whole_numbers(table, KEYS["frame"], path)
        else:
            frame = count_rows(episode)
            self.uncounted.append(path)
        if is_filled(table, KEYS["time"]):
            time = plain_numbers(table, KEYS["time"], path)
        elif self.filmed:
            raise DataError(
                f"{path} has no column 'timestamp', the time of every row in its video. Copy the file again, or have times "
                f"written that follow from the numbers of the frames: {self.repair}"
            )
        else:
            time = frame / self.fps
        return {"episode": episode, "frame": frame, "task": whole_numbers(table, KEYS["task"], path), "time": time}

    def _own_number(self, episode: np.ndarray, number: int, path: Path) -> np.ndarray:
        """Where every episode has a file of its own, the file's number counts."""
        found = np.unique(episode)
        if len(found) == 1 and found[0] != number:
            self.notes.append(
                f"Rows of {path.relative_to(self.root)} say that they belong to episode {found[0]}; the file's number, "
                f"{number}, counts."
            )
            return np.full_like(episode, number)
        return episode

    def _vector(self, table: pa.Table, key: str, path: Path, part: Mapping[str, np.ndarray]) -> np.ndarray:
        """One vector column as float32 (rows, width), refusing rows whose length differs from the declared one."""
        declared, column = width(self.features[key]), table[key]
        try:
            values, widths = flat_numbers(column, switches=self.features[key]["dtype"].startswith("bool"))
        except pa.ArrowException as error:
            cure = "Record the file again."
            if switches_as_numbers(column).type != column.type:
                cure = f"Have the booleans written as numbers: {self.repair}"
            raise DataError(f"'{key}' in {path} cannot be read ({error}). {cure}") from error
        wrong = np.flatnonzero(widths != declared)
        if len(wrong) or column.null_count:
            row = int(wrong[0]) if len(wrong) else int(np.flatnonzero(column.is_null().to_numpy())[0])
            found = f"{widths[row]} numbers" if column[row].is_valid else "nothing"
            raise DataError(
                f"Episode {part['episode'][row]} of {self.root}: '{key}' holds {found} at frame "
                f"{part['frame'][row]} ({path.relative_to(self.root)}), but meta/info.json declares {declared}. "
                f"Correct the shape there, or record the episode again."
            )
        return values.reshape(-1, declared)

    def _with_strays(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows of known episodes in files that meta points no episode to, added to the others."""
        named = {files.data for files in self.meta.files}
        strays: list[int] = []
        for path in sorted((self.root / "data").rglob("*.parquet")):
            if path in named:
                continue
            found = np.unique(whole_numbers(read_parquet(path, ["episode_index"]), "episode_index", path))
            absent = np.intersect1d(found, np.setdiff1d(self.numbers, rows["episode"]))
            if len(absent):
                part = self._part(path)
                keep = np.isin(part["episode"], absent)
                rows = {name: np.concatenate([array, part[name][keep]]) for name, array in rows.items()}
                strays += absent.tolist()
        if strays:
            self.notes.append(
                f"Rows of episode {some(strays)} are not in the file that meta names; they were found in another."
            )
        return rows

    # -- checks ------------------------------------------------------------------------------------------------------

    def _check_counts(self, rows: Mapping[str, np.ndarray]) -> None:
        """Every episode has as many rows as meta says, and no row belongs to another one."""
        found, counts = np.unique(rows["episode"], return_counts=True)
        foreign = np.setdiff1d(found, self.numbers)
        if len(foreign):
            raise DataError(
                f"{self.root}/data holds rows of episode {int(foreign[0])}, which meta does not describe. Copy the meta folder "
                f"again, or have it written from the rows: {self.repair}"
            )
        held = np.zeros(len(self.numbers), np.int64)
        held[np.searchsorted(self.numbers, found)] = counts
        problems = [
            f"Episode {self.numbers[i]} of {self.root} has {self.lengths[i]} frames according to meta, but {self._path(i)} "
            f"holds {held[i]} rows of it. Copy the file again, or have the rows' number written: {self.repair}"
            for i in np.flatnonzero(held != self.lengths).tolist()
        ]
        if problems:
            raise RowsError(problems)

    def _ordered(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The rows by episode and frame; LeRobot does without frame numbers, so they may begin anywhere or be all the same."""
        counted = np.arange(len(rows["frame"])) - np.repeat(self.starts, self.lengths)
        order, as_stored = np.lexsort((rows["frame"], rows["episode"])), np.argsort(rows["episode"], kind="stable")
        recounted = []
        miscounted = rows["episode"][order][rows["frame"][order] != counted]
        for place in np.searchsorted(self.numbers, np.unique(miscounted)).tolist():
            own = self._own(place)
            frame, time = (rows[name][as_stored[own]] for name in ("frame", "time"))
            step = np.diff(frame)
            if ((step == 1).all() or (step == 0).all()) and self._is_clock(time):
                order[own] = as_stored[own]
                recounted.append(place)
        if not np.array_equal(order, np.arange(len(order))):
            rows = {name: array[order] for name, array in rows.items()}
        for place in recounted:
            rows["frame"][self._own(place)] = np.arange(self.lengths[place])
        if recounted:
            self.notes.append(about_recounted(self.numbers[recounted].tolist()))
        return rows if self.filmed else rows | {"time": self._from_first(rows["time"])}

    def _is_clock(self, time: np.ndarray) -> bool:
        """Whether by the timestamps of an episode, in the order of its rows, none is missing."""
        return is_regular(time, self.fps, self.limit_s, from_first=not self.filmed)

    def _from_first(self, time: np.ndarray) -> np.ndarray:
        """Times that begin elsewhere than at 0 s counted from there: without videos, they only tell rows apart."""
        first = time[self.starts].astype(np.float64)
        late = np.isfinite(first) & (np.abs(first) >= self.limit_s)
        if not late.any():
            return time
        place = int(np.argmax(late))
        self.notes.append(
            f"Timestamps of episode {some(self.numbers[late].tolist())} do not begin at 0 s ({self.numbers[place]} at "
            f"{first[place]:.4g} s); they are counted from their first row."
        )
        return time - np.repeat(np.where(late, first, 0.0), self.lengths)

    def _check_rows(self, rows: dict[str, np.ndarray]) -> None:
        """Refuse rows that would be given the wrong meaning, with all episodes that have some."""
        starts = np.repeat(self.starts, self.lengths)
        miscounted = rows["frame"] != np.arange(len(starts)) - starts
        count = f"Fix the column, or have frames counted by the timestamps: {self.repair}"
        problems = self._refused(
            rows,
            miscounted,
            "frame_index",
            "does not count from 0",
            lambda place: count if self._is_clock(rows["time"][self._own(place)]) else "",
        )
        places = self.meta.tasks.places(rows["task"])
        cure = f"Fix the column, or have the only task written that meta lists for the episode: {self.repair}"
        problems += self._refused(rows, places < 0, "task_index", "names no task in meta", lambda _: cure)
        if not problems:
            rows["task"] = places
            self._note_tasks(rows)
        if not miscounted.any():
            problems += self._check_times(rows)
        for name, vector in self.vectors.items():
            bad = ~(np.abs(rows[name]) <= LARGEST)
            for row in self._firsts(bad.any(axis=1)):
                dimension = int(np.argmax(bad[row]))
                number = rows["episode"][row]
                problems.append(
                    f"Episode {number} of {self.root} holds {rows[name][row, dimension]} in "
                    f"'{','.join(vector.keys)}' at frame {rows['frame'][row]}, dimension {dimension} "
                    f"('{vector.names[dimension]}') ({self._path(self._place(row))}). Record the episode again, or "
                    f"leave it out: vlaflow data drop {self.root} --episodes {number} --out DIR"
                )
        if problems:
            raise RowsError(problems)

    def _check_times(self, rows: Mapping[str, np.ndarray]) -> list[str]:
        """Frames are addressed by number, so a timestamp must be nearest to its own frame; how exact it is, a note says."""
        off = np.abs(rows["time"].astype(np.float64) - rows["frame"] / self.fps)
        rounding = np.abs(rows["time"]) * ROUNDING
        none = ~np.isfinite(off)
        if none.any():
            cure = f"Fix the column, or have times written that follow from the numbers of the frames: {self.repair}"
            return self._refused(rows, none, "timestamp", "is no time", lambda _: cure)
        bad = off >= self.limit_s + rounding
        if bad.any():
            what = f"disagrees with fps = {self.fps:g} in meta/info.json by {self.limit_s * 1000:.3g} ms or more"
            enough = math.floor(off.max() * 1000 + 1) / 1000
            cure = (
                f"Fix the column, or give a larger --tolerance-s ({enough:g} is enough) if frames are to be taken by number "
                "whatever the clock says."
            )
            times = [rows["time"][self._own(place)] for place in range(len(self.numbers))]
            rate, mean = regular_rate(times, self.fps), mean_rate(times)
            if rate is not None:
                what += f"; all rows are {rate:.5g} per second"
                cure = f"If that is their rate, correct fps there, or have it corrected: {self.repair}"
            elif mean is not None and abs(mean / self.fps - 1) > 0.05:
                what += f"; the rows are {mean:.4g} per second on average"
            return self._refused(rows, bad, "timestamp", what, lambda _: cure)[:1]
        if (off >= TOLERANCE_S + rounding).any():
            row = int(np.argmax(off))
            self.notes.append(
                f"Timestamps are up to {off[row] * 1000:.3g} ms away from frame_index / fps (most in episode "
                f"{rows['episode'][row]}, frame {rows['frame'][row]}); frames are taken by their number."
            )
        return []

    def _note_tasks(self, rows: Mapping[str, np.ndarray]) -> None:
        """Frames whose instruction is none that meta gives their episode keep their own."""
        place, words = np.repeat(np.arange(len(self.numbers)), self.lengths), self.meta.tasks.words
        pairs, first, counts = np.unique(place * len(words) + rows["task"], return_index=True, return_counts=True)
        own = [frozenset(e.tasks) for e in self.meta.episodes]
        strange = []
        for pair, row, count in zip(pairs.tolist(), first.tolist(), counts.tolist(), strict=True):
            at, task = divmod(pair, len(words))
            if words[task] not in own[at]:
                strange.append((row, count, words[task]))
        if strange:
            row, _, task = strange[0]
            self.notes.append(
                f"{sum(count for _, count, _ in strange)} frames have a task_index that meta does not list for their episode "
                f"(first episode {rows['episode'][row]}, frame {rows['frame'][row]}: '{task}'); the frames' own instruction "
                "counts."
            )

    def _firsts(self, bad: np.ndarray) -> list[int]:
        """The first bad row of every episode that has one."""
        rows = np.flatnonzero(bad)
        places = np.searchsorted(self.starts, rows, side="right")
        return rows[np.unique(places, return_index=True)[1]].tolist()

    def _refused(
        self, rows: Mapping[str, np.ndarray], bad: np.ndarray, column: str, what: str, cure: Callable[[int], str]
    ) -> list[str]:
        """A sentence about the first bad row of every episode that has one; ``cure`` takes the episode's place."""
        name = next(name for name, key in KEYS.items() if key == column)
        found = []
        for row in self._firsts(bad):
            place = self._place(row)
            number = self.numbers[place]
            fix = f"Fix the column, or leave the episode out: vlaflow data drop {self.root} --episodes {number} --out DIR"
            found.append(
                f"Episode {number} of {self.root}: '{column}' is {rows[name][row]:g} at frame "
                f"{row - self.starts[place]} ({self._path(place)}), which {what}. {cure(place) or fix}"
            )
        return found

    def _place(self, row: int) -> int:
        """The place among the episodes of the one that a row belongs to."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def _own(self, place: int) -> slice:
        """The rows of the episode at a place."""
        return slice(self.starts[place], self.starts[place] + self.lengths[place])

    def _path(self, place: int) -> Path:
        return self.meta.files[place].data.relative_to(self.root)
