"""Reading a LeRobot data set, v3.0 or v2.1, without LeRobot: numeric columns at once, frames one episode at a time.

    dataset = Dataset.open("runs/demo/dataset")
    columns = dataset.columns()              # state (N, S), action (N, D), ...
    images = dataset.frames(3, "corner2")    # (T, H, W, 3) uint8

Opening reads the meta folder only. ``columns`` reads and checks every row, ``frames`` decodes and checks one video. Damaged
data is refused with an error that names file and episode; nothing is skipped or padded. For fast random access to frames
see ``frames.FrameCache``, for batches ``windows.Windows``.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlaflow.config import from_json
from vlaflow.data.hub import data_folder
from vlaflow.data.lerobot_meta import Episode, Meta, inside, read_meta, read_parquet
from vlaflow.data.video import TOLERANCE_S, VideoError, decode_frames
from vlaflow.data.video_offsets import largest_drift_s
from vlaflow.errors import DataError, SpecError, nearest
from vlaflow.spec import ActionSpec

__all__ = ["Columns", "Dataset", "Episode", "view_name"]

EXTRA_KEY = "x_vlaflow"
"""Our own block in meta/info.json; LeRobot ignores unknown keys with a warning."""

EXECUTED_KEY = "executed_action"
"""Column of the actions that the robot executed, where they differ from those to be learned. LeRobot trains on every column
whose name begins with "action", so this name does not."""


@dataclass(frozen=True)
class Columns:
    """The numeric columns of all rows, in episode order.

    Args:
        state: float32 (N, S), robot units; S is 0 if the data set has no state.
        action: float32 (N, D), robot units; the actions to be learned.
        executed: float32 (N, D), the actions that the robot executed, with noise and corrections if the data set records them
            (``EXECUTED_KEY``); otherwise ``action`` itself.
        episode: int64 (N,).
        frame: int64 (N,), counted from 0 within the episode.
        task: int64 (N,), index into ``Dataset.tasks``.
    """

    state: np.ndarray
    action: np.ndarray
    executed: np.ndarray
    episode: np.ndarray
    frame: np.ndarray
    task: np.ndarray


def view_name(key: str) -> str:
    """Name of a view: its feature key without 'observation.images.' or 'observation.'."""
    return key.removeprefix("observation.").removeprefix("images.")


class Dataset:
    """A LeRobot data set on disk; see the module docstring for an example.

    Attributes:
        root: its folder.
        version: "v3.0" or "v2.1".
        fps: frames per second.
        features: as in meta/info.json.
        views: view name to feature key, cameras only (depth maps are not colour images and are left out).
        state_key, action_key: feature keys; None where there is no 'observation.state' or, opened as video alone, no 'action'.
        executed_key: feature key of the executed actions; None if the data set does not record them separately.
        tasks: the instructions, by task index.
        episodes: one ``Episode`` each.
        action_spec: what an action means, or None if neither the data set nor the caller states it.
        provenance: how the data set was created, as recorded by the writer.
    """

    def __init__(self, meta: Meta, action_spec: ActionSpec | None = None, video: bool = False) -> None:
        info = meta.info
        self._meta = meta
        self.root, self.version, self.fps = meta.root, str(info["codebase_version"]), float(info["fps"])
        self.features: Mapping[str, Any] = info["features"]
        self.tasks, self.episodes = meta.tasks, meta.episodes
        self.views = {view_name(key): key for key, f in self.features.items() if _is_camera(f)}
        self.action_key = None if video and "action" not in self.features else "action"
        self.state_key = "observation.state" if "observation.state" in self.features else None
        self.executed_key = EXECUTED_KEY if self.action_key and not video and EXECUTED_KEY in self.features else None
        for key in filter(None, (self.action_key, self.state_key, self.executed_key)):
            self._require_vector(key)
        if self.executed_key and self.features[self.executed_key]["shape"] != self.features["action"]["shape"]:
            raise DataError(
                f"'{EXECUTED_KEY}' of {self.root} has {self.features[EXECUTED_KEY]['shape'][0]} numbers, 'action' has "
                f"{self.features['action']['shape'][0]}. Rename the column, or record the data set again."
            )
        own = info.get(EXTRA_KEY, {})
        where = str(self.root / "meta/info.json")
        stated = own.get("action_spec")
        self.provenance: Mapping[str, Any] = own.get("provenance", {})
        self.action_spec = from_json(ActionSpec, stated, where) if stated is not None else action_spec
        if self.action_spec is not None:
            self._require_spec(self.action_spec)
            if action_spec is not None:
                self.action_spec.require_match(action_spec, f"data set {self.root}", "the action spec passed to it")

    @classmethod
    def open(cls, root: Path | str, action_spec: ActionSpec | None = None, *, video: bool = False) -> Dataset:
        """Open a data set; only its meta folder is read.

        Args:
            root: the folder that holds meta/, data/ and videos/, or a name on the Hub (``hub.data_folder``).
            action_spec: what an action means, for data sets without an action spec.
            video: only the video is needed: a data set without actions can be opened too; its ``columns().action`` has
                shape (N, 0).

        Raises:
            DataError: not a data set, unsupported version, files missing, meta contradicting itself.
            SpecError: the action spec does not fit the actions.
        """
        return cls(read_meta(data_folder(root)), action_spec, video)

    def __len__(self) -> int:
        """Number of rows, N."""
        return self.episodes[-1].start + self.episodes[-1].length

    def __repr__(self) -> str:
        return f"Dataset({str(self.root)!r}, {self.version}, {len(self.episodes)} episodes, {len(self)} frames)"

    def episode_slice(self, episode: int) -> slice:
        """The rows of one episode in ``columns()``."""
        found = self._episode(episode)
        return slice(found.start, found.start + found.length)

    def image_size(self, view: str) -> tuple[int, int]:
        """Height and width of a view as stored."""
        feature = self.features[self._view_key(view)]
        names = feature.get("names")
        # Some converters declare (channel, height, width) although the pixels are stored as (height, width, channel).
        channel_first = isinstance(names, list) and str(names[0]).startswith("channel")
        height, width = feature["shape"][1:] if channel_first else feature["shape"][:2]
        return int(height), int(width)

    def dimension_names(self, name: str) -> tuple[str, ...]:
        """One name per dimension of "state", "action" or "executed"; "0", "1", ... if the data set gives none."""
        if name not in self._vectors:
            return ()
        key = self._vectors[name]
        names, width = self.features[key].get("names"), int(self.features[key]["shape"][0])
        if isinstance(names, dict):  # some recorders group them: {"motors": [...]}
            names = [one for group in names.values() for one in (group if isinstance(group, list) else [group])]
        fitting = isinstance(names, list) and len(names) == width
        return tuple(map(str, names)) if fitting else tuple(map(str, range(width)))

    def video_paths(self, episode: int) -> dict[str, Path]:
        """The mp4 file that contains this episode, by feature key."""
        return {key: path for key, (path, _) in self._meta.files[self._episode(episode).index].videos.items()}

    @property
    def video_drift_s(self) -> float:
        """Largest distance between the stated start of an episode in its video and a frame, in seconds."""
        return largest_drift_s(self.fps, [one.videos for one in self._meta.files])

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of the content: meta and data files in full, of each video its size and its first and last 64 KiB.

        Reading whole videos would take as long as copying them; the two ends hold the frame index, which changes with
        every frame. Neither the location of the folder nor the time of writing matters.
        """
        digest = hashlib.blake2b(digest_size=16)
        data = sorted({files.data for files in self._meta.files})
        videos = sorted({path for files in self._meta.files for path, _ in files.videos.values()})
        for path in (*self._meta.paths, *data):
            digest.update(f"{path.relative_to(self.root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
        for path in videos:
            size = path.stat().st_size
            digest.update(f"{path.relative_to(self.root).as_posix()}\0{size}\0".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 16))
                file.seek(max(0, size - (1 << 16)))
                digest.update(file.read())
        return digest.hexdigest()

    def columns(self) -> Columns:
        """Read all rows, check them, and keep them.

        Raises:
            DataError: a damaged file; rows missing; a value that is not finite; a vector of the wrong length; timestamps
                that disagree with fps; a task that does not exist or is not the episode's. Each error names file and episode.
        """
        return self._columns

    def frames(self, episode: int, view: str) -> np.ndarray:
        """All images of one episode, uint8 (T, H, W, 3), RGB.

        Raises:
            SpecError: no such view or episode.
            DataError: the video is damaged, too short, or runs at another rate.
        """
        height, width = self.image_size(view)
        images = np.empty((self._episode(episode).length, height, width, 3), np.uint8)
        for i, image in enumerate(self.iter_frames(episode, view)):
            images[i] = image
        return images

    def iter_frames(self, episode: int, view: str) -> Iterator[np.ndarray]:
        """Yield the images of one episode, uint8 (H, W, 3); raises as ``frames`` does."""
        key, found = self._view_key(view), self._episode(episode)
        video = self.features[key]["dtype"] == "video"
        shape = (*self.image_size(view), 3)
        for i, image in enumerate(self._video(found, key) if video else self._stored_images(found, key)):
            if image.shape != shape:
                raise DataError(
                    f"Episode {episode} of {self.root}: frame {i} of '{key}' is {image.shape[0]}x{image.shape[1]}, but "
                    f"meta/info.json declares {shape[0]}x{shape[1]}. Correct the shape there, or record the episode again."
                )
            yield image

    def _video(self, episode: Episode, key: str) -> Iterator[np.ndarray]:
        path, start_s = self._meta.files[episode.index].videos[key]
        try:
            yield from decode_frames(path, start_s, episode.length, self.fps)
        except VideoError as error:
            raise DataError(self._video_sentence(episode, key, path, start_s, error)) from error

    def _video_sentence(self, episode: Episode, key: str, path: Path, start_s: float, error: VideoError) -> str:
        which, where = f"Episode {episode.index} of {self.root}", path.relative_to(self.root)
        if error.kind == "start":
            cure = f"Correct 'videos/{key}/from_timestamp' in meta/episodes, or copy the meta folder again."
            if self.version != "v3.0":
                cure = "The video begins late: encode it again with its first frame at 0 s, or record the episode again."
            return f"{which} begins at {start_s:.4f} s of video '{key}' ({where}), {error.detail}. {cure}"
        if error.kind == "rate":
            return (
                f"{which}: video '{key}' ({where}) runs at {error.detail}, but meta/info.json states fps = {self.fps:g}. "
                f"Correct fps there, or encode the video again at that rate."
            )
        if error.kind == "time":
            return (
                f"{which}: in video '{key}' ({where}) {error.detail}, so frames are missing or fps = {self.fps:g} in "
                f"meta/info.json is wrong. Correct fps, or record the episode again."
            )
        if error.kind == "unreadable":
            return (
                f"{which}: video '{key}' ({where}) cannot be decoded after {error.found} of {episode.length} frames "
                f"({error.detail}). Copy the file again, or record the episode again."
            )
        return (
            f"{which} has {episode.length} actions but video '{key}' holds {error.found} frames of it ({where}). "
            f"Copy the file again, or record the episode again."
        )

    def _stored_images(self, episode: Episode, key: str) -> Iterator[np.ndarray]:
        from PIL import Image

        path = self._meta.files[episode.index].data
        rows = _read_cells(path, key, episode.index)
        if len(rows) != episode.length:
            raise DataError(
                f"Episode {episode.index} of {self.root} has {episode.length} actions but '{key}' holds {len(rows)} images "
                f"({path.relative_to(self.root)}). Copy the file again, or record the episode again."
            )
        for i, row in enumerate(rows):
            try:
                where = f"The path of image {i} of '{key}' in episode {episode.index}"
                source = io.BytesIO(row["bytes"]) if row["bytes"] is not None else inside(self.root, row["path"], where)
                with Image.open(source) as image:
                    yield np.asarray(image.convert("RGB"))
            except (TypeError, OSError) as error:
                raise DataError(
                    f"Episode {episode.index} of {self.root}: image {i} of '{key}' cannot be read "
                    f"({path.relative_to(self.root)}: {error}). Copy the file again, or record the episode again."
                ) from error

    @cached_property
    def _columns(self) -> Columns:
        keys = {"episode": "episode_index", "frame": "frame_index", "task": "task_index", "time": "timestamp"}
        vectors = self._vectors
        parts: dict[str, list[np.ndarray]] = {name: [] for name in ("state", "action", *vectors, *keys)}
        for path in dict.fromkeys(files.data for files in self._meta.files):
            table = read_parquet(path, [*keys.values(), *vectors.values()])
            for name, key in keys.items():
                parts[name].append(table[key].to_numpy())
            for name, key in vectors.items():
                parts[name].append(self._vector(table, key, path))
            for name in {"action", "state"} - vectors.keys():
                parts[name].append(np.zeros((len(table), 0), np.float32))
        joined = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        order = np.lexsort((joined["frame"], joined["episode"]))
        if not np.array_equal(order, np.arange(len(order))):
            joined = {name: array[order] for name, array in joined.items()}
        self._check_rows(joined)
        whole = {name: joined[name].astype(np.int64, copy=False) for name in ("episode", "frame", "task")}
        return Columns(joined["state"], joined["action"], joined.get("executed", joined["action"]), **whole)

    @property
    def _vectors(self) -> dict[str, str]:
        """Feature keys of the vectors that the data set has, by name in ``Columns``."""
        keys = {"action": self.action_key, "executed": self.executed_key, "state": self.state_key}
        return {name: key for name, key in keys.items() if key}

    def _vector(self, table: pa.Table, key: str, path: Path) -> np.ndarray:
        """One vector column as float32 (rows, width), refusing rows whose length differs from the declared one."""
        declared = int(np.prod(self.features[key]["shape"]))
        column = table[key].combine_chunks()
        nested = pa.types.is_fixed_size_list(column.type)
        if nested:
            widths = np.full(len(column), column.type.list_size)
        elif pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            nested, widths = True, np.diff(column.offsets.to_numpy())
        else:
            widths = np.ones(len(column), np.int64)
        wrong = np.flatnonzero(widths != declared)
        if len(wrong) or column.null_count:
            row = int(wrong[0]) if len(wrong) else int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            found = "nothing" if not column[row].is_valid else f"{widths[row]} numbers"
            raise DataError(
                f"Episode {table['episode_index'][row].as_py()} of {self.root}: '{key}' holds {found} at frame "
                f"{table['frame_index'][row].as_py()} ({path.relative_to(self.root)}), but meta/info.json declares {declared}. "
                f"Correct the shape there, or record the episode again."
            )
        values = (column.flatten() if nested else column).to_numpy(zero_copy_only=False)
        return np.ascontiguousarray(values.reshape(-1, declared), np.float32)

    def _check_rows(self, rows: Mapping[str, np.ndarray]) -> None:
        lengths = np.array([e.length for e in self.episodes])
        known = rows["episode"][(rows["episode"] >= 0) & (rows["episode"] < len(lengths))]
        counts = np.bincount(known, minlength=len(lengths))
        if len(known) != len(rows["episode"]):
            raise DataError(
                f"{self.root}/data holds rows of an episode that meta does not describe. Copy the meta folder again."
            )
        for i in np.flatnonzero(counts != lengths)[:1]:
            raise DataError(
                f"Episode {i} of {self.root} has {lengths[i]} frames according to meta, but {self._data_path(i)} holds "
                f"{counts[i]} rows of it. Copy the file again, or record the episode again."
            )
        starts = np.repeat([e.start for e in self.episodes], lengths)
        self._refuse(rows, rows["frame"] != np.arange(len(starts)) - starts, "frame_index", "does not count 0, 1, 2, ...")
        self._refuse(rows, (rows["task"] < 0) | (rows["task"] >= len(self.tasks)), "task_index", "names no task in meta")
        self._check_tasks(rows)
        # float32 seconds: half a unit in the last place exceeds the tolerance after half an hour within one episode.
        off = np.abs(rows["time"].astype(np.float64) - rows["frame"] / self.fps)
        late = off >= TOLERANCE_S + np.abs(rows["time"]) * np.finfo(np.float32).eps
        self._refuse(rows, late, "timestamp", f"disagrees with fps = {self.fps:g} in meta/info.json")
        for name, key in self._vectors.items():
            bad = ~np.isfinite(rows[name])
            if bad.any():
                row, dimension = (int(i) for i in np.argwhere(bad)[0])
                raise DataError(
                    f"Episode {rows['episode'][row]} of {self.root} holds {rows[name][row, dimension]} in '{key}' at frame "
                    f"{rows['frame'][row]}, dimension {dimension} ('{self.dimension_names(name)[dimension]}') "
                    f"({self._data_path(int(rows['episode'][row]))}). Record the episode again."
                )

    def _check_tasks(self, rows: Mapping[str, np.ndarray]) -> None:
        """Every row's instruction must be one of its episode's."""
        for episode, task in np.unique(np.stack([rows["episode"], rows["task"]], axis=1), axis=0).astype(int).tolist():
            own, found = self.episodes[episode].tasks, self.tasks[task]
            if found not in own:
                row = int(np.argmax((rows["episode"] == episode) & (rows["task"] == task)))
                raise DataError(
                    f"Episode {episode} of {self.root}: 'task_index' is {task} ('{found}') at frame {rows['frame'][row]} "
                    f"({self._data_path(episode)}), but meta gives the episode the task "
                    f"{' or '.join(repr(one) for one in own)}. Correct the one that is wrong."
                )

    def _refuse(self, rows: Mapping[str, np.ndarray], bad: np.ndarray, column: str, what: str) -> None:
        if bad.any():
            row = int(np.argmax(bad))
            values = {"frame_index": "frame", "task_index": "task", "timestamp": "time"}
            raise DataError(
                f"Episode {rows['episode'][row]} of {self.root}: '{column}' is {rows[values[column]][row]:g} at frame "
                f"{row - self.episodes[int(rows['episode'][row])].start} ({self._data_path(int(rows['episode'][row]))}), which "
                f"{what}. Fix the column, or record the episode again."
            )

    def _data_path(self, episode: int) -> Path:
        return self._meta.files[episode].data.relative_to(self.root)

    def _require_vector(self, key: str) -> None:
        if key not in self.features:
            raise DataError(f"{self.root} has no feature '{key}' in meta/info.json; {nearest(key, self.features)}")
        if len(self.features[key]["shape"]) != 1:
            raise DataError(
                f"'{key}' of {self.root} must be one vector per frame, but has shape {self.features[key]['shape']}."
            )

    def _require_spec(self, spec: ActionSpec) -> None:
        declared = int(self.features[self.action_key]["shape"][0]) if self.action_key else 0
        if spec.dim != declared:
            raise SpecError(
                f"The actions of {self.root} have {declared} numbers, but its action spec describes {spec.dim}. State a "
                f"spec with one dimension per number."
            )
        if abs(spec.rate_hz - self.fps) > 1e-6 * self.fps:
            raise SpecError(
                f"{self.root} runs at {self.fps:g} fps, but its action spec states {spec.rate_hz:g} actions per second. "
                f"The two must be equal."
            )

    def _episode(self, episode: int) -> Episode:
        if not 0 <= episode < len(self.episodes):
            raise SpecError(f"{self.root} has no episode {episode}; it has 0 to {len(self.episodes) - 1}.")
        return self.episodes[episode]

    def _view_key(self, view: str) -> str:
        if view not in self.views:
            hint = nearest(view, self.views) if self.views else "it has no camera at all."
            raise SpecError(f"{self.root} has no view '{view}'; {hint}")
        return self.views[view]


def _is_camera(feature: Mapping[str, Any]) -> bool:
    info = feature.get("info") or feature.get("video_info") or {}
    depth = info.get("is_depth_map") or info.get("video.is_depth_map")
    return feature["dtype"] in ("video", "image") and not depth


def _read_cells(path: Path, key: str, episode: int) -> list[Any]:
    """The cells of one column for one episode, by frame, wherever its rows lie; one row group is in memory at a time."""
    places = read_parquet(path, ["episode_index", "frame_index"])
    rows = np.flatnonzero(places["episode_index"].to_numpy() == episode)
    rows = rows[np.argsort(places["frame_index"].to_numpy()[rows], kind="stable")]
    cells: list[Any] = [None] * len(rows)
    try:
        file = pq.ParquetFile(path)
        if key not in file.schema_arrow.names:
            raise DataError(f"{path} has no column '{key}'. Copy or record the file again.")
        sizes = np.array([file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)], np.int64)
        ends = np.cumsum(sizes)
        groups = np.searchsorted(ends, rows, side="right")
        for group in np.unique(groups):
            column = file.read_row_group(int(group), columns=[key])[key]
            start = int(ends[group] - sizes[group])
            for place in np.flatnonzero(groups == group):
                cells[place] = column[int(rows[place]) - start].as_py()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged or cut off ({str(error).splitlines()[0]}). Copy or record it again.") from error
    return cells
