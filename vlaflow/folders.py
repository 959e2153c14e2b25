"""Folders that a command is told to write into: made, or refused in a sentence before anything is computed."""

from __future__ import annotations

import os
from pathlib import Path

from vlaflow.errors import ConfigError


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; one that is there is left as it is.

    Raises:
        ConfigError: when it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refusal(folder, error.strerror) from error


def require_makeable(folder: Path) -> None:
    """Refuse a folder that ``make_folder`` could not make, as far as can be told; nothing is made.

    Raises:
        ConfigError: something above it is no folder, or nothing may be written there.
    """
    if os.path.isdir(folder):
        return
    there = next(Path(above) for above in (folder, *folder.parents) if os.path.exists(above))
    if not there.is_dir():
        raise _refusal(folder, f"{there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise _refusal(folder, f"{there} may not be written")


def _refusal(folder: Path, reason: str | None) -> ConfigError:
    return ConfigError(f"The folder {folder} cannot be made ({reason}). Choose another --out.")
