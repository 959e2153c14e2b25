"""How long a chunk takes, from what it computes: a time per chunk, per pass, per operation and per byte of weights, fitted to
measurements of one machine (``evaluation.profile``).

Operations alone say little about small networks on a CPU, where starting an operation takes as long as computing it, and few
tokens read every weight for little work. ``benchmarks/cost_model`` is the other half: what no program can beat, by arithmetic.
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
    """What a chunk, a part of one, or a batch of chunks computes.

    Args:
        passes: layers that run, over prefix, solver steps and rater, and one for each decoder evaluation and embedded view; a
            batch takes no more of them.
        gflop: 10⁹ floating-point operations of matrix products and convolutions, two per multiply-add.
        gigabytes: 10⁹ bytes of weights that are read, again at every pass but once for a batch.
    """

    passes: float = 0.0
    gflop: float = 0.0
    gigabytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.passes + other.passes, self.gflop + other.gflop, self.gigabytes + other.gigabytes)

    def __mul__(self, times: float) -> Work:
        return Work(times * self.passes, times * self.gflop, times * self.gigabytes)

    def batched(self, batch: int) -> Work:
        """That of so many observations together."""
        return Work(self.passes, batch * self.gflop, self.gigabytes)


@dataclass(frozen=True)
class CostModel:
    """Milliseconds, none of them negative.

    Args:
        chunk: that every chunk takes.
        layer_pass: that every pass takes, however little it computes.
        gflop: that 10⁹ operations take.
        gigabyte: that reading 10⁹ bytes of weights takes.
        points: measurements it was fitted to.
        error: mean relative error when each of these is predicted from the others.
    """

    chunk: float
    layer_pass: float
    gflop: float
    gigabyte: float = 0.0
    points: int = 0
    error: float = 0.0

    def milliseconds(self, work: Work) -> float:
        """Median of a chunk."""
        return float(np.dot((self.chunk, self.layer_pass, self.gflop, self.gigabyte), _features(work)))


def fit(works: Sequence[Work], milliseconds: Sequence[float]) -> CostModel:
    """The cost model with the smallest sum of squared relative errors.

    Args:
        works: what was computed.
        milliseconds: how long it took.

    Raises:
        ConfigError: for fewer than five measurements.
    """
    if len(works) < 5:
        raise ConfigError(f"A cost model is fitted to at least 5 measurements, got {len(works)}.")
    places = range(len(works))
    others = [CostModel(*_fit(_without(works, place), _without(milliseconds, place))) for place in places]
    errors = [abs(others[place].milliseconds(works[place]) / milliseconds[place] - 1) for place in places]
    return CostModel(*_fit(works, milliseconds), points=len(works), error=float(np.mean(errors)))


def _features(work: Work) -> tuple[float, float, float, float]:
    return (1.0, work.passes, work.gflop, work.gigabytes)


def _fit(works: Sequence[Work], milliseconds: Sequence[float]) -> tuple[float, float, float, float]:
    """Least squares without negative terms: of all subsets of the four, the best whose solution has none."""
    features = np.array([_features(work) for work in works]) / np.array(milliseconds)[:, None]
    best, least = np.zeros(4), np.inf
    for kept in (list(chosen) for size in (1, 2, 3, 4) for chosen in combinations(range(4), size)):
        solved, *_ = np.linalg.lstsq(features[:, kept], np.ones(len(works)), rcond=None)
        lost = float(((features[:, kept] @ solved - 1) ** 2).sum())
        if (solved >= 0).all() and lost < least - 1e-12:  # of equal ones the one with fewer terms
            best, least = np.zeros(4), lost
            best[kept] = solved
    chunk, layer_pass, gflop, gigabyte = map(float, best)
    return chunk, layer_pass, gflop, gigabyte


def _without(values: Sequence[T], place: int) -> list[T]:
    return [*values[:place], *values[place + 1 :]]


@dataclass(frozen=True)
class ChunkWork:
    """What the parts of a chunk compute for one observation.

    Args:
        embed: before the first layer.
        prefix: the layers up to each depth 1 … J, over the prefix.
        step: one decoder evaluation at each depth 1 … J; nothing where no exit was trained.
    """

    embed: Work
    prefix: tuple[Work, ...]
    step: tuple[Work, ...]

    def spent(self, nfe: float, layer_passes: float) -> Work:
        """That of a chunk of which only the numbers of evaluations and layer passes are known: a full prefix, and steps."""
        depth = len(self.prefix)
        steps = self.step[-1] * max(0.0, layer_passes / depth - 1)
        return self.embed + self.prefix[-1] + Work(layer_passes - depth + nfe, steps.gflop, steps.gigabytes)
