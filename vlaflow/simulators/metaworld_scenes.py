"""The contents of Meta-World's scenes: named points of bodies, states of joints, and the camera's projection.

Everything is read from MuJoCo's state. There are no questions yet about tasks that are not in ``SCENES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vlaflow.errors import CapabilityError
from vlaflow.simulators.scenes import Condition, Facts, Thing


@dataclass(frozen=True)
class Point:
    """A point of the scene: an element of MuJoCo's model, plus an offset in metres, in the world frame."""

    kind: Literal["body", "site", "geom"]
    name: str
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def place(self, data: Any) -> np.ndarray:
        """Position (3,) in metres, world frame."""
        return getattr(data, self.kind)(self.name).xpos + np.array(self.shift)


@dataclass(frozen=True)
class StateQuestion:
    """A question about a state, and how to answer it.

    Args:
        words: the question.
        high, low: answers for values ≥ ``above`` and ≤ ``below``.
        joint: name of the joint whose position, times ``sign``, is the value; or
        height: the point whose height in metres is the value.
    """

    words: str
    high: str
    low: str
    above: float
    below: float
    joint: str | None = None
    sign: int = 1
    height: Point | None = None

    def evaluate(self, data: Any) -> Condition:
        """The current state."""
        if self.joint is not None:
            value = self.sign * float(data.joint(self.joint).qpos[0])
        else:
            assert self.height is not None
            value = float(self.height.place(data)[2])
        answer = self.high if value >= self.above else self.low if value <= self.below else None
        return Condition(self.words, answer)


@dataclass(frozen=True)
class Scene:
    """The object on the table, its named points, and questions about its state."""

    subject: str
    things: Mapping[str, Point]
    questions: tuple[StateQuestion, ...] = ()


def _open(what: str, joint: str, above: float, below: float, sign: int = 1) -> StateQuestion:
    return StateQuestion(f"Is the {what} open or closed?", "open", "closed", above, below, joint=joint, sign=sign)


_PEG, _PUCK, _DOT = Point("site", "pegGrasp"), Point("body", "obj"), Point("site", "goal")
_DRAWER = Scene(  # the slide goes 0.2 m towards the robot, which is negative
    "drawer",
    {"drawer's handle": Point("body", "drawer_link", (0.0, -0.16, 0.05))},
    (_open("drawer", "goal_slidey", 0.1, 0.02, -1),),
)
_WINDOW = Scene(  # 0.2 m
    "window", {"window's handle": Point("site", "handleOpenStart")}, (_open("window", "window_slide", 0.12, 0.02),)
)
_DOOR = Scene(  # a right angle is 1.57
    "safe", {"door's handle": Point("geom", "handle")}, (_open("door", "doorjoint", 0.6, 0.05, -1),)
)
_BUTTON = Scene(
    "button",
    {"button": Point("body", "button", (0.0, 0.0, 0.193))},
    (StateQuestion("Is the button pressed?", "yes", "no", 0.05, 0.005, joint="btnbox_joint", sign=-1),),
)

SCENES: dict[str, Scene] = {
    "drawer-open-v3": _DRAWER,
    "drawer-close-v3": _DRAWER,
    "window-open-v3": _WINDOW,
    "window-close-v3": _WINDOW,
    "door-open-v3": _DOOR,
    "door-close-v3": _DOOR,
    "button-press-topdown-v3": _BUTTON,
    "peg-insert-side-v3": Scene(
        "peg",
        {"peg": _PEG, "box": Point("body", "box", (0.0, 0.0, 0.13))},
        (StateQuestion("Is the peg on the table or lifted?", "lifted", "on the table", 0.07, 0.035, height=_PEG),),
    ),
    "push-v3": Scene("puck", {"puck": _PUCK, "green dot": _DOT}),
    "pick-place-v3": Scene(
        "puck",
        {"puck": _PUCK, "green dot": _DOT},
        (StateQuestion("Is the puck on the table or lifted?", "lifted", "on the table", 0.07, 0.035, height=_PUCK),),
    ),
}


def facts(task: str, sim: Any, camera: str, opening: float) -> Facts:
    """The facts of a scene.

    Args:
        task: e.g. "drawer-open-v3".
        sim: Meta-World's environment.
        camera: its camera, whose image is rotated by 180 degrees.
        opening: opening of the gripper, in [0, 1].

    Raises:
        CapabilityError: for a task without an entry in ``SCENES``.
    """
    if task not in SCENES:
        raise CapabilityError(
            f"There are no questions about metaworld/{task} yet, only about {', '.join(SCENES)}. "
            "Add an entry to SCENES in vlaflow/simulators/metaworld_scenes.py."
        )
    scene = SCENES[task]

    def thing(position: np.ndarray) -> Thing:
        return Thing(position, pixel(sim.model, sim.data, camera, position))

    things = {name: thing(point.place(sim.data)) for name, point in scene.things.items()}
    conditions = tuple(question.evaluate(sim.data) for question in scene.questions)
    return Facts(scene.subject, thing(np.array(sim.tcp_center)), float(opening), things, conditions)


def pixel(model: Any, data: Any, camera: str, position: np.ndarray) -> np.ndarray:
    """Project a point (3,) into the image rotated by 180 degrees: (2,) shares of its width and height, from the top left.

    The camera looks along its −z axis with x to the right and y up; a point at depth d and height y appears y/(d·tan(φ/2))
    half-images above the middle, φ being the vertical field of view. A point behind the camera gives infinity.
    """
    number = model.camera(camera).id
    point = data.cam_xmat[number].reshape(3, 3).T @ (position - data.cam_xpos[number])
    depth = -point[2]
    if depth <= 0:
        return np.full(2, np.inf)
    half = depth * np.tan(np.deg2rad(model.cam_fovy[number]) / 2)
    return np.array([0.5 - point[0] / (2 * half), 0.5 + point[1] / (2 * half)])
