"""Scripted demonstrators: the experts of the suites, and mistakes that are executed but not learned.

Demonstrations of a perfect expert never show how to recover from a mistake. So noise is added to the *executed* action, while
the *label* remains the expert's clean action for the state that the noise led to (as in DART, Laskey et al. 2017). Noise
averages out within a few steps, but a policy that misjudges the position of its goal errs for a whole chunk. An expert that
misjudges does the same: for some time it acts as if its hand were somewhere else.

Meta-World's experts return actions as large as 24; the simulator clips them to ±1, and the clipped action is recorded, because
otherwise a single outlier would determine the scale of the normalisation.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlaflow.errors import CapabilityError, ConfigError, SpecError
from vlaflow.ranges import Fraction, NotNegative, require_ranges
from vlaflow.simulators.base import Environment, Expert, parse_env_name, suite_of


def expert_for(name: str) -> Expert:
    """The scripted expert of an environment.

    Args:
        name: "suite/task".

    Raises:
        ConfigError: for an unknown environment.
        CapabilityError: when the suite has no experts.
    """
    suite, task = parse_env_name(name)
    expert = suite_of(suite).expert
    if expert is None:
        raise CapabilityError(f"The suite '{suite}' has no scripted experts; record by teleoperation, or use 'metaworld/...'.")
    return expert(task)


def clean_action(expert: Expert, env: Environment, error: np.ndarray | None = None) -> np.ndarray:
    """What an expert does now, (D,) float32.

    Args:
        expert, env: the expert and its environment.
        error: see ``Expert``; None for a right assumption.

    Raises:
        SpecError: for an action of another shape, or with a value outside the range of the action spec.
    """
    spec = env.action_spec
    action = np.array(expert(env) if error is None else expert(env, error), np.float32)
    if action.shape != (spec.dim,):
        raise SpecError(f"The expert of {env.name} must return {spec.dim} numbers, got an array of shape {action.shape}.")
    for dimension, value, low, high in zip(spec.dimensions, action, spec.low, spec.high, strict=True):
        if not low <= value <= high:
            raise SpecError(
                f"The expert of {env.name} returned {value:g} for '{dimension.name}', which lies in [{low:g}, {high:g}]. "
                "Let it clip its actions to the range of the suite's action spec."
            )
    return action


class Wandering:
    """An expert whose hand first visits random points of Meta-World's workspace, opening and closing the gripper.

    An expert alone always takes the same path, so its images show the hand on one side of everything.

    Args:
        expert: takes over after the last point; it must depend on the current state only.
        generator: the generator of this episode.
        points: number of points to visit, each for ``STEPS`` steps (the hand moves 1 cm per step).
    """

    STEPS = 30
    LOW, HIGH = (-0.45, 0.42, 0.08), (0.45, 0.9, 0.42)  # metres; the hand can reach 0.5, 1 and 0.5

    def __init__(self, expert: Expert, generator: np.random.Generator, points: int) -> None:
        self._expert, self._done = expert, 0
        self._goals = generator.uniform(self.LOW, self.HIGH, (points, 3))
        self._grips = generator.choice([-1.0, 1.0], points)

    def __call__(self, env: Any, error: np.ndarray | None = None) -> np.ndarray:
        """The action for the current state of ``env``, (4,) float32; on the way to a point, nothing is misjudged."""
        if error is None:  # the call with an error is for the same step
            self._done += 1
        number = (self._done - 1) // self.STEPS
        if number >= len(self._goals):
            return self._expert(env, error)
        action = np.append((self._goals[number] - env.raw_observation[:3]) / 0.01, self._grips[number])
        return np.clip(action.astype(np.float32), env.action_spec.low, env.action_spec.high)


SOUND, WRONG = (16, 49), (16, 57)
"""Ranges [low, high) of the number of steps for which a misjudging expert is right, then wrong."""

FIRST = (-32, 33)
"""The same, of being right at the beginning; below 0 is not at all. So half of the misjudging episodes begin wrong: the first
grasp of many tasks comes after 20 steps."""

MISJUDGED = 0.5
"""Share of the episodes in which the expert misjudges."""


@dataclass(frozen=True)
class Noise:
    """Differences between the executed action and the label.

    Scales are shares of the largest displacement, which is half the range of a dimension of the action spec. Where the range is
    infinite, they are in its own unit.

    Args:
        scale: standard deviation on the movement dimensions; 0 executes the clean action.
        gripper: standard deviation on the gripper. 0 by default: a disturbed gripper drops its object.
        memory: correlation ρ of consecutive steps, in [0, 1). The noise is n_t = ρ n_{t−1} + sqrt(1 − ρ²) ε_t, whose
            standard deviation is the same at every step; a larger ρ pushes the hand further off the path.
        misjudge: standard deviation, in metres per axis, of the error in the hand position that the expert assumes, in half of
            the episodes. The expert is right for ``SOUND`` steps (at the beginning for ``FIRST``), then wrong by a constant
            error for ``WRONG`` steps, and so on, with new draws each time. The other episodes are undisturbed, without which a
            policy stays imprecise.
    """

    scale: NotNegative = 0.1
    gripper: NotNegative = 0.0
    memory: Fraction = 0.0
    misjudge: NotNegative = 0.0

    def __post_init__(self) -> None:
        require_ranges(self, "noise.{}")


def noises(scales: Sequence[float], memories: Sequence[float], misjudge: Sequence[float] = ()) -> tuple[Noise, ...]:
    """One noise for each scale.

    Args:
        scales: standard deviations; empty for the default one.
        memories: one for each scale, or one for all; empty for none.
        misjudge: likewise.

    Raises:
        ConfigError: for another number of memories or misjudgements, or a value out of its range.
    """
    scales = scales or (Noise.scale,)
    each: list[list[float]] = []
    for flag, values, default in (
        ("--noise-memory", memories, Noise.memory),
        ("--misjudge", misjudge, Noise.misjudge),
    ):
        given = list(values) or [default]
        if len(given) not in (1, len(scales)):
            raise ConfigError(f"{len(scales)} value(s) of --noise and {len(given)} of {flag}: give one, or one for each noise.")
        each.append(given * (len(scales) if len(given) == 1 else 1))
    return tuple(Noise(scale, memory=m, misjudge=error) for scale, m, error in zip(scales, *each, strict=True))


class Noisy:
    """An expert whose executed action is disturbed.

    Args:
        expert: gives the clean action.
        noise: size of the disturbance.
        generator: the generator of this episode; see `episode_generator`.
        is_gripper: (D,) bool, the dimensions that take ``noise.gripper`` instead of ``noise.scale``.

    Attributes:
        error: (3,) error in metres of the assumed hand position at the latest action; None if it was right.
    """

    def __init__(self, expert: Expert, noise: Noise, generator: np.random.Generator, is_gripper: np.ndarray) -> None:
        self._expert = expert
        self._noise = noise
        self._generator = generator
        self._deviation = np.where(is_gripper, noise.gripper, noise.scale)
        self._state: np.ndarray | None = None
        self.error: np.ndarray | None = None
        self._left = max(0, int(generator.integers(*FIRST))) if noise.misjudge and generator.random() < MISJUDGED else -1

    def __call__(self, env: Environment) -> tuple[np.ndarray, np.ndarray]:
        """(action to execute, action to label), both (D,) float32 within the action's range."""
        if self._left == 0:
            self.error = self._noise.misjudge * self._generator.standard_normal(3) if self.error is None else None
            self._left = int(self._generator.integers(*(SOUND if self.error is None else WRONG)))
        self._left -= 1
        clean = clean_action(self._expert, env)
        done = clean if self.error is None else clean_action(self._expert, env, self.error)
        fresh = self._generator.standard_normal(clean.shape)
        memory = self._noise.memory
        self._state = fresh if self._state is None else memory * self._state + np.sqrt(1 - memory**2) * fresh
        low, high = env.action_spec.low, env.action_spec.high
        largest = (high - low) / 2
        largest[~np.isfinite(largest)] = 1
        executed = np.clip(done + self._deviation * largest * self._state, low, high)
        return executed.astype(np.float32), clean


def episode_generator(name: str, seed: int) -> np.random.Generator:
    """The generator of one episode's noise; depends on environment and seed only, so any worker can run the episode."""
    return np.random.default_rng((zlib.crc32(name.encode()), seed))
