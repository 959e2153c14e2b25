"""Multi-exit training: at which depths a network learns to answer (A1 §3.2), and what spares the deepest one.

Depth counts layers that have run: A1's layer index 27 is depth 28. A1's exits share one head, and their losses train the same
layers. A small network then answers worse at full depth (docs/log.md). Heads of their own, losses that stop at the head
(``detached``) and answers learned from the last exit (``distil``) are ours.

Shape letters: B batch, T suffix tokens, W width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from vlaflow.decoders.losses import LossTerms
from vlaflow.errors import ConfigError
from vlaflow.nn.resnet import ResidualMLP
from vlaflow.ranges import Number


@dataclass(frozen=True)
class ExitTraining:
    """Where and how exits are trained.

    Args:
        depths: ascending; the last is the backbone's own depth.
        choose: "all" takes the mean loss over the depths, in one pass; "random" trains one depth a step, the same on every
            process, and runs no layer beyond it. A1's code has both and its paper does not say which one made its numbers.
        shallow: with "all", the share of the loss that the depths before the last have together; None counts all alike, as A1
            does. Small networks learn less at full depth when shallow answers count as much (docs/log.md).
        own_heads: residual layers of the head that each depth before the last has of its own; 0 for the head of the last.
        detached: the losses of the depths before the last train their own heads alone, so that all other weights learn what
            they would without exits.
        distil: with "all", the depths before the last learn the answer of the last instead of the data's.
    """

    depths: tuple[int, ...]
    choose: Literal["all", "random"] = "all"
    shallow: float | None = None
    own_heads: Number = 0
    detached: bool = False
    distil: bool = False

    def __post_init__(self) -> None:
        if not self.depths or self.depths[0] < 1 or list(self.depths) != sorted(set(self.depths)):
            raise ConfigError(f"Exit depths count layers and must ascend from at least 1, got {list(self.depths)}.")
        if self.shallow is not None and not (0 <= self.shallow < 1 and self.choose == "all"):
            raise ConfigError(f"shallow is a share in [0, 1) and goes with choose='all', got {self.shallow}.")
        if self.detached and not self.own_heads:
            raise ConfigError("detached exits train nothing but heads of their own; set own_heads to at least 1.")
        if self.detached and self.shallow is not None:
            raise ConfigError(
                "shallow weighs losses that train the same weights, which those of detached exits do not; leave it out."
            )
        if self.choose == "random" and (self.distil or self.detached):
            raise ConfigError("distil and detached compare every depth with the last; they go with choose='all'.")

    @property
    def alike(self) -> bool:
        """Whether all depths have the same head and learn the same, as in A1."""
        return not (self.own_heads or self.distil)

    def draw(self, shared: Generator) -> tuple[int, ...]:
        """The depth that a step trains, nothing where it trains all; evaluation does without it."""
        if self.choose == "all":
            return ()
        return (self.depths[int(torch.randint(len(self.depths), (), generator=shared))],)

    def losses(
        self,
        hidden: Sequence[Tensor],
        depths: Sequence[int],
        answer: Callable[[Tensor, int], Tensor],
        loss: Callable[[Tensor, Tensor], Tensor],
        target: Tensor,
        *,
        training: bool,
    ) -> dict[int, Tensor]:
        """The loss at each depth.

        Args:
            hidden: hidden states at each of ``depths``, which ascend.
            depths: the last may be shallower than the backbone's, where a step trains one depth.
            answer: what the head of a depth makes of hidden states.
            loss: of an answer, given what it should be.
            target: what the data says.
            training: whether answers may be learned from the last depth's; validation compares all of them with the data.
        """
        last = self.depths[-1]
        kept = [h.detach() if self.detached and depth < last else h for h, depth in zip(hidden, depths, strict=True)]
        made = [answer(h, depth) for h, depth in zip(kept, depths, strict=True)]
        taught = made[-1].detach() if training and self.distil and depths[-1] == last else target
        return {depth: loss(each, taught if depth < last else target) for each, depth in zip(made, depths, strict=True)}

    def total(self, terms: LossTerms) -> LossTerms:
        """The loss of all exits, weighted; detached ones train separate weights and count in full."""
        if len(terms.exits) < 2 or (self.shallow is None and not self.detached):
            return terms
        *before, last = terms.exits.values()
        if self.shallow is None:
            return terms.answering(last + torch.stack(before).sum())
        return terms.answering((1 - self.shallow) * last + self.shallow * torch.stack(before).mean())


class ExitHeads(nn.Module):
    """The heads that the depths before the last have of their own.

    Args:
        exits: says at which depths, and with how many layers.
        width: of the hidden states that a head reads.
        hidden: inner width.
        out: numbers that it makes.
    """

    def __init__(self, exits: ExitTraining, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.at = nn.ModuleDict({f"{depth}": ResidualMLP(width, hidden, out, exits.own_heads) for depth in exits.depths[:-1]})

    def __contains__(self, depth: int) -> bool:
        return f"{depth}" in self.at

    def forward(self, hidden_BTW: Tensor, depth: int) -> Tensor:
        """Answers (B, T, out) at one of its depths."""
        made: Tensor = self.at[f"{depth}"](hidden_BTW)
        return made


def every(step: int, depth: int) -> tuple[int, ...]:
    """Every so many layers, and the deepest always: with 2 of 28 it is 2, 4, …, 28, which are A1's layers 1, 3, …, 27."""
    return tuple(sorted({*range(step, depth + 1, step), depth}))
