"""Scripted experts for LIBERO: programs of skills, derived from a task's goal predicates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from vlaflow.simulators.libero_fixtures import CloseDrawer, OpenDrawer, Push, TurnKnob
from vlaflow.simulators.libero_picking import PickPlace
from vlaflow.simulators.libero_scene import Scene
from vlaflow.simulators.libero_skills import OPEN, Aim, action


class LiberoExpert:
    def __init__(self, task: str) -> None:
        self._task = task
        self._scene: Scene | None = None
        self._skills: list[Any] = []
        self._steps = -1

    def __call__(self, env: Any, error: np.ndarray | None = None) -> np.ndarray:
        if self._scene is None or env.steps < self._steps or self._scene.env is not env:
            self._scene = Scene(env)
            self._skills = program(self._scene, env.words)
        self._steps = env.steps
        scene = self._scene
        scene.error = np.zeros(3) if error is None else np.asarray(error)
        aim = next((s.aim(scene) for s in self._skills if not s.done(scene)), None)
        if aim is None:
            aim = Aim(scene.hand + [0, 0, 0.03], scene.rotation, OPEN)
        aim = replace(aim, position=scene.within_reach(aim.position))
        return action(scene.hand, scene.rotation, aim, scene.extension)


def program(scene: Scene, instruction: str) -> list[Any]:
    """The skills that reach a task's goal, in order."""
    first, then, last = [], [], []
    for goal in scene.env.goal:
        kind, name, *target = goal
        if kind == "open":
            first.append(OpenDrawer(name))
        elif kind == "close":
            last.append(CloseDrawer(name))
        elif kind in ("turnon", "turnoff"):
            first.append(TurnKnob(goal))
        elif "push" in instruction.split():
            then.append(Push(goal))
        else:
            if kind == "in" and scene.is_drawer(target[0]) and not scene.holds(["open", target[0]]):
                first.append(OpenDrawer(target[0], wide=True))
            then.append(PickPlace(goal))
    return first + then + last
