"""Whether a LIBERO environment equals the stock one to the bit: python -m tests.simulators.libero_stock TASK SIZE SEED."""

import os
import sys

import numpy as np

from tests.simulators.compiled import scenes_compiled_once
from vlaflow.simulators import make
from vlaflow.simulators.libero_package import files
from vlaflow.simulators.libero_tasks import TASKS

SETTLE = [0, 0, 0, 0, 0, 0, -1]


def require_equal(what, ours, theirs):
    assert np.array_equal(ours, theirs), f"{what}: {ours} is not {theirs}"


def main(task, size, seed, steps=6):
    env = make(f"libero/{task}", render="exact", size=size)
    from libero.libero.envs import OffScreenRenderEnv
    from robosuite.utils.transform_utils import quat2axisangle

    bddl, states = files(TASKS[task])
    stock = OffScreenRenderEnv(bddl_file_name=str(bddl), camera_heights=size, camera_widths=size)
    number = (seed - 1000) % len(states)
    stock.seed(seed)
    stock.reset()  # builds the scene again
    theirs = stock.set_init_state(states[number])
    for _ in range(10):
        theirs, *_ = stock.step(SETTLE)

    env.restart(seed + 1)
    env.advance(np.ones(7))
    assert env.restart(seed)["initial_state"] == number
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, 7)).astype(np.float32)
    actions[:, 2] -= 0.5  # down, where the hand touches things
    for action in [None, *actions]:
        if action is not None:
            theirs, _, success, _ = stock.step(action.astype(np.float64))
            require_equal("success", env.advance(action)[1], success)
        ours = env.observe()
        require_equal("positions", env.raw.sim.data.qpos, stock.sim.data.qpos)
        require_equal("velocities", env.raw.sim.data.qvel, stock.sim.data.qvel)
        require_equal("image", ours.images["image"], theirs["agentview_image"][::-1, ::-1])
        require_equal("wrist image", ours.images["wrist_image"], theirs["robot0_eye_in_hand_image"][::-1, ::-1])
        require_equal("hand", ours.state[:3], theirs["robot0_eef_pos"].astype(np.float32))
        require_equal("rotation", ours.state[3:6], quat2axisangle(theirs["robot0_eef_quat"].copy()).astype(np.float32))
        require_equal("fingers", ours.state[6:], theirs["robot0_gripper_qpos"].astype(np.float32))


if __name__ == "__main__":
    with scenes_compiled_once():
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    os._exit(0)  # the stock environment's OpenGL can crash when Python ends
