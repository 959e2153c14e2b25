"""Where training gets frames from: a raw frame cache, one of JPEGs, or the videos themselves.

    frames = open_frames("raw", dataset, size=96)
    images = frames.gather(np.array([0, 17, 4]))      # {"corner2": uint8 (3, 96, 96, 3)}

``frames`` and ``stream`` have the two implementations, ``codecs`` what distinguishes raw caches from JPEGs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from vlaflow.data.codecs import Codec, Jpeg, Raw
from vlaflow.data.frames import CacheBuilder, FrameCache
from vlaflow.data.lerobot import Dataset
from vlaflow.data.nearby import Nearby
from vlaflow.data.stream import FrameStream
from vlaflow.progress import counting

FrameStorage = Literal["raw", "jpeg", "stream"]

CODECS: Mapping[str, Codec] = {"raw": Raw(), "jpeg": Jpeg()}


class FrameSource(Protocol):
    """Every frame of a data set by row, at the size that a policy reads."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """(height, width) by view."""

    @property
    def codec(self) -> Codec:
        """What the frames went through: those of one data set with equal codecs and shapes are equal to the bit."""

    def __len__(self) -> int:
        """Number of rows, N."""

    def gather(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Copies of the frames at these rows of ``Dataset.columns``: uint8 (B, H, W, 3) by view name."""

    def nearby(self, rows: np.ndarray, offsets: Sequence[int] = (0,)) -> Nearby | None:
        """The order in which samples are to be read; None if any order is as good.

        Args:
            rows: the row at which each sample begins, ascending within episodes.
            offsets: of a sample's frames from its row.
        """

    def for_few(self) -> FrameSource:
        """The same frames for a few rows, which are gathered again and again."""


def open_frames(
    storage: FrameStorage,
    dataset: Dataset,
    size: int | None = None,
    views: Sequence[str] | None = None,
    *,
    area: int | None = None,
) -> FrameSource:
    """A data set's frames; a cache that is not complete is built first, with progress on standard error.

    Args:
        storage: where from.
        dataset, size, views, area: see ``FrameCache.open``.

    Raises:
        SpecError, DataError: see ``FrameCache.open``.
    """
    if storage == "stream":
        return FrameStream(dataset, size, views, area=area)
    with counting("Decoding episodes") as report:
        return FrameCache.open(dataset, size, views, progress=report, area=area, codec=CODECS[storage])


def open_few_frames(
    dataset: Dataset, size: int | None = None, views: Sequence[str] | None = None, *, area: int | None = None
) -> FrameSource:
    """The frames of a complete raw cache, or else decoded one by one, for uses that need few of them.

    Args:
        dataset, size, views, area: see ``FrameCache.open``.
    """
    builder = CacheBuilder(dataset, size, views, area=area)
    if builder.store.missing():
        return FrameStream(dataset, size, views, area=area).for_few()
    return FrameCache(builder.store, len(dataset), builder.shapes, CODECS["raw"])
