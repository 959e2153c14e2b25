"""Transforms of numbers and pixels between data set and network. Every change of units has an inverse.

A policy keeps the ``Normalizer`` that it was trained with, so its inputs and outputs are always in robot units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from vlaflow.data.stats import FeatureStats
from vlaflow.errors import ConfigError, SpecError, nearest

Mode = Literal["identity", "mean_std", "quantile", "min_max"]
MODES: tuple[Mode, ...] = ("identity", "mean_std", "quantile", "min_max")

CONSTANT = 1e-6
"""A dimension whose range is below this share of its size is constant: float32 itself resolves 1.2e-7."""

FLOOR = 1e-3
"""A dimension that spreads by less than this share of its size, or of what the vector's dimensions usually spread by, is nearly
constant (a sensor's jitter) and is divided by that instead, so that a small offset does not become thousands of deviations."""


@dataclass(frozen=True)
class Normalizer:
    """Normalisation per dimension, y = (x - shift) / scale, and its inverse, x = y * scale + shift.

    A dimension with scale 0 is constant in the data: it maps to 0, and every y maps back to exactly that constant. So an
    unseen value of a sensor that never varied cannot become huge, and an action that never varied keeps its value.

    A nearly constant dimension (``FLOOR``) is divided by a floor instead of its own spread.

    Args:
        mode: how shift and scale were computed; see ``from_stats``.
        shift: (D,), robot units.
        scale: (D,), robot units per normalised unit.
        clip: largest size of a normalised number; None for no limit. ``inverse`` cannot undo what is clipped.
        kept: dimensions that are neither normalised nor clipped.
    """

    mode: Mode
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    clip: float | None = None
    kept: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.shift) != len(self.scale) or any(s < 0 for s in self.scale):
            raise ConfigError("A normalizer needs as many shifts as scales, and every scale must be at least 0.")
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"Normalised numbers can be clipped at a positive size, got {self.clip}.")

    @staticmethod
    def from_stats(stats: FeatureStats, mode: Mode) -> Normalizer:
        """Build from measured statistics.

        "identity" leaves numbers as they are; "mean_std" gives mean 0 and deviation 1; "min_max" maps [min, max] to
        [-1, 1]; "quantile" maps [q01, q99] to [-1, 1] without clipping. For a dimension that varies but whose two
        quantiles coincide (a gripper that closes in less than 1 % of the frames), "quantile" uses minimum and maximum.

        Raises:
            ConfigError: no such mode.
        """
        pairs = []
        least = floors(stats)
        for d in range(stats.dim):
            low, high = stats.min[d], stats.max[d]
            if mode == "identity":
                pairs.append((0.0, 1.0))
            elif _constant(stats, d):
                pairs.append((low, 0.0))
            elif mode == "mean_std":
                pairs.append((stats.mean[d], max(stats.std[d], least[d])))
            elif mode in ("quantile", "min_max"):
                inner = (stats.q01[d], stats.q99[d]) if mode == "quantile" else (low, high)
                if inner[1] - inner[0] <= CONSTANT * max(abs(low), abs(high)):
                    inner = (low, high)
                pairs.append(((inner[0] + inner[1]) / 2, max((inner[1] - inner[0]) / 2, least[d])))
            else:
                raise ConfigError(f"There is no normalisation '{mode}'; {nearest(mode, MODES)}")
        return Normalizer(mode, tuple(p[0] for p in pairs), tuple(p[1] for p in pairs))

    @staticmethod
    def of_actions(
        stats: FeatureStats, names: Sequence[str], mode: Mode, clip: float | None = None, kept: Sequence[str] = ()
    ) -> Normalizer:
        """Of actions, as a policy's config and the file of an action tokenizer state it.

        Args:
            stats: of the actions.
            names: of their dimensions.
            mode: see ``from_stats``.
            clip: largest size of a normalised number; None for no limit.
            kept: words; dimensions with one of them in their name, in small letters, are left as they are.
        """
        found = tuple(d for d, name in enumerate(names) if any(word in name.lower() for word in kept))
        return Normalizer.from_stats(stats, mode).limited(clip, found)

    def limited(self, clip: float | None, kept: Sequence[int] = ()) -> Normalizer:
        """The same, with clipping and with some dimensions left as they are."""
        pairs = [(0.0, 1.0) if d in kept else pair for d, pair in enumerate(zip(self.shift, self.scale, strict=True))]
        return Normalizer(self.mode, tuple(p[0] for p in pairs), tuple(p[1] for p in pairs), clip, tuple(kept))

    @property
    def dim(self) -> int:
        """Number of dimensions, D."""
        return len(self.shift)

    def forward(self, x_D: Tensor) -> Tensor:
        """Convert robot units to normalised units, (..., D) of any floating type."""
        shift_D, scale_D = self._tensors(x_D)
        if 0 in self.scale:
            constant_D = scale_D == 0
            y_D = torch.where(constant_D, torch.zeros_like(x_D), (x_D - shift_D) / scale_D.masked_fill(constant_D, 1.0))
        else:
            y_D = (x_D - shift_D) / scale_D
        if self.clip is None:
            return y_D
        limits = tuple(math.inf if d in self.kept else self.clip for d in range(self.dim))
        limit_D = _tensor(limits, x_D.dtype, x_D.device)
        return y_D.clamp(-limit_D, limit_D)

    def inverse(self, x_D: Tensor) -> Tensor:
        """Convert normalised units to robot units, (..., D) of any floating type."""
        shift_D, scale_D = self._tensors(x_D)
        return x_D * scale_D + shift_D

    def _tensors(self, x_D: Tensor) -> tuple[Tensor, Tensor]:
        if x_D.shape[-1] != self.dim:
            raise SpecError(f"This normalizer is for {self.dim} dimensions, got a tensor of shape {tuple(x_D.shape)}.")
        return _tensor(self.shift, x_D.dtype, x_D.device), _tensor(self.scale, x_D.dtype, x_D.device)


@lru_cache(maxsize=256)
def _tensor(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once: a chunk of a small policy takes about a millisecond. Never one of the inference mode, which training could
    not use.
    """
    with torch.inference_mode(mode=False):
        return torch.tensor(numbers, dtype=dtype, device=device)


def floors(stats: FeatureStats) -> tuple[float, ...]:
    """The least spread that each dimension is divided by, in its own units: see ``FLOOR``."""
    spreads = [stats.std[d] for d in range(stats.dim) if not _constant(stats, d)]
    usual = median(spreads) if spreads else 0.0
    return tuple(FLOOR * max(usual, abs(stats.min[d]), abs(stats.max[d])) for d in range(stats.dim))


def nearly_constant(stats: FeatureStats) -> tuple[int, ...]:
    """The dimensions that vary by less than their floor, so little that it may be a sensor's jitter."""
    least = floors(stats)
    return tuple(d for d in range(stats.dim) if not _constant(stats, d) and stats.std[d] < least[d])


def _constant(stats: FeatureStats, d: int) -> bool:
    low, high = stats.min[d], stats.max[d]
    return high - low <= CONSTANT * max(abs(low), abs(high))


@dataclass(frozen=True)
class RandomShift:
    """Shift every image by up to ``pad`` pixels in each direction, repeating the border; for training only.

    Args:
        pad: largest shift in pixels; 0 changes nothing.
    """

    pad: int

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise ConfigError(f"A random shift must be at least 0 pixels, got {self.pad}.")

    def __call__(self, images_BHWC: Tensor, generator: torch.Generator) -> Tensor:
        """Shift each sample by its own whole number of pixels.

        Args:
            images_BHWC: uint8 (B, H, W, 3); one view.
            generator: a CPU generator; the only source of randomness.

        Returns:
            uint8 (B, H, W, 3), on the device of the images.
        """
        if not self.pad:
            return images_BHWC
        batch, height, width, _ = images_BHWC.shape
        device = images_BHWC.device
        shift_2B = torch.randint(-self.pad, self.pad + 1, (2, batch, 1), generator=generator).to(device)
        rows_BH = (torch.arange(height, device=device) + shift_2B[0]).clamp(0, height - 1)
        columns_BW = (torch.arange(width, device=device) + shift_2B[1]).clamp(0, width - 1)
        samples_B = torch.arange(batch, device=device)
        return images_BHWC[samples_B[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]
