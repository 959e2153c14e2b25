"""Frames decoded once into memory-mapped files, because decoding at random costs a hundred times as much as a copy.

    cache = FrameCache.open(dataset, size=96)
    images = cache.gather(np.array([0, 17, 4]))      # {"corner2": uint8 (3, 96, 96, 3)}

The frames lie in ``blocks`` of whole episodes, raw or as JPEGs (``codecs``), in ``<root>/.cache/frames-<key>/`` or
``$VLAFLOW_CACHE/frames-<key>/``. The key hashes the data set's content, cameras, sizes, codec and layout, so a changed data
set gets a new cache and an old one is never read by mistake. Each block is written whole or not at all, so building can be
interrupted and continued, and shared by machines: ``CacheBuilder.build(share=(0, 4))`` writes every fourth block.
``open_frames`` of ``frame_source`` chooses between the caches and ``stream``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Self

import numpy as np
import torch
from torch import Tensor

from vlaflow.data.blocks import SUFFIX, BlockFile, BlockStore, Frame, cut
from vlaflow.data.codecs import Codec, Raw
from vlaflow.data.lerobot import Dataset
from vlaflow.data.nearby import Nearby
from vlaflow.data.resize import fitted, resize
from vlaflow.errors import DataError, SpecError, StorageError
from vlaflow.outputs import claim

logger = logging.getLogger("vlaflow.data")

LAYOUT = 2
"""Version of the cache format; increment it when the files or the output of ``resize`` change."""

RAW = Raw()

Progress = Callable[[int, int], None]


def cache_home(root: Path) -> Path:
    """Folder for everything derived from the data in ``root``: ``$VLAFLOW_CACHE``, or ``.cache`` within it."""
    return Path(os.environ["VLAFLOW_CACHE"]) if os.environ.get("VLAFLOW_CACHE") else root / ".cache"


class FrameCache:
    """Every frame of a data set at training resolution, by row.

    Args:
        store: the blocks, all of which exist.
        rows: number of rows, N.
        shapes: (height, width) by view.
        codec: what the frames' bytes mean.

    Attributes:
        folder: location of the cache.
        shapes, codec: as given.
        views: the view names.
    """

    def __init__(self, store: BlockStore, rows: int, shapes: Mapping[str, tuple[int, int]], codec: Codec) -> None:
        self.folder, self.shapes, self.views, self.codec = store.folder, dict(shapes), tuple(shapes), codec
        self._store, self._rows = store, rows

    @classmethod
    def open(
        cls,
        dataset: Dataset,
        size: int | None = None,
        views: Sequence[str] | None = None,
        workers: int | None = None,
        progress: Progress | None = None,
        *,
        area: int | None = None,
        codec: Codec = RAW,
    ) -> FrameCache:
        """Open the cache of this data set, and build what is missing of it first.

        Two processes may call this at once: one builds, the other waits for it. A process that is killed while building
        leaves whole blocks, which the next one keeps.

        Args:
            dataset: an open data set.
            size: side in pixels of every view (see ``resize``); None keeps each view's shape.
            views: view names; all of them if None.
            workers: decoding threads; None for one per core, at most eight.
            progress: called with (episodes done, total episodes) while building.
            area: without ``size``, most pixels of a view.
            codec: how frames are stored.

        Raises:
            SpecError: no such view.
            DataError: a damaged video, no space left, or no permission to write the cache.
        """
        builder = CacheBuilder(dataset, size, views, area=area, codec=codec)
        if builder.store.missing():
            with building(dataset.root, builder.store.folder):
                builder.build(workers, progress)
        return cls(builder.store, len(dataset), builder.shapes, codec)

    def __len__(self) -> int:
        """Number of rows, N."""
        return self._rows

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        return self._store.nbytes

    def gather(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Copy the frames at these rows of ``Dataset.columns``: uint8 (B, H, W, 3) by view name.

        Raises:
            DataError: a damaged block.
        """
        if len(rows) and (rows.min() < 0 or rows.max() >= self._rows):
            raise IndexError(f"Rows must lie in 0 .. {self._rows - 1}, got {rows.min()} .. {rows.max()}.")
        images = {}
        for view, shape in self.shapes.items():
            image_BHWC = np.empty((len(rows), *shape, 3), np.uint8)
            self.codec.decode(self._store.read(view, rows), image_BHWC)
            images[view] = torch.from_numpy(image_BHWC)
        return images

    def nearby(self, rows: np.ndarray, offsets: Sequence[int] = (0,)) -> Nearby | None:
        """See ``frame_source.FrameSource``: a cache is read in any order."""
        return None

    def for_few(self) -> Self:
        """See ``frame_source.FrameSource``."""
        return self


class CacheBuilder:
    """What a cache of a data set consists of, and how its blocks are made.

    Args:
        dataset, size, views, area, codec: see ``FrameCache.open``.

    Attributes:
        shapes: (height, width) by view.
        store: the blocks, whether they exist or not.

    Raises:
        SpecError: no such view, or a size that is none.
    """

    def __init__(
        self,
        dataset: Dataset,
        size: int | None = None,
        views: Sequence[str] | None = None,
        *,
        area: int | None = None,
        codec: Codec = RAW,
    ) -> None:
        if min(1 if size is None else size, 1 if area is None else area) < 1:
            raise SpecError(f"The frame size must be at least one pixel, got {size if size is not None else area}.")
        self._dataset, self._size, self._area, self._codec = dataset, size, area, codec
        chosen = dataset.views if views is None else views
        self.shapes = {view: fitted(*dataset.image_size(view), size, area) for view in chosen}
        what = [LAYOUT, dataset.fingerprint, sorted(self.shapes.items()), codec.key]
        if columns := dataset.chosen_views(self.shapes):  # the same name may mean another camera the next time
            what.append(columns)
        key = hashlib.blake2b(json.dumps(what).encode(), digest_size=8).hexdigest()
        self._row_bytes = codec.estimate(sum(h * w for h, w in self.shapes.values()))
        self._slices = cut([episode.length * self._row_bytes for episode in dataset.episodes])
        starts = [*(dataset.episodes[s.start].start for s in self._slices), len(dataset)]
        folder = cache_home(dataset.root) / f"frames-{key}"
        self.store = BlockStore(folder, starts, sorted(self.shapes), {"data": dataset.fingerprint})

    def build(self, workers: int | None = None, progress: Progress | None = None, share: tuple[int, int] = (0, 1)) -> None:
        """Write the missing blocks, or every n-th of all blocks.

        Args:
            workers: decoding threads; None for one per core, at most eight.
            progress: called with (episodes done, total episodes).
            share: which of how many shares, counted from 0; different ones may be built at the same time, anywhere.

        Raises:
            DataError: a damaged video, no space left, or no permission to write.
        """
        first, step = share
        mine, missing = range(first, len(self.store), step), set(self.store.missing())
        todo = [number for number in mine if number in missing]
        episodes = {number: self._slices[number].stop - self._slices[number].start for number in mine}
        total, done, lock = sum(episodes.values()), sum(episodes[number] for number in mine if number not in missing), Lock()

        def advance(count: int = 1) -> None:
            nonlocal done
            with lock:
                done += count
                if progress:
                    progress(done, total)

        def fill(number: int) -> None:
            if self.store.file(number).exists():  # another process was faster
                advance(episodes[number])
            else:
                self.store.write(number, self._frames(number, advance))

        nbytes = self._row_bytes * sum(map(self._rows, todo))
        pool = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1))
        with writing(self._dataset.root, self.store.folder, nbytes), pool:
            futures = [pool.submit(fill, number) for number in todo]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _rows(self, number: int) -> int:
        return sum(episode.length for episode in self._dataset.episodes[self._slices[number]])

    def _frames(self, number: int, advance: Callable[[], None]) -> Iterator[Frame]:
        """The encoded frames of one block."""
        episodes = self._dataset.episodes[self._slices[number]]
        for episode in episodes:
            for place, view in enumerate(self.store.views):
                for i, image in enumerate(self._dataset.iter_frames(episode.index, view)):
                    small = resize(image, self._size, self._area)
                    yield place, episode.start - episodes[0].start + i, self._codec.encode(small)
            advance()


@contextlib.contextmanager
def building(root: Path, folder: Path) -> Iterator[None]:
    """Hold the lock of a cache, so that of several processes one builds it and the others wait.

    Raises:
        DataError: it cannot be written there.
    """
    with contextlib.ExitStack() as held:
        with _refusals(root, folder, 0):
            folder.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder.parent / f".{folder.name}.lock"))
        yield


@contextlib.contextmanager
def writing(root: Path, folder: Path, nbytes: int) -> Iterator[None]:
    """Create the folder of a cache and turn errors of the disk into sentences; an empty one is removed after an error.

    Args:
        root: folder of the data that it is derived from.
        folder: of the cache.
        nbytes: about how much will be written.

    Raises:
        DataError: no space left, or no permission to write there.
    """
    with _refusals(root, folder, nbytes):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if nbytes > shutil.disk_usage(folder).free:
                raise _too_large(root, folder.parent, nbytes)
            yield
        finally:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


@contextlib.contextmanager
def _refusals(root: Path, folder: Path, nbytes: int) -> Iterator[None]:
    home = folder.parent
    try:
        yield
    except (OSError, StorageError) as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _too_large(root, home, nbytes) from error
        raise DataError(
            f"The frame cache cannot be written to {home} ({error.strerror}). Set VLAFLOW_CACHE to a writable folder."
        ) from error


def _too_large(root: Path, home: Path, nbytes: int) -> DataError:
    free = shutil.disk_usage(home).free
    return DataError(
        f"The frame cache of {root} needs {nbytes / 1e9:.1f} GB, but {home} has {free / 1e9:.1f} GB left. Choose a smaller "
        "size, or JPEGs, or set VLAFLOW_CACHE to a larger disk. Whole blocks are kept."
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, which the kernel releases whenever the process ends."""
    with path.open("w") as file:
        try:
            claim(file.fileno())
        except OSError as error:  # a network folder without locks
            logger.warning("%s cannot be locked (%s); processes that need it now may each do the work.", path, error.strerror)
        yield


def damaged_blocks(dataset: Dataset, progress: Progress | None = None) -> Iterator[str]:
    """Compare all checksums of all frame caches of a data set.

    Args:
        dataset: an open data set.
        progress: called with (blocks done, total blocks).

    Yields:
        A sentence about every damaged block, with its cure.
    """
    files = sorted(cache_home(dataset.root).glob(f"frames-*/*{SUFFIX}"))
    for done, file in enumerate(files, 1):
        try:
            block = BlockFile(file)
            if block.about.get("data") == dataset.fingerprint:
                block.check()
        except DataError as error:
            yield str(error)
        if progress:
            progress(done, len(files))
