"""What every simulator offers: names, capabilities, and environments that a policy, a recorder or a checker can drive.

An environment is named ``suite/task`` ("metaworld/drawer-open-v3"); ``suite/group`` and ``suite/all`` stand for several.
Importing this module loads no simulator: suites are found by name and imported when one is asked for.
The environments are ordinary `gymnasium.Env`s with a few additions, listed at `Environment`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from vlaflow import registry
from vlaflow.errors import CapabilityError, ConfigError, nearest
from vlaflow.spec import ActionSpec, Observation

Render = Literal["fast", "exact"]


@dataclass(frozen=True)
class SimulatorSpec:
    """What a suite of environments is and can do. Known without importing the simulator.

    Args:
        suite: the word before the slash.
        tasks: instruction of every task, by task name.
        groups: task names by group name.
        robot: robot type, as written into data sets.
        action: what an action means.
        state_names: the S numbers of the state, in order.
        views: camera views of an observation.
        max_steps: steps after which an episode is cut off.
        size: side of the image in pixels when none is asked for, by quality.
        lazy: physics can advance without rendering.
        protocol: whose evaluation protocol this follows, for reports.
    """

    suite: str
    tasks: Mapping[str, str]
    groups: Mapping[str, tuple[str, ...]]
    robot: str
    action: ActionSpec
    state_names: tuple[str, ...]
    views: tuple[str, ...]
    max_steps: int
    size: Mapping[str, int]
    lazy: bool
    protocol: str


@runtime_checkable
class Environment(Protocol):
    """A `gymnasium.Env` with what this library adds to it.

    Observations are ``{"pixels": (H, W, 3) uint8, "agent_pos": (S,) float32}`` (``pixels`` is a dict by view where there
    are several views). ``info`` holds ``success`` and ``is_success`` (bool, at this step), ``steps`` (int, since reset)
    and ``first_success_step`` (int, counted from 1; −1 while there is none). The first success terminates the episode;
    stepping on is allowed until the step limit.
    """

    name: str
    task: str
    task_description: str
    view: str
    render_quality: Render
    action_spec: ActionSpec
    state_names: tuple[str, ...]
    metadata: dict[str, Any]
    _max_episode_steps: int
    action_space: Any
    observation_space: Any

    @property
    def renders(self) -> int:
        """Images taken since the environment was made."""
        ...

    @property
    def views(self) -> dict[str, tuple[int, int]]:
        """(height, width) of every view."""
        ...

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode and render. The same seed gives the same bytes, whatever happened before."""
        ...

    def restart(self, seed: int | None = None) -> dict[str, Any]:
        """`reset` without rendering; returns info."""
        ...

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Execute one action (D,) and render."""
        ...

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool, dict[str, Any]]:
        """`step` without rendering: (reward, terminated, truncated, info)."""
        ...

    def observe(self) -> Observation:
        """What a policy sees now; rendered at most once per step."""
        ...

    def render(self) -> np.ndarray:
        """The image now, (H, W, 3) uint8."""
        ...

    def close(self) -> None:
        """Release the simulator."""
        ...


class Expert(Protocol):
    """Maps the privileged state of its simulator to an action."""

    def __call__(self, env: Environment, error: np.ndarray | None = None) -> np.ndarray:
        """The clean action for the state ``env`` is in, (D,) float32, within the action's range.

        Args:
            env: the environment.
            error: (3,), metres by which the expert is wrong about where its hand is.
        """
        ...


@dataclass(frozen=True)
class Suite:
    """A suite as it is registered under ``vlaflow.simulators``, importable without its simulator.

    Args:
        spec: what it is; ``spec.suite`` is the name it is registered by.
        build: makes the environment of a task, with an image quality and a side in pixels (None: the suite's own), importing
            the simulator.
        expert: makes the scripted expert of a task; None where the suite has none.
        install: what brings the simulator, as an argument of ``pip install``.
    """

    spec: SimulatorSpec
    build: Callable[[str, Render, int | None], Environment]
    expert: Callable[[str], Expert] | None = None
    install: str = ""


def suites() -> tuple[str, ...]:
    """Names of the installed suites."""
    return registry.names("simulators")


def suite_of(name: str) -> Suite:
    """An installed suite, without importing its simulator.

    Raises:
        ConfigError: for an unknown suite, with the nearest valid name.
        CapabilityError: for another distribution's that cannot be imported.
    """
    found = registry.load("simulators", name, Suite, f"There is no simulator suite '{name}'")
    if found.spec.suite != name:
        raise ConfigError(f"The suite registered as '{name}' calls itself '{found.spec.suite}'; both must be the same.")
    return found


def simulator_spec(suite: str) -> SimulatorSpec:
    """The spec of a suite; see ``suite_of``."""
    return suite_of(suite).spec


def parse_env_name(name: str) -> tuple[str, str]:
    """Split "metaworld/drawer-open-v3" into ("metaworld", "drawer-open-v3").

    Raises:
        ConfigError: one sentence with the nearest valid name when the suite or the task does not exist.
    """
    suite, slash, task = name.partition("/")
    if not slash:
        owners = [s for s in suites() if _has(s, name)]
        hint = f"did you mean '{owners[0]}/{name}'?" if owners else "for example 'metaworld/drawer-open-v3'."
        raise ConfigError(f"An environment is named 'suite/task', got '{name}'; {hint}")
    tasks = simulator_spec(suite).tasks
    if task not in tasks:
        full = [f"{suite}/{t}" for t in tasks]
        raise ConfigError(f"There is no environment '{name}'; {nearest(name, full)}")
    return suite, task


def expand_env_names(names: str | Sequence[str]) -> list[str]:
    """Replace groups ("metaworld/easy", "metaworld/all") by their tasks; duplicates are dropped, order is kept.

    Raises:
        ConfigError: for a name that is neither a task nor a group.
    """
    found: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else names:
        suite, _, group = name.partition("/")
        spec = simulator_spec(suite) if "/" in name else None
        if spec and group == "all":
            tasks: Sequence[str] = tuple(spec.tasks)
        elif spec and group in spec.groups:
            tasks = spec.groups[group]
        else:
            tasks = (parse_env_name(name)[1],)
        found.update(dict.fromkeys(f"{suite}/{task}" for task in tasks))
    return list(found)


def make(name: str, *, render: Render = "fast", size: int | None = None) -> Environment:
    """Build one environment.

    Args:
        name: "suite/task".
        render: "exact" keeps the simulator's own rendering defaults, which published numbers were measured with; "fast"
            drops multisampling, shadows and reflections. Train and test with the same one.
        size: side of the image in pixels; None takes the suite's default for this ``render``.

    Raises:
        ConfigError: for an unknown name or an impossible size.
        CapabilityError: when the simulator is not installed.
    """
    suite, task = parse_env_name(name)
    found = suite_of(suite)
    if render not in ("fast", "exact"):
        raise ConfigError(f"There is no rendering '{render}'; {nearest(str(render), ('fast', 'exact'))}")
    if size is not None and not 8 <= size <= 2048:
        raise ConfigError(f"The image must be between 8 and 2048 pixels wide, got {size}.")
    try:
        return found.build(task, render, size)
    except ModuleNotFoundError as problem:
        cure = f": pip install '{found.install}'" if found.install else "; install it."
        raise CapabilityError(f"The suite '{suite}' needs the package '{problem.name}'{cure}") from problem


def _has(suite: str, task: str) -> bool:
    """Whether a suite has such a task; one that cannot be imported has none."""
    try:
        return task in simulator_spec(suite).tasks
    except (CapabilityError, ConfigError):
        return False


_kept: dict[tuple[str, Render, int | None], Environment] = {}
_KEEP = 8


def cached(name: str, *, render: Render = "fast", size: int | None = None) -> Environment:
    """The environment of this process with these settings, built on the first call; reset it before use.

    Workers use this so that consecutive episodes of one task share one environment. The last 8 are kept (an environment
    that has rendered holds 10 to 60 MB); older ones are closed. Never hold two users of the same one.
    """
    key = (name, render, size)
    env = _kept.pop(key, None) or make(name, render=render, size=size)
    _kept[key] = env
    while len(_kept) > _KEEP:
        _kept.pop(next(iter(_kept))).close()
    return env
