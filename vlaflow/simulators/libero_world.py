"""One LIBERO task as a physical world: robosuite's environment, reset and advanced faster than by its own methods.

Both are checked to the bit against the stock environment (tests/simulators/test_libero.py):

- ``reset`` restores the compiled model and MuJoCo's data instead of building the scene again: 0.1 s instead of 4 to 10 s.
- ``execute`` computes positions and velocities once per substep instead of three times. MuJoCo starts its constraint solver
  from the previous solution, so the two repetitions of the solver that the stock environment causes are kept. ``Arm``
  takes the place of robosuite's controller.

The stock environment returns observations of the second-to-last of the 25 substeps of an action, not of the last, because its
sensors' clock is two substeps ahead after a stored state was set. ``execute`` therefore calls ``observe`` at that moment.

A stored state contains positions of joints, but fixtures (cabinet, stove) have none: the stock environment draws their places,
within about 2 cm, at every reset, also before a stored state is set. Here they are drawn from the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from vlaflow.errors import ConfigError
from vlaflow.simulators import libero_package
from vlaflow.simulators.libero_arm import Arm
from vlaflow.simulators.libero_tasks import LiberoTask

SETTLING = 10
"""Actions executed after a reset, so that objects come to rest, before the episode begins."""
SUBSTEPS = 25
OBSERVED = 24
"""Substep after which an action is observed, counted from 1."""
PLACEMENTS = 50
"""Largest number of placements drawn per reset."""

_STILL = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
_RESTORED = ("body_pos", "body_quat", "site_rgba")
"""Arrays of MuJoCo's model that episodes change."""


class World:
    """The world of one task.

    Args:
        task: the task.
        observe: called when the outcome of an action is observed.

    Attributes:
        raw: robosuite's environment.
        states: (N, 1 + nq + nv), the stored initial states.
        model, data: MuJoCo's.
    """

    def __init__(self, task: LiberoTask, observe: Callable[[], None]) -> None:
        envs = libero_package.load()
        import mujoco
        from robosuite import load_controller_config

        self._mujoco, self._observe = mujoco, observe
        self._name = f"{task.suite}, {task.name}"
        bddl, self.states = libero_package.files(task)
        kind = envs.TASK_MAPPING[_problem(bddl)]
        with _drawing_from(0):
            try:
                # The name of the class is compared with that of the problem.
                self.raw: Any = type(kind.__name__, (_RemembersItsModel, kind), {})(
                    str(bddl),
                    robots=["Panda"],
                    controller_configs=load_controller_config(default_controller="OSC_POSE"),
                    initialization_noise=None,
                    use_camera_obs=False,
                    has_offscreen_renderer=False,
                    ignore_done=True,
                    hard_reset=False,
                )
            except FileNotFoundError as problem:
                raise libero_package.missing(str(problem.filename or problem)) from problem
        self.model, self.data = self.raw.sim.model._model, self.raw.sim.data._data
        robot = self.raw.robots[0]
        self._hand, self._wrist = robot.eef_site_id, self.raw.sim.model.body_name2id(robot.robot_model.eef_name)
        self._fingers = list(robot._ref_gripper_joint_pos_indexes)

    def reset(self, seed: int, number: int | None) -> None:
        """Start an episode, settling included.

        Args:
            seed: determines the placement.
            number: number of the stored initial state; None for a drawn placement.

        Raises:
            ConfigError: no placement without overlap was found.
        """
        raw, sim = self.raw, self.raw.sim
        with _drawing_from(seed):
            self._place()
        sim.forward()
        raw.visualize(vis_settings=dict.fromkeys(raw._visualizations, False))
        sim.set_state_from_flattened(sim.get_state().flatten() if number is None else self.states[number])
        sim.forward()
        raw._check_success()
        raw._post_process()
        self._arm = Arm(raw, self._solve)
        for _ in range(SETTLING):
            self.execute(_STILL)

    def execute(self, action: np.ndarray) -> bool:
        """Execute one action (7,) and return whether the goal holds afterwards."""
        for substep in range(1, SUBSTEPS + 1):
            self._mujoco.mj_step1(self.model, self.data)
            self._solve()
            if substep == 1:
                self._arm.aim(action)
            self._arm.drive()
            self._mujoco.mj_step2(self.model, self.data)
            if substep == OBSERVED:
                self._observe()
        self.raw._post_process()
        return bool(self.raw._check_success())

    def _solve(self) -> None:
        """Repeat the constraint solver, as the stock environment does before every substep and when its controller reads."""
        self._mujoco.mj_forwardSkip(self.model, self.data, self._mujoco.mjtStage.mjSTAGE_VEL, 1)

    @property
    def state(self) -> np.ndarray:
        """Proprioception, (8,) float32; see ``libero_tasks.SPEC.state_names``."""
        position, fingers = self.data.site_xpos[self._hand], self.data.qpos[self._fingers]
        return np.concatenate((position, _axis_angle(self.data.xquat[self._wrist]), fingers)).astype(np.float32)

    def _place(self) -> None:
        """Draw a placement, beginning as the stock environment begins: at the compiled model."""
        from robosuite.utils.errors import RandomizationError

        for _ in range(PLACEMENTS):
            for name, value in self.raw.compiled.items():
                getattr(self.model, name)[:] = value
            self._mujoco.mj_resetData(self.model, self.data)
            for _ in range(2):  # the stock environment's second one is that of its renderer
                self.raw.sim.forward()
            gripper = self.raw.robots[0].gripper
            gripper.current_action = np.zeros(gripper.dof)
            try:
                return self.raw._reset_internal()
            except RandomizationError:
                continue
        raise ConfigError(f"No placement without overlaps was found for {self._name} in {PLACEMENTS} draws; try another seed.")


class _RemembersItsModel:
    """Mixin for robosuite's environments that keeps what episodes change in the compiled model."""

    sim: Any

    def _initialize_sim(self, xml_string: str | None = None) -> None:
        super()._initialize_sim(xml_string)  # type: ignore[misc]
        self.compiled = {name: getattr(self.sim.model._model, name).copy() for name in _RESTORED}


def _problem(bddl: Any) -> str:
    """The kind of scene that a task's description names."""
    import libero.libero.envs.bddl_utils as descriptions

    return str(descriptions.get_problem_info(str(bddl))["problem_name"])


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, from which LIBERO draws, and restore it afterwards."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def _axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """A unit quaternion (w, x, y, z) as axis times angle, (3,) radians; the angle lies in [0, 2π], as in LIBERO's data."""
    w, *xyz = quaternion
    w = max(-1.0, min(1.0, float(w)))
    sine = np.sqrt(1.0 - w * w)
    return np.zeros(3) if np.isclose(sine, 0.0) else np.array(xyz) * 2.0 * np.arccos(w) / sine
