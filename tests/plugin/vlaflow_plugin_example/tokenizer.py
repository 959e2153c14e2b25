"""An action tokenizer: a few actions of a chunk, rounded to levels, and straight lines between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlaflow.actions.base import Decoding, Tokenizer, TokenizerConfig, check_chunks
from vlaflow.errors import ConfigError


@dataclass(frozen=True)
class KnotsFit(TokenizerConfig):
    """What training fits.

    Args:
        knots: actions that become tokens, the first and the last included.
        levels: values that a number is rounded to.
    """

    knots: int = 3
    levels: int = 16

    def __post_init__(self) -> None:
        if min(self.knots, self.levels) < 2:
            raise ConfigError(f"A knots tokenizer needs 2 knots and 2 levels at least, got {self.knots} and {self.levels}.")

    def fit(self, action_NLD: np.ndarray) -> KnotsTokenizer:
        """Levels from the smallest to the largest number of all."""
        _, chunk_size, dim = action_NLD.shape
        return KnotsTokenizer(chunk_size, dim, self.knots, self.levels, float(action_NLD.min()), float(action_NLD.max()))


@dataclass(frozen=True)
class KnotsTokenizer(Tokenizer):
    """The fitted tokenizer.

    Args:
        chunk_size, dim: L and D.
        knots, levels: see ``KnotsFit``.
        low, high: values of the first and the last level.
    """

    chunk_size: int
    dim: int
    knots: int
    levels: int
    low: float
    high: float

    @property
    def slots(self) -> int:
        """One per knot and dimension."""
        return self.knots * self.dim

    @property
    def vocabulary(self) -> int:
        """The levels."""
        return self.levels

    @property
    def ordered(self) -> bool:
        """Levels ascend."""
        return True

    @property
    def values_SV(self) -> np.ndarray:
        """The levels, in every slot."""
        return np.tile(np.linspace(self.low, self.high, self.levels), (self.slots, 1))

    @property
    def description(self) -> str:
        """A name for tables."""
        return f"{self.knots} knots of {self.levels} levels"

    def encode(self, action_BLD: np.ndarray) -> np.ndarray:
        """The nearest level of each knot's numbers."""
        places = np.linspace(0, self.chunk_size - 1, self.knots).round().astype(int)
        value_BKD = check_chunks(action_BLD, self.chunk_size, self.dim)[:, places]
        share_BKD = (value_BKD - self.low) / max(self.high - self.low, 1e-9)
        return (share_BKD * (self.levels - 1)).round().clip(0, self.levels - 1).astype(np.int64).reshape(len(action_BLD), -1)

    def decode(self, id_BS: np.ndarray) -> Decoding:
        """Straight lines from knot to knot; any ids are valid."""
        value_BKD = np.take(self.values_SV[0], id_BS).reshape(len(id_BS), self.knots, self.dim)
        at_L, knot_K = np.arange(self.chunk_size), np.linspace(0, self.chunk_size - 1, self.knots).round()
        lines = [[np.interp(at_L, knot_K, value_KD[:, d]) for d in range(self.dim)] for value_KD in value_BKD]
        action_BLD = np.array(lines, np.float32).reshape(len(id_BS), self.dim, self.chunk_size).swapaxes(1, 2)
        return Decoding(action_BLD, np.zeros(len(id_BS), bool))

    def exact(self, action_BLD: np.ndarray) -> np.ndarray:
        """Chunks that are straight between their knots, to half a level."""
        far_B = np.abs(self.decode(self.encode(action_BLD)).action_BLD - action_BLD).max((1, 2))
        return far_B <= (self.high - self.low) / (self.levels - 1) / 2 + 1e-6
