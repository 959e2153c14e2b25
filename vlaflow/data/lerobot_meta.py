"""The meta folder of a LeRobot data set, v2.0 to v3.0, read into one structure: which rows and frames lie in which file.

Data rows are read only for what the meta folder does not say (an episode's instruction, a file that is not where it should
be), and no video is. ``lerobot_rows`` compares the rows with this, ``lerobot`` builds the data set on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vlaflow.data.lerobot_info import filled, read_info
from vlaflow.data.lerobot_tasks import Tasks, read_tasks
from vlaflow.data.tables import is_list, is_text, read_jsonl, read_parquet, whole_numbers
from vlaflow.data.video_offsets import require_sound_offsets, rewrite, seconds
from vlaflow.errors import DataError
from vlaflow.ranges import Number
from vlaflow.strict import is_file
from vlaflow.text import shown, spans

MOST_SPANS = 200
"""Characters of a list of episodes in an error; instead of a longer one it names the command that finds them by itself."""


@dataclass(frozen=True)
class Episode:
    """One demonstration.

    Args:
        index: its number in the data set; numbers may have gaps, where episodes were removed.
        task: the instruction (of its first frame, if frames differ).
        length: number of frames, T, at least 1.
        start: row of its first frame in ``Columns``.
        tasks: every instruction that its frames may have.
    """

    index: int
    task: str
    length: int
    start: int
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class EpisodeFiles:
    """The files of an episode.

    Args:
        data: the parquet file with its rows.
        videos: by feature key, the mp4 file and the start of the episode within it in seconds.
    """

    data: Path
    videos: Mapping[str, tuple[Path, float]]


@dataclass(frozen=True)
class Meta:
    """The content of the meta folder.

    Args:
        root: the data set's folder.
        info: meta/info.json.
        tasks: the task table.
        episodes: by number, those without frames left out.
        files: of each episode.
        paths: the meta files that were read.
        notes: what the user should know.
        absent: of each camera with missing video files, these, by the number of the episode that needs them.
    """

    root: Path
    info: Mapping[str, Any]
    tasks: Tasks
    episodes: tuple[Episode, ...]
    files: tuple[EpisodeFiles, ...]
    paths: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    absent: Mapping[str, Mapping[int, Path]] = field(default_factory=dict)

    @property
    def modern(self) -> bool:
        """Whether several episodes share a file, as from v3.0 on."""
        return is_modern(self.info)


@dataclass(frozen=True)
class EpisodeForm:
    """A line of meta/episodes.jsonl."""

    episode_index: Number
    length: Number
    tasks: tuple[str, ...] | str | None = None


def is_modern(info: Mapping[str, Any]) -> bool:
    """Whether several episodes share a file, as from v3.0 on."""
    return str(info["codebase_version"]).startswith("v3")


def read_meta(root: Path) -> Meta:
    """Read and cross-check the meta folder; every data file it points to must exist.

    Raises:
        DataError: not a data set, an unsupported version, a damaged or missing file, a path that leads out of the folder, an
            episode without a task in meta and rows, inconsistent video offsets.
    """
    info = read_info(root)
    modern = is_modern(info)
    tasks = read_tasks(root, modern)
    rows, episode_paths = (_episodes_v3 if modern else _episodes_v2)(root)
    notes = _require_numbered(root, info, rows, episode_paths[0])
    rows = [row for row in rows if int(row["length"])]
    if not rows:
        raise DataError(f"{root} holds no episodes{' with frames' if notes else ''}. Record at least one.")
    keys = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    paths = _Paths(root, info)
    files = [(_files_v3 if modern else _files_v2)(paths, keys, row) for row in rows]
    numbers = [int(row["episode_index"]) for row in rows]
    files, moved = _require_data(root, numbers, files)
    require_sound_offsets(root, float(info["fps"]), rows, [one.videos for one in files])
    named, told = _instructions(root, tasks, rows, files, modern)
    lengths = np.array([int(row["length"]) for row in rows])
    starts = np.cumsum(lengths) - lengths
    episodes = tuple(
        Episode(int(row["episode_index"]), names[0], int(length), int(start), names)
        for row, names, length, start in zip(rows, named, lengths, starts, strict=True)
    )
    read = (root / "meta/info.json", tasks.path, *episode_paths)
    absent = _absent_videos(numbers, files)
    return Meta(root, info, tasks, episodes, tuple(files), read, (*tasks.notes, *notes, *moved, *told), absent)


def some(numbers: Sequence[object]) -> str:
    """The first few of many episodes or files, in words: "2, 5 and 7", "2, 5, 7 and 40 more"."""
    shown = [str(n) for n in numbers[:3]]
    if len(numbers) > 3:
        return f"{', '.join(shown)} and {len(numbers) - 3} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _require_numbered(root: Path, info: Mapping[str, Any], rows: list[dict[str, Any]], path: Path) -> tuple[str, ...]:
    """Sort the episodes by number, and refuse those that are not numbered; notes about gaps and empty ones."""
    for row in rows:
        if min(row["episode_index"], row["length"]) < 0:
            raise DataError(
                f"{path} describes an episode with episode_index = {row['episode_index']} and length = {row['length']}; "
                f"neither can be negative; {rewrite(root)}"
            )
    rows.sort(key=lambda row: row["episode_index"])
    numbers = [row["episode_index"] for row in rows]
    twice = [a for a, b in pairwise(numbers) if a == b]
    if twice:
        raise DataError(f"{root}: meta describes episode {twice[0]} twice; {rewrite(root)}")
    notes = []
    for what, counted in (("episodes", len(rows)), ("frames", sum(row["length"] for row in rows))):
        stated = counted if (total := info.get(f"total_{what}")) is None else total
        if stated < counted:
            notes.append(
                f"meta/info.json counts {stated} {what}, but {path.relative_to(root)} describes {counted}; these count."
            )
        if stated > counted:
            raise DataError(
                f"{root}: meta/info.json counts {stated} {what} but {path.relative_to(root)} describes {counted}. The "
                f"recording was interrupted or copied in part; {rewrite(root)}"
            )
    if numbers and numbers[-1] != len(numbers) - 1:
        first = next(i for i, number in enumerate(numbers) if number != i)
        notes.append(
            f"Its episodes are numbered up to {numbers[-1]} with gaps ({numbers[-1] + 1 - len(numbers)} missing, the first is "
            f"{first}); they keep these numbers."
        )
    empty = [row["episode_index"] for row in rows if not row["length"]]
    if empty:
        which = f"Episode {empty[0]} has" if len(empty) == 1 else f"Episodes {some(empty)} have"
        notes.append(f"{which} no frames and {'is' if len(empty) == 1 else 'are'} left out.")
    return tuple(notes)


def _episodes_v3(root: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    paths = sorted((root / "meta/episodes").glob("chunk-*/file-*.parquet"))
    if not paths:
        raise DataError(f"{root} is incomplete: meta/episodes holds no parquet file; {rewrite(root)}")
    rows: list[dict[str, Any]] = []
    for path in paths:
        table = read_parquet(path, without="stats/")
        table = _with_lengths(table, path)
        needed = ("episode_index", "length", "data/chunk_index", "data/file_index")
        absent = [name for name in needed if name not in table.schema.names]
        if absent:
            raise DataError(f"{path} has no column '{absent[0]}'; {rewrite(root)}")
        for name in needed:
            whole_numbers(table, name, path)
        if "tasks" in table.schema.names and not _are_texts(table.schema.field("tasks").type):
            raise DataError(f"'tasks' in {path} holds {table.schema.field('tasks').type} instead of texts; {rewrite(root)}")
        rows += ({key: value for key, value in row.items() if value is not None} for row in table.to_pylist())
    return rows, paths


def _with_lengths(table: pa.Table, path: Path) -> pa.Table:
    """The table with 'length', which LeRobot does without: its rows' range says as much."""
    first, end = "dataset_from_index", "dataset_to_index"
    if "length" in table.column_names or not {first, end} <= {*table.column_names}:
        return table
    return table.append_column("length", pa.array(whole_numbers(table, end, path) - whole_numbers(table, first, path)))


def _are_texts(kind: pa.DataType) -> bool:
    """Whether a column holds words, or lists of them; one that is empty throughout has no type."""
    inner = kind.value_type if is_list(kind) else kind
    return is_text(inner) or pa.types.is_null(inner)


def _episodes_v2(root: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    path = root / "meta/episodes.jsonl"
    return read_jsonl(path, EpisodeForm), [path]


DATA_V3 = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_V3 = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
DATA_V2 = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_V2 = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"


class _Paths:
    """The paths that meta/info.json states. Episodes of one file share its ``Path``: making 20,000 takes half a second."""

    def __init__(self, root: Path, info: Mapping[str, Any]) -> None:
        self.root, self.info = root, info
        self._made: dict[tuple[Any, ...], Path] = {}

    def __call__(self, name: str, usual: str, **values: Any) -> Path:
        """The path of this name, "data_path" or "video_path", filled in; as usual where info.json states none."""
        key = (name, *values.values())
        if key not in self._made:
            template = usual if self.info.get(name) is None else self.info[name]
            self._made[key] = filled(self.root, name, template, **values)
        return self._made[key]


def _files_v3(paths: _Paths, keys: Sequence[str], row: Mapping[str, Any]) -> EpisodeFiles:
    root, videos = paths.root, {}
    for key in keys:
        start = f"videos/{key}/from_timestamp"
        pointers = [row.get(name) for name in (f"videos/{key}/chunk_index", f"videos/{key}/file_index", start)]
        if not all(type(pointer) is int and pointer >= 0 for pointer in pointers[:2]) or pointers[2] is None:
            raise DataError(
                f"Episode {row['episode_index']} of {root} does not say where its video '{key}' is (meta/episodes); "
                f"{rewrite(root)}"
            )
        path = paths("video_path", VIDEO_V3, video_key=key, chunk_index=pointers[0], file_index=pointers[1])
        videos[key] = (path, seconds(root, row, start))
    where = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
    return EpisodeFiles(paths("data_path", DATA_V3, **where), videos)


def _files_v2(paths: _Paths, keys: Sequence[str], row: Mapping[str, Any]) -> EpisodeFiles:
    index = row["episode_index"]
    where = {"episode_chunk": index // (paths.info.get("chunks_size") or 1000), "episode_index": index}
    videos = {key: (paths("video_path", VIDEO_V2, video_key=key, **where), 0.0) for key in keys}
    return EpisodeFiles(paths("data_path", DATA_V2, **where), videos)


def _require_data(
    root: Path, numbers: Sequence[int], files: Sequence[EpisodeFiles]
) -> tuple[list[EpisodeFiles], tuple[str, ...]]:
    """Refuse missing data files, unless their rows lie in another one: those episodes are pointed to it, with a note."""
    exists = {path: is_file(path) for path in {one.data for one in files}}
    elsewhere = _located(root) if not all(exists.values()) else {}
    found, moved, lost = [], [], []
    for number, one in zip(numbers, files, strict=True):
        if exists[one.data]:
            found.append(one)
        elif number in elsewhere:
            moved.append(number)
            found.append(replace(one, data=elsewhere[number]))
        else:
            lost.append((number, one.data))
    if lost:
        raise DataError(missing_files(root, lost, len(numbers)))
    note = f"Rows of episode {some(moved)} are not in the file that meta names; they were found in another one."
    return found, (note,) if moved else ()


def _absent_videos(numbers: Sequence[int], files: Sequence[EpisodeFiles]) -> dict[str, dict[int, Path]]:
    """See ``Meta.absent``. Whether they are needed depends on the views that are used."""
    exists = {path: is_file(path) for path in {path for one in files for path, _ in one.videos.values()}}
    absent: dict[str, dict[int, Path]] = {}
    for number, one in zip(numbers, files, strict=True):
        for key, (path, _) in one.videos.items():
            if not exists[path]:
                absent.setdefault(key, {})[number] = path
    return absent


def missing_files(root: Path, needed: Sequence[tuple[int, Path]], episodes: int) -> str:
    """What is missing, and what to do about all of it.

    Args:
        root: the data set's folder.
        needed: numbers of episodes, each with a missing file that it needs; at least one.
        episodes: how many the data set has.
    """
    numbers = sorted({number for number, _ in needed})
    first, *others = dict.fromkeys(path.relative_to(root).as_posix() for _, path in sorted(needed))
    said = f"Episode {numbers[0]} of {root} needs {first}, which is missing."
    files, them = ("these files", "them") if others else ("it", "it")
    count = f"{'All ' * (len(numbers) == episodes)}{len(numbers)} episodes need {files}." if len(numbers) > 1 else ""
    if others:
        said += f" So {'are' if len(others) > 1 else 'is'} {some(others)}{f'; {count}' if count else '.'}"
    elif count:
        said += f" {count}"
    if len(numbers) == episodes:
        return f"{said} Copy {them} again."
    out, which = f"leave {'these episodes' if count else 'the episode'} out", spans(numbers)
    command = f"drop {root} --episodes {which}" if len(which) <= MOST_SPANS else f"repair {root}"
    return f"{said} Copy {them} again, or {out}: vlaflow data {command} --out DIR"


def _located(root: Path) -> dict[int, Path]:
    """The data file that holds each episode's rows, from the rows themselves."""
    found: dict[int, Path] = {}
    for path in sorted((root / "data").rglob("*.parquet")):
        for number in np.unique(whole_numbers(read_parquet(path, ["episode_index"]), "episode_index", path)).tolist():
            found.setdefault(number, path)
    return found


def _instructions(
    root: Path, tasks: Tasks, rows: Sequence[Mapping[str, Any]], files: Sequence[EpisodeFiles], modern: bool
) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """The instructions of every episode: those that meta lists, or its rows' where meta lists none or one it does not know."""
    known, cache = set(tasks.words), dict[Path, dict[str, np.ndarray]]()
    named: list[tuple[str, ...]] = []
    silent: list[int] = []
    strange: list[int] = []
    for row, one in zip(rows, files, strict=True):
        number, own = row["episode_index"], row.get("tasks") or ()
        listed = tuple(t for t in ((own,) if isinstance(own, str) else own) if t and t.strip())
        unknown = [name for name in listed if name not in known]
        if not listed or unknown:
            if one.data not in cache:
                names = ("task_index", "episode_index") if modern else ("task_index",)
                table = read_parquet(one.data, names)
                cache[one.data] = {name: whole_numbers(table, name, one.data) for name in names}
            cells = cache[one.data]
            found = tasks.places(cells["task_index"][cells["episode_index"] == number] if modern else cells["task_index"])
            if not len(found) or found.min() < 0:
                what = f"names the task {shown(unknown[0])}, which {_task_table(modern)} lacks" if unknown else "has no task"
                raise DataError(
                    f"Episode {number} of {root} {what}, and its rows' task_index names none either. Write its instruction "
                    f"into {_episode_table(modern)} and {_task_table(modern)}."
                )
            (strange if unknown else silent).append(number)
            listed = tuple(dict.fromkeys(tasks.words[i] for i in found.tolist()))
        named.append(listed)
    notes = []
    if silent:
        notes.append(
            f"{_episode_table(modern)} gives no task to {len(silent)} of {len(rows)} episodes (first {silent[0]}); their "
            "instructions are those that their rows' task_index names."
        )
    if strange:
        notes.append(
            f"{_episode_table(modern)} gives {len(strange)} of {len(rows)} episodes (first {strange[0]}) a task that "
            f"{_task_table(modern)} lacks; their instructions are those that their rows' task_index names."
        )
    return named, tuple(notes)


def _episode_table(modern: bool) -> str:
    return "meta/episodes" if modern else "meta/episodes.jsonl"


def _task_table(modern: bool) -> str:
    return "meta/tasks.parquet" if modern else "meta/tasks.jsonl"
