"""Does an environment keep every promise that policies, recorders and evaluations rely on?

Any environment with the methods of `vlaflow.simulators.base.Environment` can be checked, not only those of this library:

    findings = check_environment(make("metaworld/drawer-open-v3"))

Each check is a function whose docstring is the promise and whose failure is an exception saying what was seen instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlaflow.errors import VlaflowError

Check = Callable[[Any], None]
CHECKS: list[Check] = []
SEED = 1000


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Args:
        promise: one sentence, what should hold.
        passed: whether it does.
        seen: what was seen instead; empty when passed.
    """

    promise: str
    passed: bool
    seen: str = ""


def check_environment(env: Any, progress: Callable[[int, int], None] | None = None) -> list[Finding]:
    """Run every check on one environment; none stops the others.

    Args:
        env: an environment; it is reset and stepped, not closed.
        progress: called as ``progress(done, total)``.
    """
    findings = []
    for number, check in enumerate(CHECKS, 1):
        promise = " ".join((check.__doc__ or check.__name__).split())
        try:
            check(env)
        except Exception as problem:  # whatever goes wrong is the finding
            what = str(problem) if isinstance(problem, Broken | VlaflowError) else f"{type(problem).__name__}: {problem}"
            findings.append(Finding(promise, False, " ".join(what.split())))
        else:
            findings.append(Finding(promise, True))
        if progress:
            progress(number, len(CHECKS))
    return findings


class Broken(Exception):  # noqa: N818 - a finding, not a defect of this library
    """A promise that is not kept."""


def _require(holds: object, seen: str) -> None:
    if not bool(holds):
        raise Broken(seen)


def _promise(check: Check) -> Check:
    CHECKS.append(check)
    return check


def _actions(env: Any, count: int, seed: int = 0) -> np.ndarray:
    """Random actions within range, (count, D) float32; a fixed function of ``seed``."""
    space = env.action_space
    return np.random.default_rng(seed).uniform(space.low, space.high, (count, *space.shape)).astype(np.float32)


def _trace(env: Any, seed: int, actions: np.ndarray) -> list[np.ndarray]:
    """Every number and pixel of an episode's beginning."""
    observation, _ = env.reset(seed=seed)
    seen = _flat(observation)
    for action in actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        seen += [*_flat(observation), np.array([reward, terminated, truncated])]
        if terminated or truncated:
            break
    return seen


def _flat(observation: dict[str, Any]) -> list[np.ndarray]:
    pixels = observation["pixels"]
    images = list(pixels.values()) if isinstance(pixels, dict) else [pixels]
    return [np.array(image) for image in images] + [np.array(observation["agent_pos"])]


def _same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@_promise
def _spaces(env: Any) -> None:
    """The spaces are those of the contract: pixels uint8 (H, W, 3), agent_pos float32 (S,), one bounded float32 action."""
    from gymnasium import spaces

    given = env.observation_space
    _require(isinstance(given, spaces.Dict) and set(given) == {"pixels", "agent_pos"}, f"the observation space is {given}")
    state: Any = given["agent_pos"]
    _require(state.dtype == np.float32 and len(state.shape) == 1, f"agent_pos is {state}")
    _require(len(env.state_names) == state.shape[0], f"{len(env.state_names)} state names for {state.shape[0]} numbers")
    pixels = given["pixels"]
    images: list[Any] = list(pixels.values()) if isinstance(pixels, spaces.Dict) else [pixels]
    for image in images:
        _require(image.dtype == np.uint8 and len(image.shape) == 3 and image.shape[2] == 3, f"pixels are {image}")
    action = env.action_space
    _require(isinstance(action, spaces.Box) and action.dtype == np.float32 and action.is_bounded(), f"actions are {action}")


@_promise
def _observations_fit(env: Any) -> None:
    """What reset and step return lies in the observation space, and rewards and flags have their types."""
    observation, info = env.reset(seed=SEED)
    _require(env.observation_space.contains(observation), "the reset's observation does not fit its space")
    _require(isinstance(info, dict), f"the reset's info is {type(info).__name__}")
    for action in _actions(env, 3):
        observation, reward, terminated, truncated, _ = env.step(action)
        _require(env.observation_space.contains(observation), "a step's observation does not fit its space")
        _require(np.isfinite(reward), f"the reward is {reward}")
        _require(isinstance(terminated, bool) and isinstance(truncated, bool), "terminated or truncated is no bool")


@_promise
def _pictures_show_something(env: Any) -> None:
    """The image is not of one colour."""
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
def _rate(env: Any) -> None:
    """metadata["render_fps"] is the action rate of the spec."""
    fps = env.metadata.get("render_fps")
    _require(fps == env.action_spec.rate_hz, f"render_fps is {fps}, rate_hz is {env.action_spec.rate_hz}")


@_promise
def _info(env: Any) -> None:
    """info holds success, is_success (bool), steps and first_success_step (int), and counts right."""
    _, info = env.reset(seed=SEED)
    for number, action in enumerate([None, *_actions(env, 2)]):
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
    """A chunk equals single steps to the bit."""
    from vlaflow.simulators.chunks import ChunkEnv

    actions = _actions(env, 6)
    env.reset(seed=SEED)
    single = [env.step(action) for action in actions]
    chunked = ChunkEnv(env, n_action_steps=3)
    chunked.reset(seed=SEED)
    for end in (3, 6):
        observation, reward, _, _, info = chunked.step(actions[end - 3 : end])
        expected, _, _, _, wanted = single[end - 1]
        _require(_same(_flat(observation), _flat(expected)), f"the observation after {end} steps differs")
        rewards = sum(step[1] for step in single[end - 3 : end])
        _require(np.isclose(reward, rewards, rtol=1e-9), f"the reward of 3 steps is {reward}, one by one {rewards}")
        _require(info["steps"] == wanted["steps"], f"{info['steps']} steps were counted, one by one {wanted['steps']}")


@_promise
def _lazy(env: Any) -> None:
    """Advancing takes no image, and looking twice at one moment takes one."""
    env.restart(SEED)
    before = env.renders
    for action in _actions(env, 3):
        env.advance(action)
    _require(env.renders == before, f"{env.renders - before} images in 3 steps nobody looked at")
    env.observe()
    env.observe()
    _require(env.renders == before + len(env.views), f"{env.renders - before} images for one look")


@_promise
def _rendering_is_passive(env: Any) -> None:
    """Rendering does not disturb the physics."""
    states = []
    for look in (False, True):
        env.restart(SEED)
        for action in _actions(env, 8):
            env.advance(action)
            if look:
                env.render()
        states.append(np.array(env.observe().state))
    _require(np.array_equal(states[0], states[1]), f"the states differ by up to {np.abs(states[0] - states[1]).max():.3g}")


@_promise
def _observe(env: Any) -> None:
    """observe() shows what step returned."""
    env.reset(seed=SEED)
    observation = env.step(_actions(env, 1)[0])[0]
    seen = env.observe()
    _require(_same(_flat(observation), [*seen.images.values(), seen.state]), "they differ")
    _require(seen.instruction == env.task_description, f"its instruction is {seen.instruction!r}")
    sizes = {view: image.shape[:2] for view, image in seen.images.items()}
    _require(sizes == env.views, f"views are {sizes}, declared are {env.views}")


@_promise
def _refusals(env: Any) -> None:
    """An action of the wrong length, or with a value that is not finite, is refused with a sentence."""
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
    """The episode is cut off after exactly _max_episode_steps, unless it succeeds before."""
    env.restart(SEED)
    action = np.clip(np.zeros(env.action_space.shape), env.action_space.low, env.action_space.high)
    for step in range(1, env._max_episode_steps + 1):
        _, terminated, truncated, _ = env.advance(action)
        if terminated:
            return
        _require(truncated == (step == env._max_episode_steps), f"truncated is {truncated} at step {step}")
