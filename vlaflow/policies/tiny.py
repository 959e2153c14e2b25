"""The demos' small networks and how they are trained, in one place: systems differ in decoder and depth, not in these.

``tiny_backbone`` learns from scratch on a laptop. Nine tokens per view (cells of 32 pixels) and width 128: at equal processor
time, 36 tokens or width 192 ended at a higher validation loss (docs/log.md).
"""

from __future__ import annotations

from dataclasses import replace

from vlaflow.actions.fast import FastFit
from vlaflow.backbones.tiny import TinyConfig
from vlaflow.data.quality import PauseRule
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.masked_diffusion import MaskedDiffusionConfig
from vlaflow.policies.base import PolicyConfig
from vlaflow.policies.objectives import PolicyObjective
from vlaflow.policies.recipe import DataSpec, OptimConfig, TrainConfig

FAST = FastFit(scale=10.0, vocabulary=256)
"""On the demo's chunks of 16 × 4 numbers: 15 tokens on average, 46 at most, error 0.017 of the range's half."""
COEFFICIENTS = FastFit(scale=10.0, vocabulary=None)
"""The same without merges: 64 tokens of 81 ids. Decoders that make tokens in parallel need it (docs/tokens.md)."""
OPTIM = OptimConfig("muon", learning_rate=3e-3, warmup_steps=100)


def tiny_backbone(data: DataSpec) -> TinyConfig:
    """Four layers of width 128, 0.8 M parameters."""
    return TinyConfig(data.state_dim, data.views, cell=32, width=128, depth=4, heads=4, ffn=512)


def wordy_backbone(data: DataSpec) -> TinyConfig:
    """The same with room for suffixes of 96 tokens, for decoders of action tokens."""
    return replace(tiny_backbone(data), suffix=96)


def token_policy(
    data: DataSpec, system: str, decoder: FlowConfig | AutoregressiveConfig | MaskedDiffusionConfig | DiscreteFlowConfig
) -> PolicyConfig:
    """What decoders are compared on; actions reach from −1 to 1 between their 1st and 99th percentile."""
    return PolicyConfig(system, wordy_backbone(data), decoder, action_normalisation="quantile")


def tiny_training(policy: PolicyConfig, *, steps: int, optim: OptimConfig = OPTIM) -> TrainConfig:
    """Training of a tiny policy on a CPU: batches of 64, averaged weights, pauses left out.

    Two threads train batches of 64 at 1.4 times the rate of 32, and Muon learned more from as many samples (docs/log.md).
    """
    return TrainConfig(
        PolicyObjective(policy),
        optim=optim,
        steps=steps,
        global_batch_size=64,
        ema_decay=0.998,
        pauses=PauseRule(),
        validate_every=200,
        checkpoint_every=400,
    )
