"""Where a training run stands when it ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """Where a run stands when it ends.

    Args:
        step, steps: taken, and to take.
        loss: mean training loss of the last hundred steps; None before the first.
        validation: last validation loss, with averaged weights; None without held-out episodes.
        seconds: of training, over all attempts.
        signal: the signal that asked for its end, or None; it may have come when nothing was left to cut short.
        more: whether stages of a pipeline are still to come.
        policy: folder of the policy that the run made; None if it made something else.
        best: step whose weights the checkpoint holds, of a run that ended because it no longer improved.
    """

    step: int
    steps: int
    loss: float | None
    validation: float | None
    seconds: float
    signal: int | None = None
    more: bool = False
    policy: Path | None = None
    best: int | None = None

    @property
    def finished(self) -> bool:
        """Whether all steps were taken, or all that improved it, and all stages."""
        return (self.step >= self.steps or self.best is not None) and not self.more
