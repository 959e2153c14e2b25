"""What a training step needs, without taking it: numbers counted on the meta device, activations measured with fake tensors.

A fake tensor has a shape and a type and no memory, so the step runs through the very code that trains, and what it would
allocate is added up. Deep backbones are measured through six and twelve layers and continued in a straight line, because their
layers are alike.

    bytes = weights + gradients + optimizer + average + buckets + activations

where AdamW keeps two moments per trained weight, and Muon one per weight of a matrix. Unless the recipe says otherwise, all of
these are float32.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vlaflow.errors import CapabilityError
from vlaflow.nn.attention import as_on_gpu
from vlaflow.nn.fake import real_tensors
from vlaflow.nn.meta import on_meta
from vlaflow.nn.precision import autocast
from vlaflow.policies.adapters import adapt
from vlaflow.policies.dry_run import DryRun
from vlaflow.policies.recipe import TrainConfig
from vlaflow.stacks.base import blocks_of
from vlaflow.training.optim import freeze, turned_matrices

FLOAT = 4
"""Bytes of a gradient, moment or average."""
SHALLOW = (6, 12)
"""Layers through which a deeper backbone is measured."""


class LiveBytes(TorchDispatchMode):
    """Adds up what tensors made in this context hold.

    Args:
        before: tensors that were there before; views of them hold nothing more.

    Attributes:
        now: bytes that are held.
        peak: the most that were held at once.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {each.untyped_storage()._cdata: 0 for each in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count the memory of what it made."""
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._forget, storage._cdata)
        return made

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@dataclass(frozen=True)
class Counts:
    """Numbers of a training stage's networks.

    Args:
        parameters: all of them.
        trained: those that get a gradient.
        weight_bytes: what all of them take, in the types that the config states.
        gradient_bytes: of the trained ones' gradients, which are of the weights' types.
        optimizer_bytes: AdamW's two moments, in float32 or in 8 bits, or Muon's one, and float32 copies of weights in smaller
            formats.
        root: parameters outside of layers, which sharding gathers for a whole step.
        root_trained: those of them that get a gradient.
        largest: parameters of the largest layer.
        matrices: parameters of trained matrices, which autocast copies in bfloat16.
        root_matrices: those of them outside of layers.
    """

    parameters: int
    trained: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    root: int
    root_trained: int
    largest: int
    matrices: int
    root_matrices: int


@dataclass(frozen=True)
class StepCost:
    """What computing a part of a step takes.

    Args:
        activations: bytes beyond weights and their gradients, at most; autocast's copies of matrices included.
        flops: of forward and backward pass, fused attention aside.
    """

    activations: float
    flops: float


def count(build: Callable[[], DryRun], config: TrainConfig) -> Counts:
    """Count a stage's parameters.

    Args:
        build: makes its networks.
        config: says which parameters are frozen or adapted, and how moments are kept.
    """
    with on_meta():
        run = build()
    _adapt(run, config)
    _freeze(run, config)
    blocks = blocks_of(run.trained)
    inside = {p for block in blocks for p in block.parameters()}
    every = list(run.networks.parameters())
    matrices = {m.weight for m in run.networks.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad}
    free = [p for p in every if p.requires_grad]
    moments = 2 if config.optim.kind.endswith("8bit") else 2 * FLOAT
    turned = turned_matrices(run.trained, config.optim)
    return Counts(
        parameters=_numbers(every),
        trained=_numbers(free),
        gradient_bytes=sum(p.numel() * p.element_size() for p in free),
        optimizer_bytes=sum(
            p.numel() * ((FLOAT if p in turned else moments) + FLOAT * (p.dtype != torch.float32)) for p in free
        ),
        weight_bytes=sum(t.numel() * t.element_size() for t in (*every, *run.networks.buffers())),
        root=_numbers(p for p in every if p not in inside),
        root_trained=_numbers(p for p in every if p not in inside and p.requires_grad),
        largest=max((_numbers(block.parameters()) for block in blocks), default=0),
        matrices=_numbers(matrices),
        root_matrices=_numbers(matrices - inside),
    )


def measure(build: Callable[[], DryRun], config: TrainConfig, batch: int, *, bf16: bool) -> StepCost:
    """Measure forward and backward pass of a part of a step, on one process that holds all weights.

    Args:
        build: makes the networks.
        config: says which parameters are frozen or adapted.
        batch: observations.
        bf16: under autocast.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):  # what ``real_tensors`` made
        run = build() if config.lora is None else _adapted(build, config)
        _freeze(run, config)
        run.networks.train()
        for parameter in run.trained.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop)  # gradients are counted, not measured
        depths = (run.depth,) if run.depth <= SHALLOW[-1] else SHALLOW
        found = [_measured(run, batch, depth, bf16) for depth in depths]
        unseen = run.unseen(batch) * (2 if bf16 else FLOAT)
    first, last = found[0], found[-1]
    more = (run.depth - depths[-1]) / max(depths[-1] - depths[0], 1)
    return StepCost(
        last.activations + more * (last.activations - first.activations) + unseen,
        last.flops + more * (last.flops - first.flops),
    )


def _measured(run: DryRun, batch: int, depth: int, bf16: bool) -> StepCost:
    """Two steps, because the counter of operations keeps some tensors until the next garbage collection."""
    live = LiveBytes((*run.networks.parameters(), *run.networks.buffers()))
    operations = FlopCounterMode(display=False)
    for instrument in (live, operations):
        with instrument, as_on_gpu():
            with autocast(bf16, torch.device("cpu")):
                total = run.loss(batch, depth)
            torch.autograd.backward(total)
    return StepCost(live.peak, operations.get_total_flops())


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _adapt(run: DryRun, config: TrainConfig) -> None:
    if config.lora is None:
        return
    if config.lora.quantise is not None:
        raise CapabilityError("Matrices in four bits cannot be planned. Plan with --set lora.quantise=none.")
    with on_meta():
        adapt(run.trained, config.lora, 0)


def _adapted(build: Callable[[], DryRun], config: TrainConfig) -> DryRun:
    """Networks with adapters as fake tensors; peft cannot make adapters of these, so they come from the meta device."""
    with real_tensors(), on_meta():
        run = build()
    with real_tensors():
        _adapt(run, config)
    for module in run.networks.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty_like(parameter, device="cpu")
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty_like(buffer, device="cpu")
    return run


def _freeze(run: DryRun, config: TrainConfig) -> None:
    """Take the gradient from what does not train, as the trainer does."""
    if run.trained is not run.networks:
        trained = set(run.trained.parameters())
        for parameter in run.networks.parameters():
            parameter.requires_grad_(parameter in trained)
    freeze(run.trained, config.optim)


def _numbers(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


@dataclass(frozen=True)
class Memory:
    """Bytes that a process needs, by part.

    Args:
        weights, gradients, optimizer, average: of its share of the parameters; the optimizer's as in ``Counts``.
        buckets: copies in which gradients are exchanged, and with sharding the layers that are gathered at a time.
        activations: what is kept for the backward pass, with autocast's copies of matrices.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    buckets: float
    activations: float

    @property
    def total(self) -> float:
        """All parts: what is held at once when gradients are complete and the next part's activations are kept."""
        return self.fixed + self.activations

    @property
    def fixed(self) -> float:
        """All but activations."""
        return self.weights + self.gradients + self.optimizer + self.average + self.buckets


def copies(counts: Counts, processes: int, *, averaged: bool, activations: float = 0.0) -> Memory:
    """Every process holds everything (DDP); gradients are copied into buckets to be exchanged."""
    own, average = counts.gradient_bytes, FLOAT * counts.trained * averaged
    return Memory(counts.weight_bytes, own, counts.optimizer_bytes, average, own * (processes > 1), activations)


def sharded(counts: Counts, processes: int, *, averaged: bool, bf16: bool, activations: float = 0.0) -> Memory:
    """Every process holds its rows (FSDP2).

    Gathered are the root with its gradients, two layers, and one layer's gradients twice: whole, and as they are sent.
    Autocast copies no matrix of a layer, because layers are gathered in bfloat16.
    """
    if processes == 1 or not counts.largest:  # networks without layers of their own are always copied
        return copies(counts, processes, averaged=averaged, activations=activations)
    layers = (2 if bf16 else FLOAT) * 2 * counts.largest + 2 * FLOAT * counts.largest
    rounded = 2 * (counts.matrices - counts.root_matrices) if bf16 else 0
    return Memory(
        weights=counts.weight_bytes / processes,
        gradients=counts.gradient_bytes / processes,
        optimizer=counts.optimizer_bytes / processes,
        average=FLOAT * counts.trained * averaged / processes,
        buckets=FLOAT * (counts.root + counts.root_trained) + layers,
        activations=max(activations - rounded, 0.0),
    )
