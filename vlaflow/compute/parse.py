"""Compute policies by the names that people type.

dense            all layers, all solver steps
dense:2          2 solver steps
dense:2@3        … through the first 3 layers
refine           the dense chunk, and what its rater doubts made anew
refine-random    the same with random doubts
two-stage:14+2   14 stochastic steps and 2 deterministic ones, for discrete flows
two-stage:14+2/0.3  … whose prefix is run again when 30 % of the tokens have changed (0: at every step, no cache)
refine-tokens    the dense chunk of a decoder of tokens, and the tokens below the threshold made anew
exit:NAME        early exit by the calibration CKPT/calibration/NAME.json
refine+exit:NAME refinement of that
budget:20        whatever fits 20 ms on this machine (vlaflow bench latency CKPT comes first)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.budget import within
from vlaflow.compute.calibration import Checkpoint, load_exit
from vlaflow.compute.dense import Dense
from vlaflow.compute.refine import AtRandom, BelowThreshold, Refine
from vlaflow.compute.refine_tokens import Improbable, RefineTokens
from vlaflow.compute.two_stage import TwoStage
from vlaflow.decoders.model import Model
from vlaflow.errors import CapabilityError, ConfigError, nearest


@dataclass(frozen=True)
class Knobs:
    """What the command line may turn.

    Args:
        steps: solver steps per round.
        threshold: confidence below which "refine" makes an action anew.
        any_training: see ``Refine``.
        device, threads: what is computed with, for budgets.
    """

    steps: int = 10
    threshold: float = 0.5
    any_training: bool = False
    device: str = "cpu"
    threads: int = 1


REFINEMENTS: dict[str, Callable[[Knobs], BelowThreshold | AtRandom]] = {
    "refine": lambda k: BelowThreshold(k.threshold),
    "refine-random": lambda k: AtRandom(0.5),
}
KINDS = ("dense", "two-stage", *REFINEMENTS, "refine-tokens", "exit", "budget")


def parse(name: str, knobs: Knobs = Knobs(), checkpoint: Checkpoint | None = None) -> ComputePolicy:
    """The compute policy of that name.

    Args:
        name: see the module text.
        knobs: settings.
        checkpoint: holds the calibrations and latencies that "exit" and "budget" read.

    Raises:
        ConfigError: for an unknown name, with the nearest valid one, or a malformed one.
        CalibrationError: for a calibration that is missing or of another checkpoint.
    """
    head, plus, inner = name.partition("+")
    if head in (*REFINEMENTS, "refine-tokens"):
        first = parse(inner, knobs, checkpoint) if plus else Dense(knobs.steps)
        if head == "refine-tokens":
            return RefineTokens(Improbable(knobs.threshold), knobs.steps, first)
        return Refine(REFINEMENTS[head](knobs), knobs.steps, first, knobs.any_training)
    kind, _, rest = name.partition(":")
    if kind not in KINDS:
        raise ConfigError(f"There is no compute policy '{kind}'; {nearest(kind, KINDS)}")
    if kind == "dense":
        return _dense(name, rest, knobs)
    if kind == "two-stage":
        return _two_stage(name, rest)
    if checkpoint is None:
        raise ConfigError(f"'{name}' is measured for one checkpoint; say which.")
    if not rest:
        raise ConfigError(f"'{kind}' needs more: exit:NAME of a calibration, or budget:MILLISECONDS.")
    if kind == "exit":
        return load_exit(checkpoint, rest)
    try:
        milliseconds = float(rest)
    except ValueError:
        raise ConfigError(f"A budget is a number of milliseconds, as in budget:20, got '{rest}'.") from None
    return within(checkpoint, milliseconds, knobs.device, knobs.threads).compute


def parse_all(names: Sequence[str], knobs: Knobs = Knobs(), checkpoint: Checkpoint | None = None) -> list[ComputePolicy]:
    """Several, each once, in the order given."""
    found = [parse(name, knobs, checkpoint) for name in names]
    return list({compute.name: compute for compute in found}.values())


def able(model: Model, knobs: Knobs = Knobs()) -> list[ComputePolicy]:
    """Every compute policy without a calibration that this model can run."""
    found = []
    for compute in parse_all(["dense", "two-stage:14+2", *REFINEMENTS, "refine-tokens"], knobs):
        try:
            compute.needs.check(model, compute.name)
        except CapabilityError:
            continue
        found.append(compute)
    return found


def _dense(name: str, rest: str, knobs: Knobs) -> Dense:
    if not rest:
        return Dense(knobs.steps)
    found = re.fullmatch(r"(\d+)(?:@(\d+))?", rest)
    if found is None:
        raise ConfigError(f"dense takes steps and layers as in dense:2 or dense:2@3, got '{name}'.")
    return Dense(int(found[1]), int(found[2]) if found[2] else None, label=name)


def _two_stage(name: str, rest: str) -> TwoStage:
    found = re.fullmatch(r"(\d+)\+(\d+)(?:/(\d*\.?\d+))?", rest)
    if found is None:
        raise ConfigError(f"two-stage takes stochastic and deterministic steps as in two-stage:14+2, got '{name}'.")
    return TwoStage(int(found[1]), int(found[2]), float(found[3]) if found[3] else None, label=name)
