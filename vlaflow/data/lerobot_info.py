"""meta/info.json of a LeRobot data set: its version, rate and features, and the paths that it says files are at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from vlaflow.data.features import require_features
from vlaflow.errors import DataError
from vlaflow.ranges import Count, Number, Range
from vlaflow.strict import fill, read_object, require_form
from vlaflow.text import one_line, shown

FASTEST = 1e6
"""Largest rate of a data set, frames per second."""
VERSIONS = ("v2.0", "v2.1", "v3.0")


@dataclass(frozen=True)
class InfoForm:
    """What meta/info.json must and may say, as far as it is read; see LeRobot's documentation for the meaning.

    The templates of paths are checked where they are filled in, the features by ``require_features``, and what vlaflow adds by
    the classes that it is read as.
    """

    fps: Annotated[float, Range(0, FASTEST, above=True)]
    features: dict[str, dict[str, Any]]
    total_episodes: Number | None = None
    total_frames: Number | None = None
    chunks_size: Count | None = None
    robot_type: str | None = None
    x_vlaflow: Extra | None = None


@dataclass(frozen=True)
class Extra:
    """What vlaflow adds to meta/info.json."""

    action_spec: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None


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
    info = read_object(path, DataError, "copy the file again.", finite=True)
    absent = [key for key in ("codebase_version", "fps", "features") if key not in info]
    if absent:
        raise DataError(f"{path} does not state '{absent[0]}', which every LeRobot data set must. Copy the file again.")
    if info["codebase_version"] not in VERSIONS:
        raise DataError(
            f"{root} has format version {one_line(str(info['codebase_version'])):.40}; vlaflow reads {', '.join(VERSIONS)}. "
            "Convert it with LeRobot's own scripts (lerobot.datasets.v30.convert_dataset_v21_to_v30 or the older v2 ones)."
        )
    require_form(InfoForm, info, str(path), DataError)
    require_features(path, info["features"])
    return info


def inside(root: Path, path: str, where: str) -> Path:
    """Resolve a path within the data set, as stated in ``where``.

    Raises:
        DataError: the path leads out of the folder.
    """
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise DataError(f"{where} of {root} leads out of the data set ({shown(path)}). Give a path inside it, without '..'.")
    return root / path


def filled(root: Path, name: str, template: Any, **values: Any) -> Path:
    """Fill in the template of a path from meta/info.json.

    Raises:
        DataError: it names something unknown, or leads out of the folder.
    """
    try:
        path = fill(template, values)
    except ValueError as error:
        raise DataError(
            f"meta/info.json of {root} states '{name}' = {shown(template)}, which cannot be filled in ({error}); it may name "
            f"{', '.join(values)}. Correct it there."
        ) from error
    return inside(root, path, f"'{name}' in meta/info.json")
