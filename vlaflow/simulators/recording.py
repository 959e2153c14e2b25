"""The finished episodes of a recording, on disk until the data set is complete, so that an interrupted recording continues.

They are in the hidden folder ``.NAME.episodes`` next to the data set NAME: per episode one mp4 per view, and one npz with
everything else. The npz is renamed into place last, so an episode without one is recorded again. What they were recorded with
is in ``settings.json``. ``DONE`` is written when nothing is left to record, so that what a kill leaves of the folder after the
data set got its name is known to be of no more use.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import numpy as np

from vlaflow.data.video import Segment
from vlaflow.errors import ConfigError
from vlaflow.outputs import claim, whole_file, write_json
from vlaflow.strict import read_object

SETTINGS = "settings.json"
DONE = "done"
ARRAYS = ("state", "action", "executed", "success")
KEPT = "the finished episodes are kept. Make room and repeat the command, or choose another --out"


@dataclass(frozen=True)
class RecordJob:
    """One episode to record, for a pool of workers."""

    env: str
    episode: int

    @property
    def name(self) -> str:
        """Name of the job in error messages."""
        return f"{self.env}, episode {self.episode}"

    @property
    def stem(self) -> str:
        """Beginning of the names of its files."""
        return f"{quote(self.env, safe='')}-{self.episode}"


@dataclass(frozen=True)
class Demonstration:
    """One recorded episode of T frames.

    Args:
        name: "suite/task".
        instruction: the task in words.
        seed: seed of the reset.
        attempts: number of seeds tried, this one included.
        state: (T, S) float32.
        action: (T, D) float32, the clean labels.
        executed: (T, D) float32, the executed actions.
        success: (T,) bool, whether the step taken at frame t ended in success.
        videos: encoded segments by view, T frames each.
    """

    name: str
    instruction: str
    seed: int
    attempts: int
    state: np.ndarray
    action: np.ndarray
    executed: np.ndarray
    success: np.ndarray
    videos: dict[str, Segment]


class Recording:
    """The folder of finished episodes; a context manager that removes it when the data set is complete.

    After an error or an interruption it is kept, unless no episode was finished.

    Args:
        out: the data set.
        settings: everything that determines an episode besides its environment and number, as JSON values by name.

    Raises:
        ConfigError: another process is recording into it, or its episodes were recorded with other settings.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.folder = episodes_folder(out)
        sweep_finished(out)
        self.folder.mkdir(exist_ok=True)
        self._place = os.open(self.folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # a network folder without locks
                claim(self._place, f"Another process is recording into {self.folder}. Wait for it, or choose another --out.")
            (self.folder / DONE).unlink(missing_ok=True)
            self._require(json.loads(json.dumps(settings)))
        except BaseException:
            os.close(self._place)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None or not any(self.folder.glob("*.npz")):
            _clear(self.folder)
        os.close(self._place)

    def done(self) -> None:
        """Say that every episode is in the data set, which is about to get its name."""
        (self.folder / DONE).touch()

    def finished(self, job: RecordJob) -> Demonstration | None:
        """The episode, if it was recorded before and its files are whole."""
        try:
            with np.load(_file(self.folder, job), allow_pickle=False) as stored:
                facts = json.loads(str(stored["facts"]))
                videos = {}
                for view, size in facts["bytes"].items():
                    path = video_file(self.folder, job, view)
                    if path.stat().st_size != size:
                        return None
                    videos[view] = Segment(path, len(stored["action"]), stored[f"histogram {view}"], facts["digests"][view])
                arrays = {name: stored[name] for name in ARRAYS}
                return Demonstration(job.env, facts["instruction"], facts["seed"], facts["attempts"], **arrays, videos=videos)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def _require(self, settings: Mapping[str, Any]) -> None:
        file, number = self.folder / SETTINGS, sum(1 for _ in self.folder.glob("*.npz"))
        if number:
            stored = _read(file)
            for key, value in settings.items():
                if found := _difference(key, stored.get(key), value):
                    name, before, now = found
                    raise ConfigError(
                        f"{self.folder} holds {number} episodes of an unfinished recording with {name} = {before}, "
                        f"not {now}. Repeat its command to continue it, remove that folder, or choose another --out."
                    )
        else:
            try:
                write_json(file, settings, indent=1)
            except BaseException:
                _clear(self.folder)
                raise


def _difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any] | None:
    """The first value in which two settings differ, with its name: ("noise[0].scale", 0.1, 0.2)."""
    inner: list[tuple[str, Any, Any]]
    if isinstance(before, dict) and isinstance(now, dict):
        inner = [(f"{name}.{key}", before.get(key), now.get(key)) for key in {**before, **now}]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        inner = [(f"{name}[{place}]", *pair) for place, pair in enumerate(zip(before, now, strict=True))]
    else:
        return None if before == now else (name, before, now)
    return next((found for each in inner if (found := _difference(*each))), None)


def sweep_finished(out: Path) -> None:
    """Remove the folder of episodes that a process left which was killed after the data set was complete."""
    folder = episodes_folder(out)
    if out.exists() and (folder / DONE).exists():
        _clear(folder)


def _clear(folder: Path) -> None:
    """Remove the folder, and last of all what says that it is done; what cannot be removed stays for the next time."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name != DONE:
                path.unlink(missing_ok=True)
        (folder / DONE).unlink(missing_ok=True)
        folder.rmdir()


def keep(folder: Path, job: RecordJob, demo: Demonstration) -> None:
    """Mark an episode as finished; its videos are in the folder already.

    Raises:
        StorageError: the disk is full or not writable.
    """
    facts = {
        "instruction": demo.instruction,
        "seed": demo.seed,
        "attempts": demo.attempts,
        "bytes": {view: segment.path.stat().st_size for view, segment in demo.videos.items()},
        "digests": {view: segment.digest for view, segment in demo.videos.items()},
    }
    arrays: dict[str, Any] = {name: getattr(demo, name) for name in ARRAYS}
    arrays |= {f"histogram {view}": segment.histogram for view, segment in demo.videos.items()}
    with whole_file(_file(folder, job)) as part:
        np.savez(part, facts=np.array(json.dumps(facts)), **arrays)


def finished_before(out: Path, jobs: Sequence[RecordJob]) -> int:
    """How many of the episodes an interrupted recording has finished."""
    folder = episodes_folder(out)
    return sum(_file(folder, job).exists() for job in jobs)


def episodes_folder(out: Path) -> Path:
    """Where the finished episodes of a data set are until it is complete."""
    return out.parent / f".{out.name}.episodes"


def video_file(folder: Path, job: RecordJob, view: str) -> Path:
    """The mp4 of one view of an episode."""
    return folder / f"{job.stem}-{view}.mp4"


def _file(folder: Path, job: RecordJob) -> Path:
    return folder / f"{job.stem}.npz"


def _read(file: Path) -> dict[str, Any]:
    return read_object(file, ConfigError, f"it is damaged. Remove {file.parent}, or choose another --out.")
