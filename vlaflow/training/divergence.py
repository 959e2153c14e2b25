"""Two things that end a run early: a loss that leaves the rails, and a signal from outside."""

from __future__ import annotations

import math
import signal
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from types import FrameType, TracebackType
from typing import Any

from vlaflow.data.batch import SampleGroup
from vlaflow.data.source import Sample
from vlaflow.errors import VlaflowError
from vlaflow.policies.provenance import newest_state


class DivergedError(VlaflowError):
    """The loss or its gradient is not finite, or far above anything seen before."""


class Divergence:
    """Compares each loss with the running median of the last hundred.

    Args:
        warm_up: steps during which only what is not finite counts.
        factor: how many times the median a loss must be to count as an explosion. Flow losses vary by a factor of about
            two from batch to batch, so a hundred is no accident.
    """

    def __init__(self, warm_up: int, factor: float = 100.0) -> None:
        self.warm_up, self.factor = max(warm_up, 20), factor
        self.losses: deque[float] = deque(maxlen=101)

    def complaint(self, step: int, loss: float, gradient: float) -> str | None:
        """What is wrong with step number ``step``, or None; a sound loss is remembered."""
        if not math.isfinite(loss):
            return f"The loss is {loss}"
        if not math.isfinite(gradient):
            return f"The gradient's norm is {gradient} (loss {loss:.4g})"
        if step > self.warm_up and len(self.losses) >= 20 and loss > self.factor * median(self.losses):
            return f"The loss jumped to {loss:.4g}, {loss / median(self.losses):.0f} times the usual {median(self.losses):.4g},"
        self.losses.append(loss)
        return None


def samples_sentence(batches: Iterable[Sample], most: int = 64) -> str:
    """A step's samples: "episode 3 frames 12, 40; episode 7 frame 5", or the names of its questions."""
    names = [named for batch in batches for named in batch.sample_names()]
    groups: dict[SampleGroup, list[Any]] = {}
    for group, name in names[:most]:
        groups.setdefault(group, []).append(name)
    listed = [
        f"{group.heading}{'s' * (len(group_names) > 1)} {', '.join(map(str, sorted(group_names)))}"
        for group, group_names in sorted(groups.items())
    ]
    return "; ".join(listed) + (f"; and {len(names) - most} more" if len(names) > most else "")


def diverged(what: str, batches: Sequence[Sample], out: Path) -> DivergedError:
    """The error of a loss that left the rails.

    Args:
        what: happened at which step.
        batches: on which it was computed.
        out: of the run.
    """
    return DivergedError(
        f"{what}. Its samples: {samples_sentence(batches)}. {batches[0].advice}, or lower optim.learning_rate. {untouched(out)}"
    )


def untouched(out: Path) -> str:
    """Which checkpoint of a run that ends early is left."""
    found = newest_state(out)
    kept = f"The checkpoint of step {found[0]} is untouched" if found else "Nothing was saved yet"
    return f"{kept}: {out}."


class Interrupt:
    """Notes SIGTERM and SIGINT so that the run can be saved before it ends; a second signal acts as usual.

    Outside the main thread, where Python takes no signals, it notes nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._usual[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, usual in self._usual.items():
            signal.signal(number, usual)
        self._usual = {}
