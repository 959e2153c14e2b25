"""Statistics of states and actions, from the numeric columns alone: no image is decoded, so they take seconds.

``compute(dataset)["action"]`` is the input of ``transforms.Normalizer.from_stats``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from vlaflow.data.features import LARGEST
from vlaflow.data.lerobot import Dataset
from vlaflow.errors import CheckpointError, DataError
from vlaflow.ranges import AnyNumber
from vlaflow.text import shown

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
ROUNDING = 1e-6
"""How far statistics may contradict each other, as a share of the largest number: other programs compute them in float32."""


@dataclass(frozen=True)
class FeatureStats:
    """Statistics of each dimension of one vector feature, in the feature's own units; ``count`` is the number of rows.

    Quantiles interpolate linearly between rows; ``std`` divides by ``count``.
    """

    min: tuple[AnyNumber, ...]
    max: tuple[AnyNumber, ...]
    mean: tuple[AnyNumber, ...]
    std: tuple[AnyNumber, ...]
    count: int
    q01: tuple[AnyNumber, ...]
    q10: tuple[AnyNumber, ...]
    q50: tuple[AnyNumber, ...]
    q90: tuple[AnyNumber, ...]
    q99: tuple[AnyNumber, ...]

    @property
    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.min)

    def require_sound(self, where: str) -> None:
        """Refuse statistics that cannot be used for normalisation.

        Args:
            where: origin of the statistics, e.g. "'action' in stats.json".

        Raises:
            CheckpointError: numbers that are not finite in float32, lists of different lengths, or numbers that no data have: a
                mean or deviation that the range does not allow, quantiles out of order, squares that overflow.
        """
        damaged = "so it cannot be used for normalisation; the file is damaged. Copy it again, or train again."
        for part in fields(self):
            numbers = getattr(self, part.name)
            if part.name == "count":
                continue
            if len(numbers) != self.dim:
                raise CheckpointError(f"{where} has {self.dim} minima, but '{part.name}' is of length {len(numbers)}.")
            if not np.all(np.abs(numbers) <= np.finfo(np.float32).max):
                raise CheckpointError(f"{where} holds a '{part.name}' that is not finite ({shown(list(numbers))}), {damaged}")
        low, high = np.array(self.min), np.array(self.max)
        slack = ROUNDING * np.maximum(np.abs(low), np.abs(high))
        ordered = np.array([self.min, *(getattr(self, name) for name in QUANTILES), self.max])
        if self.count < 1 or (np.diff(ordered, axis=0) < -slack).any():
            raise CheckpointError(f"{where} holds minima, quantiles and maxima that are not in order, {damaged}")
        mean, std = np.array(self.mean), np.array(self.std)
        if ((mean < low - slack) | (mean > high + slack)).any():
            raise CheckpointError(f"{where} holds a mean outside the range from 'min' to 'max', {damaged}")
        # Popoviciu's inequality: nothing between two ends deviates by more than half their distance
        if ((std < 0) | (std > (high - low) / 2 + slack)).any():
            raise CheckpointError(f"{where} holds a deviation that its range does not allow, {damaged}")
        if np.maximum(np.abs(low), np.abs(high)).max(initial=0) > LARGEST:
            raise CheckpointError(f"{where} holds numbers above {LARGEST:.3g}, whose squares float32 cannot hold, {damaged}")

    @staticmethod
    def of(values: np.ndarray) -> FeatureStats:
        """Statistics of an array (N, D)."""
        values = np.asarray(values, np.float64)
        if values.ndim != 2 or not len(values):
            raise DataError(f"Statistics need at least one row of a two-dimensional array, got shape {values.shape}.")

        def numbers(row: np.ndarray) -> tuple[float, ...]:
            return tuple(float(v) for v in row)

        quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
        return FeatureStats(
            min=numbers(values.min(0)),
            max=numbers(values.max(0)),
            mean=numbers(values.mean(0)),
            std=numbers(values.std(0)),
            count=len(values),
            **{name: numbers(row) for name, row in zip(QUANTILES, quantiles, strict=True)},
        )


def compute(dataset: Dataset, episodes: Sequence[int] | None = None) -> dict[str, FeatureStats]:
    """Statistics of "state" (absent where the data set has none) and "action" over the given episodes, or all."""
    columns = dataset.columns()
    rows = slice(None) if episodes is None else np.isin(columns.episode, np.asarray(episodes, np.int64))
    stats = {"action": FeatureStats.of(columns.action[rows])}
    return ({"state": FeatureStats.of(columns.state[rows])} if columns.state.shape[1] else {}) | stats
