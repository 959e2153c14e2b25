"""How long a chunk takes, from what it computes: a time per chunk, one per layer pass and one per operation, fitted to
measurements of one machine (``evaluation.profile``).

Operations alone say little about small networks on a CPU, where starting an operation takes as long as computing it; how many
are started is counted in layer passes. ``benchmarks/cost_model`` is the other half: what no program can beat, by arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

import numpy as np

from vlaflow.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """What a chunk, or a batch of them, computes.

    Args:
        layer_passes: layers that run, over prefix, solver steps and rater; once for the whole batch.
        gflop: 10⁹ floating-point operations of matrix products and convolutions, two per multiply-add, of the whole batch.
    """

    layer_passes: float
    gflop: float


@dataclass(frozen=True)
class CostModel:
    """Milliseconds, none of them negative.

    Args:
        chunk: that every chunk takes.
        layer_pass: that every layer pass takes, however little it computes.
        gflop: that 10⁹ operations take.
        points: measurements it was fitted to.
        error: mean relative error when each of these is predicted from the others.
    """

    chunk: float
    layer_pass: float
    gflop: float
    points: int = 0
    error: float = 0.0

    def milliseconds(self, work: Work) -> float:
        """Median of a chunk."""
        return self.chunk + self.layer_pass * work.layer_passes + self.gflop * work.gflop


def fit(works: Sequence[Work], milliseconds: Sequence[float]) -> CostModel:
    """The cost model with the smallest sum of squared relative errors.

    Args:
        works: what was computed.
        milliseconds: how long it took.

    Raises:
        ConfigError: for fewer than four measurements.
    """
    if len(works) < 4:
        raise ConfigError(f"A cost model is fitted to at least 4 measurements, got {len(works)}.")
    model = _fit(works, milliseconds)
    places = range(len(works))
    others = [_fit(_without(works, place), _without(milliseconds, place)) for place in places]
    errors = [abs(others[place].milliseconds(works[place]) / milliseconds[place] - 1) for place in places]
    return CostModel(model.chunk, model.layer_pass, model.gflop, len(works), float(np.mean(errors)))


def _fit(works: Sequence[Work], milliseconds: Sequence[float]) -> CostModel:
    """Least squares without negative terms: of all subsets of the three, the best whose solution has none."""
    features = np.array([[1.0, work.layer_passes, work.gflop] for work in works]) / np.array(milliseconds)[:, None]
    best, least = CostModel(0.0, 0.0, 0.0), np.inf
    for kept in (chosen for size in (1, 2, 3) for chosen in combinations(range(3), size)):
        solved, *_ = np.linalg.lstsq(features[:, kept], np.ones(len(works)), rcond=None)
        lost = float(((features[:, kept] @ solved - 1) ** 2).sum())
        if (solved >= 0).all() and lost < least:
            terms = dict(zip(kept, map(float, solved), strict=True))
            best, least = CostModel(terms.get(0, 0.0), terms.get(1, 0.0), terms.get(2, 0.0)), lost
    return best


def _without(values: Sequence[T], place: int) -> list[T]:
    return [*values[:place], *values[place + 1 :]]


@dataclass(frozen=True)
class ChunkWork:
    """What the parts of a chunk compute for one observation, in 10⁹ operations.

    Args:
        embed: before the first layer.
        prefix: of the layers up to each depth 1 … J, over the prefix.
        step: of one decoder evaluation at each depth 1 … J; 0 where no exit was trained.
    """

    embed: float
    prefix: tuple[float, ...]
    step: tuple[float, ...]

    def ladder(self, depths: Sequence[int], nfe: int, batch: int = 1) -> Work:
        """Of so many evaluations at each of these depths, ascending; one depth is a dense chunk."""
        passes = depths[-1] + nfe * sum(depths)
        each = self.embed + self.prefix[depths[-1] - 1] + nfe * sum(self.step[depth - 1] for depth in depths)
        return Work(passes, batch * each)

    def spent(self, layer_passes: float) -> Work:
        """Of a chunk of which only the number of layer passes is known: a full prefix, and the rest in evaluations."""
        depth = len(self.prefix)
        evaluations = max(0.0, layer_passes / depth - 1)
        return Work(layer_passes, self.embed + self.prefix[-1] + evaluations * self.step[-1])
