"""The contract of an action tokenizer, and what a fitted one promises.

A tokenizer works on normalised chunks (L, D) and fills a fixed number of slots; what a sequence does not need of them is
taken by the end token. It is a frozen dataclass of plain numbers: saved in a checkpoint's config.json or in a file of its own,
the same ids on every run. ``fast.py`` and ``bins.py`` hold the two kinds, ``files.py`` reads and writes them.

Shape letters: B batch, L chunk size, D action dimension, S token slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vlaflow.errors import ConfigError


@dataclass(frozen=True)
class Decoding:
    """Chunks made of tokens.

    Args:
        action_BLD: float32, normalised, always finite.
        repaired_B: bool, chunks whose tokens did not describe one exactly, made by the tokenizer's stated rule.
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
        """Tokens per chunk with the end tokens that fill it up, S."""

    @property
    def vocabulary(self) -> int:
        """Number of ids, the end token included where there is one; ids are 0 … vocabulary − 1."""

    @property
    def end(self) -> int | None:
        """Id of the end token, the last one; None for tokenizers whose sequences all have the same length."""

    @property
    def local(self) -> bool:
        """Whether slot s belongs to action s // D alone, so that single actions can be given or regenerated."""

    @property
    def ordered(self) -> bool:
        """Whether neighbouring ids mean neighbouring values, so that their difference is a distance."""

    def encode(self, action_BLD: np.ndarray) -> np.ndarray:
        """Ids, int64 (B, S)."""

    def decode(self, id_BS: np.ndarray) -> Decoding:
        """Chunks of any ids, also of ones that no chunk encodes to."""


def check_chunks(action_BLD: np.ndarray, chunk_size: int, dim: int) -> np.ndarray:
    """The chunks as float64.

    Raises:
        ConfigError: for another shape or values that are not finite.
    """
    if action_BLD.ndim != 3 or action_BLD.shape[1:] != (chunk_size, dim):
        raise ConfigError(
            f"This action tokenizer is for chunks of {chunk_size} actions of {dim} dimensions, got shape {action_BLD.shape}. "
            "Fit one for this chunk size: vlaflow data fit-tokenizer."
        )
    if not np.isfinite(action_BLD).all():
        raise ConfigError("A chunk to be tokenised holds a value that is not finite.")
    return action_BLD.astype(np.float64)
