"""How a picture is brought to the size that a policy reads, by the frame cache, by streams, and on the robot."""

from __future__ import annotations

import numpy as np


def fitted(height: int, width: int, size: int | None, area: int | None = None) -> tuple[int, int]:
    """Height and width of an image of this size after ``resize``."""
    if size is not None:
        return size, size
    if area is None or height * width <= area:
        return height, width
    scale = (area / (height * width)) ** 0.5
    return max(1, int(height * scale)), max(1, int(width * scale))


def resize(image: np.ndarray, size: int | None, area: int | None = None) -> np.ndarray:
    """Resize with a box filter, to a square or to an area.

    Args:
        image: uint8 (H, W, 3).
        size: side in pixels of a square; an image that is not square is padded with black bars.
        area: without ``size``, most pixels; a larger image is made smaller and keeps its shape.

    Returns:
        uint8 (H', W', 3); the image itself if it already has that size.
    """
    from PIL import Image

    height, width = image.shape[:2]
    wanted = fitted(height, width, size, area)
    if (height, width) == wanted:
        return image
    scale = min(wanted[0] / height, wanted[1] / width)
    inner = wanted if size is None else (max(1, round(height * scale)), max(1, round(width * scale)))
    small = np.asarray(Image.fromarray(image).resize(inner[::-1], Image.Resampling.BOX))
    if small.shape[:2] == wanted:
        return small
    canvas = np.zeros((*wanted, 3), np.uint8)
    top, left = (wanted[0] - small.shape[0]) // 2, (wanted[1] - small.shape[1]) // 2
    canvas[top : top + small.shape[0], left : left + small.shape[1]] = small
    return canvas
