"""The shared stack: suffix tokens run through the backbone's own layers and read the prefix's keys and values there.

It has no parameters. The suffix sees the whole prefix and itself; the prefix never sees the suffix.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlaflow.backbones.base import Prefix
from vlaflow.stacks.base import Stack


class SharedStack(Stack):
    """As many backbone layers as asked, applied to the suffix; of the backbone's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def exits(self, suffix_BTW: Tensor, prefix: Prefix, depths: Sequence[int]) -> list[Tensor]:
        """See ``Stack``."""
        backbone, found = prefix.backbone, []
        dtype = suffix_BTW.dtype
        hidden_BTW, rotary = backbone.place(suffix_BTW, prefix)
        for index in range(depths[-1]):
            hidden_BTW, _ = backbone.layer(index, hidden_BTW, rotary, prefix.memory[index])
            if index + 1 in depths:
                found.append(backbone.finish(hidden_BTW).to(dtype))
        return found
