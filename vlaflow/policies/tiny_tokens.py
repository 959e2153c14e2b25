"""The small discrete policy that DFM-VLA's demo and the baselines share: only the decoder differs."""

from __future__ import annotations

from vlaflow.actions.fast import FastFit
from vlaflow.backbones.tiny import TinyConfig
from vlaflow.data.quality import PauseRule
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.masked_diffusion import MaskedDiffusionConfig
from vlaflow.policies.base import PolicyConfig
from vlaflow.policies.recipe import DataSpec, OptimConfig, TrainConfig

FAST = FastFit(scale=10.0, vocabulary=256)
"""On the demo's chunks of 16 × 4 numbers: 15 tokens on average, 46 at most, error 0.017 of the range's half."""
COEFFICIENTS = FastFit(scale=10.0, vocabulary=None)
"""The same without merges: 64 tokens of 81 ids. Decoders that make tokens in parallel need it (docs/tokens.md)."""


def tiny_policy(
    data: DataSpec, system: str, decoder: FlowConfig | AutoregressiveConfig | MaskedDiffusionConfig | DiscreteFlowConfig
) -> PolicyConfig:
    """The demo's backbone with another decoder; actions reach from −1 to 1 between their 1st and 99th percentile."""
    return PolicyConfig(
        system=system,
        backbone=TinyConfig(data.state_dim, data.views, cell=32, width=128, depth=4, heads=4, ffn=512, suffix=96),
        decoder=decoder,
        action_normalisation="quantile",
    )


def tiny_training(policy: PolicyConfig) -> TrainConfig:
    """One training of every decoder in the comparison: same data, same observations, same optimiser."""
    return TrainConfig(
        policy=policy,
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=100),
        steps=3000,
        batch_size=32,
        ema_decay=0.998,
        pauses=PauseRule(),
        validate_every=500,
        checkpoint_every=1000,
    )
