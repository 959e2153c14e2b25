"""A stage's loss as a module, which is where the wrappers for several processes listen."""

from __future__ import annotations

import os
import shutil
import sys

import torch
from torch import Tensor, nn

from vlaflow.data.source import Ready
from vlaflow.nn.precision import autocast
from vlaflow.policies.processor import Drawn
from vlaflow.policies.stages import Stage
from vlaflow.training.team import Team


def can_compile(device: torch.device, team: Team) -> bool:
    """Whether a loss can be compiled for this device; a note says what is missing, and training goes on without."""
    compiler = os.environ.get("CXX", "g++")
    if device.type != "cpu" or shutil.which(compiler) is not None:
        return True
    if team.is_first:
        sys.stderr.write(
            f"Note: --compile needs the C++ compiler '{compiler}', which this machine lacks, so the loss is not compiled. "
            "Install it (apt install g++), or set CXX to another one.\n"
        )
    return False


class LossModule(nn.Module):
    """The stage's loss as a forward pass, for DDP and FSDP.

    Args:
        stage: whose loss.
        bf16: compute in bfloat16 autocast.
        device: of the networks.
        compiled: compile the loss by torch.compile with the first batch, which takes a minute; nothing in it is random.
            Held-out losses are computed without, for they are rarely needed and would be compiled once more.
    """

    def __init__(self, stage: Stage, bf16: bool, device: torch.device, *, compiled: bool = False) -> None:
        super().__init__()
        self.module, self._bf16, self._device = stage.module, bf16, device
        self._plain = stage.loss
        self._trained = torch.compile(stage.loss) if compiled else stage.loss

    def forward(self, batch: Ready, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and its detached parts; plain containers, so that the wrappers find the tensors in them."""
        with autocast(self._bf16, self._device):
            terms = (self._trained if self.module.training else self._plain)(batch, drawn)
        return terms.total, dict(terms.parts)
