"""Where claims are tested: the tasks, the recipes at their size, and how long that takes.

The catalogue is written for Meta-World. On LIBERO a training takes the recipe of the same system there, with the same settings
and the same share of its steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from vlaflow.claims.base import Claim, Training
from vlaflow.claims.catalogue import STEPS
from vlaflow.errors import ConfigError


@dataclass(frozen=True)
class Hours:
    """Rough durations on two processor cores.

    Args:
        recording: of all demonstrations.
        training: of a checkpoint with one training seed.
        arm: of the episodes of an arm, for one training seed.
    """

    recording: float
    training: float
    arm: float


@dataclass(frozen=True)
class Benchmark:
    """Tasks and the recipes that learn them.

    Args:
        name: "metaworld", or a suite of LIBERO: "libero/goal".
        envs: the tasks.
        hours: see ``Hours``.
        packages, extra: import names that it needs, and the extra that brings them.
        recipes: by the recipe of Meta-World that they take the place of; recipes that are not named stay the same.
        steps: optimiser steps for one of Meta-World.
        episodes: environment seeds per task and arm, unless told otherwise.
        recording: further options of ``vlaflow record``.
        asks: whether there are questions about its scenes.
    """

    name: str
    envs: tuple[str, ...]
    hours: Hours
    packages: tuple[str, ...]
    extra: str
    recipes: Mapping[str, str] = field(default_factory=dict)
    steps: float = 1.0
    episodes: int = 40
    recording: tuple[str, ...] = ()
    asks: bool = True

    def training(self, training: Training) -> Training:
        """A training of the catalogue, here."""
        steps = None if training.steps is None else round(training.steps * self.steps)
        return replace(training, recipe=self.recipes.get(training.recipe, training.recipe), steps=steps)

    def lacks(self, claim: Claim) -> str:
        """What a claim needs that there is not here, as a clause; empty where nothing is missing."""
        unknown = [one.recipe for one in claim.trainings.values() if self.recipes and one.recipe not in self.recipes]
        if unknown:
            return f"trains {unknown[0]}, which has no counterpart for {self.name}"
        return f"asks questions about scenes, of which {self.name} has none" if claim.asks and not self.asks else ""

    def require(self, claim: Claim) -> None:
        """Refuse a claim that cannot be tested here.

        Raises:
            ConfigError: it needs questions, or a recipe that does not exist for these tasks.
        """
        if lacks := self.lacks(claim):
            raise ConfigError(f"{claim.name} {lacks}. Leave --benchmark out to test it on Meta-World.")

    def hours_of(self, claim: Claim) -> float:
        """Rough duration of one training seed of a claim."""
        return self.hours.recording + self.hours.training * len(claim.trainings) + self.hours.arm * len(claim.arms)


METAWORLD = Benchmark(
    "metaworld",
    ("metaworld/window-open-v3", "metaworld/peg-insert-side-v3", "metaworld/pick-place-v3"),
    Hours(recording=0.05, training=0.1, arm=0.033),
    ("metaworld", "mujoco"),
    "demo",
)
"""Three tasks with room to improve."""

LIBERO_RECIPES = {
    "asyncvla.demo": "asyncvla.libero_small",
    "asyncvla.rater": "asyncvla.rater",
    "a1.demo": "a1.libero_small",
    "dfm_vla.demo": "dfm_vla.libero_small",
    "baselines.oft": "baselines.oft_libero_small",
    "iflybot.latent": "iflybot.small_latent",
    "iflybot.joint": "iflybot.small_joint",
    "iflybot.fine": "iflybot.small_fine",
}


def _libero(suite: str) -> Benchmark:
    """A suite of LIBERO; its recipes' 4000 steps take the place of the catalogue's."""
    return Benchmark(
        f"libero/{suite}",
        tuple(f"libero/{suite}/{number}" for number in range(10)),
        Hours(recording=0.6, training=0.9, arm=0.07),
        ("libero", "mujoco"),
        "demo,libero",
        LIBERO_RECIPES,
        4000 / STEPS,
        episodes=10,
        recording=("--noise", "0.1", "--noise-memory", "0", "--noise", "0.2", "--noise-memory", "0.8"),
        asks=False,
    )


BENCHMARKS = {one.name: one for one in (METAWORLD, *map(_libero, ("spatial", "object", "goal", "long")))}
