"""Pictures that lie in a parquet file: PNG or JPEG in LeRobot's cells, their bytes alone, paths, or nested lists of numbers.

Only eight bits per channel are colours. Sixteen bits are a depth map, which would come out nearly white.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np

from vlaflow.data.features import Feature, channel_first, channels, marked_as_depth
from vlaflow.data.lerobot_info import inside
from vlaflow.data.tables import first_cell
from vlaflow.data.video import decodable, open_video
from vlaflow.errors import DataError

if TYPE_CHECKING:
    from PIL import Image


class DepthError(DataError):
    """A picture has more than eight bits per channel, so it is no colour picture."""


def read_image(cell: Any, feature: Feature, root: Path, where: str) -> np.ndarray:
    """One picture, uint8 (H, W, 3).

    Args:
        cell: of the column.
        feature: as declared; nested lists of numbers are laid out as its shape says.
        root: the data set's folder, for cells that hold a path.
        where: the cell, for errors.

    Raises:
        DataError: a path that leads out of the folder.
        DepthError: more than eight bits per channel.
        OSError, TypeError, ValueError: it cannot be read.
    """
    from PIL import Image

    if isinstance(cell, list):
        return _numbers(cell, feature, where)
    content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if isinstance(content, str):
        content, path = None, content
    if content is None and path is None:
        raise TypeError("the cell is empty")
    source = io.BytesIO(content) if content is not None else inside(root, str(path), f"The path of {where}")
    with Image.open(source) as image:
        if _deep(image):
            raise DepthError(
                f"{where[:1].upper()}{where[1:]} of {root} is not a colour picture: it has more than eight bits per pixel, as "
                "depth maps have. Mark the column with \"is_depth_map\": true under 'info' in meta/info.json."
            )
        return np.asarray(image.convert("RGB"))


def depth_reason(root: Path, key: str, feature: Feature, file: Path | None) -> str | None:
    """Why a column of pictures is no camera's, found in its declaration and its first picture; None where it is one.

    Args:
        root: the data set's folder.
        key, feature: the column.
        file: a file with some of its pictures, parquet or mp4; None where there is none.
    """
    if marked_as_depth(feature):
        return "it is marked as depth"
    if file is not None and _file_is_deep(root, key, feature, file):
        return "its pictures have one channel of more than eight bits, as depth maps have"
    if "depth" in key.lower() and channels(feature) == 1:
        return "its name says depth and it has one channel"
    return None


def _file_is_deep(root: Path, key: str, feature: Feature, file: Path) -> bool:
    if feature["dtype"] == "video":
        try:
            with open_video(file) as container:
                found = decodable(container)[0].codec_context.pix_fmt or ""
        except (av.FFmpegError, OSError, IndexError):
            return False  # decoding reports it better, by episode
        return found.startswith("gray") and found not in ("gray", "gray8", "gray8a")
    cell = first_cell(file, key)
    if cell is None or isinstance(cell, list):
        return False
    try:
        read_image(cell, feature, root, "the first picture")
    except DepthError:
        return True
    except (DataError, OSError, TypeError, ValueError):
        return False  # reading reports it better, by episode
    return False


def _deep(image: Image.Image) -> bool:
    """Whether pixels hold more than a byte per channel; Pillow would cut 16-bit grey with transparency to its high byte."""
    return image.mode == "F" or image.mode.startswith("I") or "LA;16" in str(getattr(image, "tile", ""))


def _numbers(cell: list[Any], feature: Feature, where: str) -> np.ndarray:
    image = np.asarray(cell)
    if image.ndim != 3 or image.shape != tuple(feature["shape"]):
        raise ValueError(f"{where} has shape {image.shape} instead of {tuple(feature['shape'])}")
    if image.min(initial=0) < 0 or image.max(initial=0) > 255:
        raise ValueError(f"{where} holds numbers outside 0..255")
    image = image.astype(np.uint8)
    image = image.transpose(1, 2, 0) if channel_first(feature) else image
    return np.ascontiguousarray(np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[..., :3])
