"""The interface of an action tokenizer.

A tokenizer maps normalised chunks (L, D) to a fixed number of token slots; unused slots contain the end token. It is a frozen
dataclass of plain numbers, saved in a checkpoint's config.json or in its own file, and gives the same ids in every run.
``fast.py`` and ``bins.py`` contain the two kinds, ``io.py`` reads and writes them.

Shape letters: B batch, L chunk size, D action dimension, S token slots, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vlaflow.errors import ConfigError


@dataclass(frozen=True)
class Decoding:
    """Chunks decoded from tokens.

    Args:
        action_BLD: float32, normalised, always finite.
        repaired_B: bool, chunks whose tokens were not a valid encoding, repaired by the tokenizer's rules.
    """

    action_BLD: np.ndarray
    repaired_B: np.ndarray


class Tokenizer(Protocol):
    """A fitted tokenizer."""

    @property
    def chunk_size(self) -> int:
        """Actions per chunk, L."""

    @property
    def dim(self) -> int:
        """Action dimensions, D."""

    @property
    def slots(self) -> int:
        """Tokens per chunk, including end tokens as padding, S."""

    @property
    def vocabulary(self) -> int:
        """Number of ids, including the end token if there is one; ids are 0 … vocabulary − 1."""

    @property
    def end(self) -> int | None:
        """Id of the end token, the last one; None for tokenizers whose sequences all have the same length."""

    @property
    def local(self) -> bool:
        """Whether slot s belongs to action s // D alone, so that single actions can be fixed or regenerated."""

    @property
    def ordered(self) -> bool:
        """Whether neighbouring ids stand for neighbouring values, so that their difference is a distance."""

    @property
    def values_SV(self) -> np.ndarray | None:
        """What each id stands for in each slot, float64, ascending in V; None for ids without an order."""

    @property
    def description(self) -> str:
        """A name for tables: "FAST, scale 10, 256 ids" or "64 bins"."""

    def encode(self, action_BLD: np.ndarray) -> np.ndarray:
        """Encode chunks: ids, int64 (B, S)."""

    def decode(self, id_BS: np.ndarray) -> Decoding:
        """Decode any ids, including those that are not the encoding of a chunk."""

    def exact(self, action_BLD: np.ndarray) -> np.ndarray:
        """bool (B,): chunks that lose nothing but the rounding."""

    def lengths(self, id_BS: np.ndarray) -> np.ndarray:
        """Number of tokens before the end, int64 (B,)."""


def check_chunks(action_BLD: np.ndarray, chunk_size: int, dim: int) -> np.ndarray:
    """Check chunks and return them as float64.

    Raises:
        ConfigError: for another shape or values that are not finite.
    """
    if action_BLD.ndim != 3 or action_BLD.shape[1:] != (chunk_size, dim):
        raise ConfigError(
            f"This action tokenizer is for chunks of {chunk_size} actions of {dim} dimensions, got shape {action_BLD.shape}. "
            "Fit one for this chunk size: vlaflow data fit-tokenizer."
        )
    if not np.isfinite(action_BLD).all():
        raise ConfigError("A chunk to be tokenised contains a value that is not finite.")
    return action_BLD.astype(np.float64)
