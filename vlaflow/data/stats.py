"""Statistics of states and actions, from the numeric columns alone: no image is decoded, so they take seconds.

``compute(dataset)["action"]`` is the input of ``transforms.Normalizer.from_stats``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from vlaflow.data.lerobot import Dataset
from vlaflow.errors import CheckpointError, DataError

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


@dataclass(frozen=True)
class FeatureStats:
    """Statistics of each dimension of one vector feature, in the feature's own units; ``count`` is the number of rows.

    Quantiles interpolate linearly between rows; ``std`` divides by ``count``.
    """

    min: tuple[float, ...]
    max: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int
    q01: tuple[float, ...]
    q10: tuple[float, ...]
    q50: tuple[float, ...]
    q90: tuple[float, ...]
    q99: tuple[float, ...]

    @property
    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.min)

    def require_sound(self, where: str) -> None:
        """Refuse statistics that cannot be used for normalisation.

        Args:
            where: origin of the statistics, e.g. "'action' in stats.json".

        Raises:
            CheckpointError: numbers that are not finite in float32, or lists of different lengths.
        """
        for part in fields(self):
            numbers = getattr(self, part.name)
            if part.name == "count":
                continue
            if len(numbers) != self.dim:
                raise CheckpointError(f"{where} has {self.dim} minima, but '{part.name}' is of length {len(numbers)}.")
            if not np.all(np.abs(numbers) <= np.finfo(np.float32).max):
                raise CheckpointError(
                    f"{where} holds a '{part.name}' that is not finite ({list(numbers)}), so it cannot be used for "
                    "normalisation; the file is damaged. Copy it again, or train again."
                )

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
