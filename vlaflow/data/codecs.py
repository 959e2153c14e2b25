"""How a frame is stored in a frame cache: as it is, or as a JPEG.

Raw frames are copied, JPEGs are decoded, by several threads where there are cores. Both come from Pillow, which is installed
anyway and contains libjpeg-turbo: the same file is decoded to the same bytes on every machine.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np

THREADS = 8
"""Most threads that decode one batch of JPEGs."""


class Codec(Protocol):
    """Images to bytes and back."""

    @property
    def key(self) -> str:
        """Name of the codec and its settings; caches with different keys are different."""

    def encode(self, image: np.ndarray) -> memoryview | bytes:
        """The bytes of an image, uint8 (H, W, 3)."""

    def decode(self, contents: Sequence[np.ndarray], image_BHWC: np.ndarray) -> None:
        """Fill ``image_BHWC`` with the images of B byte strings, each uint8 (bytes,).

        Raises:
            ValueError: they are not an image of that size.
        """

    def estimate(self, pixels: int) -> int:
        """About how many bytes images of so many pixels take together."""


@dataclass(frozen=True)
class Raw:
    """Three bytes per pixel."""

    @property
    def key(self) -> str:
        """See ``Codec``."""
        return "raw"

    def encode(self, image: np.ndarray) -> memoryview:
        """See ``Codec``."""
        return np.ascontiguousarray(image).reshape(-1).data

    def decode(self, contents: Sequence[np.ndarray], image_BHWC: np.ndarray) -> None:
        """See ``Codec``."""
        flat_BN = image_BHWC.reshape(len(image_BHWC), -1)
        for place, content in enumerate(contents):
            flat_BN[place] = content

    def estimate(self, pixels: int) -> int:
        """See ``Codec``; exact."""
        return 3 * pixels


@dataclass(frozen=True)
class Jpeg:
    """JPEG with colour at half the resolution, as in the videos that the frames come from.

    Args:
        quality: of libjpeg, 1 to 100.
    """

    quality: int = 95

    @property
    def key(self) -> str:
        """See ``Codec``."""
        return f"jpeg{self.quality}"

    def encode(self, image: np.ndarray) -> bytes:
        """See ``Codec``."""
        from PIL import Image

        with io.BytesIO() as file:
            Image.fromarray(image).save(file, "JPEG", quality=self.quality, subsampling="4:2:0")
            return file.getvalue()

    def decode(self, contents: Sequence[np.ndarray], image_BHWC: np.ndarray) -> None:
        """See ``Codec``."""
        from PIL import Image

        def fill(place: int) -> None:
            with Image.open(io.BytesIO(contents[place].data), formats=("JPEG",)) as image:
                image_BHWC[place] = np.asarray(image)

        for _ in _pool().map(fill, range(len(contents))):
            pass

    def estimate(self, pixels: int) -> int:
        """See ``Codec``; camera images take about a tenth of the raw bytes."""
        return 3 * pixels // 10


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "jpeg")
