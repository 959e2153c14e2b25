"""What a process that decodes video for a stream does: a run of frames of one episode, decoded forward and resized.

No torch here, so such a process starts in half a second.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np

from vlaflow.data.lerobot import Dataset
from vlaflow.data.reading import Reading
from vlaflow.data.resize import fitted, resize


@dataclass(frozen=True)
class Opening:
    """How another process opens the same frames.

    Args:
        root: folder of the data set.
        reading: how its columns and cameras are read.
        views: view names.
        size, area: see ``resize.resize``.
    """

    root: Path
    reading: Reading
    views: tuple[str, ...]
    size: int | None
    area: int | None


class EpisodeFrames:
    """Frames of a data set at the size that is wanted.

    Attributes:
        shapes: (height, width) by view.
    """

    def __init__(self, dataset: Dataset, opening: Opening) -> None:
        self._dataset, self._opening = dataset, opening
        self.shapes: Mapping[str, tuple[int, int]] = {
            view: fitted(*dataset.image_size(view), opening.size, opening.area) for view in opening.views
        }

    def decode(self, episode: int, wanted: Iterable[int]) -> dict[str, np.ndarray]:
        """Frames of an episode by number, ascending: uint8 (n, H, W, 3) by view.

        What lies between the first and the last is decoded too.
        """
        numbers = list(wanted)
        first, count = numbers[0], numbers[-1] + 1 - numbers[0]
        place = {number - first: i for i, number in enumerate(numbers)}
        found = {}
        for view, shape in self.shapes.items():
            images = np.empty((len(numbers), *shape, 3), np.uint8)
            for i, image in enumerate(self._dataset.iter_frames(episode, view, first, count)):
                if i in place:
                    images[place[i]] = resize(image, self._opening.size, self._opening.area)
            found[view] = images
        return found


_own: list[EpisodeFrames] = []
"""What this process decodes, if it is a worker."""


def begin(opening: Opening) -> None:
    """Prepare a worker process: it leaves Ctrl-C to its parent, and ends when the parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    _own.append(EpisodeFrames(Dataset.open(opening.root, video=True, reading=opening.reading), opening))


def decode(episode: int, wanted: Iterable[int]) -> dict[str, np.ndarray]:
    """``EpisodeFrames.decode`` in a worker process."""
    return _own[0].decode(episode, wanted)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
