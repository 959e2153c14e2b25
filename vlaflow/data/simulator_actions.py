"""What an action means in the simulated suites whose data sets others publish too, also where their packages are missing."""

from __future__ import annotations

from vlaflow.spec import ActionSpec, Dimension

_AHEAD = "fraction of 5 cm that the hand's target lies ahead of the hand"
_TURN = "fraction of 0.5 rad by which the hand's target is turned against the hand"

LIBERO = ActionSpec(
    robot="libero panda, end-effector pose deltas",
    dimensions=(
        Dimension("x", _AHEAD, "world", -1.0, 1.0, "away from the robot's base"),
        Dimension("y", _AHEAD, "world", -1.0, 1.0, "to the left, seen from the robot's base"),
        Dimension("z", _AHEAD, "world", -1.0, 1.0, "up"),
        Dimension("rotation_x", _TURN, "world", -1.0, 1.0, "right-handed about x"),
        Dimension("rotation_y", _TURN, "world", -1.0, 1.0, "right-handed about y"),
        Dimension("rotation_z", _TURN, "world", -1.0, 1.0, "right-handed about z"),
        Dimension("gripper", "sign of the fingers' speed", "gripper", -1.0, 1.0, "closes", mode="absolute"),
    ),
    rotation="axis-angle",
    gripper="-1 opens, +1 closes",
    rate_hz=20.0,
)

_STEP = "fraction of 1 cm that the hand's target moves per step"

METAWORLD = ActionSpec(
    robot="metaworld sawyer, end-effector displacement",
    dimensions=(
        Dimension("x", _STEP, "world", -1.0, 1.0, "to the right, seen from the robot's base"),
        Dimension("y", _STEP, "world", -1.0, 1.0, "away from the robot's base"),
        Dimension("z", _STEP, "world", -1.0, 1.0, "up"),
        Dimension("gripper", "fraction of the fingers' full force", "gripper", -1.0, 1.0, "closes", mode="absolute"),
    ),
    rotation="none",
    gripper="-1 opens, +1 closes, a force and not a width",
    rate_hz=80.0,
)
