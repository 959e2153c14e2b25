"""What training draws its samples from, and what they are when they leave the loader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, Self

import numpy as np
import torch

from vlaflow.data.batch import Batch, VqaBatch

Sample = Batch | VqaBatch


class Source(Protocol):
    """Numbered samples: ``data.windows.Windows``, ``data.mixture.Mixed``, ``data.image_cache.VqaSource``, or the like."""

    def __len__(self) -> int:
        """Number of samples."""

    def batch(self, indices: np.ndarray) -> Sample:
        """The samples at ``indices``."""


class SampleOrder(Protocol):
    """The samples of every step, as a function of its number: ``data.mixture.Order``, or anything like it."""

    def indices(self, step: int) -> np.ndarray:
        """Numbers of the samples of step 0, 1, 2, ...: int64 (B,)."""

    def expect(self, indices: np.ndarray) -> None:
        """Announce samples that will be asked for soon; a stream begins to decode them."""


MakeOrder = Callable[[int, int, int], SampleOrder]
"""An order of so many samples, so many per step, by a seed."""


class Ready(Protocol):
    """A batch as a stage's loss takes it (``Stage.prepare``)."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same on another device."""


Prepare = Callable[[Any], Ready]
"""What is done to every batch on the CPU, in the loader's thread where there is one."""
