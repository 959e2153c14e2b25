"""Conversion between images and square patches.

Shape letters: B batch, H height, W width, P patches (row by row), N values per patch (3 · cell²).
"""

from __future__ import annotations

from torch import Tensor, nn


def to_patches(image_BHW3: Tensor, cell: int) -> Tensor:
    """(B, H, W, 3) → (B, P, N); H and W are multiples of ``cell``."""
    b, h, w, _ = image_BHW3.shape
    return image_BHW3.reshape(b, h // cell, cell, w // cell, cell, 3).transpose(2, 3).reshape(b, -1, 3 * cell * cell)


def from_patches(patch_BPN: Tensor, cell: int, height: int) -> Tensor:
    """The inverse of ``to_patches`` for images of this height, (B, P, N) → (B, H, W, 3)."""
    b, patches, _ = patch_BPN.shape
    rows = height // cell
    columns = patches // rows
    return patch_BPN.reshape(b, rows, columns, cell, cell, 3).transpose(2, 3).reshape(b, height, columns * cell, 3)


class PatchStem(nn.Module):
    """A linear projection of every patch."""

    def __init__(self, cell: int, width: int) -> None:
        super().__init__()
        self.cell = cell
        self.project = nn.Linear(3 * cell * cell, width)

    def forward(self, image_BHW3: Tensor) -> Tensor:
        """(B, H, W, 3) in [−1, 1] → (B, patches, width)."""
        return self.project(to_patches(image_BHW3, self.cell))
