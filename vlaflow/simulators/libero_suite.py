"""LIBERO as a suite: its spec and functions that create environments and experts, importing the simulator."""

from __future__ import annotations

from vlaflow.simulators.base import Environment, Expert, Render, Suite
from vlaflow.simulators.libero_tasks import SPEC


def _build(task: str, render: Render, size: int | None) -> Environment:
    from vlaflow.simulators.libero import LiberoEnv

    return LiberoEnv(task, render, size)


def _expert(task: str) -> Expert:
    from vlaflow.simulators.libero_experts import LiberoExpert

    return LiberoExpert(task)


SUITE = Suite(SPEC, _build, _expert, install="vlaflow[libero]")
