"""The interface of every simulator: names, capabilities, and environments that a policy, a recorder or a checker can drive.

An environment is named ``suite/task`` ("metaworld/drawer-open-v3", "libero/object/3"; the suite ends at the first slash);
``suite/group`` and ``suite/all`` stand for several.
Importing this module loads no simulator: suites are found by name and imported on first use.
The environments are ordinary `gymnasium.Env`s with a few additions, listed at `Environment`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from vlaflow import registry
from vlaflow.errors import CapabilityError, ConfigError, nearest
from vlaflow.spec import ActionSpec, Observation

Render = Literal["fast", "exact"]


@dataclass(frozen=True)
class SimulatorSpec:
    """Description of a suite of environments, available without importing the simulator.

    Args:
        suite: the name before the slash.
        tasks: instruction of every task, by task name.
        groups: task names by group name.
        robot: robot type, as written into data sets.
        action: what an action means.
        state_names: the S numbers of the state, in order.
        views: camera views of an observation.
        max_steps: steps after which an episode is cut off, by task name.
        protocols: step limits of published evaluations, by the evaluation's name and then by task name. None exceeds
            ``max_steps``, so one run gives the success rate under each of them, from the step of the first success.
        size: default side of the image in pixels, by rendering quality.
        protocol: the evaluation protocol that this follows, for reports.
        rendering: version of the images by rendering quality; a change of pixels changes it. Empty where the
            simulator's own version says it.
        excluded: groups that the simulator lists but that cannot run here, with the reason.
        kept: number of environments that a worker keeps for later episodes. One that has rendered takes 10 to 60 MB of
            memory in Meta-World, and 300 MB in LIBERO.
        published: groups without common tasks whose success rates published tables list and average.
    """

    suite: str
    tasks: Mapping[str, str]
    groups: Mapping[str, tuple[str, ...]]
    robot: str
    action: ActionSpec
    state_names: tuple[str, ...]
    views: tuple[str, ...]
    max_steps: Mapping[str, int]
    protocols: Mapping[str, Mapping[str, int]]
    size: Mapping[str, int]
    protocol: str
    rendering: Mapping[str, str] = field(default_factory=dict)
    excluded: Mapping[str, str] = field(default_factory=dict)
    kept: int = 8
    published: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a spec that would fail later, in the middle of a recording or an evaluation.

        Raises:
            ConfigError: a limit, a size or a group is missing or impossible.
        """
        for place, names, known in (
            ("max_steps", self.tasks, self.max_steps),
            ("tasks", [task for group in self.groups.values() for task in group], self.tasks),
            ("groups", self.published, self.groups),
            ("size", ("fast", "exact"), self.size),
            *((f"protocols['{name}']", self.tasks, limits) for name, limits in self.protocols.items()),
        ):
            for name in names:
                if name not in known:
                    raise ConfigError(f"The spec of the suite '{self.suite}' has no '{name}' in its {place}. Add it there.")
        for name, limits in self.protocols.items():
            for task in self.tasks:
                if limits[task] > self.max_steps[task]:
                    raise ConfigError(
                        f"The suite '{self.suite}' has max_steps {self.max_steps[task]} for '{task}', below the "
                        f"{limits[task]} of protocols['{name}']. Raise it."
                    )


@runtime_checkable
class Environment(Protocol):
    """A `gymnasium.Env` with the additions of this library.

    Observations are ``{"pixels": (H, W, 3) uint8, "agent_pos": (S,) float32}`` (``pixels`` is a dict by view if there
    are several views; see ``pixels``). ``info`` holds ``success`` and ``is_success`` (bool, at this step), ``steps``
    (int, since reset) and ``first_success_step`` (int, counted from 1; −1 before the first success). The first success
    terminates the episode; further steps are allowed until the step limit. A failure that ends an episode truncates it.

    A simulator with stored initial states starts an episode at one of them, which the seed selects, as its evaluation
    protocol asks; the option ``{"start": "random"}`` draws a placement from the seed instead. Recording uses this option.
    Where every placement is drawn anyway, it changes nothing.

    Arrays that a method returns belong to the caller: later steps and resets do not change them.

    An environment may also have ``postpone()``, without arguments, which returns a function. Called later, it renders what
    `observe` would return now, with the same bytes (`postponed`).

    Attributes:
        view: the main view, which ``render`` returns and videos show.
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
        """Number of images rendered since the environment was created."""
        ...

    @property
    def views(self) -> dict[str, tuple[int, int]]:
        """(height, width) of every view."""
        ...

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode and render. The same seed and options give the same bytes, whatever happened before."""
        ...

    def restart(self, seed: int | None = None, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """`reset` without rendering; returns info."""
        ...

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Execute one action (D,) and render."""
        ...

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool, dict[str, Any]]:
        """`step` without rendering: (reward, terminated, truncated, info)."""
        ...

    def observe(self) -> Observation:
        """The current observation; rendered at most once per step."""
        ...

    def render(self) -> np.ndarray:
        """The current image of the main view, (H, W, 3) uint8."""
        ...

    def close(self) -> None:
        """Release the simulator."""
        ...


def postponed(env: Environment) -> Callable[[], Observation]:
    """The current observation as a function that renders it, also after further steps or a reset.

    A recorder learns at the end of an episode whether its images are needed. An environment without ``postpone`` renders them
    now.
    """
    postpone: Callable[[], Callable[[], Observation]] | None = getattr(env, "postpone", None)
    if postpone is not None:
        return postpone()
    observation = owned(env.observe())
    return lambda: observation


def owned(observation: Observation) -> Observation:
    """A copy, for those who keep an observation: an environment of another package may draw every image into one array."""
    images = {view: np.array(image) for view, image in observation.images.items()}
    return Observation(images, np.array(observation.state), observation.instruction)


RANDOM_START: dict[str, Any] = {"start": "random"}
"""Option of a reset: draw the placement from the seed, also where there are stored initial states."""


def pixels(images: Mapping[str, np.ndarray]) -> Any:
    """``pixels`` of an observation: the image of the only view, or a dict of images by view."""
    return dict(images) if len(images) > 1 else next(iter(images.values()))


class Expert(Protocol):
    """Maps the privileged state of its simulator to an action."""

    def __call__(self, env: Environment, error: np.ndarray | None = None) -> np.ndarray:
        """The clean action for the current state of ``env``, (D,) float32, within the action's range.

        Args:
            env: the environment.
            error: (3,), error in metres of the hand position that the expert assumes.
        """
        ...


@dataclass(frozen=True)
class Suite:
    """A suite as registered under ``vlaflow.simulators``, importable without its simulator.

    Args:
        spec: its description; ``spec.suite`` is the name under which it is registered.
        build: creates the environment of a task from a rendering quality and the side of its images in pixels (None: the
            suite's default), importing the simulator.
        expert: creates the scripted expert of a task; None if the suite has none.
        install: argument of ``pip install`` that installs the simulator.
    """

    spec: SimulatorSpec
    build: Callable[[str, Render, int | None], Environment]
    expert: Callable[[str], Expert] | None = None
    install: str = ""


def suites() -> tuple[str, ...]:
    """Names of the installed suites."""
    return registry.names("simulators")


def suite_of(name: str) -> Suite:
    """Find an installed suite without importing its simulator.

    Raises:
        ConfigError: for an unknown suite, with the nearest valid name.
        CapabilityError: for a suite of another distribution that cannot be imported.
    """
    found = registry.load("simulators", name, Suite, f"There is no simulator suite '{name}'")
    if found.spec.suite != name:
        raise ConfigError(
            f"The suite registered as '{name}' is named '{found.spec.suite}' in its spec; both names must be equal."
        )
    return found


def simulator_spec(suite: str) -> SimulatorSpec:
    """The spec of a suite; see ``suite_of``."""
    return suite_of(suite).spec


def step_limit(name: str, max_steps: int | None = None) -> int:
    """Steps after which an episode of the environment "suite/task" is cut off: ``max_steps``, or the suite's limit."""
    suite, task = parse_env_name(name)
    return max_steps or simulator_spec(suite).max_steps[task]


def protocol_limits(name: str) -> dict[str, int]:
    """Step limits of published evaluations of the environment "suite/task", by the evaluation's name."""
    suite, task = parse_env_name(name)
    return {protocol: limits[task] for protocol, limits in simulator_spec(suite).protocols.items()}


def published_groups(suite: str) -> dict[str, tuple[str, ...]]:
    """Environments "suite/task" of each group that published tables list, by the group's name."""
    spec = simulator_spec(suite)
    return {group: tuple(f"{suite}/{task}" for task in spec.groups[group]) for group in spec.published}


def rendering_versions(names: Iterable[str], render: Render) -> dict[str, str]:
    """Versions of the suites' rendered images, as results and data sets record them with ``versions``."""
    suites = dict.fromkeys(name.partition("/")[0] for name in names)
    found = {suite: simulator_spec(suite).rendering.get(render) for suite in suites}
    return {f"{suite} rendering": version for suite, version in found.items() if version}


def suite_package(suite: str) -> dict[str, str]:
    """Name and version of the package that a suite comes with; empty for vlaflow's own."""
    name, _, version = registry.find("simulators", suite).distribution.rpartition(" ")
    return {name: version} if name else {}


def require_size(size: int) -> None:
    """Refuse a side of the image that no camera can have.

    Raises:
        ConfigError: stating the range.
    """
    if not 8 <= size <= 2048:
        raise ConfigError(f"The image must be between 8 and 2048 pixels wide, got {size}.")


def parse_env_name(name: str) -> tuple[str, str]:
    """Split "metaworld/drawer-open-v3" into ("metaworld", "drawer-open-v3").

    Raises:
        ConfigError: the suite or the task does not exist; the message names the nearest valid one.
    """
    suite, slash, task = name.partition("/")
    if not slash:
        owners = [s for s in suites() if _has(s, name)]
        hint = f"did you mean '{owners[0]}/{name}'?" if owners else "for example 'metaworld/drawer-open-v3'."
        raise ConfigError(f"An environment is named 'suite/task', got '{name}'; {hint}")
    spec = simulator_spec(suite)
    if task not in spec.tasks:
        reason = spec.excluded.get(task.partition("/")[0])
        hint = reason if reason else nearest(name, [f"{suite}/{t}" for t in [*spec.tasks, *spec.groups]])
        raise ConfigError(f"There is no environment '{name}'; {hint}")
    return suite, task


def expand_env_names(names: str | Sequence[str]) -> list[str]:
    """Replace groups ("metaworld/easy", "metaworld/all") with their tasks, without duplicates and in order.

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
    """Create an environment.

    Args:
        name: "suite/task".
        render: "exact" keeps the rendering defaults of the simulator, with which published numbers were measured; "fast"
            disables multisampling, shadows and reflections. Train and evaluate with the same one.
        size: side of the image in pixels; None for the suite's default for this ``render``.

    Raises:
        ConfigError: for an unknown name or an impossible size.
        CapabilityError: when the simulator is not installed, or lacks a file that this task needs.
    """
    suite, task = parse_env_name(name)
    found = suite_of(suite)
    if render not in ("fast", "exact"):
        raise ConfigError(f"There is no rendering '{render}'; {nearest(str(render), ('fast', 'exact'))}")
    if size is not None:
        require_size(size)
    try:
        return found.build(task, render, size)
    except ModuleNotFoundError as problem:
        cure = f": pip install '{found.install}'" if found.install else "; install it."
        raise CapabilityError(f"The suite '{suite}' needs the package '{problem.name}'{cure}") from problem


def _has(suite: str, task: str) -> bool:
    """Whether a suite has this task; False if the suite cannot be imported."""
    try:
        return task in simulator_spec(suite).tasks
    except (CapabilityError, ConfigError):
        return False


_kept: dict[tuple[str, Render, int | None, int], Environment] = {}


def cached(name: str, *, render: Render = "fast", size: int | None = None, copy: int = 0) -> Environment:
    """The environment of this process with these settings, created on the first call; reset it before use.

    Workers use this so that consecutive episodes of one task share one environment. The latest are kept, as many as their
    suite allows (``SimulatorSpec.kept``); older ones are closed. One environment must not be used in two places at once: ask
    for another ``copy``.
    """
    key = (name, render, size, copy)
    env = _kept.pop(key, None) or make(name, render=render, size=size)
    _kept[key] = env
    while sum(1 / simulator_spec(suite.partition("/")[0]).kept for suite, *_ in _kept) > 1 + 1e-9:
        _kept.pop(next(iter(_kept))).close()
        gc.collect()  # simulators refer to themselves in circles, and one model may take 300 MB
    return env
