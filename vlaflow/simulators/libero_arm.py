"""The commands of LIBERO's arm and gripper: robosuite's operational-space controller at a third of its cost.

The controller aims at a pose relative to the hand and turns the error into joint torques, 25 times per action (Khatib 1987).
robosuite spends most of the time around the mathematics: looking up names, computing every Jacobian twice, copying. Here the
same operations are done in the same order on arrays of the same layout, so that the torques are equal to the bit
(tests/simulators/libero_stock.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


class Arm:
    """The arm and gripper between two resets of robosuite's environment.

    Args:
        raw: robosuite's environment, just reset: its controller is new, and has read the state once.
        solve: brings MuJoCo's data up to date before the state is read.
    """

    def __init__(self, raw: Any, solve: Callable[[], None]) -> None:
        import mujoco
        from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error

        self._mujoco, self._solve = mujoco, solve
        self._nullspace_torques, self._opspace_matrices = nullspace_torques, opspace_matrices
        self._orientation_error = orientation_error
        robot = raw.robots[0]
        self._model, self._data = raw.sim.model._model, raw.sim.data._data
        self._controller, self._gripper = robot.controller, robot.gripper
        self._controller.update = self._read
        self._site = robot.eef_site_id
        self._qpos, self._qvel = robot._ref_joint_pos_indexes, robot._ref_joint_vel_indexes
        self._motors = robot._ref_joint_actuator_indexes
        self._low, self._high = robot.torque_limits
        self._grips = list(robot._ref_joint_gripper_actuator_indexes)
        closed, opened = self._model.actuator_ctrlrange[self._grips].T
        self._middle, self._half = 0.5 * (opened + closed), 0.5 * (opened - closed)

    def aim(self, action: np.ndarray) -> None:
        """Begin an action (7,)."""
        self._controller.set_goal(action[:6])
        # The fingers close or open by a hundredth of their range per substep.
        self._closing = np.array([-1.0, 1.0]) * self._gripper.speed * np.sign(action[6:])

    def drive(self) -> None:
        """Set the motors for one substep."""
        c = self._controller
        c.update()
        force = (c.goal_pos - c.ee_pos) * c.kp[:3] + -c.ee_pos_vel * c.kd[:3]
        torque = self._orientation_error(c.goal_ori, c.ee_ori_mat) * c.kp[3:] + -c.ee_ori_vel * c.kd[3:]
        _, mass_33, inertia_33, nullspace_77 = self._opspace_matrices(c.mass_matrix, c.J_full, c.J_pos, c.J_ori)
        wrench = np.concatenate([np.dot(mass_33, force), np.dot(inertia_33, torque)])
        torques = np.dot(c.J_full.T, wrench) + self._data.qfrc_bias[self._qvel]
        torques += self._nullspace_torques(c.mass_matrix, nullspace_77, c.initial_joint, c.joint_pos, c.joint_vel)
        self._data.ctrl[self._motors] = np.clip(torques, self._low, self._high)
        self._gripper.current_action = np.clip(self._gripper.current_action + self._closing, -1.0, 1.0)
        self._data.ctrl[self._grips] = self._middle + self._half * self._gripper.current_action
        c.new_update = True

    def _read(self) -> None:
        """Read the state of the arm, once per substep; takes the place of the controller's own ``update``."""
        c, data = self._controller, self._data
        if not c.new_update:
            return
        self._solve()
        position_3V, rotation_3V = np.zeros((2, 3, self._model.nv))
        self._mujoco.mj_jacSite(self._model, data, position_3V, rotation_3V, self._site)
        mass_VV = np.empty((self._model.nv, self._model.nv))
        self._mujoco.mj_fullM(self._model, mass_VV, data.qM)
        c.ee_pos, c.ee_ori_mat = data.site_xpos[self._site].copy(), data.site_xmat[self._site].reshape(3, 3).copy()
        c.ee_pos_vel, c.ee_ori_vel = np.dot(position_3V, data.qvel), np.dot(rotation_3V, data.qvel)
        c.joint_pos, c.joint_vel = data.qpos[self._qpos], data.qvel[self._qvel]
        c.J_pos, c.J_ori = np.array(position_3V[:, self._qvel]), np.array(rotation_3V[:, self._qvel])
        c.J_full = np.vstack([c.J_pos, c.J_ori])
        c.mass_matrix = mass_VV[self._qvel, :][:, self._qvel]
        c.new_update = False
