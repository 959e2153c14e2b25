"""A1's assemblies: flow matching in an action expert, or regression from query tokens, each with exits at several depths.

``tiny_flow`` and ``tiny_regression`` learn from scratch on a laptop.
"""

from __future__ import annotations

from vlaflow.backbones.tiny import TinyConfig
from vlaflow.decoders.exits import ExitTraining, every
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.regression import RegressionConfig
from vlaflow.nn.block import BlockConfig
from vlaflow.policies.base import PolicyConfig
from vlaflow.stacks.expert import ExpertConfig

DEPTH = 6


def tiny_flow(state_dim: int, action_dim: int, views: tuple[str, ...]) -> PolicyConfig:
    """Flow matching in an expert as wide as the backbone is deep enough to leave early: six layers, an exit at each."""
    block = BlockConfig(width=128, heads=4, kv_heads=4, head_dim=32, ffn=256)
    return PolicyConfig(
        system="a1",
        backbone=_tiny(state_dim, views),
        decoder=FlowConfig(action_dim, masks="synchronous", draws=2, expert=ExpertConfig(block), head_layers=2),
        exits=ExitTraining(every(1, DEPTH)),
    )


def tiny_regression(state_dim: int, action_dim: int, views: tuple[str, ...]) -> PolicyConfig:
    """L1 regression from one query token per action, through the backbone's own layers."""
    return PolicyConfig(
        system="a1",
        backbone=_tiny(state_dim, views),
        decoder=RegressionConfig(action_dim, queries="action"),
        exits=ExitTraining(every(1, DEPTH)),
    )


def _tiny(state_dim: int, views: tuple[str, ...]) -> TinyConfig:
    return TinyConfig(state_dim=state_dim, views=views, cell=32, width=128, depth=DEPTH, heads=4, ffn=512)
