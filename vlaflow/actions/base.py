"""The interface of an action tokenizer.

A tokenizer maps normalised chunks (L, D) to a fixed number of token slots; unused slots contain the end token. It is a frozen
dataclass of plain numbers, saved in a checkpoint's config.json or in its own file, and gives the same ids in every run.
``fast.py``, ``published_fast.py`` and ``bins.py`` contain ours, other distributions may bring more (``registry``), and
``io.py`` reads and writes them all.

Shape letters: B batch, L chunk size, D action dimension, S token slots, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from vlaflow.errors import ConfigError
from vlaflow.registry import Group, Part


@dataclass(frozen=True)
class Decoding:
    """Chunks decoded from tokens.

    Args:
        action_BLD: float32, normalised, always finite.
        repaired_B: bool, chunks whose tokens were not a valid encoding, repaired by the tokenizer's rules.
    """

    action_BLD: np.ndarray
    repaired_B: np.ndarray


class TokenizerConfig(Part, ABC):
    """An action tokenizer in a config: fitted, or to be fitted by training.

    A kind is a frozen dataclass, registered by its class's name under ``vlaflow.tokenizers``. Those to be fitted derive from
    this class, the fitted ones from ``Tokenizer``.
    """

    group: ClassVar[Group] = "tokenizers"

    @property
    def fitted(self) -> Tokenizer | None:
        """The fitted tokenizer; None while it is to be fitted."""
        return None

    @abstractmethod
    def fit(self, action_NLD: np.ndarray) -> Tokenizer:
        """The tokenizer for N normalised chunks."""


class Tokenizer(TokenizerConfig):
    """A fitted tokenizer."""

    if TYPE_CHECKING:  # fields in some kinds, properties in others; a property here would be taken for a field's default

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
    def fitted(self) -> Self:
        """Itself."""
        return self

    def fit(self, action_NLD: np.ndarray) -> Self:
        """Itself: it is fitted already."""
        return self

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Number of ids, including the end token if there is one; ids are 0 … vocabulary − 1."""

    @property
    @abstractmethod
    def description(self) -> str:
        """A name for tables: "FAST, scale 10, 256 ids" or "64 bins"."""

    @property
    def end(self) -> int | None:
        """Id of the end token, the last one; None for tokenizers whose sequences all have the same length."""
        return None

    @property
    def local(self) -> bool:
        """Whether slot s belongs to action s // D alone, so that single actions can be fixed or regenerated."""
        return False

    @property
    def ordered(self) -> bool:
        """Whether neighbouring ids stand for neighbouring values, so that their difference is a distance."""
        return False

    @property
    def values_SV(self) -> np.ndarray | None:
        """What each id stands for in each slot, float64, ascending in V; None for ids without an order."""
        return None

    @abstractmethod
    def encode(self, action_BLD: np.ndarray) -> np.ndarray:
        """Encode chunks: ids, int64 (B, S), padded with end tokens."""

    @abstractmethod
    def decode(self, id_BS: np.ndarray) -> Decoding:
        """Decode any ids, including those that are not the encoding of a chunk."""

    @abstractmethod
    def exact(self, action_BLD: np.ndarray) -> np.ndarray:
        """bool (B,): chunks that lose nothing but the rounding."""

    def lengths(self, id_BS: np.ndarray) -> np.ndarray:
        """Number of tokens before the end, int64 (B,)."""
        if self.end is None:
            return np.full(len(id_BS), id_BS.shape[1])
        ended_BS = id_BS == self.end
        return np.where(ended_BS.any(1), ended_BS.argmax(1), id_BS.shape[1])


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
