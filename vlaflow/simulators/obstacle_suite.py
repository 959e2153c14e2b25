"""The obstacle as a suite: its spec and functions that create the environment and its expert, importing gymnasium."""

from __future__ import annotations

from vlaflow.simulators.base import Environment, Expert, Render, Suite
from vlaflow.simulators.obstacle_task import SPEC


def _build(task: str, render: Render, size: int | None) -> Environment:
    from vlaflow.simulators.obstacle import ObstacleEnv

    return ObstacleEnv(task, render, size)


def _expert(task: str) -> Expert:
    from vlaflow.simulators.obstacle import ObstacleExpert

    return ObstacleExpert()


SUITE = Suite(SPEC, _build, _expert, install="gymnasium")
