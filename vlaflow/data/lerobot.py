"""Reading a LeRobot data set, v2.0 to v3.0, without LeRobot: numeric columns at once, frames one episode at a time.

    dataset = Dataset.open("runs/demo/dataset")
    columns = dataset.columns()              # state (N, S), action (N, D), ...
    images = dataset.frames(3, "corner2")    # (T, H, W, 3) uint8

Opening reads the meta folder and the first picture of every camera. ``columns`` reads and checks every row, ``frames`` decodes
and checks one video. Damaged data is refused with an error that names file and episode; what is left out or read otherwise than
meta says is in ``notes`` and ``row_notes``. For fast random access to frames see ``frames.FrameCache``, for batches
``windows.Windows``, for other names of columns and cameras ``reading.Reading``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlaflow.config import from_json
from vlaflow.data import features as of
from vlaflow.data.cameras import find_cameras, view_name
from vlaflow.data.hub import data_folder
from vlaflow.data.lerobot_meta import Episode, EpisodeFiles, Meta, missing_files, read_meta
from vlaflow.data.lerobot_rows import CheckedRows, Columns, Vector, read_rows
from vlaflow.data.reading import ACTION, Reading, choose_columns
from vlaflow.data.stored_images import read_image
from vlaflow.data.tables import POINTER, is_filled, is_pointer, read_cells, read_parquet, whole_numbers
from vlaflow.data.video import FrameDigest, VideoError, decode_frames
from vlaflow.data.video_offsets import largest_drift_s, rewrite
from vlaflow.errors import DataError, SpecError, nearest
from vlaflow.spec import ActionSpec, known_parts

__all__ = ["Columns", "Dataset", "Episode", "view_name"]

EXTRA_KEY = "x_vlaflow"
"""Our own block in meta/info.json; LeRobot ignores unknown keys with a warning."""

EXECUTED_KEY = "executed_action"
"""Column of the actions that the robot executed, where they differ from those to be learned. LeRobot trains on every column
whose name begins with "action", so this name does not."""

DEFAULT = Reading()


class Dataset:
    """A LeRobot data set on disk; see the module docstring for an example.

    Attributes:
        root: its folder.
        version: "v3.0", "v2.1" or "v2.0".
        fps: frames per second.
        robot_type: as in meta/info.json; empty where it states none.
        features: as in meta/info.json.
        views: view name to feature key, cameras only (depth maps are not colour images and are left out).
        state_keys, action_keys: feature keys, joined in order; empty where there is no 'observation.state' or, opened as video
            alone, no 'action'.
        executed_key: feature key of the executed actions; None if the data set does not record them separately.
        tasks: the instructions, in the order of their numbers.
        episodes: one ``Episode`` each, in the order of the rows; those without frames are left out.
        action_spec: what an action means, or None if neither the data set nor the caller states it.
        provenance: how the data set was created, as recorded by the writer.
        reading: how it was opened.
        notes: what the user should know about how it is read, one sentence each; see also ``row_notes``.
    """

    def __init__(
        self, meta: Meta, action_spec: ActionSpec | None = None, video: bool = False, reading: Reading = DEFAULT
    ) -> None:
        info = meta.info
        self._meta, self.reading = meta, reading
        self.root, self.version, self.fps = meta.root, str(info["codebase_version"]), float(info["fps"])
        self.robot_type = str(info.get("robot_type") or "")
        self.features: Mapping[str, Any] = info["features"]
        self.tasks, self.episodes = meta.tasks.words, meta.episodes
        self._place = {episode.index: place for place, episode in enumerate(meta.episodes)}
        cameras = find_cameras(self.root, self.features, reading, self._sample)
        self._require_videos(cameras.views)
        chosen = choose_columns(self.root, self.features, reading, video=video)
        self.views, self.action_keys, self.state_keys = dict(cameras.views), chosen.action, chosen.state
        self.notes: tuple[str, ...] = (*meta.notes, *cameras.notes, *chosen.notes)
        recorded = bool(self.action_keys) and not video and EXECUTED_KEY in self.features
        self.executed_key = EXECUTED_KEY if recorded else None
        if self.executed_key and (found := of.width(self.features[EXECUTED_KEY])) != self.dim("action"):
            raise DataError(
                f"'{EXECUTED_KEY}' of {self.root} has {found} numbers, 'action' has {self.dim('action')}. Rename the column, "
                "or record the data set again."
            )
        own = info.get(EXTRA_KEY) or {}
        stated = own.get("action_spec")
        self.provenance: Mapping[str, Any] = own.get("provenance") or {}
        action_spec = action_spec or reading.action_spec
        self.action_spec = action_spec
        if stated is not None:
            spec = from_json(ActionSpec, known_parts(stated), str(self.root / "meta/info.json"))
            if self.action_keys and self.action_keys != (ACTION,) and spec.dim != self.dim("action"):
                named = ",".join(self.action_keys)
                self.notes += (f"Its action spec describes {spec.dim} numbers of '{ACTION}', not '{named}'; it is not used.",)
            else:
                self.action_spec = spec
        if self.action_spec is not None and self.action_keys:
            self._require_spec(self.action_spec)
            if action_spec is not None:
                self.action_spec.require_match(action_spec, f"data set {self.root}", "the action spec passed to it")

    @classmethod
    def open(
        cls,
        root: Path | str,
        action_spec: ActionSpec | None = None,
        *,
        video: bool = False,
        reading: Reading | None = None,
    ) -> Dataset:
        """Open a data set; no row is read but for what its meta folder does not say.

        Args:
            root: the folder that holds meta/, data/ and videos/, or a name on the Hub (``hub.data_folder``).
            action_spec: what an action means, for data sets without an action spec.
            video: only the video is needed: a data set without actions can be opened too; its ``columns().action`` has
                shape (N, 0).
            reading: names of columns and cameras that are not LeRobot's, and the tolerance of its clock; None for LeRobot's.

        Raises:
            DataError: not a data set, unsupported version, files missing, meta contradicting itself.
            SpecError: the action spec does not fit the actions; a view that does not exist.
        """
        return cls(read_meta(data_folder(root)), action_spec, video, reading or DEFAULT)

    def with_spec(self, action_spec: ActionSpec, *notes: str) -> Dataset:
        """The same data set, rows that were read included, whose actions mean this; with notes about it.

        Raises:
            SpecError: it does not fit the actions.
        """
        self._require_spec(action_spec)
        other = copy(self)
        other.action_spec, other.notes = action_spec, (*self.notes, *notes)
        return other

    def __len__(self) -> int:
        """Number of rows, N."""
        return self.episodes[-1].start + self.episodes[-1].length

    def __repr__(self) -> str:
        return f"Dataset({str(self.root)!r}, {self.version}, {len(self.episodes)} episodes, {len(self)} frames)"

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of all episodes, in the order of the rows."""
        return tuple(self._place)

    def episode(self, number: int) -> Episode:
        """The episode of this number.

        Raises:
            SpecError: there is none.
        """
        return self.episodes[self._at(number)]

    def episode_slice(self, number: int) -> slice:
        """The rows of one episode in ``columns()``."""
        found = self.episode(number)
        return slice(found.start, found.start + found.length)

    def image_size(self, view: str) -> tuple[int, int]:
        """Height and width of a view as stored."""
        return of.image_size(self.features[self._view_key(view)])

    def dim(self, name: str) -> int:
        """How many numbers "state", "action" or "executed" has; 0 where the data set does not have it."""
        return sum(of.width(self.features[key]) for key in self._keys(name))

    def dimension_names(self, name: str) -> tuple[str, ...]:
        """One name per dimension of "state", "action" or "executed"; "0", "1", ... if the data set gives none."""
        keys = self._keys(name)
        if len(keys) == 1:
            return of.dimension_names(self.features[keys[0]])
        return tuple(f"{key} {one}" for key in keys for one in of.dimension_names(self.features[key]))

    def chosen_views(self, views: Iterable[str]) -> dict[str, str]:
        """Feature keys of views whose names the caller chose (``Reading.views``); nothing where the data set itself gives them.

        Whatever is stored by the name of a view is stored for these keys.
        """
        return {view: self.views[view] for view in sorted(views)} if self.reading.views else {}

    def video_paths(self, number: int) -> dict[str, Path]:
        """The mp4 file that contains this episode, by feature key, for the cameras that are used."""
        videos, used = self._files(number).videos, set(self.views.values())
        return {key: path for key, (path, _) in videos.items() if key in used}

    @property
    def video_drift_s(self) -> float:
        """Largest distance between the stated start of an episode in its video and a frame, in seconds."""
        return largest_drift_s(self.fps, [one.videos for one in self._meta.files])

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of the content: meta and data files in full, of each video its size and its first and last 64 KiB.

        Reading whole videos would take as long as copying them; the two ends hold the frame index, which changes with
        every frame. Of a camera that is not used, the videos that are there count. Neither the location of the folder nor the
        time of writing matters.
        """
        digest = hashlib.blake2b(digest_size=16)
        data = sorted({files.data for files in self._meta.files})
        absent = self._meta.absent
        videos = sorted(
            {
                path
                for files in self._meta.files
                for key, (path, _) in files.videos.items()
                if key not in absent or path.is_file()
            }
        )
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
                that disagree with fps; a task that does not exist. Each error names file and episode.
        """
        return self._rows.columns

    @property
    def row_notes(self) -> tuple[str, ...]:
        """Where rows and meta disagree and the rows were believed, one sentence each; reads all rows as ``columns`` does."""
        return self._rows.notes

    def frames(self, number: int, view: str) -> np.ndarray:
        """All images of one episode, uint8 (T, H, W, 3), RGB.

        Raises:
            SpecError: no such view or episode.
            DataError: the video is damaged, too short, or runs at another rate.
        """
        height, width = self.image_size(view)
        images = np.empty((self.episode(number).length, height, width, 3), np.uint8)
        for i, image in enumerate(self.iter_frames(number, view)):
            images[i] = image
        return images

    def iter_frames(
        self, number: int, view: str, first: int = 0, count: int | None = None, *, digest: FrameDigest | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the images of one episode, uint8 (H, W, 3); raises as ``frames`` does.

        Args:
            number, view: as for ``frames``.
            first, count: only so many images from this one on; by default all.
            digest: counts in every frame of a video as it is stored.
        """
        key, found = self._view_key(view), self.episode(number)
        video = self.features[key]["dtype"] == "video"
        shape = (*self.image_size(view), 3)
        which = range(first, found.length if count is None else first + count)
        images = self._video(found, key, which, digest) if video else self._stored_images(found, key, which)
        for i, image in zip(which, images, strict=True):
            if image.shape != shape:
                cure = f"have the video's written: vlaflow data repair {self.root} --out DIR" if video else "record it again."
                raise DataError(
                    f"Episode {number} of {self.root}: frame {i} of '{key}' is {image.shape[0]}x{image.shape[1]}, but "
                    f"meta/info.json declares {shape[0]}x{shape[1]}. Correct the shape there, or {cure}"
                )
            yield image

    def _video(self, episode: Episode, key: str, which: range, digest: FrameDigest | None) -> Iterator[np.ndarray]:
        path, start_s = self._files(episode.index).videos[key]
        try:
            yield from decode_frames(
                path, start_s, len(which), self.fps, self.reading.tolerance_s, first=which.start, digest=digest
            )
        except VideoError as error:
            raise DataError(self._video_sentence(episode, key, path, start_s, error)) from error

    def _video_sentence(self, episode: Episode, key: str, path: Path, start_s: float, error: VideoError) -> str:
        which, where = f"Episode {episode.index} of {self.root}", path.relative_to(self.root)
        drop = f"vlaflow data drop {self.root} --episodes {episode.index} --out DIR"
        repair = f"vlaflow data repair {self.root} --out DIR"
        if error.kind == "start":
            cure = f"Correct 'videos/{key}/from_timestamp' in meta/episodes, {rewrite(self.root)}"
            if not self._meta.modern:
                cure = f"The video begins late: encode it again with its first frame at 0 s, or have that done: {repair}"
            return f"{which} begins at {start_s:.4f} s of video '{key}' ({where}), {error.detail}. {cure}"
        if error.kind == "rate":
            return (
                f"{which}: video '{key}' ({where}) runs at {error.detail}, but meta/info.json states fps = {self.fps:g}. "
                f"Correct fps there if the rows are at that rate too, or have frames taken by their number: {repair}"
            )
        if error.kind == "time":
            return (
                f"{which}: in video '{key}' ({where}) {error.detail}, so frames are missing or fps = {self.fps:g} in "
                f"meta/info.json is wrong. Correct fps, or have frames taken by their number: {repair}"
            )
        if error.kind == "unreadable" and is_pointer(path):
            return f"{which}: video '{key}' ({where}) {POINTER}"
        if error.kind == "unreadable":
            return (
                f"{which}: video '{key}' ({where}) cannot be decoded after {error.found} of {episode.length} frames "
                f"({error.detail}). Copy the file again, or leave the episode out: {drop}"
            )
        return (
            f"{which} has {episode.length} actions but video '{key}' holds {error.found} frames of it ({where}). "
            f"Copy the file again, or leave the episode out: {drop}"
        )

    def _stored_images(self, episode: Episode, key: str, which: range) -> Iterator[np.ndarray]:
        path, rows = self._stored_in(episode)
        if len(rows) != episode.length:
            raise DataError(
                f"Episode {episode.index} of {self.root} has {episode.length} actions but '{key}' holds {len(rows)} images "
                f"({path.relative_to(self.root)}). Copy the file again, or record the episode again."
            )
        for i, cell in zip(which, read_cells(path, key, rows[which.start : which.stop]), strict=True):
            try:
                yield read_image(cell, self.features[key], self.root, f"image {i} of '{key}' in episode {episode.index}")
            except (TypeError, ValueError, OSError) as error:
                raise DataError(
                    f"Episode {episode.index} of {self.root}: image {i} of '{key}' cannot be read "
                    f"({path.relative_to(self.root)}: {error}). Copy the file again, or record the episode again."
                ) from error

    def _stored_in(self, episode: Episode) -> tuple[Path, np.ndarray]:
        """The parquet file with an episode's rows, and their places in it, by frame."""
        named = self._files(episode.index).data
        others = sorted((self.root / "data").rglob("*.parquet")) if self._meta.modern else []
        for path in (named, *others):
            modern = self._meta.modern
            places = read_parquet(path, ["episode_index"] if modern else [], optional=("episode_index", "frame_index"))
            rows = np.arange(len(places))
            if is_filled(places, "episode_index"):
                own = np.flatnonzero(whole_numbers(places, "episode_index", path) == episode.index)
                rows = own if modern or len(own) else rows  # before v3.0 the file's number counts, as in ``columns``
            if len(rows) and is_filled(places, "frame_index"):
                frames = whole_numbers(places, "frame_index", path)[rows]
                order = np.argsort(frames, kind="stable")
                if np.array_equal(frames[order], np.arange(len(rows))):
                    rows = rows[order]
            if len(rows):
                return path, rows
        return named, np.zeros(0, np.int64)

    @cached_property
    def _rows(self) -> CheckedRows:
        vectors = {name: Vector(self._keys(name), self.dimension_names(name)) for name in ("action", "executed", "state")}
        if self.executed_key is None:
            del vectors["executed"]
        return read_rows(self._meta, vectors, self.reading.tolerance_s)

    def _keys(self, name: str) -> tuple[str, ...]:
        executed = (self.executed_key,) if self.executed_key else ()
        return {"action": self.action_keys, "executed": executed, "state": self.state_keys}[name]

    def _require_spec(self, spec: ActionSpec) -> None:
        if spec.dim != self.dim("action"):
            raise SpecError(
                f"The actions of {self.root} have {self.dim('action')} numbers, but its action spec describes {spec.dim}. "
                f"State a spec with one dimension per number."
            )
        if abs(spec.rate_hz - self.fps) > 1e-6 * self.fps:
            raise SpecError(
                f"{self.root} runs at {self.fps:g} fps, but its action spec states {spec.rate_hz:g} actions per second. "
                f"They must be equal: correct the one that is wrong, or have fps corrected by the timestamps: "
                f"vlaflow data repair {self.root} --out DIR"
            )

    def _at(self, number: int) -> int:
        if number not in self._place:
            most, gaps = self.episodes[-1].index, len(self.episodes) <= self.episodes[-1].index
            which = f"0 to {most}" + (", with gaps where episodes are empty or were removed" if gaps else "")
            raise SpecError(f"{self.root} has no episode {number}; it has {which}.")
        return self._place[number]

    def _files(self, number: int) -> EpisodeFiles:
        return self._meta.files[self._at(number)]

    def _sample(self, key: str) -> Path:
        """A file with pictures of a column."""
        first = self._meta.files[0]
        return first.videos[key][0] if key in first.videos else first.data

    def _require_videos(self, views: Mapping[str, str]) -> None:
        """Refuse cameras with missing files, and name those that have all of theirs."""
        absent = self._meta.absent
        needed = [need for key in views.values() for need in absent.get(key, {}).items()]
        if needed:
            said = missing_files(self.root, needed, len(self.episodes))
            others = " ".join(f"--view {name}" for name, key in views.items() if key not in absent)
            choose = f". To use only the cameras whose files are all here: {others}"
            raise DataError(f"{said.removesuffix('.')}{choose}" if others else said)

    def _view_key(self, view: str) -> str:
        if view not in self.views:
            hint = nearest(view, self.views) if self.views else "it has no camera at all."
            raise SpecError(f"{self.root} has no view '{view}'; {hint}")
        return self.views[view]
