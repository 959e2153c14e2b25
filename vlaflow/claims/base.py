"""What a claim consists of: trainings, arms (a training and a compute policy) and effects between arms.

A claim is data. ``vlaflow reproduce`` turns it into commands, and ``verdict`` turns their results into a row of the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vlaflow.errors import ConfigError

Cost = Literal["latency", "layer passes"]
Direction = Literal["more", "no fewer", "cheaper"]


@dataclass(frozen=True)
class Training:
    """A checkpoint that a claim needs.

    Args:
        recipe: name of the recipe.
        settings: values of ``--set``.
        steps: optimiser steps; None for the recipe's own.
        after: training whose checkpoint is continued (``--policy``).
        latent: training of the latent action model (``--latent``).
        vqa: whether questions are mixed in (``--vqa``).
        sampler: whether training ends with the calibration of the sampler, for the compute policy "auto".
        calibrations: of its early exits or its refinement: the options of ``vlaflow calibrate`` by name.
    """

    recipe: str
    settings: Mapping[str, str] = field(default_factory=dict)
    steps: int | None = None
    after: str | None = None
    latent: str | None = None
    vqa: bool = False
    sampler: bool = False
    calibrations: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def needs(self) -> tuple[str, ...]:
        """Trainings that come first."""
        return tuple(name for name in (self.latent, self.after) if name is not None)


@dataclass(frozen=True)
class TrialArm:
    """One side of an effect.

    Args:
        training: the training whose checkpoint is measured.
        compute: compute policy of its episodes; None for its answers to held-out questions instead of episodes.
        any_training: refine although the training was not made for it (``vlaflow eval --any-training``).
    """

    training: str
    compute: str | None
    any_training: bool = False


@dataclass(frozen=True)
class Effect:
    """One half of what a claim says: how ``first`` relates to ``second``.

    Args:
        first, second: names of arms.
        direction: "more" (``first`` succeeds more often), "no fewer" (not less often by ``margin`` or more) or "cheaper"
            (``first`` costs less).
        margin: for "no fewer", in success rate.
        cost: for "cheaper": the median time of a chunk, or the mean number of network layers run per chunk.
    """

    first: str
    second: str
    direction: Direction = "more"
    margin: float = 0.05
    cost: Cost = "latency"


@dataclass(frozen=True)
class Claim:
    """One claim of a paper.

    Args:
        name: "C1".
        system: the system whose paper makes it.
        statement: what it says, in a sentence.
        published: the paper's figures.
        trainings: checkpoints by name; trainings of equal names in different claims must be equal, because they are shared.
        arms: what is compared, by name; arms in no effect are rivals that the table shows.
        effects: what must hold.
        remark: how the test differs from the paper's.
    """

    name: str
    system: str
    statement: str
    published: str
    trainings: Mapping[str, Training]
    arms: Mapping[str, TrialArm]
    effects: tuple[Effect, ...]
    remark: str = ""

    def __post_init__(self) -> None:
        for name, training in self.trainings.items():
            if unknown := [need for need in training.needs if need not in self.trainings]:
                raise ConfigError(f"Training '{name}' of {self.name} needs '{unknown[0]}', which is not among its trainings.")
        for name, arm in self.arms.items():
            if arm.training not in self.trainings:
                raise ConfigError(f"TrialArm '{name}' of {self.name} is of the unknown training '{arm.training}'.")
        for effect in self.effects:
            if unknown := [side for side in (effect.first, effect.second) if side not in self.arms]:
                raise ConfigError(f"{self.name} compares '{unknown[0]}', which is not among its arms.")

    def order(self) -> tuple[str, ...]:
        """Names of the trainings, each after those that it needs."""
        found: dict[str, None] = {}

        def add(name: str) -> None:
            for need in self.trainings[name].needs:
                add(need)
            found[name] = None

        for name in self.trainings:
            add(name)
        return tuple(found)

    @property
    def asks(self) -> bool:
        """Whether questions are needed, for training or as a measure."""
        return any(training.vqa for training in self.trainings.values()) or any(a.compute is None for a in self.arms.values())
