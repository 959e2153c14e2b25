"""meta/info.json of a LeRobot data set: its version, rate and features, and the paths that it says files are at."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from vlaflow.data.features import require_features
from vlaflow.errors import DataError

VERSIONS = ("v2.0", "v2.1", "v3.0")


def read_info(root: Path) -> dict[str, Any]:
    """Read and check meta/info.json.

    Raises:
        DataError: not a data set, an unsupported version, a file that is damaged or lacks something.
    """
    path = root / "meta/info.json"
    if not root.is_dir():
        raise DataError(f"There is no folder {root}. Give the path of a LeRobot data set (the folder that holds meta/).")
    if not path.is_file():
        raise DataError(f"{root} is not a LeRobot data set: meta/info.json is missing. Give the folder that holds meta/.")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}). Copy the file again.") from error
    absent = [key for key in ("codebase_version", "fps", "features") if not isinstance(info, dict) or key not in info]
    if absent:
        raise DataError(f"{path} does not state '{absent[0]}', which every LeRobot data set must. Copy the file again.")
    if info["codebase_version"] not in VERSIONS:
        raise DataError(
            f"{root} has format version {info['codebase_version']}; vlaflow reads {', '.join(VERSIONS)}. Convert it with "
            "LeRobot's own scripts (lerobot.datasets.v30.convert_dataset_v21_to_v30 or the older v2 ones)."
        )
    if not isinstance(info["fps"], int | float) or not info["fps"] > 0:
        raise DataError(f"{path} states fps = {info['fps']!r}; it must be a positive number.")
    require_features(path, info["features"])
    return info


def inside(root: Path, path: str, where: str) -> Path:
    """Resolve a path within the data set, as stated in ``where``.

    Raises:
        DataError: the path leads out of the folder.
    """
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise DataError(f"{where} of {root} leads out of the data set ({path}). Give a path inside it, without '..'.")
    return root / path


def filled(root: Path, name: str, template: Any, **values: Any) -> Path:
    """Fill in the template of a path from meta/info.json.

    Raises:
        DataError: it names something unknown, or leads out of the folder.
    """
    try:
        path = template.format(**values)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"meta/info.json of {root} states '{name}' = {template!r}, which cannot be filled in "
            f"({type(error).__name__}: {error}); it may name {', '.join(values)}. Correct it there."
        ) from error
    return inside(root, path, f"'{name}' in meta/info.json")
