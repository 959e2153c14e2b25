"""A step that was taken: its numbers on their way from the device, and what the log says of them.

The host reads the numbers of a step on a GPU one step later, so it never waits for the device: it launches the next step
meanwhile.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlaflow.data.batch import LossName, moved
from vlaflow.training.loader import StepPart
from vlaflow.training.team import Team

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""That end a run, the one that counts first."""


@dataclass(frozen=True)
class StepNumbers:
    """What a step's numbers say.

    Args:
        loss: over all processes and parts.
        terms: its parts, by name.
        gradient: norm before clipping.
        stopped: the signal after which the processes are to stop; 0 for none.
    """

    loss: float
    terms: dict[str, float]
    gradient: float
    stopped: int


@dataclass(frozen=True)
class TakenStep:
    """See the module text.

    Args:
        number: of the step, from 1.
        parts: that this process computed.
        names: of the loss's terms.
        values: loss, terms, how many processes got each of ``SIGNALS``, norm of the gradient.
        copied: recorded when ``values`` have arrived; None where there is nothing to wait for.
        rate: learning rate.
        began: monotonic time.
    """

    number: int
    parts: Sequence[StepPart]
    names: tuple[str, ...]
    values: Tensor
    copied: torch.cuda.Event | None
    rate: float
    began: float

    @staticmethod
    def of(
        number: int, parts: Sequence[StepPart], names: Sequence[str], values: Tensor, *, rate: float, began: float
    ) -> TakenStep:
        """Start the copy of the numbers."""
        if values.device.type != "cuda":
            return TakenStep(number, parts, tuple(names), values, None, rate, began)
        kept = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        kept.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return TakenStep(number, parts, tuple(names), kept, copied, rate, began)

    @property
    def loss_name(self) -> LossName:
        """Of the kind of samples that it was taken on."""
        return self.parts[0].batch.loss_name

    def read(self) -> StepNumbers:
        """The numbers; waits for them if they have not arrived."""
        if self.copied is not None:
            self.copied.synchronize()
        loss, *others, gradient = self.values.tolist()
        terms, noted = others[: len(self.names)], others[len(self.names) :]
        stopped = next((int(each) for each, count in zip(SIGNALS, noted, strict=True) if count), 0)
        return StepNumbers(loss, dict(zip(self.names, terms, strict=True)), gradient, stopped)

    def entry(self, numbers: StepNumbers, samples: int, seconds: float) -> dict[str, Any]:
        """The line of the log.

        Args:
            numbers: what ``read`` gave.
            samples: of the step, over all processes.
            seconds: that it took.
        """
        return {
            self.loss_name: numbers.loss,
            "parts": numbers.terms,
            "rate": self.rate,
            "gradient": numbers.gradient,
            "samples_per_second": round(samples / seconds, 1),
        }


def shares(parts: Sequence[StepPart], team: Team) -> Sequence[float | Tensor]:
    """Each part's weight in the step, by valid actions (or answers); over all processes they add up to 1."""
    counts = [part.targets for part in parts]
    if team.world == 1:
        count = sum(counts)
        return [own / count for own in counts] if count else [1 / len(counts)] * len(counts)
    own_P = torch.tensor([*counts, sum(counts), len(counts)], dtype=torch.float64)
    own_P = moved(own_P, team.device, non_blocking=True)
    all_2 = team.sum(own_P[-2:].clone())
    return list(torch.where(all_2[0] > 0, own_P[:-2] / all_2[0].clamp(min=1), 1 / all_2[1]))
