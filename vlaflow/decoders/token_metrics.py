"""Distances between tokens, along which the metric path of a discrete flow moves.

Between embeddings, between ids, or between the values that ids stand for in each slot. The tensors are computed in
``flows.metrics``.

Shape letters: N chunks, L chunk size, D action dimension, S token slots, V vocabulary, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from vlaflow.actions.base import Tokenizer
from vlaflow.errors import ConfigError
from vlaflow.flows import metrics


class TokenMetric(ABC):
    """The distance between tokens along which the metric path moves. A kind is a frozen dataclass.

    Attributes:
        ordered: whether it needs a tokenizer whose ids are ordered by value.
    """

    ordered: bool = False

    @property
    def frozen(self) -> bool:
        """Whether distances are those of the embeddings before training."""
        return False

    @property
    def unfitted(self) -> bool:
        """Whether something is still to be fitted on the training data."""
        return False

    def fitted(self, tokenizer: Tokenizer, action_NLD: np.ndarray) -> Self:
        """The metric with what it needs to know of the training data; by default nothing.

        Args:
            tokenizer: a fitted one.
            action_NLD: normalised chunks.
        """
        return self

    @abstractmethod
    def distance(self, table_VW: Tensor, tokenizer: Tokenizer) -> Tensor:
        """d between all tokens, (V, V), or (S, V, V) where slots differ, given their embeddings."""


@dataclass(frozen=True)
class EmbeddingMetric(TokenMetric):
    """Distances of the tokens' embeddings, mean 1 off the diagonal.

    Args:
        table: "live" follows the embeddings as they train (without a gradient); "frozen" keeps those of the start.
        power: of the Euclidean distance of the unit-norm rows; the larger, the earlier the chain arrives.
    """

    table: Literal["live", "frozen"] = "live"
    power: metrics.Power = 2

    @property
    def frozen(self) -> bool:
        """See ``TokenMetric``."""
        return self.table == "frozen"

    def distance(self, table_VW: Tensor, tokenizer: Tokenizer) -> Tensor:
        """See ``TokenMetric``."""
        return metrics.embedding_distance(table_VW, self.power)


@dataclass(frozen=True)
class BinMetric(TokenMetric):
    """Differences of ordered ids (bins, or FAST without merges), mean 1 off the diagonal.

    Args:
        power: of the difference.
    """

    power: metrics.Power = 1

    ordered = True

    def distance(self, table_VW: Tensor, tokenizer: Tokenizer) -> Tensor:
        """See ``TokenMetric``."""
        return metrics.bin_distance(len(table_VW), power=self.power).to(table_VW.device)


@dataclass(frozen=True)
class SlotMetric(TokenMetric):
    """Differences of the values that ordered ids stand for, in units of each slot's spread in the training data.

    With ``BinMetric`` the noise of one clock is as wide in a coefficient of the highest frequency, which hardly varies, as in
    that of the lowest; here it is as wide compared with the data.

    Args:
        power: of the difference.
        spread: mean difference of two training chunks in each slot; None until it is fitted.
    """

    power: metrics.Power = 1
    spread: tuple[float, ...] | None = field(default=None, repr=False)

    ordered = True

    @property
    def unfitted(self) -> bool:
        """See ``TokenMetric``."""
        return self.spread is None

    def fitted(self, tokenizer: Tokenizer, action_NLD: np.ndarray) -> SlotMetric:
        """See ``TokenMetric``."""
        if self.spread is not None:
            return self
        id_NS, value_SV = tokenizer.encode(action_NLD), _values(self, tokenizer)
        value_NS = value_SV[np.arange(tokenizer.slots), id_NS]
        return replace(self, spread=tuple(metrics.mean_difference(torch.from_numpy(value_NS)).tolist()))

    def distance(self, table_VW: Tensor, tokenizer: Tokenizer) -> Tensor:
        """See ``TokenMetric``; (S, V, V)."""
        spread_S = torch.tensor(self.spread or (), dtype=torch.float64)
        if len(spread_S) != tokenizer.slots:
            raise ConfigError(
                f"A SlotMetric of {len(spread_S)} slots does not fit a tokenizer of {tokenizer.slots}. Leave spread out; "
                "training fits it."
            )
        return metrics.line_distance(torch.from_numpy(_values(self, tokenizer)), spread_S, self.power).to(table_VW.device)


def _values(metric: TokenMetric, tokenizer: Tokenizer) -> np.ndarray:
    """The values of an ordered tokenizer's ids.

    Raises:
        ConfigError: it is not ordered.
    """
    require_order(metric, tokenizer)
    assert tokenizer.values_SV is not None
    return tokenizer.values_SV


def require_order(metric: TokenMetric, tokenizer: Tokenizer) -> None:
    """Refuse a metric that needs ordered ids for a tokenizer that has none.

    Raises:
        ConfigError: saying what fits.
    """
    if metric.ordered and not tokenizer.ordered:
        raise ConfigError(
            f"{type(metric).__name__} needs a tokenizer whose ids are ordered: use bins, FAST without merges, or "
            "EmbeddingMetric."
        )
