"""``episodes.jsonl``: the finished episodes of a running evaluation, so that it can be continued after an interruption.

The first line contains the settings that determine the episodes (and further information about the run), every other line one
finished episode. A line is written at once, flushed to the disk and never changed; a line left incomplete by a kill or a power
cut is removed when the log is opened again. The log exists only while an evaluation is unfinished: it is removed when the
results are written.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from vlaflow.config import from_json, to_json
from vlaflow.errors import ConfigError, DataError
from vlaflow.outputs import append, claim, require_writable, storing
from vlaflow.progress import progress
from vlaflow.ranges import NotNegative, Number
from vlaflow.strict import parse, require_form
from vlaflow.text import shortened

FILE = "episodes.jsonl"
FORMAT = "vlaflow episodes 1"
KEPT = "the {}s finished so far are kept in {}. Make room, and run the same command again to continue"

E = TypeVar("E")
J = TypeVar("J")


@dataclass(frozen=True)
class Kept(Generic[E]):
    """What a log holds.

    Args:
        settings: everything that determines the episodes.
        about: further information about the run.
        finished: episodes by the number of their job.
        seconds: wall time of the runs that played them.
    """

    settings: Mapping[str, Any]
    about: Mapping[str, Any]
    finished: Mapping[int, E]
    seconds: float


@dataclass(frozen=True)
class _Header:
    settings: dict[str, Any]
    about: dict[str, Any]


@dataclass(frozen=True)
class _Entry:
    job: Number
    seconds: NotNegative
    episode: dict[str, Any]


def read_log(file: Path, kind: type[E]) -> Kept[E]:
    """Read a log that no evaluation is currently writing; an incomplete last line is left out.

    Raises:
        ConfigError: an evaluation is writing it, or it is no log.
        DataError: it is missing, or damaged other than at its end.
    """
    try:
        place = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}).") from error
    try:
        with suppress(OSError):  # a network folder without locks
            claim(place, f"An evaluation is still writing {file}. Wait for it.")
        content = file.read_bytes()
    finally:
        os.close(place)
    whole = content[: content.rfind(b"\n") + 1]
    if not whole:  # begun, and killed before its first line
        raise DataError(f"{file} ends before its first line does. Run the command that began it again, or remove it.")
    return _parsed(file, kind, whole)


def _require_log(file: Path, content: bytes) -> None:
    if not content.startswith(f'{{"format": "{FORMAT}"'.encode()):
        raise ConfigError(f"{file} is not the log of an evaluation. Choose another --out.")


def _parsed(file: Path, kind: type[E], content: bytes) -> Kept[E]:
    _require_log(file, content)
    first, *lines = content.split(b"\n")[:-1]
    cure = "it is damaged and can only be discarded, with --fresh."
    header = parse(first, f"{file}, line 1", DataError, cure)
    require_form(_Header, header, f"{file}, line 1", DataError)
    finished, seconds = {}, 0.0
    for number, line in enumerate(lines, 2):
        where = f"{file}, line {number}"
        entry = parse(line, where, DataError, cure, finite=True)
        require_form(_Entry, entry, where, DataError)
        finished[entry["job"]] = from_json(kind, entry["episode"], where)
        seconds = max(seconds, float(entry["seconds"]))
    return Kept(header["settings"], header["about"], finished, seconds)


class EpisodeLog(Generic[E]):
    """The log of one folder, open for appending; a context manager.

    Args:
        folder: folder of the evaluation; created if it does not exist.
        kind: dataclass of an episode.
        settings: everything that determines the episodes, as JSON values by name.
        about: further information about the run, which may change when the run is continued.
        name: of the file.
        what: what one entry is, for errors.
        fresh: discard an existing log instead of continuing it.
        cure: what to do about a log that was begun with other settings.

    Attributes:
        kept: what remains after a failure, and what to do, as the end of a sentence.
        finished: finished episodes by the number of their job.
        seconds: wall time of the earlier runs that this one continues.

    Raises:
        ConfigError: the folder cannot be written, another evaluation is writing into it, or its log was begun with other
            settings.
        DataError: the log is damaged, other than at its end.
    """

    def __init__(
        self,
        folder: Path,
        kind: type[E],
        settings: Mapping[str, Any],
        *,
        about: Mapping[str, Any] | None = None,
        name: str = FILE,
        what: str = "episode",
        fresh: bool = False,
        cure: str = "Choose another --out, or discard it with --fresh.",
    ) -> None:
        self.file, self.kept, self._what, self._began = folder / name, KEPT.format(what, name), what, time.monotonic()
        self._cure = cure
        self.finished: dict[int, E] = {}
        self.seconds = 0.0
        require_writable(self.file)
        # a round trip through JSON, so that tuples compare equal to the lists they become
        header = {"format": FORMAT, "settings": json.loads(_line(settings)), "about": dict(about or {})}
        with self._storing():
            self._place = os.open(self.file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            self._open(folder, kind, header, fresh)

    def _open(self, folder: Path, kind: type[E], header: dict[str, Any], fresh: bool) -> None:
        """Lock the file, and read what it holds or begin it."""
        try:
            with suppress(OSError):  # a network folder without locks
                claim(self._place, f"Another evaluation is writing to {folder}. Wait for it, or choose another --out.")
            content = self._read()
            if content:
                _require_log(self.file, content)
            if content.count(b"\n") > 1 and not fresh:  # a header alone is not worth keeping
                self._continue(_parsed(self.file, kind, content), header["settings"])
            else:
                os.ftruncate(self._place, 0)
                self._append(header)
        except BaseException:
            os.close(self._place)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the file and keep it for the next run."""
        os.close(self._place)

    @property
    def spent(self) -> float:
        """Seconds of wall time, including the earlier runs that this one continues."""
        return self.seconds + time.monotonic() - self._began

    def add(self, number: int, episode: E) -> None:
        """Store a finished episode on disk.

        Raises:
            DataError: the disk is full or not writable.
        """
        self._append({"job": number, "seconds": round(self.spent, 3), "episode": to_json(episode)})
        self.finished[number] = episode

    def complete(
        self,
        jobs: Sequence[J],
        play: Callable[[Sequence[J], Callable[[int, E], None]], object],
        description: str,
        blocks: Sequence[Sequence[int]] | None = None,
    ) -> list[E]:
        """Run what is not finished yet and store each episode.

        Args:
            jobs: all jobs of the evaluation; the same settings must give the same list.
            play: takes the remaining jobs and a function to call with the number (among these) and the episode of each.
            description: for the progress bar.
            blocks: numbers of jobs that are run together; by default every job alone. If one of a block is not finished, the
                whole block is run again. Jobs that belong to no block are not run.

        Returns:
            The episodes of all blocks, in the order of the jobs.
        """
        blocks = [[number] for number in range(len(jobs))] if blocks is None else blocks
        for block in blocks:
            if any(number not in self.finished for number in block):
                for number in block:
                    self.finished.pop(number, None)
        numbers = sorted(number for block in blocks for number in block)
        left = [number for number in numbers if number not in self.finished]
        before = f", {len(self.finished)} done before" if self.finished else ""
        with progress(len(left), description + before) as bar:

            def keep(place: int, episode: E) -> None:
                self.add(left[place], episode)
                bar.advance()

            play([jobs[number] for number in left], keep)
        return [self.finished[number] for number in numbers]

    def remove(self) -> None:
        """Remove the log, once the results are written."""
        with self._storing():
            self.file.unlink(missing_ok=True)

    def _storing(self) -> AbstractContextManager[None]:
        return storing(self.file.parent, f"The {self._what}", self.kept)

    def _read(self) -> bytes:
        """Read all complete lines, and truncate the file after them."""
        content = self.file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.ftruncate(self._place, len(whole))
        return whole

    def _continue(self, found: Kept[E], settings: Mapping[str, Any]) -> None:
        for name, value in settings.items():
            if found.settings.get(name) != value:
                raise ConfigError(
                    f"{self.file} belongs to an unfinished evaluation with {name} = {_short(found.settings.get(name))}, not "
                    f"{_short(value)}. {self._cure}"
                )
        self.finished.update(found.finished)
        self.seconds = found.seconds

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self._storing():
            append(self._place, f"{_line(entry)}\n".encode(), sync=True)


def _line(value: Any) -> str:
    return json.dumps(value, default=repr)


def _short(value: Any) -> str:
    return shortened(json.dumps(value))
