"""Whole tensors out of sharded ones and back, so that what is on disk does not depend on how many processes trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The complete tensor, contiguous on the CPU. With FSDP every process must call it, in the same order."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous()


@torch.no_grad()
def spread(name: str, full: Tensor, target: Tensor) -> None:
    """Copy a complete tensor into ``target``, into this process's shard of it where it is sharded.

    Raises:
        RuntimeError: another shape or type; nothing is cast.
    """
    if (full.shape, full.dtype) != (target.shape, target.dtype):
        found, wanted = (f"{tuple(t.shape)} of {str(t.dtype).removeprefix('torch.')}" for t in (full, target))
        raise RuntimeError(f"'{name}' is {found}, the network's is {wanted}")
    if isinstance(target, DTensor):
        full = distribute_tensor(full.to(target.device), target.device_mesh, target.placements)
    target.copy_(full)


def reshard(module: nn.Module) -> None:
    """Leave only this process's shards in a module after a forward pass that no backward pass followed.

    FSDP2 gathers the root's parameters in the forward pass and drops them in the backward pass. Without one the module would
    keep the gathered copies: they are other parameters than the optimiser's, and the next pass would not read new weights.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
