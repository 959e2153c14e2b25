"""Trainings of a few steps that several processes share (fixture ``together``): python -m tests.training.together OUT."""

import sys
from dataclasses import replace
from pathlib import Path

from tests.training.latents import train_together
from tests.training.small import Memory, new_policy, tiny_config, tiny_policy
from vlaflow.decoders.exits import ExitTraining
from vlaflow.nn.block import BlockConfig
from vlaflow.stacks.expert import ExpertConfig
from vlaflow.training.stages import PolicyStage
from vlaflow.training.trainer import Trainer

if __name__ == "__main__":
    out = Path(sys.argv[1])
    policy = tiny_policy()
    expert = ExpertConfig(BlockConfig(16, 2, 2, 16, 32))
    policy = replace(
        policy,
        backbone=replace(policy.backbone, depth=3),
        decoder=replace(policy.decoder, expert=expert),
        exits=ExitTraining((1, 2, 3), "random"),
    )
    config = tiny_config(policy=policy, batch_size=2)
    trainer = Trainer(PolicyStage(new_policy(config)), config, Memory(), Memory(9), out / "exits", tracker="none")
    trainer.run()
    train_together(out / "latent")
