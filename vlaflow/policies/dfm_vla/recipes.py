"""DFM-VLA's training stages. Each recipe is a function of the data set's shape and returns one frozen config.

The demos make their tokens of cosine coefficients without byte-pair merges; ``demo_fast`` merges, as the paper does. What that
changes is measured in docs/tokens.md.
"""

from __future__ import annotations

from vlaflow.actions.bins import BinsFit
from vlaflow.decoders.discrete_flow import BinMetric, DiscreteFlowConfig
from vlaflow.flows.discrete import MetricSchedule
from vlaflow.policies.dfm_vla.policy import tiny
from vlaflow.policies.recipe import DataSpec, TrainConfig
from vlaflow.policies.tiny_tokens import COEFFICIENTS, FAST, tiny_training

GRADUAL = MetricSchedule(c=3.5, alpha=0.5)
"""Embeddings of a small vocabulary are nearly equidistant: with the paper's c = 3 and α = 1 almost all tokens turn from noise to
target between clocks 0.45 and 0.3, and three training samples in four are all noise or all clean. This spreads it out."""


def demo(data: DataSpec) -> TrainConfig:
    """DFM-VLA, embedding-guided, on a few Meta-World tasks, from scratch on a CPU.

    vlaflow train dfm_vla.demo --dataset runs/demo/dataset --out runs/dfm/policy
    """
    return tiny_training(tiny(data, DiscreteFlowConfig(data.action_dim, COEFFICIENTS, schedule=GRADUAL)))


def demo_head(data: DataSpec) -> TrainConfig:
    """DFM-VLA with a rate head, otherwise as ``demo``.

    vlaflow train dfm_vla.demo_head --dataset runs/demo/dataset --out runs/dfm/head
    """
    return tiny_training(tiny(data, DiscreteFlowConfig(data.action_dim, COEFFICIENTS, velocity="rate")))


def demo_ordered(data: DataSpec) -> TrainConfig:
    """Discrete flow whose metric is the order of the coefficients, otherwise as ``demo``.

    vlaflow train dfm_vla.demo_ordered --dataset runs/demo/dataset --out runs/dfm/ordered
    """
    return tiny_training(tiny(data, DiscreteFlowConfig(data.action_dim, COEFFICIENTS, metric=BinMetric())))


def demo_bins(data: DataSpec) -> TrainConfig:
    """Discrete flow over 64 bins per number, whose metric is their order, otherwise as ``demo``.

    vlaflow train dfm_vla.demo_bins --dataset runs/demo/dataset --out runs/dfm/bins
    """
    return tiny_training(tiny(data, DiscreteFlowConfig(data.action_dim, BinsFit(64), metric=BinMetric())))


def demo_fast(data: DataSpec) -> TrainConfig:
    """DFM-VLA, embedding-guided, over merged FAST tokens with the paper's schedule, otherwise as ``demo``.

    vlaflow train dfm_vla.demo_fast --dataset runs/demo/dataset --out runs/dfm/fast
    """
    return tiny_training(tiny(data, DiscreteFlowConfig(data.action_dim, FAST)))
