"""A1's assemblies: flow matching in an action expert, or regression from query tokens, each with exits at several depths.

``tiny_flow`` and ``tiny_regression`` learn from scratch on a laptop, ``small_flow`` in a night; ``molmo_flow`` and
``molmo_regression`` are the published size, on Molmo2-8B in the place of Molmo-7B (docs/decisions/008).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from vlaflow.backbones.molmo2 import MolmoConfig, molmo2_8b
from vlaflow.decoders.exits import ExitTraining, every
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.regression import RegressionConfig
from vlaflow.nn.block import BlockConfig
from vlaflow.policies.base import PolicyConfig
from vlaflow.policies.recipe import DataSpec
from vlaflow.policies.small_networks import EXITS, HEAD_DIM, HEADS, small
from vlaflow.policies.tiny import tiny_backbone
from vlaflow.stacks.expert import ExpertConfig, a1_expert

DEPTH = 6


def tiny_flow(data: DataSpec) -> PolicyConfig:
    """Flow matching in an expert as wide as the backbone is deep enough to leave early: six layers, an exit at each."""
    block = BlockConfig(width=128, heads=4, kv_heads=4, head_dim=32, ffn=256)
    return PolicyConfig(
        system="a1",
        backbone=replace(tiny_backbone(data), depth=DEPTH),
        decoder=FlowConfig(data.action_dim, masks="synchronous", noise_samples=2, expert=ExpertConfig(block), head_layers=2),
        exits=ExitTraining(every(1, DEPTH)),
    )


def small_flow(data: DataSpec) -> PolicyConfig:
    """Flow matching for LIBERO: an expert half as wide as the backbone, exits where the other systems have theirs."""
    block = BlockConfig(width=96, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM, ffn=384)
    decoder = FlowConfig(data.action_dim, masks="synchronous", noise_samples=2, expert=ExpertConfig(block), head_layers=2)
    return replace(small(tiny_flow(data), data), decoder=decoder, exits=ExitTraining(EXITS))


def tiny_regression(data: DataSpec) -> PolicyConfig:
    """L1 regression from one query token per action, through the backbone's own layers."""
    return PolicyConfig(
        system="a1",
        backbone=replace(tiny_backbone(data), depth=DEPTH),
        decoder=RegressionConfig(data.action_dim, queries="action"),
        exits=ExitTraining(every(1, DEPTH)),
    )


MOLMO = "allenai/Molmo2-8B"
MOLMO_DEPTH = 36
RANDOM_EXITS = ExitTraining(every(1, MOLMO_DEPTH), "random")
"""One layer of all in each step, as in the paper; its exits at evaluation are every second layer (``--depths``)."""


def molmo_flow(data: DataSpec, *, chunk_size: int = 10, n_action_steps: int = 8, source: str | None = MOLMO) -> PolicyConfig:
    """A1 with flow matching: the expert of 1024 with as many key/value heads as Molmo2 has; a random exit per step.

    Numbers reach from −1 to 1 between their 1st and 99th percentile, without clipping; an action's gripper stays as it is.

    Args:
        data: at most 32 dimensions of state and action each; both are padded to 32.
        chunk_size, n_action_steps: 10 and 8 on LIBERO, 50 and 5 on VLABench.
        source: folder or Hub name of the pretrained weights; None for random weights of the same shape.
    """
    expert = a1_expert()
    return PolicyConfig(
        system="a1",
        backbone=_molmo(data, source, state_token=None, attention="causal"),
        decoder=FlowConfig(
            data.action_dim,
            chunk_size,
            padded_dim=32,
            masks="synchronous",
            noise_samples=1,
            expert=replace(expert, block=replace(expert.block, kv_heads=8)),
            head_layers=2,
        ),
        exits=RANDOM_EXITS,
        state_normalisation="quantile",
        action_normalisation="quantile",
        kept_actions=("gripper",),
        n_action_steps=n_action_steps,
    )


def molmo_regression(
    data: DataSpec, *, chunk_size: int = 10, n_action_steps: int = 8, source: str | None = MOLMO
) -> PolicyConfig:
    """A1 with L1 regression from one query token per action dimension; the state is a token of the prompt, all of which see
    each other.
    """
    return PolicyConfig(
        system="a1",
        backbone=_molmo(data, source, state_token="<|vision_pad|>", attention="full"),  # noqa: S106
        decoder=RegressionConfig(data.action_dim, chunk_size),
        exits=RANDOM_EXITS,
        state_normalisation="quantile",
        action_normalisation="quantile",
        kept_actions=("gripper",),
        n_action_steps=n_action_steps,
    )


def _molmo(data: DataSpec, source: str | None, state_token: str | None, attention: Literal["full", "causal"]) -> MolmoConfig:
    architecture = None if source else molmo2_8b()
    return MolmoConfig(
        data.state_dim, data.views, source, architecture, state_token=state_token, attention=attention, recompute=True
    )
