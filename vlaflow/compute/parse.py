"""Compute policies by the names that people type: dense, refine, refine-random."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.dense import Dense
from vlaflow.compute.refine import AtRandom, BelowThreshold, Refine
from vlaflow.decoders.model import Model
from vlaflow.errors import CapabilityError, ConfigError, nearest

NAMES: dict[str, Callable[[int, float], ComputePolicy]] = {
    "dense": lambda steps, _: Dense(steps),
    "refine": lambda steps, threshold: Refine(BelowThreshold(threshold), steps, Dense(steps)),
    "refine-random": lambda steps, _: Refine(AtRandom(0.5), steps, Dense(steps)),
}


def parse(name: str, steps: int = 10, threshold: float = 0.5) -> ComputePolicy:
    """The compute policy of that name, with ``steps`` solver steps per round and a confidence threshold for "refine".

    Raises:
        ConfigError: with the nearest valid name.
    """
    if name not in NAMES:
        raise ConfigError(f"There is no compute policy '{name}'; {nearest(name, NAMES)}")
    return NAMES[name](steps, threshold)


def parse_all(names: Sequence[str], steps: int = 10, threshold: float = 0.5) -> list[ComputePolicy]:
    """Several, each once, in the order given."""
    return [parse(name, steps, threshold) for name in dict.fromkeys(names)]


def able(model: Model, steps: int = 10) -> list[ComputePolicy]:
    """Every named compute policy that this model can run."""
    found = []
    for compute in parse_all(list(NAMES), steps):
        try:
            compute.needs.check(model, compute.name)
        except CapabilityError:
            continue
        found.append(compute)
    return found
