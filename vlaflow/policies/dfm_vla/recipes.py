"""DFM-VLA's training stages. Each recipe is a function of the data set's shape and returns one frozen config."""

from __future__ import annotations

from vlaflow.actions.bins import BinsFit
from vlaflow.decoders.discrete_flow import BinMetric, DiscreteFlowConfig
from vlaflow.policies.dfm_vla.policy import tiny
from vlaflow.policies.recipe import DataSpec, TrainConfig
from vlaflow.policies.tiny_tokens import FAST, tiny_training


def demo(data: DataSpec) -> TrainConfig:
    """DFM-VLA, embedding-guided, over FAST tokens, on a few Meta-World tasks, from scratch on a CPU.

    vlaflow train dfm_vla.demo --dataset runs/demo/dataset --out runs/dfm/policy
    """
    return tiny_training(tiny(data, DiscreteFlowConfig(data.action_dim, FAST)))


def demo_head(data: DataSpec) -> TrainConfig:
    """DFM-VLA with a rate head over FAST tokens, otherwise as ``demo``.

    vlaflow train dfm_vla.demo_head --dataset runs/demo/dataset --out runs/dfm/head
    """
    return tiny_training(tiny(data, DiscreteFlowConfig(data.action_dim, FAST, velocity="rate")))


def demo_bins(data: DataSpec) -> TrainConfig:
    """Discrete flow over bins, whose metric is their order, otherwise as ``demo``.

    vlaflow train dfm_vla.demo_bins --dataset runs/demo/dataset --out runs/dfm/bins
    """
    decoder = DiscreteFlowConfig(data.action_dim, BinsFit(64), metric=BinMetric())
    return tiny_training(tiny(data, decoder))
