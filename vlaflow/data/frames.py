"""Frames decoded once into memory-mapped files, because decoding at random costs a hundred times as much as a copy.

    cache = FrameCache.open(dataset, size=96)
    images = cache.gather(np.array([0, 17, 4]))      # {"corner2": uint8 (3, 96, 96, 3)}

One file per view, (N, H, W, 3), in ``<root>/.cache/frames-<key>/`` or ``$VLAFLOW_CACHE/frames-<key>/``. The key hashes the
data set's content, the size and the layout, so a changed data set gets a new cache and an old one is never read by mistake.
``resize`` is public because a policy must resize the images of the robot in exactly the same way.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlaflow.data.lerobot import Dataset
from vlaflow.errors import DataError, SpecError
from vlaflow.outputs import allocate, claim

logger = logging.getLogger("vlaflow.data")

LAYOUT = 1
"""Version of the cache format; increment it when the files or the output of ``resize`` change."""


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resize to size x size with a box filter; an image that is not square is padded with black bars.

    Args:
        image: uint8 (H, W, 3).
        size: side of the result in pixels.

    Returns:
        uint8 (size, size, 3); the image itself if it already has that size.
    """
    from PIL import Image

    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    scale = size / max(height, width)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(Image.fromarray(image).resize(inner, Image.Resampling.BOX))
    if small.shape[:2] == (size, size):
        return small
    canvas = np.zeros((size, size, 3), np.uint8)
    top, left = (size - small.shape[0]) // 2, (size - small.shape[1]) // 2
    canvas[top : top + small.shape[0], left : left + small.shape[1]] = small
    return canvas


def cache_home(root: Path) -> Path:
    """Folder for everything derived from the data in ``root``: ``$VLAFLOW_CACHE``, or ``.cache`` within it."""
    return Path(os.environ["VLAFLOW_CACHE"]) if os.environ.get("VLAFLOW_CACHE") else root / ".cache"


class FrameCache:
    """Every frame of a data set at training resolution, by row.

    Attributes:
        folder: location of the cache.
        views: the view names.
        shapes: (height, width) by view.
    """

    def __init__(self, folder: Path, rows: int, shapes: Mapping[str, tuple[int, int]]) -> None:
        self.folder, self.shapes, self.views = folder, dict(shapes), tuple(shapes)
        self._rows = rows
        # "c": private pages, so torch may hold the memory without being able to change the file.
        self._arrays = {v: np.memmap(folder / f"{v}.u8", np.uint8, "c", shape=(rows, *s, 3)) for v, s in shapes.items()}

    @classmethod
    def open(
        cls,
        dataset: Dataset,
        size: int | None = None,
        views: Sequence[str] | None = None,
        workers: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> FrameCache:
        """Open the cache of this data set, and build it first if it does not exist.

        Two processes may call this at once: one builds, the other waits for it. A process that is killed while building
        leaves nothing behind that could be mistaken for a cache.

        Args:
            dataset: an open data set.
            size: side in pixels of every view (see ``resize``); None keeps each view as stored.
            views: view names; all of them if None.
            workers: decoding threads; None for one per core, at most eight.
            progress: called with (episodes done, total episodes) while building.

        Raises:
            SpecError: no such view.
            DataError: a damaged video, no space left, or no permission to write the cache.
        """
        if size is not None and size < 1:
            raise SpecError(f"The frame size must be at least one pixel, got {size}.")
        chosen = list(dataset.views) if views is None else list(views)
        shapes = {view: (size, size) if size else dataset.image_size(view) for view in chosen}
        what = json.dumps([LAYOUT, dataset.fingerprint, list(shapes.items())])
        key = hashlib.blake2b(what.encode(), digest_size=8).hexdigest()

        def build(partial: Path) -> None:
            _build(dataset, partial, shapes, size=size, workers=workers, progress=progress)

        rows = len(dataset)
        folder = build_once(dataset.root, f"frames-{key}", sum(rows * h * w * 3 for h, w in shapes.values()), build)
        return cls(folder, rows, shapes)

    def __len__(self) -> int:
        """Number of rows, N."""
        return self._rows

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        return sum(array.nbytes for array in self._arrays.values())

    def gather(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Copy the frames at these rows of ``Dataset.columns``: uint8 (B, H, W, 3) by view name."""
        if len(rows) and (rows.min() < 0 or rows.max() >= self._rows):
            raise IndexError(f"Rows must lie in 0 .. {self._rows - 1}, got {rows.min()} .. {rows.max()}.")
        return {view: torch.from_numpy(np.take(array, rows, axis=0)) for view, array in self._arrays.items()}


def build_once(root: Path, name: str, nbytes: int, build: Callable[[Path], None]) -> Path:
    """Build a folder of derived data unless it exists; any number of processes find it complete or not at all.

    Args:
        root: the data set's folder; the result lies in its ``.cache``, or in ``$VLAFLOW_CACHE``.
        name: of the folder; it must encode everything that determines the content.
        nbytes: size of what will be written.
        build: fills the empty folder that is passed to it.

    Raises:
        DataError: no space left, or no permission to write there.
    """
    home = cache_home(root)
    folder = home / name
    if folder.is_dir():
        return folder
    try:
        home.mkdir(parents=True, exist_ok=True)
        with locked(home / f".{name}.lock"):
            if not folder.is_dir():
                _build_whole(root, folder, nbytes, build)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _too_large(root, home, nbytes) from error
        raise DataError(
            f"The frame cache cannot be written to {home} ({error.strerror}). Set VLAFLOW_CACHE to a writable folder."
        ) from error
    return folder


def allocated(file: Path, shape: Sequence[int]) -> np.memmap:
    """Create a file of zeros and map it as a writable uint8 array.

    Its space is allocated at once: with a sparse file, a full disk would kill the process later (SIGBUS).

    Raises:
        OSError: no space left.
    """
    allocate(file, math.prod(shape))
    return np.memmap(file, np.uint8, "r+", shape=tuple(shape))


def _too_large(root: Path, home: Path, nbytes: int) -> DataError:
    free = shutil.disk_usage(home).free
    return DataError(
        f"The frame cache of {root} needs {nbytes / 1e9:.1f} GB, but {home} has {free / 1e9:.1f} GB left. "
        f"Choose a smaller size, or set VLAFLOW_CACHE to a larger disk."
    )


def _build_whole(root: Path, folder: Path, nbytes: int, build: Callable[[Path], None]) -> None:
    """Build in a folder with a temporary name, then rename it; the caller holds the lock."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process: the lock excludes other writers
    if nbytes > shutil.disk_usage(folder.parent).free:
        raise _too_large(root, folder.parent, nbytes)
    partial.mkdir()
    try:
        build(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, which the kernel releases whenever the process ends."""
    with path.open("w") as file:
        try:
            claim(file.fileno())
        except OSError as error:  # a network folder without locks
            logger.warning("%s cannot be locked (%s); do not start a second process that needs it now.", path, error.strerror)
        yield


def _build(
    dataset: Dataset,
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    size: int | None,
    workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Decode all frames into ``folder``."""
    rows = len(dataset)
    arrays = {v: allocated(folder / f"{v}.u8", (rows, *s, 3)) for v, s in shapes.items()}

    def fill(episode: int) -> None:
        first = dataset.episode(episode).start
        for view, array in arrays.items():
            for i, image in enumerate(dataset.iter_frames(episode, view)):
                array[first + i] = resize(image, size) if size else image

    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(fill, episode.index) for episode in dataset.episodes]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                if progress:
                    progress(done, len(futures))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    for array in arrays.values():
        array.flush()
