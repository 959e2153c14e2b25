"""Trainings of a few steps with FSDP2 over gloo, on a CPU, for processes that train together (see ``together``).

Accelerate leaves FSDP out on a CPU, so this pretends to be a machine with several devices, each of which is the CPU.
"""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from tests.training.small import Cut, Memory, new_policy, tiny_config
from vlaflow.policies.stages import PolicyStage
from vlaflow.training.trainer import Trainer


def pretend(monkeypatch):
    """Several devices, each the CPU; the processes' group stays as it is."""
    monkeypatch.setattr(PartialState, "_prepare_backend", lambda *_, **__: ("gloo", DistributedType.MULTI_GPU))
    monkeypatch.setattr(PartialState, "set_device", lambda self: setattr(self, "device", torch.device("cpu")))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    AcceleratorState._reset_state(reset_partial_state=True)


def run(out, ema_decay, held=None, source=None):
    """Six steps, saved every second; with held-out samples each is followed by a validation."""
    config = tiny_config(batch_size=2, validate_every=1, ema_decay=ema_decay)
    trainer = Trainer(PolicyStage(new_policy(config)), config, source or Memory(), held, out, tracker="none")
    trainer.run()
    assert trainer.accelerator.is_fsdp2


def train_sharded(out: Path) -> None:
    """One run that only trains, one that validates, one that averages no weights, and one that breaks down and goes on."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretend(monkeypatch)
        run(out / "alone", 0.9)
        run(out / "validated", 0.9, Memory(5))
        run(out / "plain", None, Memory(5))
        with pytest.raises(RuntimeError, match="cut"):
            run(out / "cut", 0.9, Memory(5), Cut(Memory()))
        run(out / "cut", 0.9, Memory(5))
