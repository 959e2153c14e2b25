"""Bins: every number of a chunk becomes the index of its interval, uniform or by quantiles, per dimension.

Slot l·D + d holds the bin of dimension d of action l. All dimensions share the ids 0 … bins − 1, in ascending order, so the
difference of two ids is a distance. Values outside the outer edges go to the outer bins.

Shape letters: B batch, L chunk size, D action dimension, S token slots, K bins, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from vlaflow.actions.base import Decoding, Tokenizer, TokenizerConfig, check_chunks
from vlaflow.errors import ConfigError


@dataclass(frozen=True)
class BinsFit(TokenizerConfig):
    """Settings for fitting a ``BinsTokenizer``.

    Args:
        bins: number of intervals per dimension, K.
        spacing: "uniform" between the smallest and the largest value, or "quantile" with equally many values in each.
    """

    bins: int = 64
    spacing: Literal["uniform", "quantile"] = "uniform"

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ConfigError(f"A tokenizer needs at least 2 bins, got {self.bins}.")

    def fit(self, action_NLD: np.ndarray) -> BinsTokenizer:
        """Fit the edges to N normalised chunks."""
        chunk_size, dim = action_NLD.shape[1:]
        value_ND = check_chunks(action_NLD, chunk_size, dim).reshape(-1, dim)
        share_K1 = np.linspace(0, 1, self.bins + 1)
        edges, centres = [], []
        for value_N in value_ND.T:
            low, high = value_N.min(), value_N.max()
            even_K1 = low + (high - low) * share_K1
            edge_K1 = even_K1 if self.spacing == "uniform" else _quantile_edges(value_N, self.bins)
            edges.append(tuple(edge_K1.tolist()))
            centres.append(_centres(value_N, edge_K1, self.spacing))
        return BinsTokenizer(chunk_size, dim, tuple(edges), tuple(centres))


@dataclass(frozen=True)
class BinsTokenizer(Tokenizer):
    """A tokenizer with one bin per number; see the module docstring.

    Args:
        chunk_size, dim: L and D.
        edges: D rows of K + 1 ascending numbers, the outer ones included.
        centres: D rows of the K values that the ids decode to.
    """

    chunk_size: int
    dim: int
    edges: tuple[tuple[float, ...], ...] = field(repr=False)
    centres: tuple[tuple[float, ...], ...] = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.edges) != self.dim or len(self.centres) != self.dim:
            raise ConfigError(f"A bins tokenizer of {self.dim} dimensions needs as many rows of edges and of centres.")
        if any(len(e) != len(c) + 1 for e, c in zip(self.edges, self.centres, strict=True)):
            raise ConfigError("Every dimension needs one edge more than bins.")

    @property
    def description(self) -> str:
        """A name for tables."""
        return f"{self.bins} bins"

    @property
    def bins(self) -> int:
        """Number of intervals per dimension, K."""
        return len(self.centres[0])

    @property
    def vocabulary(self) -> int:
        """Number of ids, K."""
        return self.bins

    @property
    def slots(self) -> int:
        """Tokens per chunk, L·D."""
        return self.chunk_size * self.dim

    @property
    def local(self) -> bool:
        """True: every slot belongs to one action."""
        return True

    @property
    def ordered(self) -> bool:
        """True: ids ascend with their values."""
        return True

    @property
    def values_SV(self) -> np.ndarray:
        """The centres of each slot's dimension."""
        return np.tile(self._centres, (self.chunk_size, 1))

    def encode(self, action_BLD: np.ndarray) -> np.ndarray:
        """Encode chunks: ids, int64 (B, L·D)."""
        action_BLD = check_chunks(action_BLD, self.chunk_size, self.dim)
        columns = [np.searchsorted(edge_K1[1:-1], action_BLD[..., d], "right") for d, edge_K1 in enumerate(self._edges)]
        return np.stack(columns, -1).reshape(len(action_BLD), -1).astype(np.int64)

    def decode(self, id_BS: np.ndarray) -> Decoding:
        """Decode to bin centres; every id is valid, so nothing is ever repaired."""
        id_BLD = id_BS.reshape(len(id_BS), self.chunk_size, self.dim)
        action_BLD = self._centres[np.arange(self.dim), id_BLD]  # (D, K) by (D,) and (B, L, D)
        return Decoding(action_BLD.astype(np.float32), np.zeros(len(id_BS), bool))

    def exact(self, action_BLD: np.ndarray) -> np.ndarray:
        """bool (B,), True: every value is rounded to a bin, those beyond the edges to an outer one."""
        return np.ones(len(action_BLD), bool)

    @property
    def error_bound(self) -> tuple[float, ...]:
        """Largest error per dimension of a value between the outer edges: the distance from a centre to an edge."""
        far = np.maximum(self._centres - self._edges[:, :-1], self._edges[:, 1:] - self._centres)
        return tuple(far.max(1).tolist())

    @cached_property
    def _edges(self) -> np.ndarray:
        return np.array(self.edges)

    @cached_property
    def _centres(self) -> np.ndarray:
        return np.array(self.centres)


def _quantile_edges(value_N: np.ndarray, bins: int) -> np.ndarray:
    """Edges halfway between neighbouring values, such that counts are as equal as possible.

    A value that occurs often is never split between bins: an edge lies next to it, and bins may remain empty.
    """
    value_U, count_U = np.unique(value_N, return_counts=True)
    if len(value_U) == 1:
        return np.full(bins + 1, value_U[0])
    below_U = count_U.cumsum()[:-1]
    wanted_K = np.arange(1, bins) * len(value_N) / bins
    place_K = np.clip(np.searchsorted(below_U, wanted_K), 1, max(len(below_U) - 1, 1))
    nearer_K = np.where(wanted_K - below_U[place_K - 1] <= below_U[np.minimum(place_K, len(below_U) - 1)] - wanted_K, 1, 0)
    place_K = np.minimum(place_K - nearer_K, len(below_U) - 1)
    inner = (value_U[place_K] + value_U[place_K + 1]) / 2
    return np.concatenate((value_U[:1], inner, value_U[-1:]))


def _centres(value_N: np.ndarray, edge_K1: np.ndarray, spacing: str) -> tuple[float, ...]:
    """Midpoints, or for quantiles the mean of the values in each bin, because much of the data may lie on one edge."""
    centre_K = (edge_K1[:-1] + edge_K1[1:]) / 2
    if spacing == "quantile":
        place_N = np.searchsorted(edge_K1[1:-1], value_N, "right")
        count_K = np.bincount(place_N, minlength=len(centre_K))
        sum_K = np.bincount(place_N, value_N, minlength=len(centre_K))
        centre_K = np.where(count_K > 0, sum_K / np.maximum(count_K, 1), centre_K)
    return tuple(centre_K.tolist())
