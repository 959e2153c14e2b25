"""Conformance checks: whether an environment keeps every promise that policies, recorders and evaluations rely on.

Any environment with the methods of `vlaflow.simulators.base.Environment` can be checked, not only those of this library:

    findings = check_environment(make("metaworld/drawer-open-v3"))

Each check is a function whose docstring is the promise and whose failure is an exception that says what was observed instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlaflow.errors import CapabilityError, VlaflowError
from vlaflow.simulators.base import RANDOM_START, postponed, simulator_spec, suites
from vlaflow.simulators.experts import clean_action, expert_for
from vlaflow.spec import Observation

Check = Callable[[Any], None]
CHECKS: list[Check] = []
SEED = 1000


@dataclass(frozen=True)
class EnvironmentFinding:
    """The outcome of one check.

    Args:
        promise: what should hold, in one sentence.
        passed: whether it does.
        observed: what was observed instead; empty if passed.
    """

    promise: str
    passed: bool
    observed: str = ""


def check_environment(env: Any, progress: Callable[[int, int], None] | None = None) -> list[EnvironmentFinding]:
    """Run every check on one environment; a failed check does not stop the others.

    Args:
        env: the environment; it is reset and stepped, but not closed.
        progress: called as ``progress(done, total)``.
    """
    findings = []
    for number, check in enumerate(CHECKS, 1):
        promise = " ".join((check.__doc__ or check.__name__).split())
        try:
            check(env)
        except Exception as problem:  # any failure is a finding
            what = str(problem) if isinstance(problem, Broken | VlaflowError) else f"{type(problem).__name__}: {problem}"
            findings.append(EnvironmentFinding(promise, False, " ".join(what.split())))
        else:
            findings.append(EnvironmentFinding(promise, True))
        if progress:
            progress(number, len(CHECKS))
    return findings


class Broken(Exception):  # noqa: N818 - a finding, not an error of this library
    """A promise was not kept."""


def _require(holds: object, observed: str) -> None:
    if not bool(holds):
        raise Broken(observed)


def _promise(check: Check) -> Check:
    CHECKS.append(check)
    return check


def _actions(env: Any, count: int, seed: int = 0) -> np.ndarray:
    """Random actions within range, (count, D) float32, determined by ``seed``."""
    space = env.action_space
    return np.random.default_rng(seed).uniform(space.low, space.high, (count, *space.shape)).astype(np.float32)


def _before_end(env: Any, actions: np.ndarray) -> np.ndarray:
    """Those of the actions that the episode of ``SEED`` takes before it ends: a failure or a low step limit may end it soon."""
    env.restart(SEED)
    for number, action in enumerate(actions, 1):
        _, terminated, truncated, _ = env.advance(action)
        if terminated or truncated:
            return actions[:number]
    return actions


def _trace(env: Any, seed: int, actions: np.ndarray) -> list[np.ndarray]:
    """All numbers and pixels of the first steps of an episode."""
    observation, _ = env.reset(seed=seed)
    trace = _flat(observation)
    for action in actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        trace += [*_flat(observation), np.array([reward, terminated, truncated])]
        if terminated or truncated:
            break
    return trace


def _arrays(observation: dict[str, Any]) -> list[np.ndarray]:
    pixels = observation["pixels"]
    return [*(pixels.values() if isinstance(pixels, dict) else [pixels]), observation["agent_pos"]]


def _flat(observation: dict[str, Any]) -> list[np.ndarray]:
    return [np.array(array) for array in _arrays(observation)]


def _numbers(observation: Observation) -> list[np.ndarray]:
    return [*observation.images.values(), observation.state]


def _same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@_promise
def _spaces(env: Any) -> None:
    """The spaces follow the contract: pixels uint8 (H, W, 3), agent_pos float32 (S,), one bounded float32 action."""
    from gymnasium import spaces

    space = env.observation_space
    _require(isinstance(space, spaces.Dict) and set(space) == {"pixels", "agent_pos"}, f"the observation space is {space}")
    state: Any = space["agent_pos"]
    _require(state.dtype == np.float32 and len(state.shape) == 1, f"agent_pos is {state}")
    _require(len(env.state_names) == state.shape[0], f"{len(env.state_names)} state names for {state.shape[0]} numbers")
    pixels = space["pixels"]
    images: list[Any] = list(pixels.values()) if isinstance(pixels, spaces.Dict) else [pixels]
    for image in images:
        _require(image.dtype == np.uint8 and len(image.shape) == 3 and image.shape[2] == 3, f"pixels are {image}")
    action = env.action_space
    _require(isinstance(action, spaces.Box) and action.dtype == np.float32 and action.is_bounded(), f"actions are {action}")


@_promise
def _observations_fit(env: Any) -> None:
    """Observations of reset and step lie in the observation space, and rewards and flags have the right types."""
    actions = _before_end(env, _actions(env, 3))
    observation, info = env.reset(seed=SEED)
    _require(env.observation_space.contains(observation), "the reset's observation does not fit its space")
    _require(isinstance(info, dict), f"the reset's info is {type(info).__name__}")
    for action in actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        _require(env.observation_space.contains(observation), "a step's observation does not fit its space")
        _require(np.isfinite(reward), f"the reward is {reward}")
        _require(isinstance(terminated, bool) and isinstance(truncated, bool), "terminated or truncated is not a bool")


@_promise
def _square(env: Any) -> None:
    """Images are square, and all views have the same size."""
    _require(len({side for size in env.views.values() for side in size}) == 1, f"(height, width) of the views: {env.views}")


@_promise
def _images_show_something(env: Any) -> None:
    """The image is not a single colour."""
    image = _flat(env.reset(seed=SEED)[0])[0]
    _require(image.std() > 1, f"all pixels lie within {image.min()}..{image.max()}")


@_promise
def _instruction(env: Any) -> None:
    """The instruction is a sentence."""
    text = env.task_description
    _require(isinstance(text, str) and text.strip() and text.strip() == text, f"it is {text!r}")


@_promise
def _action_spec(env: Any) -> None:
    """The action spec and the action space agree on dimension and range."""
    spec, space = env.action_spec, env.action_space
    _require((spec.dim,) == space.shape, f"the spec has {spec.dim} dimensions, the space {space.shape}")
    _require(np.array_equal(spec.low, space.low) and np.array_equal(spec.high, space.high), f"the space is {space}")


@_promise
def _described(env: Any) -> None:
    """Name, views, state, action, instruction and step limit are those that the environment's suite states."""
    _require("/" in env.name, f"it is named {env.name!r}, not suite/task")
    _require(env.view in env.views, f"the main view is {env.view!r}, but the views are {list(env.views)}")
    suite, _, task = env.name.partition("/")
    if suite not in suites():
        return
    spec = simulator_spec(suite)
    _require(task == env.task and task in spec.tasks, f"the task is {env.task!r}, the name {env.name!r}")
    for what, here, stated in (
        ("views", tuple(env.views), spec.views),
        ("state names", tuple(env.state_names), spec.state_names),
        ("action spec", env.action_spec, spec.action),
        ("instruction", env.task_description, spec.tasks[task]),
        ("step limit", env._max_episode_steps, spec.max_steps[task]),
    ):
        _require(here == stated, f"the suite's {what}: {stated!r:.200}, the environment's: {here!r:.200}")


@_promise
def _rate(env: Any) -> None:
    """metadata["render_fps"] is the action rate of the spec."""
    fps = env.metadata.get("render_fps")
    _require(fps == env.action_spec.rate_hz, f"render_fps is {fps}, rate_hz is {env.action_spec.rate_hz}")


@_promise
def _info(env: Any) -> None:
    """info holds success, is_success (bool), steps and first_success_step (int), with the right values."""
    actions = _before_end(env, _actions(env, 2))
    _, info = env.reset(seed=SEED)
    for number, action in enumerate([None, *actions]):
        if action is not None:
            *_, info = env.step(action)
        missing = {"success", "is_success", "steps", "first_success_step"} - set(info)
        _require(not missing, f"missing: {sorted(missing)}")
        _require(isinstance(info["success"], bool) and info["success"] == info["is_success"], f"success is {info['success']!r}")
        _require(info["steps"] == number, f"steps is {info['steps']} after {number} steps")
        expected = -1 if not info["success"] else number
        _require(info["first_success_step"] == expected, f"first_success_step is {info['first_success_step']}")


@_promise
def _same_seed(env: Any) -> None:
    """The same seed gives the same bytes, also after another episode."""
    actions = _actions(env, 6)
    first = _trace(env, SEED, actions)
    _trace(env, SEED + 1, _actions(env, 6, seed=1))
    _require(_same(first, _trace(env, SEED, actions)), "a second episode with the same seed and actions differed")


@_promise
def _options(env: Any) -> None:
    """A reset takes the option {"start": "random"}, with which the same seed gives the same bytes, too."""
    observations = []
    for _ in range(2):
        env.restart(SEED, RANDOM_START)
        observations.append(_numbers(env.observe()))
    observations.append(_flat(env.reset(seed=SEED, options=RANDOM_START)[0]))
    _require(all(_same(observations[0], each) for each in observations[1:]), "three resets with the same seed differed")


@_promise
def _different_seeds(env: Any) -> None:
    """Different seeds give different episodes."""
    traces = [_trace(env, SEED + i, _actions(env, 2)) for i in range(3)]
    _require(not (_same(traces[0], traces[1]) and _same(traces[1], traces[2])), "three seeds gave the same bytes")


@_promise
def _global_generator(env: Any) -> None:
    """Nothing draws from numpy's global random generator."""
    before = repr(np.random.get_state(legacy=False))
    _trace(env, SEED, _actions(env, 2))
    _require(before == repr(np.random.get_state(legacy=False)), "its state changed")


@_promise
def _chunks(env: Any) -> None:
    """Executing a chunk equals executing single steps, bit for bit."""
    from vlaflow.simulators.chunks import ChunkEnv

    actions = _before_end(env, _actions(env, 6))
    env.reset(seed=SEED)
    single = [env.step(action) for action in actions]
    chunked = ChunkEnv(env, n_action_steps=3)
    chunked.reset(seed=SEED)
    for start in range(0, len(actions), 3):
        end = min(start + 3, len(actions))
        observation, reward, _, _, info = chunked.step(actions[start:end])
        expected, _, _, _, wanted = single[end - 1]
        _require(_same(_flat(observation), _flat(expected)), f"the observation after {end} steps differs")
        rewards = sum(step[1] for step in single[start:end])
        _require(
            np.isclose(reward, rewards, rtol=1e-9), f"the reward of a chunk of 3 is {reward}, that of single steps {rewards}"
        )
        _require(
            info["steps"] == wanted["steps"], f"a chunk counts {info['steps']} steps, single steps count {wanted['steps']}"
        )


@_promise
def _lazy(env: Any) -> None:
    """Advancing renders nothing, and observing the same step twice renders once."""
    actions = _before_end(env, _actions(env, 3))
    env.restart(SEED)
    before = env.renders
    for action in actions:
        env.advance(action)
    _require(env.renders == before, f"{env.renders - before} images rendered in {len(actions)} steps without an observation")
    env.observe()
    env.observe()
    _require(env.renders == before + len(env.views), f"{env.renders - before} images rendered for one observation")


@_promise
def _rendering_is_passive(env: Any) -> None:
    """Rendering does not change the physics."""
    actions = _before_end(env, _actions(env, 8))
    states = []
    for render in (False, True):
        env.restart(SEED)
        for action in actions:
            env.advance(action)
            if render:
                env.render()
        states.append(np.array(env.observe().state))
    _require(np.array_equal(states[0], states[1]), f"the states differ by up to {np.abs(states[0] - states[1]).max():.3g}")


@_promise
def _observe(env: Any) -> None:
    """observe() returns the same as step."""
    env.reset(seed=SEED)
    observation = env.step(_actions(env, 1)[0])[0]
    observed = env.observe()
    _require(_same(_flat(observation), _numbers(observed)), "they differ")
    _require(observed.instruction == env.task_description, f"its instruction is {observed.instruction!r}")
    sizes = {view: image.shape[:2] for view, image in observed.images.items()}
    _require(sizes == env.views, f"views are {sizes}, but {env.views} are declared")


@_promise
def _main_view(env: Any) -> None:
    """render() returns the main view of what observe() returns."""
    env.restart(SEED)
    env.advance(_actions(env, 1)[0])
    expected = env.observe().images[env.view]
    _require(np.array_equal(env.render(), expected), f"they differ, or {env.view!r} is another view")


@_promise
def _postponed(env: Any) -> None:
    """A postponed observation shows the moment at which it was asked for, whatever happens before it is rendered."""
    actions = _before_end(env, _actions(env, 3))
    env.reset(seed=SEED)
    moments = []
    for action in actions:
        moments.append((postponed(env), env.observe()))
        env.advance(action)
    env.restart(SEED + 1)
    for render, expected in moments:
        shown = render()
        _require(_same(_numbers(shown), _numbers(expected)), "another moment is shown")


@_promise
def _owned(env: Any) -> None:
    """What was observed stays as it is: later steps and resets do not change an array that was returned."""
    actions = _before_end(env, _actions(env, 3))
    returned = _arrays(env.reset(seed=SEED)[0])
    for action in actions:
        observed = env.observe()
        returned += [*_numbers(observed), env.render()]
        shown = [array.copy() for array in returned]
        env.advance(action)
        env.observe()
        _require(_same(returned, shown), "a step changed an image or a state that was returned before it")
    env.reset(seed=SEED + 1)
    _require(_same(returned, shown), "a reset changed an image or a state that was returned before it")


@_promise
def _refusals(env: Any) -> None:
    """An action of the wrong length, or with a value that is not finite, is refused with a clear error."""
    env.restart(SEED)
    dimension = env.action_space.shape[0]
    for bad, what in ((np.zeros(dimension + 1), "one number too many"), (np.full(dimension, np.nan), "not a number")):
        try:
            env.advance(bad)
        except VlaflowError:
            continue
        raise Broken(f"an action with {what} was executed")


@_promise
def _max_steps(env: Any) -> None:
    """The episode is cut off after exactly _max_episode_steps, unless it succeeds or fails before."""
    low, high, limit = env.action_space.low, env.action_space.high, env._max_episode_steps
    ends = []
    for action in (np.clip(np.zeros_like(low), low, high), low, high):
        env.restart(SEED)
        step, terminated, truncated = 0, False, False
        while step < limit and not (terminated or truncated):
            _, terminated, truncated, _ = env.advance(action)
            step += 1
        if terminated or step == limit:
            _require(terminated or truncated, f"truncated is {truncated} at step {step}")
            return
        ends.append(step)
    # Failures that depend on the actions come at different steps.
    _require(len(set(ends)) > 1, f"truncated is True at step {ends[0]}, with three different actions")


@_promise
def _terminates_with_success(env: Any) -> None:
    """Success terminates the episode, and nothing else does: a failure truncates it."""
    env.restart(SEED)
    low, high = env.action_space.low, env.action_space.high
    for step in range(1, env._max_episode_steps + 1):
        _, terminated, truncated, info = env.advance(high if step <= env._max_episode_steps // 2 else low)
        _require(terminated == info["success"], f"terminated is {terminated} and success {info['success']} at step {step}")
        if terminated or truncated:
            return


@_promise
def _expert(env: Any) -> None:
    """A scripted expert keeps to the range of the actions, and after its success the next step is executed."""
    if env.name.partition("/")[0] not in suites():
        return
    try:
        expert = expert_for(env.name)
        env.restart(SEED, RANDOM_START)
        clean_action(expert, env)
    except CapabilityError:  # this task has none
        return
    for seed in range(SEED, SEED + 3):
        env.restart(seed, RANDOM_START)
        expert = expert_for(env.name)
        for _ in range(env._max_episode_steps):
            _, _, truncated, info = env.advance(clean_action(expert, env))
            if truncated:
                break
            if info["success"]:
                _step_after_success(env, clean_action(expert, env))
                return


def _step_after_success(env: Any, action: np.ndarray) -> None:
    try:
        env.advance(action)
    except Exception as problem:
        raise Broken(f"the step after a success is refused ({problem}), which recordings of the end need") from problem
