"""An exponential moving average of the weights: what checkpoints hold and validation measures.

The average of the last few hundred steps is worth several points of success to a policy trained with a high learning
rate, for one multiply-add per weight and step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """avg ← avg + (1 − d)·(weight − avg) over the parameters that train.

    Args:
        module: its trainable parameters are averaged; buffers and frozen parameters are left alone.
        decay: largest d; the average looks back about 1/(1 − d) steps.
        warm_up: use min(decay, (1 + n)/(10 + n)) after n updates, so that the random first weights are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float, warm_up: bool = True) -> None:
        self.decay, self.warm_up, self.updates = decay, warm_up, 0
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._names = list(trained)
        self._weights: list[Tensor] = list(trained.values())
        self._average = [p.detach().clone() for p in self._weights]

    def decay_at(self, updates: int) -> float:
        """The decay of the update that follows ``updates`` earlier ones."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warm_up else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Take in the current weights."""
        torch._foreach_lerp_(self._average, self._weights, 1 - self.decay_at(self.updates))
        self.updates += 1

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the average into the module and keep its weights here; a second call undoes it to the bit."""
        for average, weight in zip(self._average, self._weights, strict=True):  # one copy at a time, not a second model
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)

    @contextmanager
    def in_module(self) -> Iterator[None]:
        """The module holds the average inside the ``with`` block."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def named(self) -> dict[str, Tensor]:
        """The average by parameter name, as it is: on its device, sharded as the parameters are."""
        return dict(zip(self._names, self._average, strict=True))
