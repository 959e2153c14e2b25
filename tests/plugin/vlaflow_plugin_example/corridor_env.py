"""The corridor itself: a dot at a position in [0, 1], moved by at most a tenth a step; its end is reached within 0.05."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from vlaflow.errors import SpecError
from vlaflow.simulators.base import Environment, Render
from vlaflow.spec import Observation
from vlaflow_plugin_example.corridor import SPEC


class CorridorEnv(gymnasium.Env):
    """See ``vlaflow.simulators.base.Environment``."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - gymnasium's own form

    def __init__(self, task: str, render: Render, size: int | None) -> None:
        self.name, self.task, self.task_description = f"corridor/{task}", task, SPEC.tasks[task]
        self.view, self.render_quality, self.render_mode = SPEC.views[0], render, "rgb_array"
        self.action_spec, self.state_names, self._max_episode_steps = SPEC.action, SPEC.state_names, SPEC.max_steps[task]
        self.side = size or SPEC.size[render]
        self.goal = float(task == "right")
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Box(0, 255, (self.side, self.side, 3), np.uint8),
                "agent_pos": spaces.Box(0.0, 1.0, (1,), np.float32),
            }
        )
        self.position, self.steps, self.first_success, self.renders = 0.5, 0, -1, 0
        self._image: np.ndarray | None = None

    @property
    def views(self) -> dict[str, tuple[int, int]]:
        """One, from above."""
        return {self.view: (self.side, self.side)}

    def restart(self, seed: int | None = None, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """Put the dot somewhere in the middle."""
        super().reset(seed=seed)
        self.position = float(self.np_random.uniform(0.3, 0.7))
        self.steps, self.first_success, self._image = 0, -1, None
        return self._info(False)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """``restart``, and an image."""
        info = self.restart(seed)
        return self._observation(), info

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool, dict[str, Any]]:
        """Move the dot."""
        command = np.asarray(action, np.float32)
        if command.shape != (1,) or not np.isfinite(command).all():
            raise SpecError(f"{self.name} expects one finite number as an action, got {np.asarray(action)!r}.")
        self.position = float(np.clip(self.position + np.clip(command[0], -1, 1) / 10, 0, 1))
        self.steps, self._image = self.steps + 1, None
        success = abs(self.position - self.goal) < 0.05
        if success and self.first_success < 0:
            self.first_success = self.steps
        return -abs(self.position - self.goal), success, self.steps >= self._max_episode_steps, self._info(success)

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """``advance``, and an image."""
        reward, terminated, truncated, info = self.advance(action)
        return self._observation(), reward, terminated, truncated, info

    def render(self) -> np.ndarray:
        """A white dot on a dark floor, drawn once a step."""
        if self._image is None:
            self._image = np.full((self.side, self.side, 3), 40, np.uint8)
            column = round(self.position * (self.side - 3))
            self._image[self.side // 2 - 1 : self.side // 2 + 2, column : column + 3] = 255
            self.renders += 1
        return self._image.copy()

    def observe(self) -> Observation:
        """What a policy sees."""
        return Observation({self.view: self.render()}, np.array([self.position], np.float32), self.task_description)

    def _observation(self) -> dict[str, Any]:
        return {"pixels": self.render(), "agent_pos": np.array([self.position], np.float32)}

    def _info(self, success: bool) -> dict[str, Any]:
        return {
            "success": success,
            "is_success": success,
            "steps": self.steps,
            "first_success_step": self.first_success,
        }


def walk(env: Environment, error: np.ndarray | None = None) -> np.ndarray:
    """The expert: straight to the end, slower within the last step."""
    assert isinstance(env, CorridorEnv)
    return np.clip([10 * (env.goal - env.position)], -1, 1).astype(np.float32)
