"""What the actions of well-known robots mean, as far as their recorders agree; what they disagree on is left unstated.

``draft`` uses it for data sets that do not say so themselves. Texts are those of the simulators' own specs, so that a
checkpoint trained on a converted LIBERO or Meta-World data set can be evaluated there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlaflow.data.simulator_actions import LIBERO, METAWORLD
from vlaflow.spec import UNSTATED, ActionSpec, Dimension

ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
SO_ARM = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll")


@dataclass(frozen=True)
class Clues:
    """What a data set gives away about its robot.

    Args:
        words: its robot type and its own name, in lower case.
        names: of the action's dimensions.
        low, high: of its actions, (D,).
    """

    words: str
    names: tuple[str, ...]
    low: np.ndarray
    high: np.ndarray

    def mention(self, *patterns: str) -> bool:
        """Whether one of the patterns is among the words."""
        return any(re.search(pattern, self.words) for pattern in patterns)

    def name_all(self, parts: Sequence[str]) -> bool:
        """Whether each of the parts is in some dimension's name."""
        return all(any(part in name.lower() for name in self.names) for part in parts)

    def within(self, low: float, high: float, at: slice | int = slice(None)) -> bool:
        """Whether all of these dimensions' actions lie in a range."""
        return bool(np.all(self.low[at] >= low) and np.all(self.high[at] <= high))


@dataclass(frozen=True)
class KnownRobot:
    """A robot that was recognised.

    Args:
        title: what to call it.
        spec: what is known of its actions. Ranges and rate are the data set's, unless ``ranges``.
        ranges: whether the spec's ranges hold.
    """

    title: str
    spec: ActionSpec
    ranges: bool = False


def recognise(clues: Clues, rate_hz: float) -> KnownRobot | None:
    """The robot of a data set, if it is one of those known here."""
    for find in (_libero, _metaworld, _aloha, _so_arm, _widowx, _droid):
        found = find(clues)
        if found is not None:
            return replace(found, spec=replace(found.spec, rate_hz=rate_hz))
    return None


def _libero(clues: Clues) -> KnownRobot | None:
    if len(clues.names) == LIBERO.dim and clues.mention("libero") and clues.within(-1, 1):
        return KnownRobot("LIBERO", LIBERO, ranges=True)
    return None


def _metaworld(clues: Clues) -> KnownRobot | None:
    if len(clues.names) == METAWORLD.dim and clues.mention(r"meta-?_?world", "sawyer") and clues.within(-1, 1):
        return KnownRobot("Meta-World", METAWORLD, ranges=True)
    return None


def _aloha(clues: Clues) -> KnownRobot | None:
    named = len(clues.names) == 14 and clues.name_all(ARM)
    if not named and not (len(clues.names) == 14 and clues.mention("aloha", r"\bvx300s\b", r"\bviperx\b")):
        return None
    fraction = clues.within(-0.3, 1.3, 6) and clues.within(-0.3, 1.3, 13)
    unit, gripper = ("fraction of the opening", "0 closed, 1 open") if fraction else (UNSTATED, UNSTATED)
    dimensions = []
    for side in ("left", "right"):
        dimensions += [_joint(f"{side}_{joint}", "rad") for joint in ARM]
        dimensions.append(_gripper(f"{side}_gripper", unit, "opens" if fraction else UNSTATED))
    return KnownRobot("ALOHA", _spec("aloha, joint targets", dimensions, "none", gripper))


def _so_arm(clues: Clues) -> KnownRobot | None:
    arms, rest = divmod(len(clues.names), len(SO_ARM) + 1)
    known = clues.mention(r"\bso_?-?10[01]", r"\bkoch") or clues.name_all(SO_ARM)
    if not known or rest or arms not in (1, 2):
        return None
    # Newer recorders normalise to -100 .. 100, older ones write degrees; below 100 they cannot be told apart.
    unit = UNSTATED if clues.within(-100, 100) else "degrees"
    sides = ("",) if arms == 1 else ("left_", "right_")
    dimensions = []
    for side in sides:
        dimensions += [_joint(f"{side}{joint}", unit) for joint in SO_ARM]
        dimensions.append(_gripper(f"{side}gripper", "percent of the opening", "opens"))
    return KnownRobot("SO-100/101", _spec("so-100 or so-101, joint targets", dimensions, "none", "0 closed, 100 open"))


def _widowx(clues: Clues) -> KnownRobot | None:
    small = len(clues.names) == 7 and clues.within(-1, 1, slice(3)) and not clues.name_all(("waist",))
    if not small or not clues.mention("widowx", r"\bbridge"):
        return None
    dimensions = [_move(name, "m", "base") for name in "xyz"]
    dimensions += [_move(name, "rad", "base") for name in ("roll", "pitch", "yaw")]
    dimensions.append(_gripper("gripper", "fraction of the opening", "opens"))
    spec = _spec("widowx, end-effector pose deltas", dimensions, "Euler angles, roll pitch yaw", "0 closed, 1 open")
    return KnownRobot("WidowX (BridgeData)", spec)


def _droid(clues: Clues) -> KnownRobot | None:
    if len(clues.names) not in (7, 8) or not clues.mention("droid", "franka", "panda", r"\bfr3\b"):
        return None
    if len(clues.names) == 8:  # seven joints; whether positions or velocities, recorders differ in
        dimensions = [replace(_joint(f"joint_{i}", UNSTATED), mode="unstated") for i in range(7)]
        rotation = "none"
    else:
        dimensions = [replace(_move(name, UNSTATED, UNSTATED), mode="unstated") for name in ("x", "y", "z")]
        dimensions += [replace(_move(f"rotation_{name}", UNSTATED, UNSTATED), mode="unstated") for name in "xyz"]
        rotation = UNSTATED
    droid = clues.mention("droid") and clues.within(-0.3, 1.3, -1)
    convention = "0 open, 1 closed" if droid else UNSTATED
    dimensions.append(_gripper("gripper", "fraction of the closing" if droid else UNSTATED, "closes" if droid else UNSTATED))
    return KnownRobot("Franka (DROID)" if droid else "Franka", _spec("franka", dimensions, rotation, convention))


def _joint(name: str, unit: str) -> Dimension:
    return Dimension(name, unit, "joint", 0.0, 1.0, UNSTATED, mode="absolute")


def _move(name: str, unit: str, frame: str) -> Dimension:
    return Dimension(name, unit, frame, 0.0, 1.0, UNSTATED, mode="delta")


def _gripper(name: str, unit: str, positive: str) -> Dimension:
    return Dimension(name, unit, "gripper", 0.0, 1.0, positive, mode="absolute")


def _spec(robot: str, dimensions: Sequence[Dimension], rotation: str, gripper: str) -> ActionSpec:
    return ActionSpec(robot, tuple(dimensions), rotation, gripper, rate_hz=1.0)
