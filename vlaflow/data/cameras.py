"""Which columns of a data set are camera views, and what each view is called; what is left out is said in a note."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlaflow.data.features import Feature, distinct, is_image, resembles_image
from vlaflow.data.reading import Reading
from vlaflow.data.stored_images import depth_reason
from vlaflow.errors import DataError, SpecError, nearest
from vlaflow.text import shown


@dataclass(frozen=True)
class Cameras:
    """The views of a data set.

    Args:
        views: feature key by view name, in order.
        notes: about columns that look like pictures and are not read, and about names.
    """

    views: Mapping[str, str]
    notes: tuple[str, ...] = ()


def view_name(key: str) -> str:
    """Name of a view: its feature key without 'observation.images.' or 'observation.'."""
    return _names(key)[0]


def view_names(keys: Iterable[str]) -> dict[str, str]:
    """A name for every key: the short one where it is the only one of that name, else a longer one.

    >>> view_names(["observation.image", "observation.images.image", "observation.images.top"])
    {'observation.image': 'image', 'observation.images.image': 'images.image', 'observation.images.top': 'top'}
    """
    level = dict.fromkeys(keys, 0)
    while True:
        named = {key: _names(key)[n] for key, n in level.items()}
        count = Counter(named.values())
        clashing = [key for key, name in named.items() if count[name] > 1 and level[key] < 2]
        if not clashing:
            return dict(zip(named, distinct(list(named.values())), strict=True))
        level |= {key: level[key] + 1 for key in clashing}


def _names(key: str) -> tuple[str, str, str]:
    whole = key.replace("/", ".").lstrip(".")
    middle = whole.removeprefix("observation.")
    return middle.removeprefix("images."), middle, whole


def find_cameras(
    root: Path, features: Mapping[str, Feature], reading: Reading, sample: Callable[[str], Path | None]
) -> Cameras:
    """Find and name the views.

    Args:
        root: the data set's folder, for errors.
        features: by key.
        reading: which views the user asked for; all by default.
        sample: a file with pictures of a column.

    Raises:
        DataError: a picture declared with a shape that is none.
        SpecError: a view was asked for that does not exist or is a depth map.
    """
    left_out, cameras, notes = {}, [], []
    for key, feature in features.items():
        if is_image(feature):
            if len(feature["shape"]) not in (2, 3):
                raise DataError(
                    f"'{key}' of {root} is declared with the shape {feature['shape']}, which no picture has. Write [height, "
                    "width, 3] into meta/info.json."
                )
            reason = depth_reason(root, key, feature, sample(key))
            if reason is None:
                cameras.append(key)
            else:
                left_out[key] = reason
        elif resembles_image(feature):
            notes.append(
                f"'{key}' has the shape of a picture, {feature['shape']}, but holds {shown(feature['dtype'])}; it is not read."
            )
    names = view_names(cameras)
    by_name = {name: key for key, name in names.items()}
    if reading.views:
        return Cameras({name: _asked(root, key, by_name, left_out) for name, key in reading.views})
    notes += [f"'{key}' is not used as a camera: {reason}." for key, reason in left_out.items()]
    short = Counter(map(view_name, cameras))
    alike = {key: name for key, name in names.items() if short[view_name(key)] > 1}
    if alike:
        listed = " and ".join(f"'{name}' ({key})" for key, name in alike.items())
        notes.append(f"Cameras with the same short name are told apart by longer ones: {listed}.")
    return Cameras(by_name, tuple(notes))


def _asked(root: Path, key: str, by_name: Mapping[str, str], left_out: Mapping[str, str]) -> str:
    """The feature key of a view that was named by its key or by its name."""
    if key in by_name.values():
        return key
    if key in by_name:
        return by_name[key]
    if key in left_out:
        raise SpecError(f"'{key}' of {root} cannot be a view: {left_out[key]}. Choose another one.")
    hint = nearest(key, [*by_name, *by_name.values()]) if by_name else "it has no camera at all."
    raise SpecError(f"{root} has no view '{key}'; {hint}")
