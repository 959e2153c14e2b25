"""Meta-World as a suite: its spec and functions that create environments and experts, importing the simulator."""

from __future__ import annotations

from vlaflow.simulators.base import Environment, Expert, Render, Suite
from vlaflow.simulators.metaworld_tasks import SPEC


def _build(task: str, render: Render, size: int | None) -> Environment:
    from vlaflow.simulators.metaworld import MetaWorldEnv

    return MetaWorldEnv(task, render, size)


def _expert(task: str) -> Expert:
    from vlaflow.simulators.metaworld import MetaWorldExpert

    return MetaWorldExpert(task)


SUITE = Suite(SPEC, _build, _expert, install="vlaflow[metaworld]")
