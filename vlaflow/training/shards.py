"""Whole tensors out of sharded ones and back, so that what is on disk does not depend on how many processes trained."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The complete tensor, contiguous on the CPU. With FSDP every process must call it, in the same order."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous()


@torch.no_grad()
def spread(full: Tensor, target: Tensor) -> None:
    """Copy a complete tensor into ``target``, into this process's shard of it where it is sharded."""
    if isinstance(target, DTensor):
        full = distribute_tensor(full.to(target.device), target.device_mesh, target.placements)
    target.copy_(full)
