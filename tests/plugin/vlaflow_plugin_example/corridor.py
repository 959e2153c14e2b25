"""A corridor with a dot in it, as far as it is known without gymnasium: the suite that is registered."""

from __future__ import annotations

from vlaflow.simulators.base import Environment, Expert, Render, SimulatorSpec, Suite
from vlaflow.spec import ActionSpec, Dimension

SPEC = SimulatorSpec(
    suite="corridor",
    tasks={"left": "go to the left end", "right": "go to the right end"},
    groups={},
    robot="dot",
    action=ActionSpec(
        robot="dot in a corridor",
        dimensions=(Dimension("along", "tenths of the corridor", "world", -1.0, 1.0, "right"),),
        rotation="none",
        gripper="none",
        rate_hz=10,
    ),
    state_names=("position",),
    views=("above",),
    max_steps={"left": 30, "right": 30},
    protocols={},
    size={"fast": 16, "exact": 16},
    protocol="an example",
)


def _build(task: str, render: Render, size: int | None) -> Environment:
    from vlaflow_plugin_example.corridor_env import CorridorEnv

    return CorridorEnv(task, render, size)


def _expert(task: str) -> Expert:
    from vlaflow_plugin_example.corridor_env import walk

    return walk


SUITE = Suite(SPEC, _build, _expert, install="gymnasium")
