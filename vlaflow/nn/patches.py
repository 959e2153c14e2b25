"""Conversion between images and square patches.

Shape letters: B batch, H height, W width, P patches (row by row), N values per patch (3 · cell²).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


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


class PixelStem(PatchStem):
    """The same for uint8 pixels x, which stand for x/127.5 − 1.

    Under autocast the scaling is part of the weights, which saves two passes over the images: an eighth of the demo's stem.
    Half-precision numbers hold x − 128 exactly; around 0 the rounding of the weights counts least.
    """

    def forward(self, image_BHW3: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) → (B, patches, width)."""
        weight, device = self.project.weight, image_BHW3.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return super().forward(image_BHW3.to(weight.dtype) / 127.5 - 1)
        centred_BPN = to_patches((image_BHW3 ^ 128).view(torch.int8), self.cell).to(torch.get_autocast_dtype(device))
        return functional.linear(centred_BPN, weight / 127.5, self.project.bias + weight.sum(1) * (0.5 / 127.5))
