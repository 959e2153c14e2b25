"""Writing: what a command writes appears whole or not at all, and is known to be writable before the work begins.

A file or folder is written under a hidden name next to its place, which its writer keeps locked, and renamed when it is
complete. What a killed process leaves is locked by nobody and removed by the next one that writes to the same place. Errors of
the disk become a ``StorageError``. Checkpoints of a training run have rules of their own, see ``training/checkpoint.py``.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from secrets import token_hex
from typing import Any

from vlaflow.errors import CapabilityError, ConfigError, StorageError

REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""Error numbers of a disk that is full, broken or not writable."""
OTHER = "Choose another --out."
AGAIN = "nothing of it was kept. Make room, or choose another place, and repeat the command"


class PartialOutput:
    """A hidden file or folder that is being written, locked until it is renamed to its place or removed.

    Leftovers of killed writers of the same place are removed first. On network folders without locks nothing is removed.

    Args:
        place: where the complete file or folder will be; its parent must exist.
        folder: whether it is a folder.

    Attributes:
        path: where to write; it ends like the name of ``place``.

    Raises:
        OSError: it cannot be created.
    """

    def __init__(self, place: Path, *, folder: bool = False) -> None:
        self.place, self._folder, self._closed = place, folder, False
        for leftover in place.parent.glob(f".part-????????-{glob.escape(place.name)}"):
            if not _in_use(leftover):
                _remove(leftover)
        while True:
            self.path = self._hidden()
            if folder:
                self.path.mkdir()
                flags = os.O_RDONLY
            else:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            self._descriptor = os.open(self.path, flags, 0o666)
            with suppress(OSError):  # a network folder without locks
                claim(self._descriptor)
            if _is_at(self._descriptor, self.path):  # else another process removed it before it was locked
                return
            os.close(self._descriptor)

    def publish(self, *, over: bool = False) -> None:
        """Rename it to its place; a file takes the place of an older one.

        Args:
            over: a folder does so, too. If the process is killed in between, neither the old nor the new one is there.

        Raises:
            OSError: its bytes cannot be stored, or it cannot be renamed; it still exists then.
        """
        if not self._folder:
            os.fsync(self._descriptor)  # bytes before the name, or a power cut could leave an empty file
        older = self._hidden()
        if over and self.place.is_dir():
            self.place.rename(older)
        self.path.replace(self.place)
        self._close()
        _remove(older)

    def discard(self) -> None:
        """Remove it, unless it was published or removed before."""
        if not self._closed:
            _remove(self.path)
            self._close()

    def _hidden(self) -> Path:
        return self.place.with_name(f".part-{token_hex(4)}-{self.place.name}")

    def _close(self) -> None:
        os.close(self._descriptor)
        self._closed = True


@contextmanager
def whole_file(file: Path, what: str = "", kept: str = AGAIN) -> Iterator[Path]:
    """Context manager that yields a path to write to, and moves what was written to ``file`` when the block ends.

    The folder is created. After an error, an older file is as it was.

    Args:
        file: the file; the yielded path has the same ending.
        what: what is being written, as the subject of an error; the file's name by default.
        kept: see ``storing``.

    Raises:
        StorageError: the disk is full or not writable.
    """
    with _whole(file, False, what, kept) as path:
        yield path


@contextmanager
def whole_folder(folder: Path, what: str = "", kept: str = AGAIN) -> Iterator[Path]:
    """Context manager that yields an empty folder to fill, and renames it to ``folder`` when the block ends.

    Args:
        folder: must not exist, or be empty.
        what, kept: see ``whole_file``.

    Raises:
        StorageError: the disk is full or not writable.
    """
    with _whole(folder, True, what, kept) as path:
        yield path


@contextmanager
def _whole(place: Path, folder: bool, what: str, kept: str) -> Iterator[Path]:
    with storing(place.parent, what or place.name, kept):
        place.parent.mkdir(parents=True, exist_ok=True)
        part = PartialOutput(place, folder=folder)
        try:
            yield part.path
            part.publish()
        except BaseException:
            part.discard()
            raise


def write_text(file: Path, text: str) -> None:
    """Write a file of text in UTF-8, whole or not at all."""
    with whole_file(file) as part:
        part.write_text(text, encoding="utf-8")


def write_json(file: Path, data: object, indent: int = 2, *, finite: bool = False) -> None:
    """Write indented JSON with a final newline, whole or not at all.

    Args:
        file: the file.
        data: JSON data.
        indent: spaces per level.
        finite: refuse NaN and infinities, which Python reads but JSON does not know. The range of an action may be infinite.

    Raises:
        ValueError: a number is not finite although all must be.
        StorageError: the disk is full or not writable.
    """
    write_text(file, json.dumps(data, indent=indent, allow_nan=not finite) + "\n")


def make_folder(folder: Path, cure: str = OTHER) -> None:
    """Create a folder and its parents; an existing folder is left as it is.

    Raises:
        ConfigError: when it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refusal(folder, error.strerror, cure) from error


def require_makeable(folder: Path) -> None:
    """Refuse a folder that ``make_folder`` could not create, or that could not be written then, without creating it.

    A block is written where it will be.

    Raises:
        ConfigError: a parent is not a folder, or cannot be written, or the disk is full.
    """
    try:
        there = next(above for above in (folder, *folder.parents) if above.exists())
    except OSError as error:  # a parent without search permission
        raise _refusal(folder, error.strerror) from error
    if not there.is_dir():
        raise _refusal(folder, f"{there} is a file")
    try:
        _write_block(there / "block")
    except OSError as error:
        raise _refusal(folder, f"{there} cannot be written: {error.strerror}") from error


def require_writable(*files: Path, cure: str = OTHER) -> None:
    """Create the folders of files and write a block to each, before the work whose results the files will hold.

    Args:
        files: the files that will be written; existing ones are left as they are.
        cure: what to do when one cannot be written.

    Raises:
        ConfigError: when a folder cannot be created or written, the disk is full, or a file's name is taken by a folder.
    """
    for file in files:
        _prove(file, cure)
        if file.is_dir():
            raise ConfigError(f"{file.name} cannot be written to {file.parent} ({file.name} is a folder there). {cure}")


def require_writable_folder(folder: Path, cure: str = OTHER) -> None:
    """Create a folder and write a block to it, before the work whose results will be written into it.

    Raises:
        ConfigError: when it cannot be created or written, or the disk is full.
    """
    _prove(folder / "block", cure)


def _prove(file: Path, cure: str) -> None:
    make_folder(file.parent, cure)
    try:
        _write_block(file)
    except OSError as error:
        raise ConfigError(f"{_named(file.parent)} cannot be written ({error.strerror}). {cure}") from error


def _write_block(file: Path) -> None:
    part = PartialOutput(file)
    try:
        part.path.write_bytes(bytes(512))
    finally:
        part.discard()


def _named(folder: Path) -> str:
    return "The current folder" if folder == Path() else str(folder)


def append(descriptor: int, data: bytes, *, sync: bool = False) -> None:
    """Write to the end of a journal, all or nothing: a full disk first writes a part, and only the next write fails.

    Args:
        descriptor: of a file that was opened for appending.
        data: one line or more, with their ends.
        sync: wait until they are on the disk.

    Raises:
        OSError: they cannot be written; the journal is as it was.
    """
    end = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if sync:
            os.fsync(descriptor)
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, end)
        raise


def copy_files(source: Path, goal: Path, *, leave_out: Sequence[str] = ()) -> None:
    """Copy the content of a folder into a new one, without times and permissions; stops at the first error.

    Args:
        source, goal: the folders.
        leave_out: patterns of paths within the folder that are left out, with everything within; ``*`` also stands for slashes.

    Raises:
        OSError: a file cannot be read or written (``shutil.copytree`` would raise an error without a number).
    """
    _copy_within(source, goal, Path(), leave_out)


def _copy_within(source: Path, goal: Path, place: Path, leave_out: Sequence[str]) -> None:
    """``copy_files`` for the folder at a place within the source."""
    (goal / place).mkdir(parents=True, exist_ok=True)
    for path in sorted((source / place).iterdir()):
        within = place / path.name
        if any(fnmatch(within.as_posix(), pattern) for pattern in leave_out):
            continue
        if path.is_dir():
            _copy_within(source, goal, within, leave_out)
        else:
            shutil.copyfile(path, goal / within)


def claim(place: int, busy: str | None = None) -> None:
    """Lock an open file or folder until it is closed; a process that is killed lets go of it by itself.

    Args:
        place: its descriptor.
        busy: sentence for the error if another process has locked it; None to wait for that process.

    Raises:
        ConfigError: another process has locked it.
        OSError: it cannot be locked, as on some network folders and on systems without ``fcntl``.
    """
    try:
        import fcntl
    except ImportError as error:
        raise OSError(errno.ENOLCK, "this system has no file locks") from error
    if busy is None:
        fcntl.flock(place, fcntl.LOCK_EX)
        return
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(busy) from error


@contextmanager
def storing(
    folder: Path, what: str = "The recording", kept: str = "nothing of it was kept. Make room, or choose another --out"
) -> Iterator[None]:
    """Context manager that turns the disk errors of a running job into one sentence; the outermost one words it.

    Args:
        folder: where the job writes; named in the error.
        what: what is being written, as the subject of the sentence.
        kept: what remains after a failure, and what to do.

    Raises:
        StorageError: the disk is full or not writable.
    """
    try:
        yield
    except Exception as error:  # FFmpeg's errors are not OSErrors, but carry an errno
        if getattr(error, "errno", None) not in REFUSALS:
            raise
        where = _named(folder).replace("The", "the")
        raise refused(f"{what} could not be written to {where} ({{}}); {kept}.", error) from error


def refused(sentence: str, error: Any) -> StorageError:
    """The error for a disk error: ``sentence`` with the reason in place of its braces."""
    made = StorageError(sentence.replace("{}", str(getattr(error, "strerror", None) or error)))
    made.errno, made.strerror = error.errno, getattr(error, "strerror", None)
    return made


def require_system(system: str | None = None) -> None:
    """Refuse Windows, whose folders can be neither locked nor replaced while they are open.

    Raises:
        CapabilityError: with what to use instead.
    """
    if (system or sys.platform) == "win32":
        raise CapabilityError(
            "vlaflow runs on Linux and macOS; on Windows, install it within WSL (wsl --install). A robot's computer may run "
            "Windows: vlaflow.robot works there."
        )


def _refusal(folder: Path, reason: str | None, cure: str = OTHER) -> ConfigError:
    return ConfigError(f"The folder {folder} cannot be created ({reason}). {cure}")


def _in_use(path: Path) -> bool:
    """Whether a process has locked it, or that cannot be known."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return True
    try:
        claim(descriptor, f"{path} is being written.")
    except (ConfigError, OSError):
        return True
    finally:
        os.close(descriptor)
    return False


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
