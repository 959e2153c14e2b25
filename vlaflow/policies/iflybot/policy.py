"""iFlyBot-VLA's assemblies: the latent action model and the policy, small for a laptop and at the published size."""

from __future__ import annotations

from dataclasses import replace

from vlaflow.actions.fast import FastFit
from vlaflow.actions.latent import LatentConfig
from vlaflow.backbones.qwen2_5_vl import PATCH, QwenConfig, qwen2_5_vl_3b
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.latent_flow import LatentFlowConfig
from vlaflow.decoders.latent_reader import LatentTokensConfig
from vlaflow.nn.block import BlockConfig
from vlaflow.policies import small_networks
from vlaflow.policies.base import PolicyConfig
from vlaflow.policies.recipe import DataSpec
from vlaflow.policies.tiny import FAST, wordy_backbone
from vlaflow.stacks.expert import ExpertConfig


def tiny_latent() -> LatentConfig:
    """Eight codes of a book of 32 from frames of 56 pixels; 0.9 M parameters."""
    return LatentConfig()


def full_latent() -> LatentConfig:
    """The published size, as far as the public code shows (LAPA with NSVQ): frames of 224, patches of 32; 325.6 M."""
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


def tiny(data: DataSpec) -> PolicyConfig:
    """A policy that learns from scratch on a laptop CPU: chunks of 16, 8 executed, an expert that reads eight latent tokens."""
    return PolicyConfig(system="iflybot", backbone=wordy_backbone(data), decoder=_decoder(data, heads=4))


def small(data: DataSpec) -> PolicyConfig:
    """A policy for LIBERO: the same on the larger backbone, with room for the tokens of 16 actions of seven numbers."""
    return small_networks.small(replace(tiny(data), decoder=_decoder(data, heads=6)), data, suffix=160)


def _decoder(data: DataSpec, heads: int) -> LatentFlowConfig:
    """The decoder of the small policies; the expert has this many heads of 32 dimensions."""
    block = BlockConfig(width=32 * heads, heads=heads, kv_heads=heads, head_dim=32, ffn=32 * heads)
    return LatentFlowConfig(
        FlowConfig(
            data.action_dim,
            masks="synchronous",
            noise_samples=1,
            expert=ExpertConfig(block, projected=True),
            time_token=True,
            head_layers=2,
        ),
        LatentTokensConfig(),
        AutoregressiveConfig(data.action_dim, FAST),
    )


def qwen3b(
    data: DataSpec,
    *,
    chunk_size: int = 30,
    n_action_steps: int = 30,
    source: str | None = "Qwen/Qwen2.5-VL-3B-Instruct",
) -> PolicyConfig:
    """iFlyBot-VLA as published: Qwen2.5-VL-3B and an expert of 36 layers of 1024 that reads the latent tokens.

    Numbers reach from −1 to 1 between their 1st and 99th percentile and are clipped at 1.5, quaternions aside.

    3.755 B parameters of the backbone, 236.3 M of the expert (9.5 M of them map keys and values), 3.2 M that bring actions to
    it and back, and tables for codes and FAST tokens.

    Args:
        data: at most 20 dimensions of state and action each, for two arms; both are padded to 20. Its views, head, left
            wrist and right wrist camera, are each brought to the area of 448 × 448 pixels, 256 tokens.
        chunk_size, n_action_steps: 30, one second; 7 and 7 on LIBERO.
        source: folder or Hub name of the pretrained weights; None for random weights of the same shape.
    """
    block = BlockConfig(1024, heads=16, kv_heads=16, head_dim=64, ffn=1024, norm="rms")
    area = 256 * PATCH
    return PolicyConfig(
        system="iflybot",
        backbone=QwenConfig(
            data.state_dim,
            data.views,
            source,
            None if source else qwen2_5_vl_3b(),
            min_pixels=area,
            max_pixels=area,
            recompute=True,
        ),
        decoder=LatentFlowConfig(
            FlowConfig(
                data.action_dim,
                chunk_size,
                padded_dim=20,
                masks="synchronous",
                noise_samples=1,
                expert=ExpertConfig(block, padded_state=20, projected=True),
                time_token=True,
            ),
            LatentTokensConfig(),
            AutoregressiveConfig(data.action_dim, FastFit(scale=10.0, vocabulary=2048), chunk_size),
        ),
        state_normalisation="quantile",
        action_normalisation="quantile",
        state_clip=1.5,
        action_clip=1.5,
        kept_actions=("quaternion",),
        n_action_steps=n_action_steps,
    )
