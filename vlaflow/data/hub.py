"""Data sets on the Hugging Face Hub: their folder on this machine, and pushing one.

    folder = data_folder("lerobot/pusht@v3.0")
    hub.origin(folder)                          # hf://lerobot/pusht@<commit>

Only the files that a data set needs are fetched: ``meta/`` first, then the tables and videos that ``meta/info.json`` names.
They lie in the Hub's own cache, which other programs share.
"""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from vlaflow.errors import CapabilityError, DataError
from vlaflow.hub import HubName, download, hub_name, origin
from vlaflow.packages import missing
from vlaflow.strict import read_object

DATA_PATH = "data/*.parquet"
VIDEO_PATH = "videos/*{video_key}*.mp4"
IMAGES = "images/*"
"""Stored images, where they are not in the tables."""


def data_folder(root: Path | str) -> Path:
    """The folder of a data set, fetched from the Hub if ``root`` names a repository (``hub.hub_name``).

    Raises:
        VlaflowError: see ``hub.hub_name`` and ``hub.download``.
    """
    name = hub_name(root, "data set")
    return Path(root) if name is None else _fetched(name)


def title(root: Path) -> str:
    """A data set's name for texts: its origin, or the name of its folder."""
    return origin(root) or root.name


@cache  # a command opens its data set several times, and the main branch must not move in between
def _fetched(name: HubName) -> Path:
    folder, exact = download(name, "data set", ("meta/*",), ("meta/*",))
    patterns = ("meta/*", *needed(folder))
    return download(exact, "data set", patterns, tuple(each for each in patterns if each != IMAGES))[0]


def needed(folder: Path) -> list[str]:
    """Patterns of the files, besides ``meta/``, that a data set needs; none if its ``info.json`` cannot be read.

    Stored images may lie next to the tables; everything else in a repository (pictures of its page, checkpoints, archives) is
    left where it is.
    """
    try:
        info = read_object(folder / "meta/info.json", DataError, "")
        features = info["features"].items()
        tables, videos = info.get("data_path") or DATA_PATH, info.get("video_path") or VIDEO_PATH
        patterns = [_pattern(tables)]
        patterns += [_pattern(videos, key) for key, feature in features if feature.get("dtype") == "video"]
        if any(feature.get("dtype") == "image" for _, feature in features):
            patterns.append(IMAGES)
    except (DataError, KeyError, TypeError, AttributeError):
        return []  # the reader says what is wrong with it
    return patterns


def _pattern(template: str, key: str = "*") -> str:
    """A path's template as a pattern: "data/chunk-{chunk_index:03d}/..." becomes "data/chunk-*/...", and the key stays."""
    return re.sub(r"\{[^}]*\}", "*", template.replace("{video_key}", key))


def push(root: Path, repository: str, *, private: bool, message: str) -> str:
    """Upload a data set, without what vlaflow has derived from it (``.cache``).

    Args:
        root: folder of a data set.
        repository: "USER/NAME", created if it does not exist.
        private: of a repository that is created.
        message: of the commit.

    Returns:
        "hf://USER/NAME@COMMIT".

    Raises:
        DataError: the Hub refuses, or cannot be reached.
        CapabilityError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise CapabilityError(missing("huggingface_hub", "Pushing a data set")) from error
    api = HfApi(library_name="vlaflow")
    try:
        api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        commit: Any = api.upload_folder(
            repo_id=repository,
            folder_path=root,
            repo_type="dataset",
            commit_message=message,
            ignore_patterns=[".cache/*", ".*"],
        )
        _tag(api, repository, _version(root), commit.oid)
    except Exception as error:  # the errors of its HTTP library, which is another one in other versions
        reason = f"{error}".strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise DataError(
            f"{root} could not be pushed to hf://{repository} ({reason}). Log in with a token that may write (hf auth login), "
            "or check the name and the connection."
        ) from error
    return str(HubName(repository, commit.oid))


def _tag(api: Any, repository: str, version: str, commit: str) -> None:
    """Move the tag of the format's version, at which LeRobot looks a data set up, to the commit."""
    from huggingface_hub.errors import HfHubHTTPError

    with suppress(HfHubHTTPError):  # there is none yet
        api.delete_tag(repository, tag=version, repo_type="dataset")
    api.create_tag(repository, tag=version, repo_type="dataset", revision=commit)


def _version(root: Path) -> str:
    return str(read_object(root / "meta/info.json", DataError, "copy it again.").get("codebase_version"))
