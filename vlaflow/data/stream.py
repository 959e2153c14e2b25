"""Frames that are decoded when they are needed, by processes that run ahead, for data sets too large for a frame cache.

    stream = FrameStream(dataset, size=224, workers=8)
    images = stream.gather(np.array([0, 17, 4]))      # as FrameCache.gather: {"front": uint8 (3, 224, 224, 3)}

Any rows can be asked for, and the frames are those that a raw frame cache holds, to the bit. Fast are the rows that were
announced: a *run* is up to 512 neighbouring frames of one episode, which is decoded from its beginning to its end once,
by one process, and kept in memory until all of it that was announced has been gathered. ``nearby`` is the order of samples that
needs few runs at a time. Frames that were not announced are decoded one by one, as ``for_few`` does for those that validation
asks for again and again.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from threading import Lock
from typing import Self

import numpy as np
import torch
from torch import Tensor

from vlaflow.data import decoding
from vlaflow.data.codecs import Codec, Raw
from vlaflow.data.decoding import Opening
from vlaflow.data.lerobot import Dataset, Episode
from vlaflow.data.nearby import Nearby
from vlaflow.errors import DataError

RUN_BYTES, LONGEST = 16 * 2**20, 512
"""Bytes and frames of a run at most; at least eight frames."""
SPARE = 4
"""Runs that are kept after the last announced frame of theirs was gathered, because more of them may follow."""


class FrameStream:
    """See the module text.

    Args:
        dataset: an open data set.
        size, views, area: see ``FrameCache.open``.
        workers: processes that decode; None for one per core, at most eight.

    Attributes:
        shapes: (height, width) by view.
        codec: that of raw frames.
    """

    codec: Codec = Raw()

    def __init__(
        self,
        dataset: Dataset,
        size: int | None = None,
        views: Sequence[str] | None = None,
        *,
        area: int | None = None,
        workers: int | None = None,
    ) -> None:
        opening = Opening(dataset.root, dataset.reading, tuple(dataset.views if views is None else views), size, area)
        self._opening, self._workers, self._rows = opening, workers or min(8, os.cpu_count() or 1), len(dataset)
        self._here = decoding.EpisodeFrames(dataset, opening)
        self.shapes = self._here.shapes
        most = max(8, min(LONGEST, RUN_BYTES // max(1, sum(h * w * 3 for h, w in self.shapes.values()))))
        self._runs = [
            (episode, start, min(start + most, episode.length))
            for episode in dataset.episodes
            for start in range(0, episode.length, most)
        ]
        self._first = np.array([episode.start + start for episode, start, _ in self._runs], np.int64)
        self._due: Counter[int] = Counter()
        self._decoded: dict[int, Future[dict[str, np.ndarray]]] = {}
        self._lock = Lock()
        self._executor: Executor | None = None

    def __len__(self) -> int:
        """Number of rows, N."""
        return self._rows

    def nearby(self, rows: np.ndarray, offsets: Sequence[int] = (0,)) -> Nearby:
        """See ``frame_source.FrameSource``."""
        run_M = self._run_of(rows)
        bounds = np.concatenate(([0], np.flatnonzero(np.diff(run_M)) + 1, [len(rows)]))
        return Nearby(bounds, lambda indices: self.expect(np.concatenate([rows[indices] + offset for offset in offsets])))

    def for_few(self) -> KeptFrames:
        """The same frames, decoded one by one and kept in memory once they were gathered."""
        return KeptFrames(self)

    def expect(self, rows: np.ndarray) -> None:
        """Begin to decode the runs of these rows, each of which will be gathered soon."""
        with self._lock:
            for run, count in zip(*np.unique(self._run_of(rows), return_counts=True), strict=True):
                self._due[int(run)] += int(count)
                if int(run) not in self._decoded:
                    self._decoded[int(run)] = self._submit(*self._runs[run])

    def gather(self, rows: np.ndarray) -> dict[str, Tensor]:
        """The frames at these rows of ``Dataset.columns``: uint8 (B, H, W, 3) by view name.

        Raises:
            DataError: a damaged video, or a process that decodes has died.
        """
        if len(rows) and (rows.min() < 0 or rows.max() >= self._rows):
            raise IndexError(f"Rows must lie in 0 .. {self._rows - 1}, got {rows.min()} .. {rows.max()}.")
        images = {view: np.empty((len(rows), *shape, 3), np.uint8) for view, shape in self.shapes.items()}
        run_B = self._run_of(rows)
        needed = np.unique(run_B).tolist()
        with self._lock:
            announced = {run: self._decoded[run] for run in needed if run in self._decoded}
        for run in needed:
            place_S = np.flatnonzero(run_B == run)
            frame_S = rows[place_S] - self._first[run]
            if run in announced:
                with self._alive():
                    found = announced[run].result()
            else:
                episode, start, _ = self._runs[run]
                wanted, frame_S = np.unique(frame_S, return_inverse=True)
                found = self._here.decode(episode.index, (start + wanted).tolist())
            for view, image in images.items():
                image[place_S] = found[view][frame_S]
        with self._lock:
            for run in announced:
                self._due[run] -= int((run_B == run).sum())
            self._forget()
        return {view: torch.from_numpy(image) for view, image in images.items()}

    def _run_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first, rows, side="right") - 1

    def _submit(self, episode: Episode, start: int, stop: int) -> Future[dict[str, np.ndarray]]:
        if self._executor is None:
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self._workers, context, decoding.begin, (self._opening,))
        with self._alive():
            return self._executor.submit(decoding.decode, episode.index, range(start, stop))

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool as error:
            raise DataError(
                f"A process that decodes the videos of {self._opening.root} has died. The kernel ends processes when memory "
                'runs out: train from a frame cache, --frames jpeg. A script must train under `if __name__ == "__main__":`'
            ) from error

    def _forget(self) -> None:
        """Let go of the oldest runs of which nothing more is announced."""
        idle = [run for run in self._decoded if self._due[run] <= 0]
        for run in idle[: max(0, len(idle) - SPARE)]:
            del self._decoded[run]
            del self._due[run]


class KeptFrames:
    """Frames that are gathered again and again, such as those of validation: decoded once, then kept in memory.

    Args:
        frames: where they come from.

    Attributes:
        shapes: (height, width) by view.
        codec: of ``frames``.
    """

    def __init__(self, frames: FrameStream) -> None:
        self._frames, self.shapes, self.codec = frames, frames.shapes, frames.codec
        self._kept: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        """Number of rows, N."""
        return len(self._frames)

    def nearby(self, rows: np.ndarray, offsets: Sequence[int] = (0,)) -> Nearby:
        """See ``frame_source.FrameSource``."""
        return self._frames.nearby(rows, offsets)

    def for_few(self) -> Self:
        """These."""
        return self

    def gather(self, rows: np.ndarray) -> dict[str, Tensor]:
        """See ``FrameStream``."""
        new = np.array(sorted({*rows.tolist()} - self._kept.keys()), np.int64)
        if len(new):
            found = self._frames.gather(new)
            for place, row in enumerate(new.tolist()):
                self._kept[row] = {view: images[place].clone() for view, images in found.items()}
        return {view: torch.stack([self._kept[row][view] for row in rows.tolist()]) for view in self.shapes}
