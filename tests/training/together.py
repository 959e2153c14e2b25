"""Trainings of a few steps that two processes share (fixture ``together``)."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.training import flybot
from tests.training.latents import train_together
from tests.training.sharded import train_sharded
from tests.training.small import Memory, Ragged, new_policy, tiny_config, tiny_policy
from vlaflow.cli import train as command
from vlaflow.data.lerobot import Dataset
from vlaflow.data.quality import INTERVENTIONS
from vlaflow.decoders.exits import ExitTraining
from vlaflow.errors import ConfigError
from vlaflow.nn.block import BlockConfig
from vlaflow.policies.base import Policy
from vlaflow.policies.latent_codes import codes_of
from vlaflow.policies.stages import PolicyStage
from vlaflow.stacks.expert import ExpertConfig
from vlaflow.training.trainer import Trainer


def train_codes_together(out):
    """A policy that learns latent actions, by the command; each process leaves the codes it saw."""
    dataset, latent = out / "dataset", out / "latent"
    assert command.main(flybot.joint(dataset, out / "policy", latent)) == 0
    code_NK, _ = codes_of(Policy.from_pretrained(out / "policy"), Dataset.open(dataset), latent, INTERVENTIONS)
    save_file({"code_NK": torch.from_numpy(code_NK)}, out / f"rank-{os.environ['RANK']}.safetensors")


class Ended(Memory):
    """Sends the second process a SIGTERM with the first batch; a second one would end it at once."""

    told = False

    def batch(self, indices):
        if os.environ["RANK"] == "1" and not self.told:
            self.told = True
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(indices)


def end_together(out):
    """A run that only one process is told to end; each leaves what it makes of that."""
    config = tiny_config(global_batch_size=4)
    outcome = Trainer(PolicyStage(new_policy(config)), config, Ended(), None, out, tracker="none").run()
    told = {"signal": torch.tensor(outcome.signal or 0), "step": torch.tensor(outcome.step)}
    save_file(told, out / f"rank-{os.environ['RANK']}.safetensors")


def look_apart(out):
    """Two processes that look for the checkpoint in folders of their own, as --out on each node's disk; one has it."""
    config = tiny_config(global_batch_size=4)
    rank = os.environ["RANK"]
    try:
        Trainer(PolicyStage(new_policy(config)), config, Memory(), None, out / f"of-{rank}", tracker="none").run()
    except ConfigError as error:
        (out / f"rank-{rank}.txt").write_text(str(error))


def train_all(out: Path) -> None:
    """All of them, one after the other."""
    policy = tiny_policy()
    expert = ExpertConfig(BlockConfig(16, 2, 2, 16, 32))
    policy = replace(
        policy,
        backbone=replace(policy.backbone, depth=3),
        decoder=replace(policy.decoder, expert=expert),
        exits=ExitTraining((1, 2, 3), "random"),
    )
    config = tiny_config(policy=policy, global_batch_size=4, checkpoint_every=6)
    # with a tracker: what ends it must leave the processes' group to the runs below
    Trainer(PolicyStage(new_policy(config)), config, Memory(), Memory(9), out / "exits", tracker="tensorboard").run()
    config = tiny_config(accumulate=2, checkpoint_every=6)
    Trainer(PolicyStage(new_policy(config)), config, Ragged(), Memory(9), out / "spread", tracker="none").run()
    end_together(out / "ended/of-0")
    look_apart(out / "ended")
    train_together(out / "latent")
    train_codes_together(out / "flybot")
    train_sharded(out / "sharded")
