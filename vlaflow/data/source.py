"""What training draws its samples from, whatever they are of."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from vlaflow.data.batch import Batch, VqaBatch

Sample = Batch | VqaBatch


class Source(Protocol):
    """Numbered samples: ``data.windows.Windows``, ``data.image_cache.VqaSource``, or anything like them."""

    def __len__(self) -> int:
        """Number of samples."""

    def batch(self, indices: np.ndarray) -> Sample:
        """The samples at ``indices``."""
