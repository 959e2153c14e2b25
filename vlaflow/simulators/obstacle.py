"""A table seen from above: a hand at the bottom, a goal at the top, an obstacle between them; and an expert with two ways.

Positions are shares of the table's side, x to the right and y up. The seed determines where hand, obstacle and goal are, and
also the side on which the expert passes; this side is not part of any observation. Contact ends an episode: ``truncated`` is
set and there was no success (``terminated`` stands for success, as in every environment here).

Physics and images are a few lines of NumPy; gymnasium is needed for the interface only.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from vlaflow.errors import SpecError
from vlaflow.simulators.base import Render
from vlaflow.simulators.obstacle_task import SPEC
from vlaflow.spec import Observation

STEP = 0.04
"""Displacement of the hand by an action of 1."""
HAND, OBSTACLE, GOAL = 0.03, 0.15, 0.05
"""Radii. The goal is reached by the centre of the hand."""
CLEARANCE = 0.12
"""Distance between hand and obstacle at which the expert passes."""
COLOURS = {"table": (226, 221, 209), "goal": (74, 157, 92), "obstacle": (176, 58, 52), "hand": (40, 84, 160)}


class ObstacleEnv(gymnasium.Env):
    """The obstacle's one task. See `vlaflow.simulators.base.Environment` for its methods.

    Args:
        task: "pass-v0".
        render: both qualities give the same images.
        size: side of the image in pixels; None for 96.

    Attributes:
        hand, obstacle, goal: (2,) float64, positions of the centres.
        side: side on which the expert passes, −1 left or +1 right.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - gymnasium's own form

    def __init__(self, task: str, render: Render = "fast", size: int | None = None) -> None:
        self.name, self.task, self.task_description = f"obstacle/{task}", task, SPEC.tasks[task]
        self.view, self.render_quality, self.render_mode = SPEC.views[0], render, "rgb_array"
        self.action_spec, self.state_names, self._max_episode_steps = SPEC.action, SPEC.state_names, SPEC.max_steps[task]
        self._size = size or SPEC.size[render]
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Box(0, 255, (self._size, self._size, 3), np.uint8),
                "agent_pos": spaces.Box(0.0, 1.0, (2,), np.float32),
            }
        )
        self.hand = self.obstacle = self.goal = np.full(2, 0.5)
        self.side, self._steps, self._first_success, self._over = 1, 0, -1, True
        self._image: np.ndarray | None = None
        self.renders = 0

    @property
    def views(self) -> dict[str, tuple[int, int]]:
        """(height, width) of the one view."""
        return {self.view: (self._size, self._size)}

    @property
    def state(self) -> np.ndarray:
        """Proprioception, (2,) float32: position of the hand."""
        return self.hand.astype(np.float32)

    def restart(self, seed: int | None = None, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """`reset` without rendering.

        Args:
            seed: determines the scene and the expert's side; None continues the current random stream.
            options: ignored.

        Returns:
            info, as after a step.
        """
        super().reset(seed=seed)
        self.obstacle = np.array([0.5, 0.5]) + self.np_random.uniform(-0.04, 0.04, 2)
        self.hand = np.array([0.5, 0.1]) + self.np_random.uniform((-0.04, -0.02), (0.04, 0.02))
        self.goal = np.array([0.5, 0.9]) + self.np_random.uniform((-0.12, -0.02), (0.12, 0.02))
        self.side = int(self.np_random.choice([-1, 1]))
        self._steps, self._first_success, self._over, self._image = 0, -1, False, None
        return self._info(False)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode: (observation, info). The same seed gives the same bytes, whatever happened before."""
        info = self.restart(seed)
        return self._observation(), info

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool, dict[str, Any]]:
        """Execute one action without rendering.

        Args:
            action: (2,). Values are clipped to ±1, and the hand stays on the table.

        Returns:
            (minus the distance to the goal, terminated by success, truncated by contact or the step limit, info)

        Raises:
            SpecError: for an action of another shape or with values that are not finite, and after contact or the step limit.
        """
        command = np.asarray(action, np.float32)
        if command.shape != (2,) or not np.isfinite(command).all():
            raise SpecError(f"{self.name} expects 2 finite numbers as an action, got {np.asarray(action)!r}.")
        if self._over:
            raise SpecError(f"The episode of {self.name} is over or has not begun. Call reset(seed=...) first.")
        self.hand = np.clip(self.hand + STEP * np.clip(command, -1, 1).astype(np.float64), HAND, 1 - HAND)
        self._steps, self._image = self._steps + 1, None
        distance = float(np.linalg.norm(self.hand - self.goal))
        success = distance < GOAL
        if success and self._first_success < 0:
            self._first_success = self._steps
        self._over = bool(np.linalg.norm(self.hand - self.obstacle) < HAND + OBSTACLE) or self._steps >= self._max_episode_steps
        return -distance, success, self._over, self._info(success)

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Execute one action and render: (observation, reward, terminated, truncated, info)."""
        reward, terminated, truncated, info = self.advance(action)
        return self._observation(), reward, terminated, truncated, info

    def render(self) -> np.ndarray:
        """The current image, (size, size, 3) uint8 RGB; rendered at most once per step."""
        if self._image is None:
            self._image = draw_scene(self, self._size)
            self.renders += 1
        return self._image.copy()

    def observe(self) -> Observation:
        """The current observation."""
        return Observation({self.view: self.render()}, self.state, self.task_description)

    def _observation(self) -> dict[str, Any]:
        return {"pixels": self.render(), "agent_pos": self.state}

    def _info(self, success: bool) -> dict[str, Any]:
        return {
            "success": success,
            "is_success": success,
            "steps": self._steps,
            "first_success_step": self._first_success,
        }


class ObstacleExpert:
    """Passes the obstacle on the episode's side, then goes straight to the goal; depends on the current state only."""

    def __call__(self, env: Any, error: np.ndarray | None = None) -> np.ndarray:
        """See ``Expert``; the third number of an error has no meaning on a table."""
        hand = env.hand if error is None else env.hand + error[:2]
        waypoint = env.obstacle + np.array([env.side * (OBSTACLE + HAND + CLEARANCE), 0.0])
        target = waypoint if hand[1] < waypoint[1] - STEP / 2 else env.goal
        way = (target - hand) / STEP
        return (way / max(1.0, float(np.linalg.norm(way)))).astype(np.float32)


def draw_scene(env: ObstacleEnv, size: int) -> np.ndarray:
    """The scene from above, (size, size, 3) uint8, with edges one pixel soft."""
    centre = (np.arange(size) + 0.5) / size
    image = np.broadcast_to(np.array(COLOURS["table"], np.float64), (size, size, 3)).copy()
    for name, place, radius in (
        ("goal", env.goal, GOAL),
        ("obstacle", env.obstacle, OBSTACLE),
        ("hand", env.hand, HAND),
    ):
        distance = np.hypot(centre[None, :] - place[0], centre[::-1, None] - place[1])
        cover = np.clip(0.5 + (radius - distance) * size, 0, 1)[..., None]
        image += cover * (np.array(COLOURS[name], np.float64) - image)
    return np.round(image).astype(np.uint8)
