"""Writing a LeRobot v3.0 data set, for LeRobot 0.4 and newer, without LeRobot.

    with Writer("runs/demo/dataset", fps=20, action_spec=spec, state_names=("x", "y", "z", "gripper"),
                views={"corner2": (96, 96)}, robot_type="metaworld_sawyer", provenance={"seed": 0}) as writer:
        writer.add({"corner2": images}, state, action, "Push the puck to a goal")

The folder gets its final name only when it is complete. The same episodes in the same order give the same bytes, however many
processes encoded the videos: a recording worker calls ``video.encode_video`` and sends back the segment, which is joined
packet by packet; frames passed to ``add`` are encoded in the same way.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from vlaflow.config import to_json
from vlaflow.data import writer_meta as meta
from vlaflow.data.lerobot import EXTRA_KEY
from vlaflow.data.video import Segment, encode_video, read_segment, require_even
from vlaflow.data.writer_files import DATA_PATH, VIDEO_PATH, Limits, NewFolder
from vlaflow.errors import DataError, SpecError, nearest
from vlaflow.spec import ActionSpec

ARROW = {"float32": pa.float32(), "float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_()}
NUMPY = {"float32": np.float32, "float64": np.float64, "int64": np.int64, "bool": np.bool_}


class Writer:
    """Collects episodes into a hidden folder next to ``root`` and renames it on ``finalize``.

    What a killed process leaves (``.part-...-<name>``) is removed by the next one that writes to the same place.

    Args:
        root: where the data set will be; must not exist, or be an empty folder.
        fps: frames per second, equal to the action spec's rate.
        action_spec: what an action means; saved in meta/info.json.
        state_names: one name per number of the state; S of them.
        views: (height, width) by view name, both even.
        robot_type: LeRobot's name for the robot.
        provenance: JSON data on how the data was created; without times and paths, which would make it irreproducible.
        chunks_size: files per chunk folder.
        data_mb: megabytes after which a new parquet file begins; an episode never spans two files.
        video_mb: the same for mp4 files.

    Raises:
        DataError: ``root`` is not empty.
        SpecError: an odd image size, a view name with '/', a rate other than ``fps``, provenance that is not JSON.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        fps: float,
        action_spec: ActionSpec,
        state_names: Sequence[str],
        views: Mapping[str, tuple[int, int]],
        robot_type: str,
        provenance: Mapping[str, Any],
        chunks_size: int = 1000,
        data_mb: float = 100,
        video_mb: float = 200,
    ) -> None:
        self.root = Path(root)
        if abs(action_spec.rate_hz - fps) > 1e-6 * fps:
            raise SpecError(f"The action spec states {action_spec.rate_hz:g} actions per second, but fps is {fps:g}.")
        for view, (height, width) in views.items():
            require_even(height, width, view)
            if "/" in view:
                raise SpecError(f"The view name '{view}' contains a '/', which LeRobot does not allow in feature keys.")
        try:
            json.dumps(provenance, allow_nan=False)
        except (TypeError, ValueError) as error:  # better now than after an hour of recording
            raise SpecError(f"The provenance must be plain JSON data: {error}.") from error
        self.fps, self.action_spec, self.views = float(fps), action_spec, dict(views)
        self.state_names, self.robot_type, self.provenance = tuple(state_names), robot_type, dict(provenance)
        self._keys = {view: "observation.image" if view == "image" else f"observation.images.{view}" for view in views}
        self._features = self._declare()
        self._extra: dict[str, tuple[str, int]] = {}
        self._tasks: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []
        self._values: dict[str, list[np.ndarray]] = {}
        self._histograms = {view: np.zeros((3, 256), np.int64) for view in views}
        self._frames = 0
        self._folder = NewFolder(self.root, self.fps, Limits(chunks_size, data_mb, video_mb))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.finalize()
        except BaseException:
            if not self._folder.published:
                self.abort()
            raise

    def add(
        self,
        images: Mapping[str, np.ndarray] | None,
        state: np.ndarray,
        action: np.ndarray,
        task: str,
        extra: Mapping[str, np.ndarray] | None = None,
        *,
        videos: Mapping[str, Path | Segment] | None = None,
    ) -> int:
        """Append one episode of T frames; each view is passed either in ``images`` or in ``videos``.

        Args:
            images: by view, uint8 (T, H, W, 3), RGB.
            state: (T, S), the state before action t.
            action: (T, D), the action commanded at frame t.
            task: the instruction.
            extra: further columns by feature key, (T,) or (T, k), the same ones in every episode, e.g. "next.reward".
            videos: by view, an mp4 from ``encode_video``, as a path or a ``Segment`` (a path is decoded again to count
                frames and pixel values; a segment contains both counts).

        Returns:
            The episode's index.

        Raises:
            SpecError: naming shapes, views or values that do not fit.
            DataError: a video whose number of frames differs from the number of actions.
        """
        index = len(self._rows)
        vectors = self._vectors(index, state, action, task, extra or {})
        length = len(vectors["action"])
        segments = self._segments(index, length, images or {}, videos or {})
        row: dict[str, Any] = {"episode_index": index, "tasks": [task], "length": length}
        columns = self._columns(index, length, self._tasks.setdefault(task, len(self._tasks)), vectors)
        row |= self._folder.add_rows(_table(columns, length))
        row |= {"dataset_from_index": self._frames, "dataset_to_index": self._frames + length}
        stats = {}
        for view, segment in segments.items():
            row |= self._folder.add_video(self._keys[view], segment)
            self._histograms[view] += segment.histogram
            stats[self._keys[view]] = meta.image_stats(segment.histogram, length)
        for key, values in columns.items():
            self._values.setdefault(key, []).append(values)
            stats[key] = meta.vector_stats(values)
        self._rows.append(row | {f"stats/{key}/{name}": v for key, stat in stats.items() for name, v in stat.items()})
        self._frames += length
        shutil.rmtree(self._folder.scratch, ignore_errors=True)
        return index

    def finalize(self) -> Path:
        """Write the meta folder and rename the data set to its final name.

        Raises:
            DataError: no episode was added, or ``root`` was created in the meantime.
        """
        if not self._rows:
            self.abort()
            raise DataError(f"{self.root} was not written: no episode was added.")
        stats = {key: meta.vector_stats(np.concatenate(parts)) for key, parts in self._values.items()}
        stats |= {self._keys[view]: meta.image_stats(h, self._frames) for view, h in self._histograms.items()}
        return self._folder.publish(self._info(), list(self._tasks), self._rows, stats)

    def abort(self) -> None:
        """Delete everything written so far."""
        self._folder.discard()

    def _declare(self) -> dict[str, dict[str, Any]]:
        cameras = {self._keys[view]: meta.video_feature(h, w, self.fps) for view, (h, w) in self.views.items()}
        names = [d.name for d in self.action_spec.dimensions]
        return cameras | {
            "observation.state": {"dtype": "float32", "shape": [len(self.state_names)], "names": list(self.state_names)},
            "action": {"dtype": "float32", "shape": [len(names)], "names": names},
        }

    def _vectors(
        self, index: int, state: np.ndarray, action: np.ndarray, task: str, extra: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        if not task.strip():
            raise SpecError(f"Episode {index} has no task. State the instruction in words.")
        length = len(action)
        vectors = {"observation.state": np.asarray(state, np.float32), "action": np.asarray(action, np.float32)}
        for key, values in vectors.items():
            width = self._features[key]["shape"][0]
            if values.shape != (length, width) or not length:
                raise SpecError(f"Episode {index}: '{key}' must have shape ({length}, {width}), got {values.shape}.")
            if not np.isfinite(values).all():
                frame, dimension = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
                name = self._features[key]["names"][dimension]
                raise SpecError(f"Episode {index}: '{key}' is not finite at frame {frame}, dimension {dimension} ('{name}').")
        kinds = {}
        for key, column in extra.items():
            values = np.asarray(column)
            kind = {"f": "float32", "i": "int64", "u": "int64", "b": "bool"}.get(values.dtype.kind)
            kind = "float64" if values.dtype == np.float64 else kind
            if kind is None or values.ndim not in (1, 2) or len(values) != length or "/" in key:
                raise SpecError(
                    f"Episode {index}: the extra column '{key}' must be numbers of shape ({length},) or ({length}, k) and its "
                    f"name free of '/', got {values.dtype} {values.shape}."
                )
            if not np.isfinite(values).all():
                frame = int(np.argwhere(~np.isfinite(values))[0, 0])
                raise SpecError(f"Episode {index}: the extra column '{key}' is not finite at frame {frame}.")
            kinds[key] = (kind, 1 if values.ndim == 1 else values.shape[1])
            vectors[key] = values.astype(NUMPY[kind])
        if index and kinds != self._extra:
            raise SpecError(f"Episode {index} has the extra columns {kinds}, but the first episode has {self._extra}.")
        self._extra = kinds
        return vectors

    def _segments(
        self, index: int, length: int, images: Mapping[str, np.ndarray], videos: Mapping[str, Path | Segment]
    ) -> dict[str, Segment]:
        for view in (*images, *videos):
            if view not in self.views:
                raise SpecError(f"Episode {index} has the view '{view}', which was not declared; {nearest(view, self.views)}")
        segments: dict[str, Segment] = {}
        for view, size in self.views.items():
            if (view in images) == (view in videos):
                raise SpecError(f"Episode {index} must have the view '{view}' exactly once, as images or as a video.")
            if view in images:
                if images[view].shape != (length, *size, 3) or images[view].dtype != np.uint8:
                    raise SpecError(
                        f"Episode {index}: view '{view}' must be uint8 {(length, *size, 3)}, "
                        f"got {images[view].dtype} {images[view].shape}."
                    )
                self._folder.scratch.mkdir(exist_ok=True)
                segments[view] = encode_video(images[view], self._folder.scratch / f"{len(segments)}.mp4", self.fps)
            else:
                video = videos[view]
                segments[view] = video if isinstance(video, Segment) else read_segment(Path(video))
            if segments[view].count != length or segments[view].histogram[0].sum() != length * size[0] * size[1]:
                raise DataError(
                    f"Episode {index} has {length} actions of view '{view}' at {size[0]}x{size[1]}, but the video "
                    f"{segments[view].path} holds {segments[view].count} frames, or frames of another size. Encode it again."
                )
        return segments

    def _columns(self, index: int, length: int, task: int, vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        frame = np.arange(length, dtype=np.int64)
        return {
            **vectors,
            "timestamp": (frame / self.fps).astype(np.float32),
            "frame_index": frame,
            "episode_index": np.full(length, index, np.int64),
            "index": self._frames + frame,
            "task_index": np.full(length, task, np.int64),
        }

    def _info(self) -> dict[str, Any]:
        limits = self._folder.limits
        extra = {key: {"dtype": kind, "shape": [width], "names": None} for key, (kind, width) in self._extra.items()}
        return {
            "codebase_version": "v3.0",
            "fps": int(self.fps) if self.fps.is_integer() else self.fps,
            "features": self._features | extra | meta.DEFAULT_FEATURES,
            "total_episodes": len(self._rows),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": limits.chunks_size,
            "data_files_size_in_mb": limits.data_mb,
            "video_files_size_in_mb": limits.video_mb,
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self.views else None,
            "robot_type": self.robot_type,
            "splits": {"train": f"0:{len(self._rows)}"},
            EXTRA_KEY: {"action_spec": to_json(self.action_spec), "provenance": self.provenance},
        }


def _table(columns: Mapping[str, np.ndarray], length: int) -> pa.Table:
    """The rows of an episode; vectors of one number are plain numbers, as LeRobot has them."""
    arrays = {}
    for key, values in columns.items():
        flat = pa.array(values.reshape(-1), ARROW[values.dtype.name])
        width = values.size // length
        arrays[key] = flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
    return pa.table(arrays)
