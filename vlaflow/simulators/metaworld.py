"""Meta-World v3 as LeRobot evaluates it, rendered only on demand.

The protocol, checked to the bit against frames and states of LeRobot's own environment (tests/simulators):
camera corner2 moved to (0.75, 0.075, 0.7) and its image rotated by 180 degrees; state = the first four numbers of the
raw observation (hand position in metres, opening of the fingers); object and goal drawn from the reset seed; the first
success ends the episode; the step limit is 500. Published tables also use 400: see ``first_success_step``.

LeRobot prepares each task with ``MT1(task, seed=42)``, resets it once with MT1's first random vector, and then draws from
the reset seed. Only the first of MT1's fifty vectors matters; drawing it alone takes 0.2 s instead of 1.2 s.

It matters because of a quirk: in the first frame, the goal dot is where the *first of two* draws inside Meta-World's reset put
it, at a height from before the reset. The policy's first image thus depends, by a few pixels, on the previous episode. Here
every reset starts from the state of a new LeRobot environment, so the seed alone determines every byte and environments can
be reused (checked on all 50 tasks).

The tasks and the action spec are in ``metaworld_tasks``; what recording adds to the scripted experts is in ``experts``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from vlaflow.errors import SpecError
from vlaflow.simulators import gl, metaworld_scenes
from vlaflow.simulators.base import Render
from vlaflow.simulators.metaworld_tasks import ACTION, SPEC
from vlaflow.simulators.scenes import Facts
from vlaflow.spec import Observation

gl.prepare()  # before mujoco is first imported, two lines below

import gymnasium  # noqa: E402
from gymnasium import spaces  # noqa: E402

CAMERA = "corner2"
CAMERA_POSITION = (0.75, 0.075, 0.7)
STATE = 4


class MetaWorldEnv(gymnasium.Env):
    """One Meta-World task. See `vlaflow.simulators.base.Environment` for its methods.

    Args:
        task: e.g. "drawer-open-v3".
        render: "exact" for LeRobot's pixels, "fast" for about a twentieth of the cost.
        size: side of the image in pixels; None for 480 with "exact", 96 with "fast".
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012 - gymnasium's own form

    def __init__(self, task: str, render: Render = "fast", size: int | None = None) -> None:
        self.name = f"metaworld/{task}"
        self.task = task
        self.task_description = SPEC.tasks[task]
        self.view = SPEC.views[0]
        self.render_mode = "rgb_array"
        self.render_quality: Render = render
        self.action_spec = ACTION
        self.state_names = SPEC.state_names
        self._max_episode_steps = SPEC.max_steps[task]
        self._sim, self._first_draw = _simulation(task)
        side = size or SPEC.size[render]
        self._camera = gl.OffscreenCameras(self._sim.model, (CAMERA,), side, render, simplify=True, solid=True)
        self.action_space = spaces.Box(-1.0, 1.0, (ACTION.dim,), np.float32)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Box(0, 255, (side, side, 3), np.uint8),
                "agent_pos": spaces.Box(-1000.0, 1000.0, (STATE,), np.float32),
            }
        )
        self._raw: np.ndarray | None = None
        self._image: np.ndarray | None = None
        self._first_success = -1

    @property
    def renders(self) -> int:
        """Number of images rendered since the environment was created."""
        return self._camera.taken

    @property
    def views(self) -> dict[str, tuple[int, int]]:
        """(height, width) of the one view."""
        return {self.view: (self._camera.size, self._camera.size)}

    @property
    def raw_observation(self) -> np.ndarray:
        """Meta-World's own observation, (39,) float64: the privileged state that the scripted experts read."""
        if self._raw is None:
            raise SpecError(f"{self.name} has not been reset yet. Call reset(seed=...) first.")
        return self._raw

    @property
    def state(self) -> np.ndarray:
        """Proprioception, (4,) float32: hand position in metres (world frame), opening of the fingers in [0, 1]."""
        return self.raw_observation[:STATE].astype(np.float32)

    def restart(self, seed: int | None = None, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """`reset` without rendering.

        Args:
            seed: determines where object and goal are; None continues the current random stream.
            options: ignored.

        Returns:
            info, as after a step.
        """
        super().reset(seed=seed)
        self._sim._freeze_rand_vec, self._sim._last_rand_vec = True, self._first_draw
        self._sim.reset()
        self._sim._freeze_rand_vec = False
        if seed is not None:
            self._sim.seed(int(seed))
        self._raw, _ = self._sim.reset()
        self._image = None
        self._first_success = -1
        return self._info(False)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode: (observation, info). The same seed gives the same bytes, whatever happened before."""
        info = self.restart(seed)
        return self._observation(), info

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool, dict[str, Any]]:
        """Execute one action without rendering.

        Args:
            action: (4,). The simulator clips values to ±1.

        Returns:
            (Meta-World's dense reward, terminated by success, truncated by the step limit, info)

        Raises:
            SpecError: for an action of another shape or with values that are not finite, and after the step limit.
        """
        command = np.asarray(action, np.float32)
        if command.shape != (ACTION.dim,) or not np.isfinite(command).all():
            raise SpecError(f"{self.name} expects {ACTION.dim} finite numbers as an action, got {np.asarray(action)!r}.")
        if self._raw is None or self._sim.curr_path_length >= self._max_episode_steps:
            raise SpecError(f"The episode of {self.name} is over or has not begun. Call reset(seed=...) first.")
        self._raw, reward, _, truncated, details = self._sim.step(command)
        self._image = None
        success = bool(details["success"])
        if success and self._first_success < 0:
            self._first_success = self._sim.curr_path_length
        return float(reward), success, bool(truncated), self._info(success)

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Execute one action and render: (observation, reward, terminated, truncated, info)."""
        reward, terminated, truncated, info = self.advance(action)
        return self._observation(), reward, terminated, truncated, info

    def render(self) -> np.ndarray:
        """The current image, (size, size, 3) uint8 RGB, upright; rendered at most once per step."""
        if self._image is None:
            self._image = self._take(self._camera.keep(self._sim.data))
        return self._image.copy()

    def observe(self) -> Observation:
        """The current observation."""
        return Observation({self.view: self.render()}, self.state, self.task_description)

    def postpone(self) -> Callable[[], Observation]:
        """See `vlaflow.simulators.base.postponed`."""
        moment, state, words = self._camera.keep(self._sim.data), self.state, self.task_description
        return lambda: Observation({self.view: self._take(moment)}, state, words)

    def facts(self) -> Facts:
        """Positions and states of the things in the scene; see ``scenes``.

        Raises:
            CapabilityError: for a task without questions.
        """
        return metaworld_scenes.facts(self.task, self._sim, CAMERA, self.raw_observation[3])

    def close(self) -> None:
        """Release the buffers of the camera; the environment can still be used."""
        self._camera.close()

    def _take(self, moment: gl.Moment) -> np.ndarray:
        # The buffer's row 0 is the bottom, and LeRobot rotates the upright image by 180 degrees: together, the
        # rows stay as they are and the columns are mirrored.
        return self._camera.take(CAMERA, moment)[:, ::-1].copy()

    def _observation(self) -> dict[str, Any]:
        return {"pixels": self.render(), "agent_pos": self.state}

    def _info(self, success: bool) -> dict[str, Any]:
        return {
            "success": success,
            "is_success": success,
            "steps": int(self._sim.curr_path_length),
            "first_success_step": self._first_success,
        }


class MetaWorldExpert:
    """Meta-World's scripted policy for one task; the action depends on the current state only."""

    def __init__(self, task: str) -> None:
        gl.prepare()
        from metaworld.policies import ENV_POLICY_MAP

        kind: Any = ENV_POLICY_MAP[task]
        self._policy = kind()

    def __call__(self, env: Any, error: np.ndarray | None = None) -> np.ndarray:
        """See ``Expert``."""
        raw = env.raw_observation
        if error is not None:
            raw = raw.copy()
            raw[:3] += error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Constant(s) may be too high": they are, and are clipped below
            action = self._policy.get_action(raw)
        return np.clip(np.asarray(action, np.float32), env.action_spec.low, env.action_spec.high)


def _simulation(task: str) -> tuple[Any, np.ndarray]:
    """Meta-World's own environment, and the random vector of ``MT1(task, seed=42).train_tasks[0]``."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    sim = ALL_V3_ENVIRONMENTS[task]()
    # As set_task does with MT1's task: the goal is part of the raw observation (the experts need it).
    sim._set_task_called, sim._partially_observable = True, False
    sim.__dict__.pop("sawyer_observation_space", None)  # cached for a hidden goal
    sim.model.cam_pos[sim.model.camera(CAMERA).id] = CAMERA_POSITION
    sim._freeze_rand_vec = False
    before = np.random.get_state()
    np.random.seed(42)  # MT1 draws from numpy's global generator
    try:
        sim.reset()
    finally:
        np.random.set_state(before)
    sim.seeded_rand_vec = True
    return sim, np.array(sim._last_rand_vec)
