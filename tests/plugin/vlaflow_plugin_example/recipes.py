"""Training stages: every public function here that returns a ``TrainConfig`` is a recipe."""

from __future__ import annotations

from vlaflow.policies.base import PolicyConfig
from vlaflow.policies.objectives import PolicyObjective
from vlaflow.policies.recipe import DataSpec, OptimConfig, TrainConfig
from vlaflow_plugin_example.backbone import GlanceConfig
from vlaflow_plugin_example.decoder import LineConfig


def demo(data: DataSpec) -> TrainConfig:
    """Straight lines along a corridor, in a few seconds.

    vlaflow train corridor.demo --dataset runs/corridor/dataset --out runs/corridor/policy
    """
    return TrainConfig(
        PolicyObjective(
            PolicyConfig(
                system="corridor",
                backbone=GlanceConfig(data.state_dim, data.views),
                decoder=LineConfig(data.action_dim),
                n_action_steps=4,
            )
        ),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=10),
        steps=120,
        global_batch_size=32,
        ema_decay=None,
        validate_every=60,
        checkpoint_every=120,
    )
