"""Scripted experts for LIBERO and LIBERO-PRO: programs of skills, derived from a task's goal predicates.

`program` reads the goal ("in bowl drawer", "turnon stove") and returns skills in order; the first that is not done acts. So the
variants of LIBERO-PRO, in which objects, places or goals have changed, are solved by the same few lines. The skills are in
``libero_picking`` and ``libero_fixtures``, how they move in ``libero_skills``, what they see in ``libero_scene``.

An expert decides at every step from the simulator's state, not from images, so noise on the executed action, a slipped object
or a failed grasp only lead to another state, from which it continues. It remembers no more than its current plans (where to
grip, where to put down), which follow their objects.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np

from vlaflow.errors import CapabilityError
from vlaflow.simulators.libero_fixtures import CloseDrawer, OpenDrawer, Push, Settle, TurnKnob
from vlaflow.simulators.libero_picking import PickPlace
from vlaflow.simulators.libero_scene import LiberoScene
from vlaflow.simulators.libero_skills import OPEN, Aim, Skill, action


class LiberoExpert:
    """The expert of one task.

    Args:
        task: e.g. "object/3"; the program follows from the goal of the environment that the expert is called with.
    """

    def __init__(self, task: str) -> None:
        self.task = task
        self._scene: LiberoScene | None = None
        self._skills: list[Skill] = []
        self._steps = 0

    def __call__(self, env: Any, error: np.ndarray | None = None) -> np.ndarray:
        """The clean action (7,) float32 for the current state of a `LiberoEnv`; see ``Expert``.

        With an error, nothing is remembered: that call only asks what would be done if the hand were elsewhere.
        """
        if self._scene is None or self._scene.env is not env or env.steps < self._steps or (env.steps == 0 and error is None):
            self._scene = LiberoScene(env)
            self._skills = program(self._scene, env.goal, env.task_description)
        self._steps = env.steps
        skills = self._skills if error is None else copy.deepcopy(self._skills)
        scene = self._scene
        scene.error = np.zeros(3) if error is None else np.asarray(error, float)
        aim = _next(scene, skills)
        aim = replace(aim, position=scene.within_reach(aim.position))
        return action(scene.hand, scene.rotation, aim, scene.extension)


def program(scene: LiberoScene, goal: list[list[str]], instruction: str) -> list[Skill]:
    """The skills that reach a goal, in order: open and turn on, move things, close.

    Args:
        scene: the scene, just reset.
        goal: predicates, e.g. [["in", "akita_black_bowl_1", "wooden_cabinet_1_top_region"]].
        instruction: in words; "push" asks for another way to bring an object to a region.

    Raises:
        CapabilityError: for a predicate without a skill.
    """
    first: list[Skill] = []
    then: list[Skill] = []
    last: list[Skill] = []
    for kind, name, *target in goal:
        if kind in ("open", "close") and not scene.is_drawer(name):
            raise CapabilityError(f"There is no scripted expert for '{instruction}': no skill moves doors.")
        if kind == "open":
            first.append(OpenDrawer(name))
        elif kind == "close":
            last.append(CloseDrawer(name))
        elif kind in ("turnon", "turnoff"):
            first.append(TurnKnob([kind, name]))
        elif kind == "on" and "push" in instruction.split():
            then.append(Push([kind, name, *target]))
        elif kind in ("on", "in"):
            if scene.is_drawer(target[0]):
                first.append(OpenDrawer(target[0], inside=[kind, name, *target]))
            same = [each for each in goal if each[0] == "on" == kind and each[2:] == target]
            number = same.index([kind, name, *target]) if len(same) > 1 else 0
            then.append(PickPlace([kind, name, *target], number, max(1, len(same))))
            if ["close", *target] in goal:
                last.insert(0, Settle([kind, name, *target], scene.pose(name)[1][2].copy()))
        else:
            raise CapabilityError(
                f"There is no scripted expert for '{instruction}': '{kind}' is not among the experts' skills."
            )
    return first + then + last


def _next(scene: LiberoScene, skills: list[Skill]) -> Aim:
    """What the first unfinished skill wants, or a later one that holds something; after all of them, rise with open fingers."""
    busy = next((skill for skill in skills if skill.busy(scene)), None)
    skill = busy or next((skill for skill in skills if not skill.done(scene)), None)
    if skill is not None:
        return skill.aim(scene)
    rise = 0.03 if scene.opening > 0.06 else 0.0
    return Aim(scene.hand + np.array([0.0, 0.0, rise]), scene.rotation, OPEN)
