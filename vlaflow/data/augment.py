"""Augmentation of observations in training, against overfitting to single cues: erased and sharpened images, masked states.

Shape letters: B batch, H height, W width, S state dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional

from vlaflow.errors import ConfigError


@dataclass(frozen=True)
class StateMask:
    """Hide the proprioceptive state: hidden dimensions are 0 after normalisation.

    Args:
        probability: of hiding, in [0, 1].
        what: "whole" hides a sample's whole state vector (A1's code), "dimension" each dimension on its own (A1's text).
    """

    probability: float
    what: Literal["whole", "dimension"] = "whole"

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"A probability must lie in [0, 1], got {self.probability}.")

    def __call__(self, batch: int, dimensions: int, generator: Generator) -> Tensor:
        """Which dimensions are known, bool (B, S)."""
        columns = 1 if self.what == "whole" else dimensions
        return (torch.rand(batch, columns, generator=generator) >= self.probability).expand(batch, dimensions)


@dataclass(frozen=True)
class Augment:
    """A1's image augmentation: erasing or sharpening, sometimes both.

    Args:
        probability: of changing an image at all; which of the two is applied first is chosen with equal probability.
        second: probability of applying the other one as well.
        squares: smallest and largest number of black squares.
        side: smallest and largest side of a square, as a share of the image's shorter side (A1: 20 to 80 of 336 pixels).
        sharpness: smallest and largest factor; 1 is the image itself, 0 its 3×3 smoothing (as Pillow and torchvision count).
    """

    probability: float = 0.5
    second: float = 0.3
    squares: tuple[int, int] = (1, 3)
    side: tuple[float, float] = (20 / 336, 80 / 336)
    sharpness: tuple[float, float] = (2.0, 3.5)

    def __post_init__(self) -> None:
        if not (0 <= self.probability <= 1 and 0 <= self.second <= 1):
            raise ConfigError(f"Probabilities must lie in [0, 1], got {self.probability} and {self.second}.")
        if not (1 <= self.squares[0] <= self.squares[1] and 0 < self.side[0] <= self.side[1] <= 1):
            raise ConfigError(
                f"squares must be a range from 1, side a range within (0, 1], got {self.squares} and {self.side}."
            )
        if not 0 <= self.sharpness[0] <= self.sharpness[1]:
            raise ConfigError(f"sharpness must be a range of factors of at least 0, got {self.sharpness}.")

    def __call__(self, images_BHWC: Tensor, generator: Generator) -> Tensor:
        """Augment each image independently.

        Args:
            images_BHWC: uint8 (B, H, W, 3); one view.
            generator: a CPU generator; the only source of randomness, advanced by the same amount whatever is drawn.

        Returns:
            uint8 (B, H, W, 3), on the device of the images.
        """
        batch, device = images_BHWC.shape[0], images_BHWC.device
        touched_B, erase_first_B, both_B = torch.rand(3, batch, generator=generator).to(device)
        touched = touched_B < self.probability
        first, both = erase_first_B < 0.5, both_B < self.second
        erased = erase(images_BHWC, self, generator)
        low, high = self.sharpness
        factor_B = (low + (high - low) * torch.rand(batch, generator=generator)).to(device)
        out = torch.where((touched & (first | both))[:, None, None, None], erased, images_BHWC)
        return torch.where((touched & (~first | both))[:, None, None, None], sharpen(out, factor_B), out)


def erase(images_BHWC: Tensor, how: Augment, generator: Generator) -> Tensor:
    """Draw black squares that may overlap and lie fully within the image, (B, H, W, 3)."""
    batch, height, width, _ = images_BHWC.shape
    most = how.squares[1]
    count_B = torch.randint(how.squares[0], most + 1, (batch,), generator=generator)
    side_BN, top_BN, left_BN = torch.rand(3, batch, most, generator=generator)
    low, high = (share * min(height, width) for share in how.side)
    side_BN = (low + (high - low) * side_BN).round().clamp(min=1)
    top_BN = (top_BN * (height - side_BN + 1)).floor()
    left_BN = (left_BN * (width - side_BN + 1)).floor()
    row_H, column_W = torch.arange(height), torch.arange(width)
    inside_BNH = (row_H >= top_BN[..., None]) & (row_H < (top_BN + side_BN)[..., None])
    inside_BNW = (column_W >= left_BN[..., None]) & (column_W < (left_BN + side_BN)[..., None])
    there_BN = torch.arange(most) < count_B[:, None]
    black_BHW = (inside_BNH[..., None] & inside_BNW[:, :, None] & there_BN[..., None, None]).any(1)
    return images_BHWC.masked_fill(black_BHW.to(images_BHWC.device)[..., None], 0)


def sharpen(images_BHWC: Tensor, factor_B: Tensor) -> Tensor:
    """Sharpen: factor · image + (1 − factor) · smoothed, with a 3×3 kernel of 5 in the centre and 1 around it, divided by 13.

    The outermost pixels are not smoothed, so they stay as they are (as in Pillow and torchvision).
    """
    image_BCHW = images_BHWC.permute(0, 3, 1, 2).float()
    kernel = image_BCHW.new_ones(3, 3)
    kernel[1, 1] = 5
    smooth_BCHW = image_BCHW.clone()
    inner = functional.conv2d(image_BCHW, (kernel / 13).expand(3, 1, 3, 3), groups=3)
    smooth_BCHW[:, :, 1:-1, 1:-1] = inner.round()
    factor_B111 = factor_B.view(-1, 1, 1, 1)
    sharp_BCHW = (factor_B111 * image_BCHW + (1 - factor_B111) * smooth_BCHW).clamp(0, 255)
    return sharp_BCHW.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
