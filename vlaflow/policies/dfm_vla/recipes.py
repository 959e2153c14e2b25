"""DFM-VLA's training stages. Each recipe is a function of the data set's shape and returns one frozen config.

The tokens of the demos are cosine coefficients without byte-pair merges, except those of ``demo_bins`` and of ``demo_fast``,
which merges as the paper does. docs/tokens.md compares the three.
"""

from __future__ import annotations

from dataclasses import replace

from vlaflow.actions.bins import BinsFit
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.decoders.token_metrics import BinMetric, SlotMetric
from vlaflow.flows.discrete import MetricSchedule
from vlaflow.policies.dfm_vla.policy import emu3, tiny
from vlaflow.policies.objectives import PolicyObjective
from vlaflow.policies.recipe import DataSpec, OptimConfig, ParameterGroup, TrainConfig
from vlaflow.policies.small_networks import small, small_training
from vlaflow.policies.tiny import COEFFICIENTS, FAST, tiny_training

GRADUAL = MetricSchedule(c=3.5, alpha=0.5)
"""Embeddings of a small vocabulary are almost equidistant. With the paper's c = 3 and α = 1 nearly all tokens turn from
noise to target between clocks 0.45 and 0.3, and most training samples are all noise or all clean. This spreads it out."""
BY_SPREAD = MetricSchedule(c=1.0, alpha=1.0)
"""In units of a slot's spread, noise is as wide as the data at clock 1/2, and three times as wide at 3/4."""


def demo(data: DataSpec) -> TrainConfig:
    """DFM-VLA, embedding-guided, on a few Meta-World tasks, from scratch on a CPU.

    vlaflow train dfm_vla.demo --dataset runs/demo/dataset --out runs/dfm/policy

    Five Meta-World tasks, 2000 steps of AdamW at 1e-3: 50 of 100 episodes, 38 with a tenth of the demonstrations (docs/log.md).
    """
    return tiny_training(tiny(data, DiscreteFlowConfig(data.action_dim, COEFFICIENTS, schedule=GRADUAL)), steps=900)


def demo_head(data: DataSpec) -> TrainConfig:
    """DFM-VLA with a rate head, otherwise as ``demo``.

    vlaflow train dfm_vla.demo_head --dataset runs/demo/dataset --out runs/dfm/head

    Five Meta-World tasks, 2000 steps of AdamW at 1e-3: 49 of 100 episodes, 34 with a tenth of the demonstrations (docs/log.md).
    """
    return tiny_training(tiny(data, DiscreteFlowConfig(data.action_dim, COEFFICIENTS, velocity="rate")), steps=900)


def demo_ordered(data: DataSpec) -> TrainConfig:
    """Discrete flow whose metric is the order of the coefficients, otherwise as ``demo``.

    vlaflow train dfm_vla.demo_ordered --dataset runs/demo/dataset --out runs/dfm/ordered
    """
    return tiny_training(tiny(data, DiscreteFlowConfig(data.action_dim, COEFFICIENTS, metric=BinMetric())), steps=900)


def demo_slots(data: DataSpec) -> TrainConfig:
    """Discrete flow whose metric is the order of each slot's coefficients, in units of its own spread, otherwise as ``demo``.

    vlaflow train dfm_vla.demo_slots --dataset runs/demo/dataset --out runs/dfm/slots
    """
    decoder = DiscreteFlowConfig(data.action_dim, COEFFICIENTS, metric=SlotMetric(), schedule=BY_SPREAD)
    return tiny_training(tiny(data, decoder), steps=900)


def demo_bins(data: DataSpec) -> TrainConfig:
    """Discrete flow over 64 bins per number, whose metric is their order, otherwise as ``demo``.

    vlaflow train dfm_vla.demo_bins --dataset runs/demo/dataset --out runs/dfm/bins
    """
    return tiny_training(tiny(data, DiscreteFlowConfig(data.action_dim, BinsFit(64), metric=BinMetric())), steps=900)


def demo_fast(data: DataSpec) -> TrainConfig:
    """DFM-VLA, embedding-guided, over merged FAST tokens with the paper's schedule, otherwise as ``demo``.

    vlaflow train dfm_vla.demo_fast --dataset runs/demo/dataset --out runs/dfm/fast
    """
    return tiny_training(tiny(data, DiscreteFlowConfig(data.action_dim, FAST)), steps=900)


def libero_small(data: DataSpec) -> TrainConfig:
    """DFM-VLA, embedding-guided, on LIBERO from scratch on a CPU.

    vlaflow train dfm_vla.libero_small --dataset runs/libero/object --out runs/libero/dfm
    """
    policy = tiny(data, DiscreteFlowConfig(data.action_dim, COEFFICIENTS, schedule=GRADUAL))
    return small_training(small(policy, data, suffix=16 * data.action_dim))


def libero(data: DataSpec) -> TrainConfig:
    """DFM-VLA on LIBERO with the published numbers; eight GPUs of 80 GB, with --shard. No run has been made with it yet.

    accelerate launch -m vlaflow train dfm_vla.libero --dataset DIR --out DIR --shard

    8.61 B parameters, 8.50 B trained; before activations 159 GiB per GPU as copies, 30 GiB with --shard on eight.

    AdamW (0.9, 0.95, 1e-6) with decay 0.1, 8e-5 falling to 5e-6 along a cosine after 50 steps, clipped at 5; batch 256 in
    parts of eight; 20 000 steps. The image tokenizer stays frozen, and no episode is held out.
    """
    return TrainConfig(
        PolicyObjective(emu3(data)),
        optim=OptimConfig(
            learning_rate=8e-5,
            betas=(0.9, 0.95),
            eps=1e-6,
            weight_decay=0.1,
            warmup_steps=50,
            final_fraction=0.0625,
            clip_norm=5.0,
            groups=(ParameterGroup("backbone.network.vqmodel.", frozen=True),),
        ),
        steps=20_000,
        global_batch_size=256,
        accumulate=32,
        ema_decay=None,
        validation_fraction=0.0,
        validate_every=1000,
        checkpoint_every=2000,
        precision="bf16",
        seed=42,
    )


def calvin(data: DataSpec) -> TrainConfig:
    """DFM-VLA on CALVIN: 24 000 steps, otherwise as ``libero``. No run has been made with it yet.

    accelerate launch -m vlaflow train dfm_vla.calvin --dataset DIR --out DIR --shard

    8.61 B parameters, 8.50 B trained; before activations 159 GiB per GPU as copies, 30 GiB with --shard on eight.
    """
    return replace(libero(data), steps=24_000)
