"""AsyncVLA's assembly: shared stack, flow decoder with unified masks, and a rater of the backbone's kind.

``tiny`` learns from scratch on a laptop; ``qwen3b`` is the published size.
"""

from __future__ import annotations

from vlaflow.backbones.qwen2_5_vl import QwenConfig, qwen2_5_vl_3b
from vlaflow.backbones.tiny import TinyConfig
from vlaflow.decoders.exits import ExitTraining
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.rater import RaterConfig
from vlaflow.policies.base import PolicyConfig

DEPTH = 4


def tiny(state_dim: int, action_dim: int, views: tuple[str, ...]) -> PolicyConfig:
    """A policy of 1.0 M parameters that learns from scratch on a laptop CPU: chunks of 16, 8 executed.

    Nine tokens per view (cells of 32 pixels) and width 128: at equal processor time, 36 tokens or width 192 ended at a
    higher validation loss (docs/log.md). Half of the draws noise every action: with the paper's masks alone a short
    training learns to copy neighbouring actions before it learns to look. It also answers after
    two and three of its four layers, for early exit; these answers count a fifth of the loss, so that the last loses little.
    """
    return PolicyConfig(
        system="asyncvla",
        backbone=TinyConfig(state_dim=state_dim, views=views, cell=32, width=128, depth=DEPTH, heads=4, ffn=512),
        decoder=FlowConfig(action_dim=action_dim, chunk_size=16, noise_samples=2, whole=0.5),
        exits=ExitTraining((2, 3, 4), shallow=0.2),
    )


def tiny_rater(policy: PolicyConfig) -> RaterConfig:
    """Two blocks like the backbone's own."""
    return RaterConfig(policy.backbone.rater_block(), depth=2)


def qwen3b(
    state_dim: int,
    action_dim: int,
    views: tuple[str, ...],
    chunk_size: int = 8,
    source: str | None = "Qwen/Qwen2.5-VL-3B-Instruct",
) -> PolicyConfig:
    """AsyncVLA as published: 3.755 B pretrained parameters and a head of 17.0 M; ``qwen3b_rater`` makes it 4.08 B.

    Args:
        state_dim, action_dim: at most 32 each; the head is padded to 32.
        views: camera views in the order of the images.
        chunk_size: actions per chunk (8 on LIBERO, 4 on Bridge and Fractal), all of them executed.
        source: folder or Hub name of the pretrained weights; None for random weights of the same shape.
    """
    return PolicyConfig(
        system="asyncvla",
        backbone=QwenConfig(state_dim, views, source, None if source else qwen2_5_vl_3b(), recompute=True),
        decoder=FlowConfig(action_dim=action_dim, chunk_size=chunk_size, padded_dim=32, noise_samples=1),
        n_action_steps=chunk_size,
    )


def qwen3b_rater(policy: PolicyConfig) -> RaterConfig:
    """Four blocks; like those of Qwen2.5-VL-3B they have 308 M parameters (the paper's 32 heads and 6144: 168 or 218 M)."""
    return RaterConfig(policy.backbone.rater_block(), depth=4)
