"""A small residual network over the last dimension: the action head of OpenVLA-OFT and A1.

Shape letters: W width in, H hidden width, O width out.
"""

from __future__ import annotations

from torch import Tensor, nn


class ResidualLayer(nn.Module):
    """x + ReLU(W·norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(…, H) → (…, H)."""
        return x + self.linear(self.norm(x)).relu()


class ResidualMLP(nn.Module):
    """LayerNorm, Linear, ReLU; residual layers; LayerNorm, Linear."""

    def __init__(self, width: int, hidden: int, out: int, layers: int = 2) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.ReLU())
        self.layers = nn.Sequential(*(ResidualLayer(hidden) for _ in range(layers)))
        self.leave = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, out))

    def forward(self, x: Tensor) -> Tensor:
        """(…, W) → (…, O)."""
        return self.leave(self.layers(self.enter(x)))
