"""Progress with an estimate of the time left, for everything that takes longer than a few seconds.

A terminal shows a bar; anything else (a log file, CI) gets a line now and then. Both go to standard error, so that
results on standard output stay clean.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol, TextIO

QUIET_SECONDS = 15.0


class Progress(Protocol):
    """The interface through which long-running work reports its progress."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Report ``steps`` more as done; ``note`` is shown next to the count, e.g. a loss."""


class Silent:
    """The progress of a process that leaves reporting to another one."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Nothing."""


@contextmanager
def progress(total: int, description: str, stream: TextIO | None = None, *, done: int = 0) -> Iterator[Progress]:
    """Report on ``total`` steps of work, of which ``done`` were taken before: they count in the position, not in the pace.

    Example:
        with progress(len(episodes), "Recording") as bar:
            for episode in episodes:
                record(episode)
                bar.advance(note=episode.task)
    """
    stream = stream or sys.stderr
    if stream.isatty():
        with _bar(total, description, stream, done) as bar:
            yield bar
    else:
        lines = Lines(total, description, stream, done=done)
        yield lines
        lines.close()


@contextmanager
def counting(description: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (steps done, total steps) that reports on them as ``progress`` does, once it is called."""
    with ExitStack() as stack:
        bar: Progress | None = None
        before = 0

        def report(done: int, total: int) -> None:
            nonlocal bar, before
            if bar is None:
                bar, before = stack.enter_context(progress(total, description, done=done - 1)), done - 1
            bar.advance(done - before)
            before = done

        yield report


class Lines:
    """Writes a line at most every ``QUIET_SECONDS``, and one at the end with the time taken."""

    def __init__(
        self, total: int, description: str, stream: TextIO, clock: Callable[[], float] = time.monotonic, done: int = 0
    ) -> None:
        self._total, self._description, self._stream, self._clock = total, description, stream, clock
        self._began = self._wrote = clock()
        self._before = self._done = done
        self._note = ""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count, and write a line if the last one was long enough ago."""
        self._done += steps
        self._note = note or self._note
        now = self._clock()
        if now - self._wrote >= QUIET_SECONDS and self._done < self._total:
            self._wrote = now
            left = seconds_left(self._done - self._before, self._total - self._before, now - self._began)
            self._write(f"{duration(left)} left" if left is not None else "")

    def close(self) -> None:
        """Write the last line."""
        self._write(f"took {duration(self._clock() - self._began)}")

    def _write(self, when: str) -> None:
        parts = (f"{self._done}/{self._total}", when, self._note)
        self._stream.write(f"{self._description}: {', '.join(p for p in parts if p)}\n")
        self._stream.flush()


def seconds_left(done: int, total: int, elapsed: float) -> float | None:
    """Estimate from the mean pace so far; None before the first step."""
    return elapsed / done * max(total - done, 0) if done > 0 else None


def duration(seconds: float) -> str:
    """``0:07``, ``3:05`` or ``1:02:00``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


@contextmanager
def _bar(total: int, description: str, stream: TextIO, done: int) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with RichProgress(*columns, console=Console(file=stream)) as drawn:
        task = drawn.add_task(description, total=total, completed=done, note="")

        class Bar:
            def advance(self, steps: int = 1, note: str = "") -> None:
                drawn.advance(task, steps)
                if note:
                    drawn.update(task, note=note)

        yield Bar()
