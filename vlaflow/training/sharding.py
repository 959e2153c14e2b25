"""FSDP2 by layer: every process keeps its rows of each parameter and gathers a layer's only while that layer runs.

A backbone and a stack name their layers (``blocks``); each is a unit of its own. What remains (embeddings, final norms, heads)
is the root's and stays gathered during a step. Between steps every process holds its share alone: of weights, gradients,
moments and averages.

A parameter's rows are divided as ``torch.chunk`` does: process r of n holds the rows from r · ⌈R/n⌉ on.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from vlaflow.errors import CapabilityError, CheckpointError, ConfigError
from vlaflow.io import first_not_finite
from vlaflow.nn.stored import Stored, place_of
from vlaflow.training.team import Team


def shard(root: nn.Module, blocks: Mapping[nn.Module, str], team: Team, *, bf16: bool) -> None:
    """Spread a module over the processes; call it before there is an optimizer.

    Each process reads its own rows of weights that lie in files (``nn.stored``); the first one sends the others.

    Args:
        root: its forward pass is the whole loss; on the CPU, with weights on the first process and on any device elsewhere.
        blocks: see ``stacks.base.blocks_of``; without any, every process holds everything.
        team: the processes.
        bf16: gather layers in bfloat16, as autocast would round their matrices; gradients are still summed in float32. What
            is the root's is gathered in float32.

    Raises:
        ConfigError: the processes do not find the same files.
        CheckpointError: a file cannot be read, or holds what is not finite.
    """
    _require_untied(root)
    places = {name: place for name, tensor in named_tensors(root).items() if (place := place_of(tensor)) is not None}
    if len(set(team.gather(len(places)))) > 1:
        raise ConfigError("The processes of this run do not find the same files of pretrained weights; give all nodes a copy.")
    given = {name: tensor.detach() for name, tensor in named_tensors(root).items()} if team.is_first else {}
    root.to("meta")
    mesh = init_device_mesh(team.device.type, (team.world,))
    rounded = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    for block, method in blocks.items():
        fully_shard(block, mesh=mesh, mp_policy=rounded)
        if method != "forward":
            register_fsdp_forward_method(block, method)
    if blocks:
        fully_shard(root, mesh=mesh)
    root.to_empty(device=team.device)
    read_rows(root, places, team)
    fill(root, {name: tensor for name, tensor in given.items() if name not in places}, team, leave=places.keys())
    # Keys and values leave a layer as views. Nothing writes into them, which is what the warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


@torch.no_grad()
def read_rows(root: nn.Module, places: Mapping[str, Stored], team: Team) -> None:
    """Read this process's rows of the tensors that lie in files.

    Raises:
        CheckpointError: in every process, where one cannot read its rows.
    """
    with team.together():
        for name, tensor in named_tensors(root).items():
            if name in places:
                own, first = own_rows(tensor)
                own.copy_(places[name].rows(first, first + len(own)) if own.ndim else places[name].whole())
                if first_not_finite({name: own}):
                    raise CheckpointError(f"'{name}' in {places[name].file} holds NaN or an infinite value.")


@torch.no_grad()
def fill(root: nn.Module, given: Mapping[str, Tensor], team: Team, leave: Collection[str] = ()) -> None:
    """Copy the first process's tensors into everyone's module, each process its rows, one tensor at a time.

    Args:
        root: parameters and buffers on the team's device.
        given: all of them by name, whole; only the first process's are read.
        team: the processes.
        leave: names of those that are there already.
    """
    for name, tensor in named_tensors(root).items():
        if name in leave:
            continue
        whole = (
            given[name].to(team.device) if team.is_first else torch.empty(tensor.shape, dtype=tensor.dtype, device=team.device)
        )
        dist.broadcast(whole, 0)
        own, first = own_rows(tensor)
        own.copy_(whole[first : first + len(own)] if own.ndim else whole)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """What this process holds of a tensor, sharing its memory, and the number of its first row.

    The whole tensor, from row 0, where it is not sharded.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor, 0
    if tensor.placements != (Shard(0),):
        raise RuntimeError(f"Parameters are sharded by rows, this one is {tensor.placements}.")
    each = -(-tensor.shape[0] // tensor.device_mesh.size())
    return tensor.to_local(), min(tensor.device_mesh.get_local_rank() * each, tensor.shape[0])


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only its rows."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which every process holds a part, or that all of them computed together, on its device."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshard(module: nn.Module) -> None:
    """Leave only this process's rows in a module after a forward pass that no backward pass followed.

    FSDP2 gathers the root's parameters in the forward pass and drops them in the backward pass. Without one the module would
    keep the gathered copies: they are other parameters than the optimiser's, and the next pass would not read new weights.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _require_untied(root: nn.Module) -> None:
    """Refuse parameters with two names: made empty, they would be two."""
    every = [id(p) for _, p in root.named_parameters(remove_duplicate=False)]
    if len(every) != len(set(every)):
        raise CapabilityError("A network with tied parameters cannot be sharded. Leave --shard out, or hold them once.")
