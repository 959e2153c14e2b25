"""A stage's loss as a module, which is where the wrappers for several processes listen."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from vlaflow.data.source import Ready
from vlaflow.nn.precision import autocast
from vlaflow.policies.stages import Stage


class LossModule(nn.Module):
    """The stage's loss as a forward pass, for DDP and FSDP."""

    def __init__(self, stage: Stage, bf16: bool, device: torch.device) -> None:
        super().__init__()
        self.module, self._loss, self._bf16, self._device = stage.module, stage.loss, bf16, device

    def forward(self, batch: Ready, generator: Generator, shared: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and its detached parts; plain containers, so that the wrappers find the tensors in them."""
        with autocast(self._bf16, self._device):
            terms = self._loss(batch, generator, shared)
        return terms.total, dict(terms.parts)
