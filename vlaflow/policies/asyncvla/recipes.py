"""AsyncVLA's training stages. Each recipe is a function of the data set's shape and returns one frozen config."""

from __future__ import annotations

from vlaflow.data.quality import PauseRule
from vlaflow.policies.asyncvla.policy import tiny, tiny_rater
from vlaflow.policies.base import PolicyConfig
from vlaflow.policies.recipe import DataSpec, OptimConfig, TrainConfig


def demo(data: DataSpec) -> TrainConfig:
    """AsyncVLA on a few Meta-World tasks, from scratch on a CPU.

    vlaflow train asyncvla.demo --dataset runs/demo/dataset --out runs/demo/policy
    """
    return TrainConfig(
        policy=tiny(data.state_dim, data.action_dim, data.views),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=100),
        steps=1000,
        batch_size=64,
        ema_decay=0.995,
        shift=4,
        pauses=PauseRule(),
    )


def rater(policy: PolicyConfig) -> TrainConfig:
    """The confidence rater on a frozen tiny policy.

    vlaflow train asyncvla.rater --policy runs/demo/policy --dataset runs/demo/dataset --out runs/demo/rater
    """
    return TrainConfig(
        policy=None,
        rater=tiny_rater(policy),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=50),
        steps=200,
        batch_size=64,
        ema_decay=0.98,
        pauses=PauseRule(),
    )
