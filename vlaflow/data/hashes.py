"""``meta/hashes.json``: what the frames of a data set were when it was written, so that flipped bits are noticed.

A video with flipped bits usually decodes, to other pictures. The hash of an episode's decoded frames (``video.FrameDigest``) is
stored for every camera when a data set is written or edited, and compared by ``vlaflow data check --deep``. The file is ours:
LeRobot reads the files of meta/ by name and leaves others alone, and a data set without it is sound. Rows need no such file:
the pages of parquet files have checksums, which are compared whenever they are read (``tables.open_parquet``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlaflow.errors import DataError
from vlaflow.strict import read_object, require_form

HASHES = "meta/hashes.json"
FORMAT = "vlaflow hashes 1"


@dataclass(frozen=True)
class HashForm:
    """The content of the file."""

    format: Literal["vlaflow hashes 1"]
    frames: dict[str, tuple[str, ...]]


def stored_hashes(root: Path) -> Mapping[str, tuple[str, ...]]:
    """The hashes of a data set's frames, by feature key and number of the episode; empty where there are none.

    Raises:
        DataError: the file is damaged.
    """
    file = root / HASHES
    if not file.exists():
        return {}
    cure = f"delete it to check without, or write the data set again: vlaflow data repair {root} --out DIR"
    found = read_object(file, DataError, cure)
    require_form(HashForm, found, str(file), DataError)
    return {key: tuple(hashes) for key, hashes in found["frames"].items()}
