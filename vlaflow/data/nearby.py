"""An order of samples for frames that are decoded as they are needed: neighbours come close together, and still shuffled."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

LANES = 16
"""Runs that are read at the same time."""


class Nearby:
    """Permutations of samples that need few runs of frames at a time.

    Every epoch, the runs are shuffled and laid end to end, the samples of each run shuffled within it; this sequence is cut
    into ``LANES`` lanes of equal length (but for one sample), and the samples are taken from the lanes in turn. So every
    sample comes once per epoch, 16 neighbours in the order are from 16 different places, and a run is needed for as long as
    its lane takes to pass it.

    Args:
        bounds: the first sample of each run, and the number of samples, M; ascending.
        expect: called with the indices of samples that will be asked for soon.
    """

    def __init__(self, bounds: np.ndarray, expect: Callable[[np.ndarray], None]) -> None:
        self.bounds, self.expect = np.asarray(bounds, np.int64), expect
        self.permutation = lru_cache(maxsize=2)(self._permutation)

    def lane(self, place: np.ndarray) -> np.ndarray:
        """The lane that the samples at these places of an epoch are from."""
        return place % LANES

    def _permutation(self, seed: int, epoch: int) -> np.ndarray:
        """The samples of an epoch: int64 (M,)."""
        rng = np.random.default_rng([seed, epoch])
        runs = [rng.permutation(np.arange(*self.bounds[run : run + 2])) for run in rng.permutation(len(self.bounds) - 1)]
        sample_M = np.concatenate(runs)
        place_M = np.arange(len(sample_M))
        short, longer = divmod(len(sample_M), LANES)
        lane_M = self.lane(place_M)
        order_M = sample_M[lane_M * short + np.minimum(lane_M, longer) + place_M // LANES]
        order_M.setflags(write=False)
        return order_M
