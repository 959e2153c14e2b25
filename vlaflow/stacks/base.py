"""The contract of a stack: the network that moves suffix tokens through as many layers as the prefix has run.

Shape letters: B batch (observations × noise samples, samples innermost), T suffix tokens, W width of the stack.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from vlaflow.backbones.base import Backbone, Prefix


class Stack(nn.Module, ABC):
    """Reads the prefix's keys and values layer by layer; the prefix never sees the suffix."""

    width: int
    own_layers: ClassVar[bool] = False
    """Whether it runs layers of its own instead of the backbone's, so that nothing reads the backbone's last output."""

    @property
    def blocks(self) -> Mapping[nn.Module, str]:
        """Layers of its own, as ``Backbone.blocks``; none by default."""
        return {}

    @abstractmethod
    def exits(self, suffix_BTW: Tensor, prefix: Prefix, depths: Sequence[int]) -> list[Tensor]:
        """Suffix hidden states (B, T, W) after each of these depths, each with the final norm, in one pass.

        Args:
            suffix_BTW: embedded suffix tokens, in the number format that the hidden states come back in.
            prefix: observations, run through at least the deepest of ``depths``.
            depths: layers, ascending, at least 1.
        """

    def forward(self, suffix_BTW: Tensor, prefix: Prefix) -> Tensor:
        """Suffix hidden states after all layers that the prefix has run, with the final norm."""
        return self.exits(suffix_BTW, prefix, (prefix.depth,))[0]


def stacks_of(module: nn.Module) -> list[Stack]:
    """All stacks in a module."""
    return [part for part in module.modules() if isinstance(part, Stack)]


def blocks_of(module: nn.Module) -> dict[nn.Module, str]:
    """The layers of all backbones and stacks in a module, each with the method that runs it."""
    found: dict[nn.Module, str] = {}
    for part in module.modules():
        if isinstance(part, Backbone | Stack):
            found.update(part.blocks)
    return found
