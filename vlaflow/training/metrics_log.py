"""What a run reports as it goes: a line of JSON per step, and a tracker (TensorBoard by default) with the same numbers.

``training/log.jsonl`` holds one object per step: step, loss (answer_loss for a step on questions), parts, rate, gradient (norm
before clipping), samples_per_second, seconds (of training so far), and where it was measured, validation. A resumed run first
drops the lines past its step, so the file reads as if nothing had happened.
"""

from __future__ import annotations

import importlib.util
import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from vlaflow.errors import CheckpointError, ConfigError, StorageError
from vlaflow.outputs import append, storing, write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

KEPT = "the last checkpoint is untouched. Make room and run the same command again to continue"
Tracker = Literal["auto", "tensorboard", "wandb", "trackio", "none"]


def choose_tracker(tracker: Tracker) -> str | None:
    """The tracker's name for Accelerate; "auto" is TensorBoard where it is installed.

    Raises:
        ConfigError: a tracker that was asked for by name and is not installed.
    """
    if tracker == "none":
        return None
    name = "tensorboard" if tracker == "auto" else tracker
    if importlib.util.find_spec(name) is not None:
        return name
    if tracker == "auto":
        return None
    raise ConfigError(f"The tracker '{name}' is not installed: pip install {name}, or choose --tracker none.")


def read_log(out: Path) -> list[dict[str, Any]]:
    """The entries of a run's log, without a last line that a kill cut short."""
    file, entries = out / "training" / "log.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


class MetricsLog:
    """Writes the log; the tracker is Accelerate's and belongs to the trainer.

    Args:
        out: the run's folder.
        step: the step it starts from; later entries of an earlier attempt are dropped.
    """

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / "training" / "log.jsonl"
        self._out = out
        self._begin([entry for entry in read_log(out) if entry["step"] <= step])

    def _begin(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Hold these entries alone, and append to them from here on."""
        try:
            write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in entries))
            self._place = os.open(self.path, os.O_WRONLY | os.O_APPEND)  # a buffer would be written again when it is closed
        except (OSError, StorageError) as error:
            message = f"{self._out} cannot be written ({error.strerror}). Choose another --out, or make room."
            raise CheckpointError(message) from error

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one step."""
        try:
            append(self._place, f"{json.dumps(entry)}\n".encode())
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written ({error.strerror}); {KEPT}.") from error

    def amend(self, step: int, more: Mapping[str, Any]) -> None:
        """Add to the entry of a step, if there is one."""
        before = self._place
        self._begin([{**entry, **more} if entry["step"] == step else entry for entry in read_log(self._out)])
        os.close(before)

    def close(self) -> None:
        """Close the file."""
        os.close(self._place)


class RunLog:
    """The log of a run and its tracker, in the first of the processes that train together; elsewhere it writes nothing.

    Args:
        out: the run's folder.
        step: the step it starts from.
        accelerator: whose trackers are used.
        tracker: name of one, or None.
    """

    def __init__(self, out: Path, step: int, accelerator: Accelerator, tracker: str | None) -> None:
        self._log = MetricsLog(out, step) if accelerator.is_main_process else None
        self._accelerator, self._tracker = accelerator, tracker
        self._storing = partial(storing, out, "The tracker's files", KEPT)
        self._hook, threading.excepthook = threading.excepthook, self._report
        if tracker:
            kwargs = {"tensorboard": {"purge_step": step + 1}} if tracker == "tensorboard" else {}
            with self._storing():
                accelerator.init_trackers(tracker, init_kwargs=kwargs)

    def write(self, step: int, entry: Mapping[str, Any]) -> None:
        """The entry of a step."""
        if self._log is not None:
            self._log.write({"step": step, **entry})
        self._track(step, entry)

    def amend(self, step: int, more: Mapping[str, Any]) -> None:
        """Numbers of a step that was written before."""
        if self._log is not None:
            self._log.amend(step, more)
        self._track(step, more)

    def _track(self, step: int, entry: Mapping[str, Any]) -> None:
        if self._tracker:
            with self._storing():
                self._accelerator.log(scalars(entry), step=step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._log is not None:
            self._log.close()
        if self._tracker:
            # end_training() would also take the processes' group away, which the next stage of a pipeline needs.
            with self._storing() if kind is None else suppress(OSError):
                for one in self._accelerator.trackers:
                    one.finish()
        if kind is None:  # else TensorBoard's thread may still be about to fail
            threading.excepthook = self._hook

    def _report(self, failed: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread raises the disk's error twice: here, with a traceback, and in the call that logs next."""
        if not issubclass(failed.exc_type, OSError):
            self._hook(failed)


def scalars(entry: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """An entry's numbers under flat names, "parts/velocity", as trackers want them."""
    flat: dict[str, float] = {}
    for key, value in entry.items():
        if isinstance(value, Mapping):
            flat |= scalars(value, f"{prefix}{key}/")
        elif key != "step":
            flat[f"{prefix}{key}"] = float(value)
    return flat
