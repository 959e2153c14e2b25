"""Names on the Hugging Face Hub and the files behind them, for data sets (``data.hub``) and checkpoints.

Which of the two a name like ``runs/demo`` means is decided in one place, ``hub_name``:

1. ``hf://USER/NAME`` always means the Hub.
2. A path that exists is that folder.
3. ``USER/NAME`` means the Hub, unless there is a folder ``USER`` here: then it is taken for a mistyped path and refused with
   both readings. A fetch is announced on standard error, and an error of the Hub says that there is no such folder either, so
   that no path is taken for a name without a word.
4. Anything else is a path.

``@REVISION`` after the name chooses a branch, a tag or a commit.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
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
    _announce(f"There is no folder {text} here, so the {kind} {name} is fetched from the Hugging Face Hub.\n")
    return name


@cache  # a command opens its data set several times
def _announce(sentence: str) -> None:
    sys.stderr.write(sentence)


def download(name: HubName, kind: Kind, patterns: Sequence[str]) -> tuple[Path, HubName]:
    """The files of a repository that match a pattern, in the Hub's own cache; what is there already is not fetched again.

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
            name.repository, repo_type=kind_there, revision=name.revision, allow_patterns=[*patterns], library_name="vlaflow"
        )
    except Exception as error:  # the errors of its HTTP library, which is another one in other versions
        raise DataError(_sentence(name, kind, error)) from error
    return Path(folder), replace(name, revision=Path(folder).name)


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
    if constants.HF_HUB_OFFLINE:
        return (
            f"{name} is not (completely) in the cache of this machine ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids "
            f"fetching it{folder}. Unset it, or give a folder."
        )
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    reason = f"{error}".strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return f"{name} could not be fetched from {where} ({reason}){folder}. Check the connection, or give a folder."
