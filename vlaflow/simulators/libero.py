"""LIBERO and LIBERO-PRO as OpenVLA and LeRobot evaluate them, rendered only on demand.

The protocol: two cameras, whose images are rotated by 180 degrees; state = position and rotation of the hand and positions of
the two fingers; an episode starts at one of the task's stored initial states, and after ten settling steps with the gripper
open; the first success ends it. Seed 1000 + i starts at state i modulo their number (50; 10 in the two ``_with_milk``
suites), and ``info["initial_state"]`` says which. Recording draws placements instead (``{"start": "random"}``,
initial_state −1), as LIBERO itself did for its demonstrations and for the stored states.

States, successes and "exact" images equal the stock environment's to the bit. How is explained in ``libero_world``; the tasks
and the action spec are in ``libero_tasks``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vlaflow.errors import ConfigError, SpecError
from vlaflow.simulators import gl
from vlaflow.simulators.base import Render, pixels
from vlaflow.simulators.libero_tasks import ACTION, CAMERAS, SPEC, TASKS
from vlaflow.simulators.libero_world import World
from vlaflow.spec import Observation

gl.prepare()  # before mujoco is first imported

import gymnasium  # noqa: E402
from gymnasium import spaces  # noqa: E402

FIRST_SEED = 1000
"""Seed of the first stored initial state."""
COLLISION_GROUP = 0
"""Group of the invisible geoms with which objects collide."""


class LiberoEnv(gymnasium.Env):
    """One LIBERO task. See `vlaflow.simulators.base.Environment` for its methods.

    Args:
        task: e.g. "spatial/0".
        render: "exact" for the stock environment's pixels, "fast" for a fraction of the cost.
        size: side of the images in pixels; None for 256 with "exact", 128 with "fast".

    Attributes:
        raw: robosuite's environment, for experts.
        steps: actions executed since the reset, settling not counted; −1 before the first reset.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 - gymnasium's own form

    def __init__(self, task: str, render: Render = "fast", size: int | None = None) -> None:
        self.name = f"libero/{task}"
        self.task = task
        self.task_description = TASKS[task].instruction
        self.view = SPEC.views[0]
        self.render_mode = "rgb_array"
        self.render_quality: Render = render
        self.action_spec = ACTION
        self.state_names = SPEC.state_names
        self._max_episode_steps = SPEC.max_steps[task]
        self._size = size or SPEC.size[render]
        self._world = World(TASKS[task], self._capture)
        self.raw = self._world.raw
        self._cameras = gl.OffscreenCameras(
            self._world.model, tuple(CAMERAS.values()), self._size, render, hidden=(COLLISION_GROUP,), simplify=True
        )
        self.action_space = spaces.Box(-1.0, 1.0, (ACTION.dim,), np.float32)
        image = spaces.Box(0, 255, (self._size, self._size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Dict(dict.fromkeys(CAMERAS, image)),
                "agent_pos": spaces.Box(-1000.0, 1000.0, (len(SPEC.state_names),), np.float32),
            }
        )
        self.steps = -1
        self._first_success = self._initial_state = -1
        self._state = np.zeros(len(SPEC.state_names), np.float32)
        self._images: dict[str, np.ndarray] = {}
        self._moment: gl.Moment | None = None

    @property
    def renders(self) -> int:
        """Number of images rendered since the environment was created."""
        return self._cameras.taken

    @property
    def views(self) -> dict[str, tuple[int, int]]:
        """(height, width) of both views."""
        return dict.fromkeys(CAMERAS, (self._size, self._size))

    @property
    def state(self) -> np.ndarray:
        """Proprioception, (8,) float32: position (m) and axis-angle rotation (rad) of the hand, two finger positions (m)."""
        self._require_reset()
        return self._state.copy()

    @property
    def goal(self) -> list[list[str]]:
        """The predicates that hold when the task is solved, e.g. [["on", "akita_black_bowl_1", "plate_1"]]."""
        return [list(predicate) for predicate in self.raw.parsed_problem["goal_state"]]

    def restart(self, seed: int | None = None, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """`reset` without rendering.

        Args:
            seed: selects the stored initial state, and determines everything that is drawn; None draws a seed.
            options: {"start": "random"} for a drawn placement, {"start": "stored"} (default) for a stored initial state.

        Returns:
            info, as after a step.

        Raises:
            ConfigError: for another start, or a placement that cannot be drawn.
        """
        super().reset(seed=seed)
        start = (options or {}).get("start", "stored")
        if start not in ("stored", "random"):
            raise ConfigError(f"{self.name} starts at a 'stored' or 'random' placement, not {start!r}.")
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self._initial_state = (seed - FIRST_SEED) % len(self._world.states) if start == "stored" else -1
        self.steps, self._first_success = 0, -1
        self._world.reset(seed, self._initial_state if start == "stored" else None)
        return self._info(False)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode: (observation, info). The same seed and options give the same bytes, whatever happened before."""
        info = self.restart(seed, options)
        return self._observation(), info

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool, dict[str, Any]]:
        """Execute one action without rendering.

        Args:
            action: (7,). The controller clips values to ±1.

        Returns:
            (1.0 for success else 0.0, terminated by success, truncated by the step limit, info)

        Raises:
            SpecError: for an action of another shape or with values that are not finite, and after the step limit.
        """
        command = np.asarray(action, np.float32)
        if command.shape != (ACTION.dim,) or not np.isfinite(command).all():
            raise SpecError(f"{self.name} expects {ACTION.dim} finite numbers as an action, got {np.asarray(action)!r}.")
        if not 0 <= self.steps < self._max_episode_steps:
            raise SpecError(f"The episode of {self.name} is over or has not begun. Call reset(seed=...) first.")
        success = self._world.execute(command.astype(np.float64))
        self.steps += 1
        if success and self._first_success < 0:
            self._first_success = self.steps
        return float(success), success, self.steps == self._max_episode_steps, self._info(success)

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Execute one action and render: (observation, reward, terminated, truncated, info)."""
        reward, terminated, truncated, info = self.advance(action)
        return self._observation(), reward, terminated, truncated, info

    def render(self) -> np.ndarray:
        """The current image of the agent's view, (size, size, 3) uint8 RGB, upright; rendered at most once per step."""
        return self._image(self.view)

    def observe(self) -> Observation:
        """The current observation; rendered at most once per step."""
        return Observation({view: self._image(view) for view in CAMERAS}, self.state, self.task_description)

    def postpone(self) -> Callable[[], Observation]:
        """See `vlaflow.simulators.base.postponed`."""
        self._require_reset()
        moment, state, words = self._moment, self.state, self.task_description
        return lambda: Observation({view: self._take(view, moment) for view in CAMERAS}, state, words)

    def close(self) -> None:
        """Release the buffers of the cameras; the environment can still be used."""
        self._cameras.close()

    def _capture(self) -> None:
        self._moment = self._cameras.keep(self._world.data)
        self._state, self._images = self._world.state, {}

    def _image(self, view: str) -> np.ndarray:
        self._require_reset()
        if view not in self._images:
            self._images[view] = self._take(view, self._moment)
        return self._images[view].copy()

    def _take(self, view: str, moment: gl.Moment | None) -> np.ndarray:
        assert moment is not None
        # The stock environment returns the buffer as it is, row 0 at the bottom; the protocol rotates that by 180 degrees.
        return self._cameras.take(CAMERAS[view], moment)[::-1, ::-1].copy()

    def _observation(self) -> dict[str, Any]:
        return {"pixels": pixels({view: self._image(view) for view in CAMERAS}), "agent_pos": self.state}

    def _require_reset(self) -> None:
        if self.steps < 0:
            raise SpecError(f"{self.name} has not been reset yet. Call reset(seed=...) first.")

    def _info(self, success: bool) -> dict[str, Any]:
        return {
            "success": success,
            "is_success": success,
            "steps": self.steps,
            "first_success_step": self._first_success,
            "initial_state": self._initial_state,
        }
