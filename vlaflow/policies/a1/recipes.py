"""A1's training stages. Each recipe is a function of the data set's shape and returns one frozen config."""

from __future__ import annotations

from dataclasses import replace

from vlaflow.data.quality import PauseRule
from vlaflow.policies.a1.policy import tiny_flow, tiny_regression
from vlaflow.policies.recipe import DataSpec, OptimConfig, TrainConfig


def demo(data: DataSpec) -> TrainConfig:
    """A1 with flow matching on a few Meta-World tasks, from scratch on a CPU; answers at every depth.

    vlaflow train a1.demo --dataset runs/demo/dataset --out runs/a1/policy
    """
    return TrainConfig(
        policy=tiny_flow(data.state_dim, data.action_dim, data.views),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=100),
        steps=3500,
        batch_size=32,
        ema_decay=0.998,
        pauses=PauseRule(),
        validate_every=500,
        checkpoint_every=1000,
    )


def demo_mlp(data: DataSpec) -> TrainConfig:
    """A1 with L1 regression on a few Meta-World tasks, from scratch on a CPU; answers at every depth.

    vlaflow train a1.demo_mlp --dataset runs/demo/dataset --out runs/a1/mlp
    """
    return replace(demo(data), policy=tiny_regression(data.state_dim, data.action_dim, data.views))
