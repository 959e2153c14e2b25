"""AsyncVLA's assembly: shared stack, flow decoder with unified masks, and a rater of the backbone's kind.

``tiny`` learns from scratch on a laptop, ``smol`` brings a language model that fits one; ``qwen3b`` is the published size.
"""

from __future__ import annotations

from typing import Literal

from vlaflow.backbones.qwen2_5_vl import QwenConfig, qwen2_5_vl_3b
from vlaflow.backbones.smol import SmolConfig, smollm2_135m
from vlaflow.backbones.smol_processor import SHORT
from vlaflow.decoders.exits import ExitTraining
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.rater import RaterConfig
from vlaflow.policies.base import PolicyConfig
from vlaflow.policies.recipe import DataSpec
from vlaflow.policies.tiny import tiny_backbone

QWEN = "Qwen/Qwen2.5-VL-3B-Instruct"
SYSTEM = "You are a helpful physical assistant."
"""AsyncVLA's system turn (§4.1)."""


def tiny(data: DataSpec) -> PolicyConfig:
    """A policy of 1.0 M parameters that learns from scratch on a laptop CPU: chunks of 16, 8 executed.

    Half of the noise samples noise every action: with the paper's masks alone a short training learns to copy neighbouring
    actions before it learns to look. It also answers after two and three of its four layers, for early exit; these answers
    count a fifth of the loss, so that the last loses little.
    """
    return PolicyConfig(
        system="asyncvla",
        backbone=tiny_backbone(data),
        decoder=FlowConfig(action_dim=data.action_dim, chunk_size=16, noise_samples=2, whole=0.5),
        exits=ExitTraining((2, 3, 4), shallow=0.2),
    )


def tiny_rater(policy: PolicyConfig) -> RaterConfig:
    """Two blocks like the backbone's own."""
    return RaterConfig(policy.backbone.rater_block(), depth=2)


def smol(data: DataSpec, *, layers: int = 8, source: str | None = SHORT) -> PolicyConfig:
    """On the first layers of SmolLM2-135M: with eight of its 30, 60 M parameters, half of them the table of its words.

    It exits after half of the layers as well. Images are nine tokens each, learned from scratch.

    Args:
        data: at most 32 dimensions of state.
        layers: of the language model, an even number.
        source: of its weights (see ``SmolConfig``); None for random weights of the same shape.
    """
    architecture = None if source else smollm2_135m()
    return PolicyConfig(
        system="asyncvla",
        backbone=SmolConfig(data.state_dim, data.views, source, architecture, layers=layers, image_size=96, cell=32),
        decoder=FlowConfig(action_dim=data.action_dim, chunk_size=16, noise_samples=2, whole=0.5),
        exits=ExitTraining((layers // 2, layers), shallow=0.2),
    )


def qwen3b(
    data: DataSpec,
    *,
    chunk_size: int = 8,
    source: str | None = QWEN,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> PolicyConfig:
    """AsyncVLA as published: 3.755 B pretrained parameters and a head of 17.0 M; ``qwen3b_rater`` makes it 4.08 B.

    Args:
        data: at most 32 dimensions of state and action each; the head is padded to 32.
        chunk_size: actions per chunk (8 on LIBERO, 4 on Bridge and Fractal), all of them executed.
        source: folder or Hub name of the pretrained weights; None for random weights of the same shape.
        dtype: of these.
    """
    architecture = None if source else qwen2_5_vl_3b()
    return PolicyConfig(
        system="asyncvla",
        backbone=QwenConfig(data.state_dim, data.views, source, architecture, dtype=dtype, system=SYSTEM, recompute=True),
        decoder=FlowConfig(action_dim=data.action_dim, chunk_size=chunk_size, padded_dim=32, noise_samples=1),
        n_action_steps=chunk_size,
    )


def qwen3b_rater(policy: PolicyConfig) -> RaterConfig:
    """Four blocks; like those of Qwen2.5-VL-3B they have 308 M parameters (the paper's 32 heads and 6144: 168 or 218 M)."""
    return RaterConfig(policy.backbone.rater_block(), depth=4)
