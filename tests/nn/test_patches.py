"""Patches of images and what projects them."""

import torch

from vlaflow.nn.patches import PixelStem, from_patches, to_patches


def images(seed=0):
    return torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_patches_are_put_together_again():
    assert torch.equal(from_patches(to_patches(images(), 4), 4, 8), images())


def test_scaling_that_is_part_of_the_weights_is_no_less_exact():
    """Against the projection in double precision, to a fifth: both round weights and results, and one also the pixels."""
    torch.manual_seed(0)
    stem = PixelStem(4, 64)
    with torch.no_grad():
        exact = stem.double().project(to_patches(images().double() / 127.5 - 1, 4))
        stem.float()
        plain = stem(images())
        with torch.autocast("cpu", torch.bfloat16):
            folded, scaled = stem(images()), stem.project(to_patches(images().float() / 127.5 - 1, 4))
    assert torch.equal(plain, stem.project(to_patches(images().float() / 127.5 - 1, 4)))
    assert (folded - exact).square().mean() < 1.2 * (scaled - exact).square().mean()
