"""What a training loss consists of: the random numbers it needs, and its terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Draws = tuple[Tensor, ...]
"""Random numbers of a training loss; each decoder knows what its own are."""


@dataclass(frozen=True)
class LossTerms:
    """A training loss.

    Args:
        total: the mean of ``exits``, where there are any, and ``auxiliary``.
        parts: named parts, detached, for the log.
        exits: loss of each depth that answers.
        auxiliary: auxiliary losses, which belong to no depth.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    exits: Mapping[int, Tensor] = field(default_factory=dict)
    auxiliary: Tensor | None = None

    def answering(self, answers: Tensor) -> LossTerms:
        """The same with another loss of the answers in place of the mean of the exits."""
        return replace(self, total=answers if self.auxiliary is None else answers + self.auxiliary)


def mean_over_exits(name: str, losses: Mapping[int, Tensor]) -> LossTerms:
    """One loss from those of several depths; each is named in the parts where there is more than one."""
    total = torch.stack(tuple(losses.values())).mean()
    deepest = losses[max(losses)].detach()
    parts = {f"{name}@{depth}": loss.detach() for depth, loss in losses.items()} if len(losses) > 1 else {}
    return LossTerms(total, {name: deepest, **parts}, losses)
