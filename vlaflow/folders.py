"""Folders that a command is told to write into: made, or refused in a sentence; what a disk refuses later is one as well."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlaflow.errors import ConfigError, DataError

REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""What a disk answers that is full, or that may not be written."""


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
    try:
        if folder.is_dir():
            return
        there = next(above for above in (folder, *folder.parents) if above.exists())
    except OSError as error:  # a folder above that may not be searched
        raise _refusal(folder, error.strerror) from error
    if not there.is_dir():
        raise _refusal(folder, f"{there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise _refusal(folder, f"{there} may not be written")


@contextmanager
def storing(folder: Path) -> Iterator[None]:
    """For what is written into a folder and removed again when it fails.

    Raises:
        DataError: the disk is full or may not be written.
    """
    try:
        yield
    except Exception as error:  # FFmpeg's errors are no OSError, but have its number
        if getattr(error, "errno", None) not in REFUSALS:
            raise
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"The recording could not be written into {folder} ({reason}); nothing of it was kept. Make room, or choose "
            f"another --out."
        ) from error


def _refusal(folder: Path, reason: str | None) -> ConfigError:
    return ConfigError(f"The folder {folder} cannot be made ({reason}). Choose another --out.")
