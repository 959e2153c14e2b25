"""The obstacle's spec, which needs no import of gymnasium.

A hand that must pass an obstacle, on either side, to reach a goal: demonstrations go left or right with equal chance and
nothing in an observation says which, so the mean of the two ways runs into the obstacle. It is the smallest task on which a
policy must choose one of several good actions (docs/sampling.md). The environment is in ``obstacle``.
"""

from __future__ import annotations

from vlaflow.simulators.base import SimulatorSpec
from vlaflow.spec import ActionSpec, Dimension

SPEC = SimulatorSpec(
    suite="obstacle",
    tasks={"pass-v0": "Move the blue hand to the green goal without touching the red obstacle"},
    groups={},
    robot="disc on a table",
    action=ActionSpec(
        robot="disc on a table, displacement",
        dimensions=(
            Dimension("x", "4 % of the table's side per step", "table", -1.0, 1.0, "right in the image"),
            Dimension("y", "4 % of the table's side per step", "table", -1.0, 1.0, "up in the image"),
        ),
        rotation="none",
        gripper="none",
        rate_hz=10,
    ),
    state_names=("hand_x", "hand_y"),
    views=("above",),
    max_steps={"pass-v0": 50},
    protocols={},
    size={"fast": 96, "exact": 96},
    protocol="our own: obstacle, goal and start drawn from the seed; a collision ends the episode as a failure",
    rendering={"fast": "1", "exact": "1"},
)
