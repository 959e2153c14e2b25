"""Confidence as a monitor: does it foretell, while an episode is still running, that it will fail?

At the start of every chunk, the episodes that are still running are ordered by what their chunks so far said: the mean
confidence of the actions to be executed, or their mean spread. The area under the ROC curve is the probability that an episode
that will fail looks worse than one that will succeed; 0.5 is chance. Episodes that are over take no part: an early success is
no good sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlaflow.evaluation.rank import auc, auc_interval
from vlaflow.evaluation.rollout import EpisodeResult

Signal = Literal["confidence", "spread"]
SIGNALS: tuple[Signal, ...] = ("confidence", "spread")
FEWEST = 5
"""Episodes of each outcome that an area under the curve is reported for."""


@dataclass(frozen=True)
class Foretold:
    """What a signal said at one moment.

    Args:
        step: actions executed before the chunk.
        running: episodes that were not over.
        failing: of them, those that failed in the end.
        auc: area under the curve.
        low, high: its 95 % interval (Newcombe), not corrected for looking at several moments. Episodes in one scene count as
            one, which is cautious.
    """

    step: int
    running: int
    failing: int
    auc: float
    low: float
    high: float


def foretold(episodes: Sequence[EpisodeResult], n_action_steps: int, signal: Signal) -> list[Foretold]:
    """The signal at the start of every chunk, as long as enough episodes of both outcomes are running; empty without it.

    Args:
        episodes: of one environment and compute policy.
        n_action_steps: actions executed per chunk.
        signal: whose running mean is looked at; a low confidence and a large spread are bad signs.
    """
    known = [(getattr(each, signal), not each.success, (each.env, each.seed)) for each in episodes]
    found = []
    for number in range(max((len(values) for values, *_ in known), default=0)):
        running = [(float(np.mean(values[: number + 1])), *rest) for values, *rest in known if len(values) > number]
        value_E, fails_E = (np.array(column) for column in list(zip(*running, strict=True))[:2])
        failing = int(fails_E.sum())
        if min(failing, len(fails_E) - failing) < FEWEST:
            continue
        area = auc(value_E if signal == "spread" else -value_E, fails_E)
        different = len({scene for *_, scene in running}) / len(running)
        low, high = auc_interval(area, different * failing, different * (len(fails_E) - failing))
        found.append(Foretold(number * n_action_steps, len(fails_E), failing, area, low, high))
    return found


def first_notice(points: Sequence[Foretold]) -> Foretold | None:
    """The first moment from which the interval lies above chance until the end; None if there is none."""
    below = [number for number, each in enumerate(points) if each.low <= 0.5]
    start = below[-1] + 1 if below else 0
    return points[start] if start < len(points) else None
