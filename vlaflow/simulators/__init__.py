"""Simulated robots: environments by name, chunked execution, workers, scripted experts, recording and checking.

Nothing heavy is imported here; mujoco, metaworld and gymnasium are loaded when an environment is created.
"""

from vlaflow.simulators.base import (
    Environment,
    Render,
    SimulatorSpec,
    cached,
    expand_env_names,
    make,
    parse_env_name,
    simulator_spec,
    suites,
)

__all__ = [
    "Environment",
    "Render",
    "SimulatorSpec",
    "cached",
    "expand_env_names",
    "make",
    "parse_env_name",
    "simulator_spec",
    "suites",
]
