"""The samples of step n as pure functions of n, so a training run resumes from the step number alone.

``Order`` goes through one set of samples, ``MixedOrder`` interleaves several by weight; neither keeps a position. ``Mixed`` is
the samples of several data sets, numbered through. How weights are chosen is in ``weights``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from vlaflow.data.batch import Batch
from vlaflow.data.common import CommonShape, joined
from vlaflow.data.nearby import Nearby
from vlaflow.data.source import SampleOrder, Source
from vlaflow.errors import ConfigError

CYCLE = 10_000
"""Length of the mixing schedule; weights are rounded to multiples of 1 / CYCLE."""


@dataclass(frozen=True)
class Order:
    """The order of samples: every epoch is a new permutation, and a batch may span two epochs.

    Args:
        count: number of samples, M.
        batch_size: samples per step, B; may exceed ``count``.
        seed: determines every permutation, together with the number of the epoch.
        nearby: permutations that keep neighbours close together, for streams; None for any.
    """

    count: int
    batch_size: int
    seed: int
    nearby: Nearby | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch_size < 1 or self.seed < 0:
            raise ConfigError(
                f"An order needs count ≥ 1, batch_size ≥ 1 and seed ≥ 0, got {self.count}, {self.batch_size}, {self.seed}."
            )

    def indices(self, step: int) -> np.ndarray:
        """Indices of the samples of step 0, 1, 2, ...: int64 (B,)."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        return self.at(positions)[np.argsort(self.lane(positions), kind="stable")]

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Indices of the samples at these positions of the endless sequence of epochs: int64, same shape."""
        epochs, places = np.divmod(positions, self.count)
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            result[here] = self._permutation(int(epoch))[places[here]]
        return result

    def lane(self, positions: np.ndarray) -> np.ndarray:
        """Lanes of a stream that these positions read. Samples of a step are sorted by them, so that of several processes,
        which share the step, each reads a part of the lanes.
        """
        return np.zeros_like(positions) if self.nearby is None else self.nearby.lane(positions % self.count)

    def expect(self, indices: np.ndarray) -> None:
        """Announce samples that will be asked for soon."""
        if self.nearby is not None:
            self.nearby.expect(indices)

    def _permutation(self, epoch: int) -> np.ndarray:
        if self.nearby is None:
            return _permutation(self.count, self.seed, epoch)
        return self.nearby.permutation(self.seed, epoch)

    def epoch(self, step: int) -> float:
        """Epochs completed before this step."""
        return step * self.batch_size / self.count


@lru_cache(maxsize=64)  # two epochs of each of thirty data sets
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(count)
    order.setflags(write=False)
    return order


class MixedOrder:
    """The order of the samples of several parts, numbered through: those of the first part come before those of the second.

    Every 10,000 samples contain each part in exact proportion (weights are rounded to that), in an order that is shuffled for
    every ten thousand; each part goes through its own epochs.

    Args:
        counts: number of samples of each part.
        weights: of each part, positive; they need not add up to 1.
        batch_size: samples per step, B.
        seed: determines the order of the samples.
        nearby: of each part, see ``Order``; nothing for None of each.

    Attributes:
        shares: how many of every 10,000 samples each part gives.

    Raises:
        ConfigError: weights that are not positive, or not one for each part.
    """

    def __init__(
        self,
        counts: Sequence[int],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        nearby: Sequence[Nearby | None] = (),
    ) -> None:
        if not counts or len(counts) != len(weights) or len(counts) > CYCLE:
            raise ConfigError(f"A mixture needs 1 to {CYCLE} parts with a weight each, got {len(counts)} and {len(weights)}.")
        if any(not np.isfinite(w) or w <= 0 for w in weights):
            raise ConfigError(f"Every weight must be a positive number, got {list(weights)}. Leave a data set out instead.")
        self.batch_size, self.seed = batch_size, seed
        self.shares = _shares(np.array(weights, np.float64))
        self._first = np.concatenate(([0], np.cumsum(counts)[:-1]))
        each = nearby or [None] * len(counts)
        self._orders = [Order(count, batch_size, seed + 1 + i, each[i]) for i, count in enumerate(counts)]

    def indices(self, step: int) -> np.ndarray:
        """Numbers of the samples of step 0, 1, 2, ...: int64 (B,)."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        cycles, places = np.divmod(positions, CYCLE)
        part_B, index_B = np.empty_like(positions), np.empty_like(positions)
        for cycle in np.unique(cycles):
            here = cycles == cycle
            schedule, before = _schedule(tuple(self.shares.tolist()), self.seed, int(cycle))
            part_B[here] = schedule[places[here]]
            index_B[here] = cycle * self.shares[part_B[here]] + before[places[here]]
        lane_B = np.zeros_like(positions)
        for part in np.unique(part_B):
            here, order = part_B == part, self._orders[part]
            lane_B[here] = order.lane(index_B[here])
            index_B[here] = self._first[part] + order.at(index_B[here])
        return index_B[np.argsort(lane_B, kind="stable")]

    def expect(self, indices: np.ndarray) -> None:
        """See ``Order.expect``."""
        part_B = np.searchsorted(self._first, indices, side="right") - 1
        for part in np.unique(part_B):
            self._orders[part].expect(indices[part_B == part] - self._first[part])


class Mixed:
    """The samples of several data sets as one source, in one shape.

    Args:
        parts: samples by name of the data set, each in the shape of its robot.
        weights: of each part, as in ``MixedOrder``.
        shape: what all are brought to.
        robots: the robot of each part, as a place in the policy's list.
        nearby: of each part that is read from a stream, see ``Order``.

    Raises:
        ConfigError: weights or robots that are not named as the parts are.
    """

    def __init__(
        self,
        parts: Mapping[str, Source],
        weights: Mapping[str, float],
        shape: CommonShape,
        robots: Mapping[str, int],
        nearby: Mapping[str, Nearby | None] | None = None,
    ) -> None:
        for name in (*parts, *weights, *robots):
            if name not in parts or name not in weights or name not in robots:
                raise ConfigError(f"Weights, robots and data sets must have the same names; '{name}' is not in all of them.")
        self.parts, self.shape, self.robots, self.weights = dict(parts), shape, dict(robots), dict(weights)
        self._nearby = [(nearby or {}).get(name) for name in parts]
        self._counts = [len(part) for part in parts.values()]
        self._ends = np.cumsum(self._counts)

    def __len__(self) -> int:
        """Number of samples of all parts."""
        return int(self._ends[-1])

    def order(self, count: int, batch_size: int, seed: int) -> SampleOrder:
        """How training goes through them, as ``Order`` does for one data set."""
        return MixedOrder(self._counts, [self.weights[name] for name in self.parts], batch_size, seed, self._nearby)

    def batch(self, indices: np.ndarray) -> Batch:
        """The samples at ``indices`` (B,), numbered through all parts."""
        part_B = np.searchsorted(self._ends, indices, side="right")
        batches, places = [], []
        for number, (name, part) in enumerate(self.parts.items()):
            own = np.flatnonzero(part_B == number)
            if len(own):
                found = part.batch(indices[own] - (self._ends[number] - self._counts[number]))
                assert isinstance(found, Batch)
                found = self.shape.batch(found, self.robots[name])
                batches.append(replace(found, sources=[name] * len(own)))
                places.append(own)
        return joined(batches, torch.from_numpy(np.argsort(np.concatenate(places))))


def _shares(weights: np.ndarray) -> np.ndarray:
    """Positive integers that add up to CYCLE, as close to the weights as possible (largest remainders first)."""
    exact = weights / weights.sum() * CYCLE
    shares = np.maximum(np.floor(exact), 1).astype(np.int64)
    while shares.sum() != CYCLE:
        surplus = shares - exact
        if shares.sum() < CYCLE:
            shares[np.argmin(surplus)] += 1
        else:
            shares[np.argmax(np.where(shares > 1, surplus, -np.inf))] -= 1
    return shares


@lru_cache(maxsize=16)
def _schedule(shares: tuple[int, ...], seed: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """The part at each position of a cycle, and the number of earlier positions in the cycle with the same part."""
    schedule = np.random.default_rng([seed, 0, cycle]).permutation(np.repeat(np.arange(len(shares)), shares))
    before = np.empty_like(schedule)
    for part, share in enumerate(shares):
        before[schedule == part] = np.arange(share)
    return schedule, before
