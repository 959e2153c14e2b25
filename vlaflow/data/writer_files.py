"""The hidden folder in which a LeRobot v3.0 data set is written, file after file, and which is renamed when it is complete.

``writer`` fills it with recorded episodes, ``edit_write`` with episodes of other data sets. The tables of the meta folder are
in ``writer_meta``.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlaflow.data import writer_meta as meta
from vlaflow.data.hashes import FORMAT as HASHES_FORMAT
from vlaflow.data.hashes import HASHES
from vlaflow.data.pixel_counts import write_counts
from vlaflow.data.video import Joiner, Segment
from vlaflow.errors import DataError
from vlaflow.outputs import PartialOutput, write_json

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


@dataclass(frozen=True)
class Limits:
    """When a new file or folder begins; an episode never spans two files.

    Args:
        chunks_size: files per chunk folder.
        data_mb: megabytes of a parquet file.
        video_mb: megabytes of an mp4 file.
    """

    chunks_size: int = 1000
    data_mb: float = 100
    video_mb: float = 200


def require_free(root: Path) -> None:
    """Refuse a place where something is already.

    Raises:
        DataError: it is a file, or a folder that is not empty.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DataError(f"{root} exists already and is not empty. Choose another name, or remove it first.")


class NewFolder:
    """A folder next to ``root`` that gets its name on ``publish``; see ``outputs.PartialOutput``.

    Args:
        root: where the data set will be; must not exist, or be an empty folder.
        fps: frames per second of its videos.
        limits: sizes of its files.

    Raises:
        DataError: ``root`` is not empty.
    """

    def __init__(self, root: Path, fps: float, limits: Limits) -> None:
        require_free(root)
        self.root, self.fps, self.limits = root, fps, limits
        self.published = False
        self._table: pq.ParquetWriter | None = None
        self._table_file: Any = None
        self._table_number = -1
        self._joiners: dict[str, Joiner] = {}
        self._numbers: dict[str, int] = {}
        self._digests: dict[str, list[str]] = {}
        self._counts: dict[str, list[np.ndarray]] = {}
        root.parent.mkdir(parents=True, exist_ok=True)
        self._part = PartialOutput(root, folder=True)
        self.path = self._part.path
        self.scratch = self.path / "segments"

    def add_rows(self, table: pa.Table) -> dict[str, int]:
        """Append the rows of one episode as a row group; returns the pointers of its row in meta/episodes."""
        if self._table is None or self._table_file.tell() + table.nbytes > self.limits.data_mb * 1e6:
            self._open_table(table.schema)
        assert self._table is not None
        self._table.write_table(table, row_group_size=len(table))
        chunk, file = divmod(self._table_number, self.limits.chunks_size)
        return {"data/chunk_index": chunk, "data/file_index": file}

    def add_video(self, key: str, segment: Segment, *, same: bool = True) -> dict[str, Any]:
        """Append one episode of a camera; returns the pointers of its row in meta/episodes.

        Args:
            key: feature key of the camera.
            segment: the episode.
            same: whether another encoding than that of the episodes before is an error; otherwise a new file begins.

        Raises:
            SpecError: see ``Joiner.append``.
        """
        joiner = self._joiners.get(key)
        full = joiner is not None and joiner.bytes + segment.size > self.limits.video_mb * 1e6
        if joiner is None or full or not (same or joiner.fits(segment)):
            if joiner is not None:
                joiner.close()
            self._numbers[key] = self._numbers.get(key, -1) + 1
            joiner = self._joiners[key] = Joiner(self.path / self._place(VIDEO_PATH, self._numbers[key], key), self.fps)
        chunk, file = divmod(self._numbers[key], self.limits.chunks_size)
        start, end = joiner.append(segment)
        self._digests.setdefault(key, []).append(segment.digest)
        self._counts.setdefault(key, []).append(segment.histogram)
        where = {"chunk_index": chunk, "file_index": file, "from_timestamp": start, "to_timestamp": end}
        return {f"videos/{key}/{name}": value for name, value in where.items()}

    def publish(
        self,
        info: Mapping[str, Any],
        tasks: Sequence[str],
        episodes: Sequence[Mapping[str, Any]],
        stats: Mapping[str, Any],
    ) -> Path:
        """Write the meta folder, and rename the data set to its final name.

        Args:
            info: content of meta/info.json.
            tasks: the instructions, by task index.
            episodes: rows of meta/episodes.
            stats: content of meta/stats.json.

        Raises:
            DataError: ``root`` was created in the meantime.
        """
        self.close()
        write_json(self.path / "meta/stats.json", stats, indent=4, finite=True)
        meta.write_tasks(self.path / "meta/tasks.parquet", tasks)
        meta.write_episodes(self.path / "meta/episodes", episodes, self.limits.chunks_size)
        if digests := {key: each for key, each in self._digests.items() if all(each)}:
            write_json(self.path / HASHES, {"format": HASHES_FORMAT, "frames": digests}, indent=1)
        if counts := {key: each for key, each in self._counts.items() if all(one.any() for one in each)}:
            write_counts(self.path, counts)
        write_json(self.path / "meta/info.json", info, indent=4, finite=True)
        self.published = True
        try:
            self._part.publish()
        except OSError as error:
            raise DataError(
                f"The finished data set is in {self.path}, but could not be renamed to {self.root} ({error.strerror}). "
                f"Rename it by hand."
            ) from error
        return self.root

    def close(self) -> None:
        """Finish all files, and remove the scratch folder."""
        self._close_table()
        for joiner in self._joiners.values():
            joiner.close()
        self._joiners = {}
        shutil.rmtree(self.scratch, ignore_errors=True)

    def discard(self) -> None:
        """Delete everything written so far."""
        files: list[Any] = [self._table, self._table_file, *self._joiners.values()]
        for file in filter(None, files):
            with contextlib.suppress(Exception):  # closing flushes, which fails again on a full disk
                file.close()
        self._table, self._table_file, self._joiners = None, None, {}
        self._part.discard()

    def _open_table(self, schema: pa.Schema) -> None:
        self._close_table()
        self._table_number += 1
        path = self.path / self._place(DATA_PATH, self._table_number)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._table_file = path.open("wb")
        self._table = pq.ParquetWriter(self._table_file, schema, compression="snappy", write_page_checksum=True)

    def _close_table(self) -> None:
        if self._table is not None:
            self._table.close()
            self._table_file.close()
            self._table = None

    def _place(self, template: str, number: int, key: str = "") -> str:
        chunk, file = divmod(number, self.limits.chunks_size)
        return template.format(video_key=key, chunk_index=chunk, file_index=file)
