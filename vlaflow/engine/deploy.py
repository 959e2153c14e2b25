"""From networks to programs, and from programs to networks that call them.

``build`` compiles (minutes), ``deployed`` opens what was built (a second) and never compiles.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Literal

import torch

from vlaflow.backbones.inputs import Inputs
from vlaflow.compute.base import ComputePolicy
from vlaflow.decoders.model import Model
from vlaflow.engine import store
from vlaflow.engine.deployed import DeployedModel
from vlaflow.engine.fold import folded
from vlaflow.engine.linear import in_bfloat16, transposed
from vlaflow.engine.plan import needed
from vlaflow.engine.programs import STEPS, Precision, Program, Programs
from vlaflow.engine.store import COMPILERS, Compiler, Deployment, Identity, Speed
from vlaflow.errors import CapabilityError, DeploymentError
from vlaflow.packages import require
from vlaflow.text import as_typed

Engine = Literal["auto", "eager", "aoti", "openvino", "graphs", "graphs-fp8"]
TOLERANCE: dict[Precision, float] = {"f32": 1e-5, "bf16": 0.05}
"""Largest difference to the eager chunk, normalised. Sums in another order give 1e-6; bfloat16 keeps 8 bits of every factor."""


@dataclass(frozen=True)
class DeploymentPlan:
    """What to build.

    Args:
        compiler, precision: how.
        computes: the compute policies whose passes the programs must cover.
        batches: numbers of observations; others are filled up to the next.
        lengths: of instructions, in the processor's units; others are filled up to the next.
    """

    compiler: Compiler
    precision: Precision
    computes: Sequence[ComputePolicy]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Opened:
    """Networks whose passes are programs, and the lengths that instructions are to be padded to."""

    model: Model
    lengths: tuple[int, ...]
    deployment: Deployment


def build(
    model: Model,
    weights: str,
    plan: DeploymentPlan,
    inputs: Iterable[Inputs],
    judge: Callable[[Opened], Speed],
    *,
    say: Callable[[Program], None],
) -> Deployment:
    """Compile the programs of a model and keep them, unless ``judge`` refuses.

    Args:
        model: the networks; see ``plan.require_programmable``.
        weights: fingerprint of their checkpoint.
        plan: what to build.
        inputs: examples, one for each batch and length.
        judge: looks at the result before it is kept, and raises if it must not be.
        say: is called before each program.

    Raises:
        CapabilityError: there is no compiler.
    """
    store.require_compiler(plan.compiler)
    network = _network(model, plan.compiler, plan.precision)
    passes = reduce(or_, (compute.passes(model.backbone.spec.depth) for compute in plan.computes))
    listed = needed(network, inputs, passes)
    if not any(program.key.part in STEPS for program in listed):
        sys.stderr.write(
            f"The engine knows no programs for the steps of a {type(model.decoder).__name__}, so the networks take them; "
            "observations are embedded and read by programs.\n"
        )
    with store.replacing(weights, plan.compiler) as new:
        digests = {}
        for program in listed:
            say(program)
            digests[str(program.key)] = store.build(program, new, plan.compiler, plan.precision)
        made = Deployment(
            Identity.here(weights, plan.compiler),
            plan.compiler,
            plan.precision,
            plan.batches,
            plan.lengths,
            tuple(compute.name for compute in plan.computes),
            torch.get_num_threads(),
            digests,
        )
        opened = _opened(network, made, store.load(made, new))
        made = replace(made, measured=judge(opened))
        store.write(made, new)
    return made


def deployed(model: Model, weights: Callable[[], str], engine: Engine, checkpoint: Path | None = None) -> Opened | None:
    """The model computed by programs; None to stay eager.

    Args:
        model: the networks.
        weights: fingerprint of their checkpoint; called only if this user has any programs.
        engine: see ``policies.engines.with_engine``.
        checkpoint: its folder, for the cures.

    Raises:
        DeploymentError: the programs of a compiler that was asked for by name are missing, or were built for something else.
    """
    device = model.device
    if engine == "auto":
        return _fastest(model, weights(), checkpoint) if device.type == "cpu" and store.root().exists() else None
    if engine == "eager" or engine == "graphs" or engine == "graphs-fp8":  # noqa: PLR1714 - narrows the type
        return None
    if device.type != "cpu":
        raise CapabilityError(f"Programs run on the CPU, and this policy is on {device}. Leave --device or --engine out.")
    if engine == "openvino":
        require("openvino", what="--engine openvino")
    found = store.find(weights(), engine, checkpoint)
    if found is None:
        raise DeploymentError(
            f"This checkpoint has no programs of {engine} on this machine. Build them: vlaflow deploy {as_typed(checkpoint)} "
            f"--engine {engine}"
        )
    return _open(model, found, checkpoint)


def _fastest(model: Model, weights: str, checkpoint: Path | None) -> Opened | None:
    """The deployment whose chunks take least; None where eager ones do. What cannot be used is said in a sentence."""
    usable: list[tuple[float, Opened]] = []
    for compiler in COMPILERS:
        try:
            found = store.find(weights, compiler, checkpoint)
            if found is not None and found.measured is not None and found.measured.milliseconds < found.measured.eager:
                usable.append((found.measured.milliseconds, _open(model, found, checkpoint)))
        except DeploymentError as error:
            sys.stderr.write(f"{error} Until then this policy runs without them.\n")
    return min(usable, key=lambda pair: pair[0])[1] if usable else None


def _open(model: Model, deployment: Deployment, checkpoint: Path | None) -> Opened:
    programs = store.load(deployment, checkpoint=checkpoint)
    return _opened(_network(model, deployment.compiler, deployment.precision), deployment, programs)


def _opened(network: Model, deployment: Deployment, programs: Programs) -> Opened:
    return Opened(DeployedModel(network, programs, deployment.engine).eval(), deployment.lengths, deployment)


def _network(model: Model, compiler: Compiler, precision: Precision) -> Model:
    """The folded networks. OpenVINO orders and rounds matrices by itself."""
    network = folded(model)
    if compiler == "openvino":
        return network
    return in_bfloat16(network) if precision == "bf16" else transposed(network)
