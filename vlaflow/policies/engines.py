"""What computes an opened policy: its networks, or programs that ``vlaflow deploy`` built of its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, get_args

from vlaflow.compute import budget
from vlaflow.compute.spelling import Checkpoint, Knobs
from vlaflow.engine import deploy, store
from vlaflow.engine.deploy import Engine
from vlaflow.engine.gpu import FusedModel
from vlaflow.errors import CalibrationError, CapabilityError, ConfigError, DeploymentError, nearest
from vlaflow.policies.provenance import fingerprint

if TYPE_CHECKING:
    from vlaflow.policies.base import Policy


def with_engine(policy: Policy, engine: Engine) -> Policy:
    """The policy, computed by the programs of its checkpoint on this machine.

    Args:
        policy: opened from a folder.
        engine: "eager" for no programs; "aoti" or "openvino" for those of this compiler; "auto" for the fastest there is;
            "graphs" for fused layers and CUDA graphs of a pretrained backbone (``engine.gpu``), which nothing is built for,
            and "graphs-fp8" for the same with float8 matrices.

    Raises:
        CapabilityError: the policy is not on the CPU, or was opened in bfloat16; not for "auto", which stays eager. For
            "graphs": its backbone is not pretrained.
        ConfigError: for an unknown engine.
        DeploymentError: they were not built, or for something else; not for "auto", which warns and stays eager.
    """
    if engine not in get_args(Engine):
        raise ConfigError(f"There is no engine '{engine}'; {nearest(engine, get_args(Engine))}")
    if engine in ("graphs", "graphs-fp8"):
        return replace(policy, model=FusedModel(policy.model, float8=engine == "graphs-fp8"))
    if engine == "eager" or policy.folder is None or (engine == "auto" and policy.dtype != "fp32"):
        return policy
    if policy.dtype != "fp32":
        raise CapabilityError("Programs have a precision of their own (vlaflow deploy --precision); leave --dtype out.")
    found = deploy.deployed(policy.model, partial(fingerprint, policy.folder), engine, policy.folder)
    if found is None:
        return policy
    return replace(policy, model=found.model, backbone_processor=policy.processor.backbone.bucketed(found.lengths))


def for_budgets(engine: Engine, computes: Sequence[str], knobs: Knobs, checkpoint: Checkpoint) -> tuple[Engine, Knobs]:
    """What computes these compute policies, and the knobs that budgets among them are chosen with.

    "auto" becomes the engine on which the first budget finds the smallest error; of equal ones the fastest.

    Args:
        engine: that was asked for.
        computes: as they were typed.
        knobs: settings.
        checkpoint: of the policy.

    Raises:
        CalibrationError: nothing fits, or nothing was measured.
    """
    limits = [float(found[1]) for name in computes if (found := re.search(r"budget:(\d+\.?\d*)", name))]
    if not limits or engine == "eager":
        return engine, knobs
    there = _engines(checkpoint.fingerprint)
    if engine != "auto":
        return engine, replace(knobs, engine=there.get(engine, engine))
    choices, refused = [], list[CalibrationError]()
    for each, words in there.items():
        try:
            choice = budget.within(checkpoint, limits[0], replace(knobs, engine=words))
            choices.append((choice.error, choice.milliseconds, each))
        except CalibrationError as error:
            refused.append(error)
    if not choices:
        raise refused[0]
    best = min(choices)[-1]
    return best, replace(knobs, engine=there[best])


def timed(engine: Engine, policy: Policy) -> list[Engine]:
    """The engine itself; for "auto" all that can compute this eager policy here."""
    if engine != "auto":
        return [engine]
    can = policy.folder is not None and policy.dtype == "fp32" and policy.device.type == "cpu"
    return list(_engines(fingerprint(policy.folder))) if can and policy.folder else ["eager"]


def _engines(weights: str) -> dict[Engine, str]:
    """Engines that can compute a checkpoint here, and how they call themselves."""
    found: dict[Engine, str] = {"eager": "eager"}
    for compiler in store.COMPILERS:
        try:
            deployment = store.find(weights, compiler)
        except DeploymentError:
            continue
        if deployment is not None:
            found[compiler] = deployment.engine
    return found
