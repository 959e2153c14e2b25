"""A data set as it is on disk, for editing: every episode whose rows and frames are whole, and what is wrong with the others.

Unlike ``lerobot``, which refuses a data set whose parts contradict each other, this decides episode by episode. Rows and videos
are believed before the meta folder; what that changes is stated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlaflow.data.edit_rows import AllRows, find_rows
from vlaflow.data.edit_video import Clip, ClipFinder, Placed, Stated, read_timeline
from vlaflow.data.hub import data_folder
from vlaflow.data.lerobot import EXTRA_KEY
from vlaflow.data.lerobot_info import filled, read_info
from vlaflow.data.lerobot_meta import DATA_V2, VIDEO_V2, EpisodeForm, is_modern, some
from vlaflow.data.lerobot_tasks import TaskForm
from vlaflow.data.tables import is_text, read_jsonl, read_parquet
from vlaflow.data.video import START_TOLERANCE
from vlaflow.data.writer_files import DATA_PATH, VIDEO_PATH
from vlaflow.errors import DataError
from vlaflow.strict import finite_number
from vlaflow.text import shown

POINTERS = ("episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index")
SAME_RATE = 0.01
"""Largest relative difference of a video's usual interval from that of a rate it may run at."""
PREFIXES = ("data/", "videos/", "meta/", "stats/")


@dataclass(frozen=True)
class SourceEpisode:
    """An episode that can be copied.

    Args:
        number: in its data set.
        path: the parquet file with its rows.
        places: int64 (T,), the places of its rows in that file, by frame.
        tasks: the instruction of every row, T of them.
        clips: its frames, by feature key of the camera.
        extra: further columns of its row in meta/episodes.
        described: whether meta states as many rows and frames as there are, so that what it states about them is about these.
    """

    number: int
    path: Path
    places: np.ndarray
    tasks: tuple[str, ...]
    clips: Mapping[str, Clip]
    extra: Mapping[str, Any]
    described: bool = False


@dataclass(frozen=True)
class Survey:
    """A data set on disk.

    Args:
        root: its folder.
        info: meta/info.json.
        tasks: the instructions of all rows, in the order of the task table.
        columns: columns that the rows of every episode have.
        episodes: those that can be copied, by number.
        problems: what is wrong with the others, a sentence each, by number.
        changes: where meta contradicts rows or videos, and what is believed.
    """

    root: Path
    info: Mapping[str, Any]
    tasks: tuple[str, ...]
    columns: frozenset[str]
    episodes: tuple[SourceEpisode, ...]
    problems: Mapping[int, str]
    changes: tuple[str, ...]

    @property
    def fps(self) -> float:
        """Frames per second."""
        return float(self.info["fps"])


def survey(folder: Path | str) -> Survey:
    """Look at every row's numbers and every video's packets; no frame is decoded.

    Args:
        folder: of a data set of format v2.0 to v3.0, or its name on the Hub.

    Raises:
        DataError: not a data set.
    """
    return _Surveyor(data_folder(folder)).run()


class _Surveyor:
    def __init__(self, root: Path) -> None:
        self.root, self.info = root, read_info(root)
        self.modern, self.fps = is_modern(self.info), float(self.info["fps"])
        self.cameras = [key for key, feature in self.info["features"].items() if feature["dtype"] == "video"]
        self.changes: list[str] = []
        self.rows: dict[int, dict[str, Any]] = {}
        self.problems: dict[int, str] = {}

    def run(self) -> Survey:
        words = self._words()
        self.rows = self._episode_rows()
        named = {number: path for number in self.rows if (path := self._data_file(number)) is not None}
        found = find_rows(self.root, self.info, named, self._videos_bear_out)
        if found.fps != self.fps:
            self._correct_rate(found.fps)
        self.changes += found.changes
        self.problems |= found.problems
        self._compare(found)
        tasks = self._tasks(found, words)
        placed = {key: self._place(key, found) for key in self.cameras}
        for one in placed.values():
            self.changes += one.changes
            for number, problem in one.problems.items():
                self.problems.setdefault(number, problem)
        whole = [number for number in sorted(found.episodes) if number not in self.problems]
        episodes = tuple(
            SourceEpisode(
                number,
                found.episodes[number].path,
                found.episodes[number].places,
                tasks[number],
                {key: placed[key].clips[number] for key in self.cameras},
                {k: v for k, v in self.rows.get(number, {}).items() if k not in POINTERS and not k.startswith(PREFIXES)},
                self._describes(number, len(found.episodes[number].places)),
            )
            for number in whole
        )
        known = {*words.values()}
        used = {word for one in episodes for word in set(one.tasks)}
        order = [word for word in words.values() if word in used] + sorted(used - known)
        schemas = [found.schemas[path] for path in dict.fromkeys(one.path for one in episodes)]
        columns = frozenset[str]().union(*(schema.names for schema in schemas))
        columns = columns.intersection(*(schema.names for schema in schemas))
        sentences = {number: f"Episode {number} of {self.root} {problem}." for number, problem in self.problems.items()}
        unused = [word for word in words.values() if word not in used]
        if unused and not self.problems:
            self.changes.append(f"{len(unused)} tasks that no row names are left out, the first is {shown(unused[0])}.")
        return Survey(
            self.root,
            self.info,
            tuple(dict.fromkeys(order)),
            columns,
            episodes,
            dict(sorted(sentences.items())),
            (*self.changes,),
        )

    # -- the meta folder ---------------------------------------------------------------------------------------------

    def _words(self) -> dict[int, str]:
        """The task table, by index; empty if it cannot be read."""
        try:
            if not self.modern:
                lines = read_jsonl(self.root / "meta/tasks.jsonl", TaskForm)
                pairs = [(line["task_index"], line["task"]) for line in lines]
            else:
                table = read_parquet(self.root / "meta/tasks.parquet")
                text = [name for name in table.schema.names if is_text(table.schema.field(name).type)]
                if "task_index" not in table.schema.names or not text:
                    raise DataError(f"{self.root / 'meta/tasks.parquet'} lacks 'task_index' or the tasks in words.")
                words = table["task" if "task" in text else text[0]].to_pylist()
                pairs = list(zip(table["task_index"].to_pylist(), words, strict=True))
        except DataError as error:
            self.changes.append(f"The task table is written again: {error}")
            return {}
        words_of: dict[int, set[str]] = {}
        for i, word in pairs:
            if type(i) is int and isinstance(word, str):
                words_of.setdefault(i, set()).add(word)
        for i in sorted(i for i, found in words_of.items() if len(found) > 1):
            self.changes.append(f"The task table gives the number {i} to {len(words_of[i])} tasks; it names none of them.")
        return {i: next(iter(found)) for i, found in sorted(words_of.items()) if len(found) == 1}

    def _episode_rows(self) -> dict[int, dict[str, Any]]:
        """The rows of the episode table, by number; empty if it cannot be read."""
        rows: list[dict[str, Any]] = []
        try:
            if not self.modern:
                rows = read_jsonl(self.root / "meta/episodes.jsonl", EpisodeForm)
            else:
                paths = sorted((self.root / "meta/episodes").glob("chunk-*/file-*.parquet"))
                if not paths:
                    raise DataError(f"{self.root / 'meta/episodes'} holds no parquet file.")
                for path in paths:
                    rows += read_parquet(path, without="stats/").to_pylist()
        except DataError as error:
            self.changes.append(f"The episode table is written again: {error}")
        found: dict[int, dict[str, Any]] = {}
        for row in rows:
            number = row.get("episode_index")
            if type(number) is not int or number < 0 or number in found:
                self.changes.append(f"A row of the episode table with episode_index = {shown(number)} is left out.")
            else:
                found[number] = row
        return found

    def _data_file(self, number: int) -> Path | None:
        """The file that meta names for an episode's rows."""
        template = self.info.get("data_path") or (DATA_PATH if self.modern else DATA_V2)
        if not self.modern:
            return filled(self.root, "data_path", template, **self._place_v2(number))
        row = self.rows[number]
        where = {name: row.get(f"data/{name}") for name in ("chunk_index", "file_index")}
        return None if None in where.values() else filled(self.root, "data_path", template, **where)

    def _place_v2(self, number: int) -> dict[str, int]:
        return {"episode_chunk": number // int(self.info.get("chunks_size") or 1000), "episode_index": number}

    def _stated(self, number: int, key: str, length: int) -> Stated:
        """Where meta says an episode of a camera is."""
        if not self.modern:
            template = self.info.get("video_path") or VIDEO_V2
            path = filled(self.root, "video_path", template, video_key=key, **self._place_v2(number))
            return Stated(number, length, path, 0.0)
        template, row = self.info.get("video_path") or VIDEO_PATH, self.rows.get(number, {})
        where = {name: row.get(f"videos/{key}/{name}") for name in ("chunk_index", "file_index")}
        times = [row.get(f"videos/{key}/{name}") for name in ("from_timestamp", "to_timestamp")]
        start_s, end_s = (float(t) if t is not None and finite_number(t) else None for t in times)
        if None in where.values():
            return Stated(number, length, None)
        return Stated(number, length, filled(self.root, "video_path", template, video_key=key, **where), start_s, end_s)

    # -- the rate ----------------------------------------------------------------------------------------------------

    def _videos_bear_out(self, rate: float) -> bool:
        """Whether the first readable video of every camera, if it has any, runs at this rate."""
        for key in self.cameras:
            for path in sorted(path for path in (self.root / "videos").rglob("*.mp4") if key in path.parts):
                try:
                    between_s = np.diff(read_timeline(path).seconds)
                except DataError:
                    continue
                if len(between_s):
                    if abs(float(np.median(between_s)) * rate - 1) > SAME_RATE:
                        return False
                    break
        return True

    def _correct_rate(self, rate: float) -> None:
        """State the rate of rows and videos wherever meta/info.json states another one."""
        self.changes.append(
            f"meta/info.json stated fps = {self.fps:g}, but the timestamps of all episodes are {rate:.5g} per second; that is "
            "now its fps."
        )
        self.info, self.fps = _with_rate(self.info, rate), rate

    # -- comparing ---------------------------------------------------------------------------------------------------

    def _place(self, key: str, found: AllRows) -> Placed:
        stated = [self._stated(number, key, len(found.episodes[number].places)) for number in sorted(found.episodes)]
        places = ClipFinder(self.root, key, self.fps)
        if not self.modern:
            return places.alone(stated)
        return places.joined(stated, sorted((self.root / "videos" / key).rglob("*.mp4")))

    def _compare(self, found: AllRows) -> None:
        """State what the episode table says of episodes, where rows say something else."""
        there = {*found.episodes, *found.problems}
        for number, row in self.rows.items():
            if number not in there:
                empty = not row.get("length")
                self.problems[number] = "has no frames" if empty else "has no rows in data/"
        unknown = sorted(there - self.rows.keys())
        if unknown and self.rows:
            self.changes.append(f"Episode {some(unknown)} is not in the episode table; its rows count.")
        wrong = [n for n, rows in found.episodes.items() if n in self.rows and not self._states_length(n, len(rows.places))]
        if wrong:
            self.changes.append(
                f"The episode table gives episode {some(wrong)} another length than it has rows; the rows count."
            )
        for name, count in (
            ("total_episodes", len(there)),
            ("total_frames", sum(len(e.places) for e in found.episodes.values())),
        ):
            stated = self.info.get(name)
            if stated is not None and stated != count and not self.problems:
                self.changes.append(f"meta/info.json stated {name} = {stated}, but there are {count}.")

    def _states_length(self, number: int, length: int) -> bool:
        """Whether the episode table gives an episode this length; or a range of as many rows instead."""
        row = self.rows.get(number, {})
        first, end = row.get("dataset_from_index"), row.get("dataset_to_index")
        if row.get("length") is None and type(first) is int and type(end) is int:
            return end - first == length
        return bool(row.get("length") == length)

    def _describes(self, number: int, length: int) -> bool:
        """Whether meta gives an episode as many rows as it has, and in no video more frames."""
        stated = [self._stated(number, key, length) for key in self.cameras if self.modern]
        spans_s = [one.end_s - one.start_s for one in stated if one.end_s is not None and one.start_s is not None]
        slack_s = 2 * START_TOLERANCE / self.fps
        return self._states_length(number, length) and all(abs(span_s - length / self.fps) < slack_s for span_s in spans_s)

    def _tasks(self, found: AllRows, words: Mapping[int, str]) -> dict[int, tuple[str, ...]]:
        """The instruction of every row, by episode: the one its task_index names, or else the only one meta lists."""
        tasks: dict[int, tuple[str, ...]] = {}
        listed: list[int] = []
        disagreeing: list[int] = []
        for number, rows in found.episodes.items():
            own = self.rows.get(number, {}).get("tasks") or ()
            listed_here = own if isinstance(own, list) else [own]
            stated = [t for t in listed_here if isinstance(t, str) and t.strip()]
            found_here = {index: words.get(index) for index in np.unique(rows.task).tolist()}
            named = {word for word in found_here.values() if word and word.strip()}
            if None not in found_here.values() and (named or len(set(stated)) != 1):
                tasks[number] = tuple(words[index] for index in rows.task.tolist())
                if named != set(stated):
                    disagreeing.append(number)
            elif len(set(stated)) == 1:
                tasks[number] = (stated[0],) * len(rows.places)
                listed.append(number)
            else:
                self.problems[number] = "has rows whose task_index names no task, and the episode table does not list one task"
        if listed:
            self.changes.append(
                f"Rows of episode {some(listed)} have a task_index that names no task; they get the one of the episode table."
            )
        if disagreeing:
            self.changes.append(
                f"The episode table lists other tasks for episode {some(disagreeing)} than its rows name; the rows count."
            )
        return tasks


def _with_rate(info: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """The content of meta/info.json with another rate, wherever it says fps."""
    old, new = info["fps"], int(rate) if rate.is_integer() else rate
    found = {**info, "fps": new}
    own = info.get(EXTRA_KEY) or {}
    spec = own.get("action_spec") or {}
    if spec.get("rate_hz") == old:
        found[EXTRA_KEY] = {**own, "action_spec": {**spec, "rate_hz": new}}
    found["features"] = {
        key: {
            name: {**part, "video.fps": new} if isinstance(part, dict) and part.get("video.fps") == old else part
            for name, part in feature.items()
        }
        for key, feature in info["features"].items()
    }
    return found


def select(found: Survey, numbers: Sequence[int]) -> Survey:
    """The survey without the other episodes, in the order of ``numbers``.

    Raises:
        DataError: one of them has a problem.
    """
    for number in numbers:
        if number in found.problems:
            raise DataError(f"{found.problems[number]} Repair the data set first: vlaflow data repair {found.root} --out DIR")
    by_number = {one.number: one for one in found.episodes}
    return replace(found, episodes=tuple(by_number[number] for number in numbers), problems={})
