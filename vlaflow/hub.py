"""Names on the Hugging Face Hub and the files behind them, for data sets (``data.hub``) and checkpoints.

Which of the two a name like ``runs/demo`` means is decided in one place, ``hub_name``:

1. ``hf://USER/NAME`` always means the Hub.
2. A path that exists is that folder.
3. ``USER/NAME`` means the Hub, unless there is a folder ``USER`` here: then it is taken for a mistyped path and refused with
   both readings. A fetch is announced on standard error, and an error of the Hub says that there is no such folder either, so
   that no path is taken for a name without a word.
4. Anything else is a path.

``@REVISION`` after the name chooses a branch, a tag or a commit. A name is resolved to a commit once per process, so the files
of one command are those of one commit; ``origin`` says of which. After ``go_offline`` the network is never used.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from vlaflow.errors import CapabilityError, ConfigError, DataError
from vlaflow.packages import missing, require

Kind = Literal["data set", "checkpoint", "action tokenizer"]
REPOSITORIES = {"data set": "dataset", "checkpoint": "model", "action tokenizer": "model"}
"""What the Hub calls them."""

_EXPLICIT = re.compile(r"hf:/{1,2}(datasets/)?")
"""A ``pathlib.Path`` of "hf://USER/NAME" has only one of the slashes."""
_NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^\s@]+))?")
_CACHED = re.compile(r"/(?:datasets|models)--(?P<user>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?:/|$)")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@dataclass(frozen=True)
class HubName:
    """A repository on the Hub.

    Args:
        repository: "USER/NAME".
        revision: branch, tag or commit; None for the main branch.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.repository}" + (f"@{self.revision}" if self.revision else "")


def go_offline() -> None:
    """Never use the network from now on, in this process and in those that it starts: what is not in the cache is missing."""
    os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:  # it was imported before, and reads the environment once
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def is_offline() -> bool:
    """Whether only the cache may be used: after ``go_offline``, or where the environment says so."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def origin(folder: Path) -> str | None:
    """Repository and commit of a folder in the Hub's cache, "hf://USER/NAME@COMMIT"; None for any other folder."""
    found = _CACHED.search(folder.as_posix())
    return None if found is None else str(HubName(f"{found['user']}/{found['name']}", found["commit"]))


def hub_name(given: Path | str, kind: Kind) -> HubName | None:
    """The repository that a name on the command line means; None for a path. See the module docstring for the rule.

    Raises:
        ConfigError: what follows "hf://" is no name, or the name may also be a mistyped path.
    """
    text = str(given)
    if prefix := _EXPLICIT.match(text):
        found = _NAME.fullmatch(text[prefix.end() :])
        if found is None:
            raise ConfigError(f"'{text}' names no {kind} on the Hub. Write hf://USER/NAME or hf://USER/NAME@REVISION.")
        return HubName(found["repository"], found["revision"])
    found = _NAME.fullmatch(text)
    if found is None or Path(text).exists():
        return None
    name, parent = HubName(found["repository"], found["revision"]), Path(text).parent
    if parent.is_dir():
        there = [each.name for each in parent.iterdir() if each.is_dir()]
        close = difflib.get_close_matches(Path(text).name, there, n=1, cutoff=0.5)
        hint = f"; did you mean {parent / close[0]}?" if close else "."
        raise ConfigError(
            f"There is no folder {text}{hint} If the {kind} of that name on the Hugging Face Hub is meant, write {name}"
        )
    require("huggingface_hub", what=f"Fetching {name}", extra="hub")
    where = "taken from the cache" if is_offline() else "fetched from the Hugging Face Hub"
    _announce(f"There is no folder {text} here, so the {kind} {name} is {where}.\n")
    return name


@cache  # a command opens its data set several times
def _announce(sentence: str) -> None:
    sys.stderr.write(sentence)


@cache  # a command opens its checkpoint several times, and the main branch must not move in between
def download(name: HubName, kind: Kind, patterns: tuple[str, ...], required: tuple[str, ...] = ()) -> tuple[Path, HubName]:
    """The files of a repository that match a pattern, in the Hub's own cache; what is there already is not fetched again.

    Args:
        name: the repository, and the revision of it.
        kind: what it contains.
        patterns: of the files to fetch, as of ``fnmatch``.
        required: patterns of which each must match a file; offline, a fetch that was interrupted is found out by them.

    Returns:
        The folder, and the name with the commit as its revision.

    Raises:
        DataError: it does not exist, is not accessible, or cannot be reached and is not in the cache.
        CapabilityError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CapabilityError(missing("huggingface_hub", f"Fetching {name}")) from error
    kind_there = REPOSITORIES[kind]
    try:
        folder = snapshot_download(
            name.repository,
            repo_type=kind_there,
            revision=name.revision,
            allow_patterns=[*patterns],
            library_name="vlaflow",
            local_files_only=is_offline(),
        )
    except Exception as error:  # the errors of its HTTP library, which is another one in other versions
        raise DataError(_sentence(name, kind, error)) from error
    if is_offline() and not all(any(Path(folder).glob(pattern)) for pattern in required):
        raise DataError(_missing(name))
    return Path(folder), replace(name, revision=Path(folder).name)


def _missing(name: HubName) -> str:
    from huggingface_hub import constants

    return (
        f"{name} is not (completely) in the cache of this machine ({constants.HF_HUB_CACHE}), and nothing may be fetched. "
        f"Fetch it once without --offline or HF_HUB_OFFLINE, or give a folder."
    )


def _sentence(name: HubName, kind: Kind, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    where = constants.ENDPOINT
    folder = "" if Path(name.repository).exists() else f", and there is no folder {name.repository} here"
    if isinstance(error, GatedRepoError):
        return f"{name} asks for consent: accept its terms on {where}, then log in (hf auth login)."
    if isinstance(error, RepositoryNotFoundError):
        return f"{where} has no {kind} {name}, or it is private{folder}. Check the name, or log in (hf auth login)."
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no such revision. Give a branch, a tag or a full commit after the @."
    if is_offline():
        return _missing(name)
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    reason = f"{error}".strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return f"{name} could not be fetched from {where} ({reason}){folder}. Check the connection, or give a folder."
