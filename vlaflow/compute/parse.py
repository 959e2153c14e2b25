"""Compute policies by the names that people type: dense, refine, refine-random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.dense import Dense
from vlaflow.compute.refine import AtRandom, BelowThreshold, Refine
from vlaflow.decoders.model import Model
from vlaflow.errors import CapabilityError, ConfigError, nearest


@dataclass(frozen=True)
class Knobs:
    """What the command line may turn.

    Args:
        steps: solver steps per round.
        threshold: confidence below which "refine" makes an action anew.
        any_training: see ``Refine``.
    """

    steps: int = 10
    threshold: float = 0.5
    any_training: bool = False


NAMES: dict[str, Callable[[Knobs], ComputePolicy]] = {
    "dense": lambda k: Dense(k.steps),
    "refine": lambda k: Refine(BelowThreshold(k.threshold), k.steps, Dense(k.steps), k.any_training),
    "refine-random": lambda k: Refine(AtRandom(0.5), k.steps, Dense(k.steps), k.any_training),
}


def parse(name: str, knobs: Knobs = Knobs()) -> ComputePolicy:
    """The compute policy of that name.

    Raises:
        ConfigError: with the nearest valid name.
    """
    if name not in NAMES:
        raise ConfigError(f"There is no compute policy '{name}'; {nearest(name, NAMES)}")
    return NAMES[name](knobs)


def parse_all(names: Sequence[str], knobs: Knobs = Knobs()) -> list[ComputePolicy]:
    """Several, each once, in the order given."""
    return [parse(name, knobs) for name in dict.fromkeys(names)]


def able(model: Model, knobs: Knobs = Knobs()) -> list[ComputePolicy]:
    """Every named compute policy that this model can run."""
    found = []
    for compute in parse_all(list(NAMES), knobs):
        try:
            compute.needs.check(model, compute.name)
        except CapabilityError:
            continue
        found.append(compute)
    return found
