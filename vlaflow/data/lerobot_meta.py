"""The meta folder of a LeRobot data set, v3.0 and v2.1, read into one structure: which rows and frames lie in which file.

No data rows and no video are read here. ``lerobot`` builds the data set on top of this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlaflow.data.video_offsets import require_sound_offsets, seconds
from vlaflow.errors import DataError

VERSIONS = ("v2.1", "v3.0")


@dataclass(frozen=True)
class Episode:
    """One demonstration.

    Args:
        index: number of the episode, 0 .. E-1, equal to its position.
        task: the instruction (of its first frame, if frames differ).
        length: number of frames, T.
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
    """The content of the meta folder."""

    root: Path
    info: Mapping[str, Any]
    tasks: tuple[str, ...]
    episodes: tuple[Episode, ...]
    files: tuple[EpisodeFiles, ...]
    paths: tuple[Path, ...]


def read_meta(root: Path) -> Meta:
    """Read and cross-check the meta folder; every data and video file it points to must exist.

    Raises:
        DataError: not a data set, an unsupported version, a damaged or missing file, a path that leads out of the folder, an
            episode without a task, inconsistent video offsets.
    """
    info = _read_info(root)
    modern = info["codebase_version"] == "v3.0"
    tasks, task_paths = (_tasks_v3 if modern else _tasks_v21)(root)
    rows, episode_paths = (_episodes_v3 if modern else _episodes_v21)(root)
    rows.sort(key=lambda row: row["episode_index"])
    if [row["episode_index"] for row in rows] != list(range(len(rows))):
        raise DataError(
            f"{root}: the episodes in meta are not numbered 0 to {len(rows) - 1} without gaps. Copy the meta folder again."
        )
    if info.get("total_episodes", len(rows)) != len(rows):
        raise DataError(
            f"{root}: meta/info.json counts {info['total_episodes']} episodes but {episode_paths[0].relative_to(root)} "
            f"describes {len(rows)}. The recording was interrupted or copied in part; copy the meta folder again."
        )
    if not rows:
        raise DataError(f"{root} holds no episodes. Record at least one.")
    keys = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    episodes, files, start = [], [], 0
    for row in rows:
        index, names = row["episode_index"], [t for t in row.get("tasks") or [] if t and t.strip()]
        if not names:
            raise DataError(f"Episode {index} of {root} has no task. Write its instruction into {_episode_table(modern)}.")
        missing = [name for name in names if name not in tasks]
        if missing:
            raise DataError(
                f"Episode {index} of {root} names the task '{missing[0]}', which {_task_table(modern)} lacks. Add it there."
            )
        episodes.append(Episode(index, names[0], int(row["length"]), start, tuple(names)))
        files.append((_files_v3 if modern else _files_v21)(root, info, keys, row))
        start += int(row["length"])
    _require_files(root, files)
    require_sound_offsets(root, float(info["fps"]), rows, [one.videos for one in files])
    return Meta(root, info, tasks, tuple(episodes), tuple(files), (root / "meta/info.json", *task_paths, *episode_paths))


def read_parquet(path: Path, columns: Sequence[str] | None = None, without: str | None = None) -> pa.Table:
    """Read a parquet file.

    Args:
        path: the file.
        columns: the columns to read, all of them when None.
        without: skip columns whose name starts with this.

    Raises:
        DataError: when the file is missing, cut off or lacks a column.
    """
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        absent = [name for name in columns or () if name not in names]
        if absent:
            raise DataError(f"{path} has no column '{absent[0]}'. Copy or record the file again.")
        if without is not None:
            columns = [name for name in columns or names if not name.startswith(without)]
        return file.read(columns=columns)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. Copy the data set again.") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged or cut off ({str(error).splitlines()[0]}). Copy or record it again.") from error


def inside(root: Path, path: str, where: str) -> Path:
    """Resolve a path within the data set, as stated in ``where``.

    Raises:
        DataError: the path leads out of the folder.
    """
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise DataError(f"{where} of {root} leads out of the data set ({path}). Give a path inside it, without '..'.")
    return root / path


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "meta/info.json"
    if not root.is_dir():
        raise DataError(f"There is no folder {root}. Give the path of a LeRobot data set (the folder that holds meta/).")
    if not path.is_file():
        raise DataError(f"{root} is not a LeRobot data set: meta/info.json is missing. Give the folder that holds meta/.")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}). Copy the file again.") from error
    absent = [key for key in ("codebase_version", "fps", "features") if not isinstance(info, dict) or key not in info]
    if absent:
        raise DataError(f"{path} does not state '{absent[0]}', which every LeRobot data set must. Copy the file again.")
    if info["codebase_version"] not in VERSIONS:
        raise DataError(
            f"{root} has format version {info['codebase_version']}; vlaflow reads {' and '.join(VERSIONS)}. Convert it with "
            f"LeRobot's own scripts (lerobot.datasets.v30.convert_dataset_v21_to_v30 or the older v2 ones)."
        )
    if not isinstance(info["fps"], int | float) or not info["fps"] > 0:
        raise DataError(f"{path} states fps = {info['fps']!r}; it must be a positive number.")
    return info


def _tasks_v3(root: Path) -> tuple[tuple[str, ...], list[Path]]:
    path = root / "meta/tasks.parquet"
    table = read_parquet(path)
    text = [name for name in table.schema.names if _is_text(table.schema.field(name).type)]
    if "task_index" not in table.schema.names or not text:
        raise DataError(f"{path} needs a column 'task_index' and one with the task in words. Copy the file again.")
    # Converted data sets leave the pandas index unnamed, so the words may be in '__index_level_0__'.
    words = table["task" if "task" in text else text[0]].to_pylist()
    return _numbered(path, table["task_index"].to_pylist(), words), [path]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _tasks_v21(root: Path) -> tuple[tuple[str, ...], list[Path]]:
    path = root / "meta/tasks.jsonl"
    rows = _read_jsonl(path, ("task_index", "task"))
    return _numbered(path, [row["task_index"] for row in rows], [row["task"] for row in rows]), [path]


def _numbered(path: Path, numbers: Sequence[int], words: Sequence[str]) -> tuple[str, ...]:
    if sorted(numbers) != list(range(len(numbers))):
        raise DataError(f"{path}: task_index must count 0 to {len(numbers) - 1}, found {sorted(numbers)}. Copy the file again.")
    return tuple(words[i] for i in np.argsort(np.asarray(numbers, np.int64), kind="stable"))


def _episodes_v3(root: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    paths = sorted((root / "meta/episodes").glob("chunk-*/file-*.parquet"))
    if not paths:
        raise DataError(f"{root} is incomplete: meta/episodes holds no parquet file. Copy the meta folder again.")
    rows: list[dict[str, Any]] = []
    for path in paths:
        table = read_parquet(path, without="stats/")
        needed = ("episode_index", "tasks", "length", "data/chunk_index", "data/file_index")
        absent = [name for name in needed if name not in table.schema.names]
        if absent:
            raise DataError(f"{path} has no column '{absent[0]}'. Copy the meta folder again.")
        rows += table.to_pylist()
    return rows, paths


def _episodes_v21(root: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    path = root / "meta/episodes.jsonl"
    return _read_jsonl(path, ("episode_index", "length")), [path]


def _read_jsonl(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. Copy the meta folder again.") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"Line {number} of {path} is not valid JSON ({error}). Copy the file again.") from error
        absent = [key for key in needed if key not in row]
        if absent:
            raise DataError(f"Line {number} of {path} does not state '{absent[0]}'. Copy the file again.")
        rows.append(row)
    return rows


def _files_v3(root: Path, info: Mapping[str, Any], keys: Sequence[str], row: Mapping[str, Any]) -> EpisodeFiles:
    data = info.get("data_path") or "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    video = info.get("video_path") or "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    videos = {}
    for key in keys:
        start = f"videos/{key}/from_timestamp"
        pointers = [row.get(name) for name in (f"videos/{key}/chunk_index", f"videos/{key}/file_index", start)]
        if None in pointers:
            raise DataError(
                f"Episode {row['episode_index']} of {root} does not say where its video '{key}' is (meta/episodes). "
                f"Copy the meta folder again."
            )
        path = _filled(root, "video_path", video, video_key=key, chunk_index=pointers[0], file_index=pointers[1])
        videos[key] = (path, seconds(root, row, start))
    where = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
    return EpisodeFiles(_filled(root, "data_path", data, **where), videos)


def _files_v21(root: Path, info: Mapping[str, Any], keys: Sequence[str], row: Mapping[str, Any]) -> EpisodeFiles:
    index = row["episode_index"]
    data = info.get("data_path") or "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    video = info.get("video_path") or "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    where = {"episode_chunk": index // int(info.get("chunks_size", 1000)), "episode_index": index}
    videos = {key: (_filled(root, "video_path", video, video_key=key, **where), 0.0) for key in keys}
    return EpisodeFiles(_filled(root, "data_path", data, **where), videos)


def _filled(root: Path, name: str, template: Any, **values: Any) -> Path:
    """Fill in the template of a path from meta/info.json."""
    try:
        path = template.format(**values)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"meta/info.json of {root} states '{name}' = {template!r}, which cannot be filled in "
            f"({type(error).__name__}: {error}); it may name {', '.join(values)}. Correct it there."
        ) from error
    return inside(root, path, f"'{name}' in meta/info.json")


def _require_files(root: Path, files: Sequence[EpisodeFiles]) -> None:
    known: dict[Path, bool] = {}
    for index, episode in enumerate(files):
        for path in (episode.data, *(path for path, _ in episode.videos.values())):
            if path not in known:
                known[path] = path.is_file()
            if not known[path]:
                raise DataError(f"Episode {index} of {root} needs {path.relative_to(root)}, which is missing. Copy it again.")


def _episode_table(modern: bool) -> str:
    return "meta/episodes" if modern else "meta/episodes.jsonl"


def _task_table(modern: bool) -> str:
    return "meta/tasks.parquet" if modern else "meta/tasks.jsonl"
