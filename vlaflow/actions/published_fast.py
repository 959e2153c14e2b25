"""A published FAST tokenizer, with its own merges: π0-FAST's universal one, or one that was fitted with its authors' code.

    processor_config.json     scale, min_token, vocab_size; action_dim and time_horizon, or null
    tokenizer.json            byte-pair encoding of the library tokenizers

A coefficient c is the character of code point c − min_token, and merges are of that character's bytes in UTF-8. (``fast``
merges whole coefficients instead, so no sequence of ids can end inside of one.) Code that comes with such a folder is not
looked at. Only the number of slots is measured on training chunks; the end token is ours, the id after the last published one.

Shape letters: B batch, N chunks, L chunk size, D action dimension, C coefficients (L·D).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlaflow.actions.base import TokenizerConfig
from vlaflow.actions.fast import CosineTokenizer
from vlaflow.errors import CheckpointError, ConfigError
from vlaflow.hub import download, hub_name
from vlaflow.io import read_json

UNIVERSAL = "physical-intelligence/fast"
SETTINGS, MERGES = "processor_config.json", "tokenizer.json"
LAST = 0xD7FF
"""The last code point before those that UTF-8 has no bytes for."""


@dataclass(frozen=True)
class PublishedFast(TokenizerConfig):
    """Settings for opening a published tokenizer.

    Args:
        source: folder or Hub name.
    """

    source: str = UNIVERSAL

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages needed for encoding."""
        return ("tokenizers",)

    def fit(self, action_NLD: np.ndarray) -> PublishedFastTokenizer:
        """The tokenizer, with as many slots as the longest of N normalised chunks needs and one for the end token.

        Raises:
            ConfigError: there is none, it is damaged, or for chunks of another size.
        """
        chunk_size, dim = action_NLD.shape[1:]
        opened = open_published(self.source, chunk_size, dim)
        longest = max(map(len, opened.encoded(opened.coefficients(action_NLD) - opened.low)))
        return replace(opened, slots=longest + 1)


@dataclass(frozen=True)
class PublishedFastTokenizer(CosineTokenizer):
    """A published tokenizer for chunks of one size; see the module docstring.

    Args:
        chunk_size, dim: L and D.
        scale: rounding units per normalised unit.
        low: min_token, the coefficient of code point 0.
        symbols: code points 0 … symbols − 1 have bytes that are all in the vocabulary.
        merges: ``tokenizer.json``.
        slots: tokens per chunk, including the end token, S.
    """

    chunk_size: int
    dim: int
    scale: float
    low: int
    symbols: int
    merges: str = field(repr=False)
    slots: int

    @property
    def description(self) -> str:
        """A name for tables; the end token does not count as an id."""
        return f"published FAST, scale {self.scale:g}, {self.end} ids"

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages needed for encoding."""
        return ("tokenizers",)

    @property
    def vocabulary(self) -> int:
        """Number of ids, with the end token."""
        return len(self._pieces) + 1

    @property
    def end(self) -> int:
        """The last id."""
        return len(self._pieces)

    def encoded(self, symbol_BC: np.ndarray) -> list[list[int]]:
        """See the base class."""
        texts = ["".join(map(chr, row_C)) for row_C in np.clip(symbol_BC, 0, self.symbols - 1).tolist()]
        return [row.ids for row in self._bpe.encode_batch(texts)]

    def decoded(self, ids: list[int]) -> list[int]:
        """See the base class; bytes that are no character are left out, which the number of symbols then shows."""
        return [ord(c) for c in b"".join(self._pieces[id_] for id_ in ids).decode(errors="ignore")]

    def encodable(self) -> int:
        """How many code points from 0 on have bytes that are all in the vocabulary."""
        known = {piece for piece in self._pieces if len(piece) == 1}
        unknown = (point for point in range(LAST + 1) if not all(bytes([byte]) in known for byte in chr(point).encode()))
        return next(unknown, LAST + 1)

    @cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes of each id."""
        by_character = {character: byte for byte, character in enumerate(_byte_characters())}
        ids = self._bpe.get_vocab()
        pieces = [b""] * (max(ids.values()) + 1)
        for text, id_ in ids.items():
            inside = all(character in by_character for character in text)
            pieces[id_] = bytes(by_character[character] for character in text) if inside else text.encode()
        return pieces

    @cached_property
    def _bpe(self) -> Any:
        from tokenizers import Tokenizer as Library

        return Library.from_str(self.merges)


def open_published(source: str, chunk_size: int, dim: int) -> PublishedFastTokenizer:
    """Open a published tokenizer for chunks of this size; its slots are one for each coefficient and the end token.

    Args:
        source: folder or Hub name.
        chunk_size, dim: L and D.

    Raises:
        ConfigError: there is none, it is damaged, or for chunks of another size.
        VlaflowError: see ``hub.hub_name`` and ``hub.download``.
    """
    folder = Path(source)
    if not folder.is_dir() and (name := hub_name(source, "action tokenizer")) is not None:
        folder = download(name, "action tokenizer", (SETTINGS, MERGES))[0]
    try:
        stated, text = read_json(folder / SETTINGS), json.dumps(read_json(folder / MERGES), ensure_ascii=False)
        scale, low = float(stated["scale"]), int(stated["min_token"])
        made = PublishedFastTokenizer(chunk_size, dim, scale, low, 1, text, slots=chunk_size * dim + 1)
        ids, made = made.end, replace(made, symbols=made.encodable())
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"'{source}' is no published FAST tokenizer ({error}). It holds {SETTINGS} and {MERGES}.") from error
    except Exception as error:  # the library raises nothing more precise
        raise ConfigError(f"{folder / MERGES} is no byte-pair encoding that can be read ({error}). Copy it again.") from error
    if not scale > 0 or stated.get("vocab_size", ids) != ids:
        raise ConfigError(
            f"{folder / SETTINGS} states a scale of {scale:g} and {stated.get('vocab_size')} ids, {MERGES} has {ids} ids; the "
            "two do not belong together. Copy the whole folder."
        )
    for key, own in (("time_horizon", chunk_size), ("action_dim", dim)):
        if stated.get(key) not in (None, own):
            raise ConfigError(
                f"'{source}' is for {key} = {stated[key]}, this policy needs {own}. Set it to null if it fits any."
            )
    return made


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself if it can be printed, else one from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
