"""The shared stack: suffix tokens run through the backbone's own layers and read the prefix's keys and values there.

It has no parameters. The suffix sees the whole prefix and itself; the prefix never sees the suffix.
"""

from __future__ import annotations

from torch import Tensor, nn

from vlaflow.backbones.base import Prefix


class SharedStack(nn.Module):
    """As many backbone layers as the prefix has run, applied to the suffix."""

    def forward(self, suffix_BTW: Tensor, prefix: Prefix) -> Tensor:
        """Suffix hidden states after ``prefix.depth`` layers and the final norm.

        Args:
            suffix_BTW: embedded suffix tokens; the batch is that of the prefix times the noise draws, draws innermost.
            prefix: an observation that has run at least one layer.

        Returns:
            (B, T, W), in the number format of ``suffix_BTW``, whatever the backbone computes in.
        """
        backbone = prefix.backbone
        dtype = suffix_BTW.dtype
        hidden_BTW, rotary = backbone.place(suffix_BTW, prefix)
        for index, memory in enumerate(prefix.memory):
            hidden_BTW, _ = backbone.layer(index, hidden_BTW, rotary, memory)
        return backbone.finish(hidden_BTW).to(dtype)
