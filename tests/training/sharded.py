"""Trainings of a few steps with FSDP2 over gloo, on a CPU, for processes that train together (see ``together``)."""

import shutil
from pathlib import Path

import pytest

from tests.training.small import Cut, Ended, Memory, new_policy, tiny_config
from vlaflow.policies.recipe import OptimConfig
from vlaflow.policies.stages import PolicyStage
from vlaflow.training.trainer import Trainer

MUON = OptimConfig("muon", learning_rate=1e-2, weight_decay=0.1, warmup_steps=2)


def run(out, ema_decay, held=None, source=None, every=6, **changes):
    """Six steps, saved after every ``every``; with held-out samples each step is followed by a validation."""
    config = tiny_config(global_batch_size=4, validate_every=1, checkpoint_every=every, ema_decay=ema_decay, **changes)
    trainer = Trainer(PolicyStage(new_policy(config)), config, source or Memory(), held, out, tracker="none", shard=True)
    trainer.run()
    assert trainer.sharded


def train_sharded(out: Path) -> None:
    """One run that only trains, one that validates, one that averages no weights, and one that breaks down and goes on.

    One is told to end before a validation, and goes on.
    With Muon, whose steps need whole matrices, one run that only trains, and one that breaks down and goes on.
    """
    run(out / "alone", 0.9)
    run(out / "validated", 0.9, Memory(5))
    run(out / "plain", None, Memory(5))
    with pytest.raises(RuntimeError, match="cut"):
        run(out / "cut", 0.9, Memory(5), Cut(Memory()), every=2)
    run(out / "cut", 0.9, Memory(5), every=2)
    run(out / "told", 0.9, Memory(5), Ended(Memory(), at=3))
    shutil.copy(out / "told/training/log.jsonl", out / "told/before.jsonl")
    run(out / "told", 0.9, Memory(5))
    run(out / "turned", None, optim=MUON)
    with pytest.raises(RuntimeError, match="cut"):
        run(out / "turned-cut", None, None, Cut(Memory()), every=2, optim=MUON)
    run(out / "turned-cut", None, every=2, optim=MUON)
