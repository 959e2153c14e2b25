"""Cameras that recorded nothing: covered or off, which gives one colour, or frozen at one image.

Such episodes decode, and a policy would be trained on them without a word.

Shape letters: H, W image.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlaflow.text import spans

EVERY = 4
"""Of the pixels in a row and in a column, one of so many is looked at."""
SAME = 12
"""Most that encoding changes a pixel of an image that stays, of 255; an arm that moves changes some by more."""
ONE_COLOUR = 12
"""Most that the pixels of a covered camera differ in a channel, of 255."""
LEAST_S = 1.0
"""Shortest episode that can show that a camera is frozen, in seconds."""


@dataclass
class Pictured:
    """What the images of a camera show in one episode, as far as they were read.

    Attributes:
        frames: number of images.
        plain: every image has one colour.
        still: every image is like the first.
    """

    frames: int = 0
    plain: bool = True
    still: bool = True

    def watch(self, images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Pass images on, uint8 (H, W, 3), and look at each."""
        first_HW3: np.ndarray | None = None
        for image_HW3 in images:
            some_HW3 = image_HW3[::EVERY, ::EVERY].astype(np.int16)
            first_HW3 = some_HW3 if first_HW3 is None else first_HW3
            self.frames += 1
            self.plain = self.plain and int(np.ptp(some_HW3, axis=(0, 1)).max()) <= ONE_COLOUR
            self.still = self.still and int(np.abs(some_HW3 - first_HW3).max()) <= SAME
            yield image_HW3


def dead_cameras(pictured: Mapping[tuple[int, str], Pictured], views: Sequence[str], fps: float, root: Path) -> list[str]:
    """A sentence about every view that shows nothing in some episodes, with what to do.

    Args:
        pictured: by episode and view.
        views: of the data set.
        fps: frames per second.
        root: of the data set.
    """
    found = []
    for view in views:
        episodes = {number: what for (number, of), what in pictured.items() if of == view and what.frames}
        plain = [number for number, what in episodes.items() if what.plain]
        still = [n for n, what in episodes.items() if what.still and not what.plain and what.frames >= LEAST_S * fps]
        for numbers, what in ((plain, "has one colour"), (still, "is one image that never changes")):
            if not numbers:
                continue
            where, others = "every episode", [f"--view {other}" for other in views if other != view]
            cure = f"Train without it: {' '.join(others)}" if others else "Record them again."
            if len(numbers) < len(episodes):
                where = f"{len(numbers)} of {len(episodes)} episodes"
                cure = f"To leave these out: vlaflow data drop {shlex.quote(str(root))} --episodes {spans(numbers)} --out DIR"
            found.append(f"The view '{view}' {what} in {where}: the camera was off, covered or frozen. {cure}")
    return found
