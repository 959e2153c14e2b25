"""Building a checkpoint's programs: they are compared with the eager chunks, and timed next to these, before they are kept.

``engines`` opens what was built.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Generator

from vlaflow.backbones.inputs import Inputs
from vlaflow.compute.base import ComputePolicy, Stopwatch
from vlaflow.data.batch import ObservationBatch
from vlaflow.engine import deploy
from vlaflow.engine.deploy import TOLERANCE, DeploymentPlan, Opened
from vlaflow.engine.plan import require_programmable
from vlaflow.engine.programs import Program
from vlaflow.engine.store import Deployment, Speed
from vlaflow.errors import DeploymentError
from vlaflow.policies.base import Policy
from vlaflow.policies.example import example
from vlaflow.policies.provenance import fingerprint
from vlaflow.spec import Observation

ROUNDS = 40
"""Chunks of each kind that are timed, in turns."""


def default_lengths(policy: Policy) -> tuple[int, ...]:
    """A third of the longest instruction, and all of it; the example's where there is no limit."""
    limit = policy.config.backbone.longest_instruction
    return () if limit is None else (-(-limit.size // 3), limit.size)


def build(policy: Policy, folder: Path, plan: DeploymentPlan, say: Callable[[Program], None]) -> Deployment:
    """Compile, check, time and keep the programs of a checkpoint; those of the same compiler that it had are replaced.

    Args:
        policy: eager, opened from ``folder``.
        folder: of the checkpoint.
        plan: what to build.
        say: is called before each program.

    Raises:
        CapabilityError: there is no compiler, or the checkpoint lacks what a compute policy or programs need.
        DeploymentError: the programs give other chunks.
    """
    for compute in plan.computes:
        compute.needs.check(policy.model, compute.name, folder)
    require_programmable(policy.model.backbone, _unlike(policy))
    processor = policy.processor.backbone.bucketed(plan.lengths)

    def judge(opened: Opened) -> Speed:
        return _compared(policy, replace(policy, model=opened.model, backbone_processor=processor), plan)

    return deploy.build(policy.model, fingerprint(folder), plan, _inputs(policy, plan), judge, say=say)


def _unlike(policy: Policy) -> Inputs:
    """Two observations of which one has a shorter instruction."""
    observed = example(policy)
    pair = [observed, replace(observed, instruction=observed.instruction[:4])]
    return policy.processor(policy.own(ObservationBatch.collate(pair)))


def _inputs(policy: Policy, plan: DeploymentPlan) -> Iterator[Inputs]:
    """Examples of every batch and length."""
    prepare = replace(policy, backbone_processor=policy.processor.backbone.bucketed(plan.lengths)).processor
    for length in plan.lengths or (None,):
        for batch in plan.batches:
            yield prepare(policy.own(ObservationBatch.collate([_observed(policy, length)] * batch)))


def _observed(policy: Policy, length: int | None) -> Observation:
    observed = example(policy)
    return observed if length is None else replace(observed, instruction=("Open a drawer " * length)[:length])


def _compared(policy: Policy, made: Policy, plan: DeploymentPlan) -> Speed:
    """Median milliseconds of the first compute policy's chunks with and without programs, and the largest difference.

    Raises:
        DeploymentError: it is beyond the tolerance.
    """
    observed = _observed(policy, plan.lengths[0] if plan.lengths else None)
    pairs = [[_normalised(each, observed, compute) for each in (policy, made)] for compute in plan.computes]
    worst = float(torch.stack([(one - other).abs().max() for one, other in pairs]).max())
    if not worst <= TOLERANCE[plan.precision]:
        raise DeploymentError(
            f"The programs of {plan.compiler} give chunks that differ by {worst:.2g} standard deviations from the eager ones, "
            f"more than {TOLERANCE[plan.precision]:g}; they are not kept. Use the other compiler, or --engine eager."
        )
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(-3, ROUNDS):
        for each, taken in zip((made, policy), times, strict=True):
            begin = time.perf_counter()
            each.act(observed, plan.computes[0], generator=Generator().manual_seed(turn % ROUNDS))
            if turn >= 0:
                taken.append(1e3 * (time.perf_counter() - begin))
    return Speed(float(np.median(times[0])), float(np.median(times[1])), worst)


def _normalised(policy: Policy, observed: Observation, compute: ComputePolicy) -> torch.Tensor:
    """A chunk as the networks make it."""
    with torch.inference_mode():
        prefix = policy.embed(policy.own(ObservationBatch.collate([observed])))
        return compute.decode(policy.model, prefix, [Generator().manual_seed(0)], Stopwatch(policy.device)).action_BLD
