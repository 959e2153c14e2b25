"""AsyncVLA's assembly: shared stack, flow decoder with unified masks, and a rater of the backbone's kind."""

from __future__ import annotations

from vlaflow.backbones.tiny import TinyConfig
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.rater import RaterConfig
from vlaflow.nn.block import BlockConfig
from vlaflow.policies.base import PolicyConfig


def tiny(state_dim: int, action_dim: int, views: tuple[str, ...]) -> PolicyConfig:
    """A 2.3 M parameter policy that learns from scratch on a laptop CPU: chunks of 16, 8 executed."""
    return PolicyConfig(
        system="asyncvla",
        backbone=TinyConfig(state_dim=state_dim, views=views),
        decoder=FlowConfig(action_dim=action_dim, horizon=16, draws=2),
    )


def tiny_rater(policy: PolicyConfig) -> RaterConfig:
    """Two blocks of the tiny backbone's own width."""
    b = policy.backbone
    return RaterConfig(BlockConfig(b.width, b.heads, b.heads, b.width // b.heads, b.ffn), depth=2)
