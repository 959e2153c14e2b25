"""What one entry of 'features' in meta/info.json says: how many numbers a column holds and their names, or a picture's layout.

LeRobot's own tools, its converters and other recorders fill in 'shape' and 'names' in many ways; this is where they are read.
Which columns a data set's actions and views are is in ``reading`` and ``cameras``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlaflow.errors import DataError
from vlaflow.strict import MOST_NAME
from vlaflow.text import shown

Feature = Mapping[str, Any]

LARGEST = float(np.sqrt(np.finfo(np.float32).max))
"""Largest number that can be normalised: beyond it, float32 cannot hold its square."""

CHANNELS = (1, 3, 4)
"""Numbers of channels that pictures have: grey, colour, colour with transparency."""

MOST_AXES, MOST_NUMBERS = 8, 2**28
"""Largest number of axes and of numbers per frame of a column."""

BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""Columns of every LeRobot data set that are neither an observation nor an action."""


def require_features(path: Path, features: Any) -> dict[str, dict[str, Any]]:
    """Refuse features without a type or a shape, naming the feature.

    Raises:
        DataError: with what to write into the file.
    """
    if not isinstance(features, dict):
        raise DataError(f"'features' in {path} must be an object with one entry per column. Copy the file again.")
    for key, feature in features.items():
        if len(key.encode()) > MOST_NAME or any(not c.isprintable() for c in key):
            raise DataError(f"{path} names a feature {shown(key)}, a name that no column can have. Correct it there.")
        where = f"The feature '{key}' in {path}"
        if not isinstance(feature, dict):
            raise DataError(f"{where} must be an object with 'dtype' and 'shape', got {shown(feature)}. Copy the file again.")
        if not isinstance(feature.get("dtype"), str):
            raise DataError(
                f'{where} states no \'dtype\'. Add one: "video" if its pictures are in mp4 files, "image" if they are in the '
                f'parquet files, or the type of its numbers, such as "float32".'
            )
        if key in BOOKKEEPING:
            feature.setdefault("shape", [1])
        shape = feature.get("shape")
        if isinstance(shape, list) and all(type(n) is float and n.is_integer() for n in shape):
            shape = feature["shape"] = [int(n) for n in shape]
        sound = isinstance(shape, list) and len(shape) <= MOST_AXES and all(type(n) is int and n >= 0 for n in shape)
        if not sound and feature["dtype"] not in ("string", "language"):
            raise DataError(
                f"{where} states the 'shape' {shown(shape)}; it must be a list of whole numbers, such as [7] for seven numbers "
                f"or [480, 640, 3] for pictures. Correct it there."
            )
        if isinstance(shape, list) and sound and math.prod(shape) > MOST_NUMBERS:
            raise DataError(f"{where} states the 'shape' {shape}, more numbers per frame than are read. Correct it there.")
        if not isinstance(feature.get("info") or feature.get("video_info") or {}, dict):
            raise DataError(f"{where} states an 'info' that is no object. Correct it there, or leave it out.")
        for name, mark in _depth_marks(feature):
            if mark is not None and not isinstance(mark, bool):
                raise DataError(f"{where} states '{name}': {shown(mark)}; it must be true or false. Correct it there.")
    return features


def is_numeric(key: str, feature: Feature) -> bool:
    """Whether a column holds numbers that can be an action or a state."""
    kind = feature["dtype"].startswith(("float", "int", "uint", "bool"))
    return kind and key not in BOOKKEEPING and not is_image(feature)


def width(feature: Feature) -> int:
    """How many numbers a column holds per frame; [] is one number."""
    return math.prod(feature["shape"])


def dimension_names(feature: Feature) -> tuple[str, ...]:
    """One name per number, in the order in which ``tables.flat_numbers`` reads them; "0", "1", ... where there are none.

    >>> dimension_names({"dtype": "float32", "shape": [2, 2], "names": ["arm", "joint"]})
    ('arm 0 joint 0', 'arm 0 joint 1', 'arm 1 joint 0', 'arm 1 joint 1')
    """
    shape, names, size = feature["shape"], feature.get("names"), width(feature)
    flat = list(_flat(names))
    if len(flat) == size and len(set(flat)) < size:
        flat = list(_flat(names, grouped=True))
    if len(flat) == size:
        return distinct(flat)
    if len(shape) >= 2 and len(flat) == len(shape):  # names of the axes
        return tuple(" ".join(f"{axis} {i}" for axis, i in zip(flat, at, strict=True)) for at in np.ndindex(*shape))
    return tuple(map(str, range(size)))


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """The names, with a number after each of those that occur more than once."""
    often, counted = Counter(names), Counter[str]()
    found = []
    for name in names:
        found.append(f"{name} {counted[name]}" if often[name] > 1 else name)
        counted[name] += 1
    return tuple(found)


def _flat(names: Any, grouped: bool = False) -> Iterable[str]:
    """Names in lists of lists, or in groups such as {"motors": [...]}, one after another."""
    if isinstance(names, dict):
        for group, inner in names.items():
            within = _flat(inner if isinstance(inner, list | dict) else [inner], grouped)
            yield from (f"{group} {name}" if grouped else name for name in within)
    elif isinstance(names, list | tuple):
        for inner in names:
            yield from _flat(inner, grouped)
    elif names is not None:
        yield str(names)


def is_image(feature: Feature) -> bool:
    """Whether a column holds pictures: in mp4 files, in parquet files, or as nested lists of bytes."""
    return feature["dtype"] in ("video", "image") or (feature["dtype"] == "uint8" and _is_layout(feature["shape"]))


def resembles_image(feature: Feature) -> bool:
    """Whether a column that is not read as pictures has the shape of some."""
    numbers = feature["dtype"].startswith(("float", "int", "uint"))
    return not is_image(feature) and numbers and (_is_layout(feature["shape"]) or _is_plane(feature["shape"]))


def _is_layout(shape: Sequence[int]) -> bool:
    return len(shape) == 3 and min(shape[0], shape[2]) in CHANNELS and shape[1] > 4


def _is_plane(shape: Sequence[int]) -> bool:
    """Whether it is a picture of one channel, such as a depth map; no action or state has so many rows and columns."""
    return len(shape) == 2 and min(shape) >= 16


def channel_first(feature: Feature) -> bool:
    """Whether (channels, height, width) was declared: the shape says it, names only where the shape fits either order."""
    shape, names = feature["shape"], feature.get("names")
    if len(shape) != 3:
        return False
    first, last = shape[0] in CHANNELS, shape[2] in CHANNELS
    if first != last:
        return first
    return isinstance(names, list) and bool(names) and str(names[0]).lower().startswith("c")


def image_size(feature: Feature) -> tuple[int, int]:
    """Declared height and width; pixels are stored as (height, width, channels), whatever order was declared."""
    height, width = feature["shape"][1:] if channel_first(feature) else feature["shape"][:2]
    return int(height), int(width)


def channels(feature: Feature) -> int:
    """Declared number of channels."""
    shape = feature["shape"]
    return 1 if len(shape) == 2 else int(shape[0] if channel_first(feature) else shape[2])


def marked_as_depth(feature: Feature) -> bool:
    """Whether the recorder says that these are depth maps."""
    return any(mark for _, mark in _depth_marks(feature))


def _depth_marks(feature: Feature) -> list[tuple[str, Any]]:
    info = feature.get("info") or feature.get("video_info") or {}
    return [(name, info.get(name)) for name in ("is_depth_map", "video.is_depth_map")]
