"""Folders that a command is told to write into: made, or refused in a sentence; what a disk refuses later is one as well."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

from vlaflow.errors import ConfigError, DataError

REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""What a disk answers that is full, or that may not be written."""


def make_folder(folder: Path, cure: str = "Choose another --out.") -> None:
    """Make a folder and those above it; one that is there is left as it is.

    Raises:
        ConfigError: when it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refusal(folder, error.strerror, cure) from error


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


def require_writable(file: Path, cure: str = "Choose another --out.") -> None:
    """Make the folder of a file and prove that the file can be written there, before the work whose result it will hold.

    Args:
        file: not written yet; one that is there is left as it is.
        cure: what to do where it cannot be written.

    Raises:
        ConfigError: when the folder cannot be made or written, or the file's name is taken by a folder.
    """
    make_folder(file.parent, cure)
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{file.name} is a folder")
        with NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}."):
            pass
    except OSError as error:
        raise ConfigError(f"{file.name} cannot be written into {file.parent} ({error.strerror}). {cure}") from error


@contextmanager
def storing(
    folder: Path, what: str = "The recording", kept: str = "nothing of it was kept. Make room, or choose another --out"
) -> Iterator[None]:
    """For what is written into a folder while work goes on.

    Args:
        folder: for the error.
        what: is written.
        kept: what remains when it fails, and the cure.

    Raises:
        DataError: the disk is full or may not be written.
    """
    try:
        yield
    except Exception as error:  # FFmpeg's errors are no OSError, but have its number
        if getattr(error, "errno", None) not in REFUSALS:
            raise
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{what} could not be written into {folder} ({reason}); {kept}.") from error


def _refusal(folder: Path, reason: str | None, cure: str = "Choose another --out.") -> ConfigError:
    return ConfigError(f"The folder {folder} cannot be made ({reason}). {cure}")
