"""FAST: a cosine transform along time, rounding, and byte-pair encoding (Pertsch et al. 2025).

    coefficients = round(scale · DCT-II(chunk))          orthonormal, along time, per dimension
    sequence     = low frequencies of all dimensions first, one symbol per coefficient
    ids          = byte-pair encoding of the sequence, learned on training chunks; then end tokens up to the slots

Ids 0 … symbols − 1 are single coefficients, merged ids follow in the order in which they were learned, the end token is
last. Neighbouring merged ids have nothing in common, and changing one id may shift all later coefficients.
Without merges every token is one coefficient, ids are ordered, and all sequences have the same length.

Inexact cases follow rules, and are counted: coefficients outside the fitted range are clipped; a sequence longer than the
slots loses its end (the highest frequencies); when decoding, missing coefficients are 0 and surplus ones are dropped.

Shape letters: B batch, L chunk size, D action dimension, S token slots, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from vlaflow.actions.base import Decoding, Tokenizer, TokenizerConfig, check_chunks
from vlaflow.errors import ConfigError
from vlaflow.ranges import Positive

FIRST = 0x4E00
"""Code point of symbol 0; the following ones are all letters, without special treatment in text tokenizers."""
MOST = 20_000
"""Number of such code points from ``FIRST``."""


@dataclass(frozen=True)
class FastFit(TokenizerConfig):
    """Settings for fitting a ``FastTokenizer``.

    Args:
        scale: rounding units per normalised unit; larger is finer and longer. (π0-FAST 10; UD-VLA 50 on chunks of 10.)
        vocabulary: number of symbols and merges, without the end token; None for no merges: every coefficient is a token.
    """

    scale: Positive = 10.0
    vocabulary: int | None = 1024

    def __post_init__(self) -> None:
        if not self.scale > 0 or (self.vocabulary is not None and self.vocabulary < 2):
            raise ConfigError(
                f"FAST needs a scale above 0 and a vocabulary of at least 2, got {self.scale} and {self.vocabulary}."
            )

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages needed for fitting."""
        return () if self.vocabulary is None else ("tokenizers",)

    def fit(self, action_NLD: np.ndarray) -> FastTokenizer:
        """Fit a tokenizer to N normalised chunks; the same chunks give the same tokenizer.

        Raises:
            ConfigError: the range of the coefficients does not fit into the vocabulary.
        """
        chunk_size, dim = action_NLD.shape[1:]
        coefficient_NC = _coefficients(check_chunks(action_NLD, chunk_size, dim), self.scale)
        low, high = int(coefficient_NC.min()), int(coefficient_NC.max())
        symbols = high - low + 1
        if symbols > min(self.vocabulary or MOST, MOST):
            raise ConfigError(
                f"These chunks have coefficients from {low} to {high}, which do not fit into a vocabulary of "
                f"{self.vocabulary or MOST}. Lower the scale ({self.scale:g}) or raise the vocabulary."
            )
        if self.vocabulary is None:
            return FastTokenizer(chunk_size, dim, self.scale, low, symbols, (), slots=chunk_size * dim)
        texts = [_text(row_C - low) for row_C in coefficient_NC]
        merges = _learn(texts, symbols, self.vocabulary)
        learned = FastTokenizer(chunk_size, dim, self.scale, low, symbols, merges, slots=chunk_size * dim + 1)
        longest = max(len(row.ids) for row in learned._bpe.encode_batch(texts))
        return FastTokenizer(chunk_size, dim, self.scale, low, symbols, merges, slots=longest + 1)


class CosineTokenizer(Tokenizer):
    """What tokenizers of cosine coefficients share: transform, padding, repairs.

    Attributes:
        chunk_size, dim: L and D.
        scale: rounding units per normalised unit.
        low: coefficient of symbol 0.
        symbols: coefficients low … low + symbols − 1 can be encoded.
        slots: tokens per chunk, including the end token, S.
    """

    chunk_size: int
    dim: int
    scale: float
    low: int
    symbols: int
    slots: int

    @abstractmethod
    def encoded(self, symbol_BC: np.ndarray) -> list[list[int]]:
        """Ids of sequences of symbols, without end tokens; symbols that cannot be encoded are clipped."""

    @abstractmethod
    def decoded(self, ids: list[int]) -> list[int]:
        """Symbols of ids."""

    def coefficients(self, action_BLD: np.ndarray) -> np.ndarray:
        """Rounded coefficients, int64 (B, L·D), low frequencies of all dimensions first."""
        return _coefficients(check_chunks(action_BLD, self.chunk_size, self.dim), self.scale)

    def encode(self, action_BLD: np.ndarray) -> np.ndarray:
        """Encode chunks: ids, int64 (B, S), padded with end tokens."""
        id_BS = np.full((len(action_BLD), self.slots), self.end or 0, np.int64)
        for row, ids in enumerate(self.encoded(self.coefficients(action_BLD) - self.low)):
            kept = ids[: self.slots]
            id_BS[row, : len(kept)] = kept
        return id_BS

    def exact(self, action_BLD: np.ndarray) -> np.ndarray:
        """bool (B,): chunks that lose nothing but the rounding (all coefficients in the fitted range, and enough slots)."""
        symbol_BC = self.coefficients(action_BLD) - self.low
        inside_B = np.asarray(((symbol_BC >= 0) & (symbol_BC < self.symbols)).all(1))
        fits_B = np.array([len(ids) <= self.slots for ids in self.encoded(symbol_BC)], bool)
        return inside_B & fits_B

    def decode(self, id_BS: np.ndarray) -> Decoding:
        """Decode any ids; ids after the first end token are ignored."""
        from scipy.fft import idct

        wanted = self.chunk_size * self.dim
        coefficient_BC = np.zeros((len(id_BS), wanted))
        repaired_B = np.zeros(len(id_BS), bool)
        for row, (ids, length) in enumerate(zip(id_BS.tolist(), self.lengths(id_BS).tolist(), strict=True)):
            found = self.decoded(ids[:length])
            repaired_B[row] = len(found) != wanted
            kept = found[:wanted]
            coefficient_BC[row, : len(kept)] = np.add(kept, self.low)
        spectrum_BLD = coefficient_BC.reshape(-1, self.chunk_size, self.dim) / self.scale
        return Decoding(idct(spectrum_BLD, axis=1, norm="ortho").astype(np.float32), repaired_B)

    @property
    def error_bound(self) -> float:
        """Largest root mean square error per dimension of a chunk for which ``exact`` is true: half a unit per coefficient."""
        return 0.5 / self.scale


@dataclass(frozen=True)
class FastTokenizer(CosineTokenizer):
    """A fitted FAST tokenizer; see the module docstring.

    Args:
        chunk_size, dim: L and D.
        scale: rounding units per normalised unit.
        low: coefficient of symbol 0.
        symbols: coefficients low … low + symbols − 1 have ids of their own.
        merges: pairs of ids, in the order learned.
        slots: tokens per chunk, including the end token, S.
    """

    chunk_size: int
    dim: int
    scale: float
    low: int
    symbols: int
    merges: tuple[tuple[int, int], ...] = field(repr=False)
    slots: int = 64

    @property
    def description(self) -> str:
        """A name for tables; the end token does not count as an id."""
        kind, ids = ("FAST", f", {self.vocabulary - 1} ids") if self.merges else ("coefficients", "")
        return f"{kind}, scale {self.scale:g}{ids}"

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages needed for encoding."""
        return ("tokenizers",) if self.merges else ()

    @property
    def vocabulary(self) -> int:
        """Number of ids: symbols, distinct merged tokens, and the end token."""
        return len(self._pieces) + (self.end is not None)

    @property
    def end(self) -> int | None:
        """The last id; None without merges, because then every sequence has one token per coefficient."""
        return len(self._pieces) if self.merges else None

    @property
    def ordered(self) -> bool:
        """Whether ids ascend with their values: true for coefficients, not for merges."""
        return not self.merges

    @property
    def values_SV(self) -> np.ndarray | None:
        """The coefficients themselves, without merges."""
        return None if self.merges else np.tile((self.low + np.arange(self.symbols)) / self.scale, (self.slots, 1))

    def encoded(self, symbol_BC: np.ndarray) -> list[list[int]]:
        """See the base class."""
        symbol_BC = np.clip(symbol_BC, 0, self.symbols - 1)
        if not self.merges:
            return symbol_BC.tolist()
        return [row.ids for row in self._bpe.encode_batch([_text(row_C) for row_C in symbol_BC])]

    def decoded(self, ids: list[int]) -> list[int]:
        """See the base class."""
        return [symbol for id_ in ids for symbol in self._pieces[id_]]

    @cached_property
    def _pieces(self) -> list[tuple[int, ...]]:
        """The symbols of each id; a merge that repeats an earlier string shares its id."""
        pieces: list[tuple[int, ...]] = [(symbol,) for symbol in range(self.symbols)]
        known = set(pieces)
        for left, right in self.merges:
            merged = pieces[left] + pieces[right]
            if merged not in known:
                known.add(merged)
                pieces.append(merged)
        return pieces

    @cached_property
    def _bpe(self) -> Any:
        from tokenizers import Tokenizer as Library
        from tokenizers.models import BPE

        texts = [_text(np.array(piece)) for piece in self._pieces]
        pairs = [(texts[left], texts[right]) for left, right in self.merges]
        return Library(BPE(vocab={text: number for number, text in enumerate(texts)}, merges=pairs))


def _coefficients(action_BLD: np.ndarray, scale: float) -> np.ndarray:
    """Rounded coefficients, int64 (B, L·D), low frequencies of all dimensions first."""
    from scipy.fft import dct

    return np.rint(scale * dct(action_BLD, axis=1, norm="ortho")).astype(np.int64).reshape(len(action_BLD), -1)


def _text(symbol_C: np.ndarray) -> str:
    return "".join(map(chr, (symbol_C + FIRST).tolist()))


def _learn(texts: list[str], symbols: int, vocabulary: int) -> tuple[tuple[int, int], ...]:
    """Learn the merges, as pairs of ids."""
    import json

    from tokenizers import Tokenizer as Library
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    library = Library(BPE())
    alphabet = [chr(FIRST + symbol) for symbol in range(symbols)]
    library.train_from_iterator(texts, BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False))
    ids = {text: number for number, text in enumerate(alphabet)}
    merges = []
    for left, right in json.loads(library.to_str())["model"]["merges"]:
        merges.append((ids[left], ids[right]))
        ids.setdefault(left + right, len(ids))
    return tuple(merges)
