"""iFlyBot-VLA's assemblies. So far its first stage: the latent action model, small for a laptop and at the published size."""

from __future__ import annotations

from vlaflow.actions.latent import LatentConfig


def tiny_latent() -> LatentConfig:
    """Eight codes of a book of 32 from frames of 56 pixels; 0.9 M parameters."""
    return LatentConfig()


def full_latent() -> LatentConfig:
    """The published size, as far as public code tells (LAPA with NSVQ): frames of 224, patches of 32; 325.6 M."""
    return LatentConfig(
        image_size=224,
        patch=32,
        width=1024,
        heads=16,
        ffn=4096,
        spatial=8,
        temporal=8,
        decoder=8,
    )
