"""Executing a chunk of actions open loop, rendering only the frame that the policy observes next.

Rendering takes nine tenths of the time, and the policy never observes the frames within a chunk. Skipping them changes
nothing else: states, successes and the frames that are rendered stay the same to the bit (tests/simulators).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vlaflow.errors import ConfigError, SpecError
from vlaflow.simulators import gl
from vlaflow.simulators.base import Environment, owned, pixels
from vlaflow.spec import Observation

gl.prepare()

import gymnasium  # noqa: E402
from gymnasium import spaces  # noqa: E402


@dataclass(frozen=True)
class ChunkOutcome:
    """The outcome of executing one chunk.

    Args:
        steps: number of actions executed.
        reward: sum of the rewards.
        terminated: the task was achieved.
        truncated: the step limit was reached.
        info: the info of the last step.
    """

    steps: int
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]

    @property
    def done(self) -> bool:
        """Whether the episode is over."""
        return self.terminated or self.truncated


class ChunkEnv(gymnasium.Wrapper):
    """An environment whose action is a chunk.

    Args:
        env: any environment of this library.
        n_action_steps: actions executed per chunk, k. Longer chunks are cut, shorter ones are executed completely.
        video: whether to keep frames for a video.
        video_every: keep one frame in this many steps (the first of an episode and the last are always kept).
        max_steps: step limit below that of the environment, e.g. 400; None keeps its own.

    Example:
        >>> env = ChunkEnv(make("metaworld/drawer-open-v3"), n_action_steps=8)
        >>> env.restart(seed=1000)
        >>> while not (outcome := env.execute(policy.act(env.observe()).actions)).done: ...
    """

    def __init__(
        self,
        env: Environment,
        n_action_steps: int = 8,
        *,
        video: bool = False,
        video_every: int = 2,
        max_steps: int | None = None,
    ) -> None:
        if n_action_steps < 1 or video_every < 1:
            raise ConfigError(
                f"n_action_steps and video_every count steps and must be at least 1, got {n_action_steps} and {video_every}."
            )
        if max_steps is not None and not 1 <= max_steps <= env._max_episode_steps:
            raise ConfigError(f"max_steps of {env.name} must lie in 1..{env._max_episode_steps}, got {max_steps}.")
        super().__init__(env)  # type: ignore[arg-type]
        self._inner = env
        self.n_action_steps = n_action_steps
        self._video = video
        self._video_every = video_every
        self._max_episode_steps = max_steps or env._max_episode_steps
        self.frames: list[np.ndarray] = []
        single = env.action_space
        self.action_space = spaces.Box(
            np.tile(single.low, (n_action_steps, 1)),
            np.tile(single.high, (n_action_steps, 1)),
            (n_action_steps, *single.shape),
            single.dtype,
        )

    def restart(self, seed: int | None = None, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """Start an episode without rendering (except the first frame of a video); returns info."""
        info = self._inner.restart(seed, options)
        self.frames = [np.array(self._inner.render())] if self._video else []
        return info

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode: (observation, info)."""
        observation, info = self._inner.reset(seed=seed, options=options)
        self.frames = [np.array(self._inner.render())] if self._video else []
        return observation, info

    def execute(self, chunk: np.ndarray) -> ChunkOutcome:
        """Execute the first k actions of a chunk; stops at success and at the step limit; renders only video frames.

        Args:
            chunk: (L, D), L >= 1, robot units.

        Raises:
            SpecError: for a chunk of another shape.
        """
        chunk = np.asarray(chunk)
        dimension = self._inner.action_spec.dim
        if chunk.ndim != 2 or chunk.shape[0] < 1 or chunk.shape[1] != dimension:
            raise SpecError(f"A chunk for {self._inner.name} must have shape (L, {dimension}) with L >= 1, got {chunk.shape}.")
        total, steps = 0.0, 0
        for action in chunk[: self.n_action_steps]:
            reward, terminated, truncated, info = self._inner.advance(action)
            total, steps = total + reward, steps + 1
            truncated = truncated or (info["steps"] >= self._max_episode_steps)
            last = terminated or truncated
            if self._video and (last or info["steps"] % self._video_every == 0):
                self.frames.append(np.array(self._inner.render()))
            if last:
                break
        return ChunkOutcome(steps, total, terminated, truncated, info)

    def step(self, chunk: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Execute a chunk, then render once: (observation, summed reward, terminated, truncated, info with ``executed``)."""
        done = self.execute(chunk)
        observed = self.observe()
        observation = {"pixels": pixels(observed.images), "agent_pos": observed.state}
        return observation, done.reward, done.terminated, done.truncated, {**done.info, "executed": done.steps}

    def observe(self) -> Observation:
        """The current observation; rendered at most once per step."""
        return owned(self._inner.observe())
