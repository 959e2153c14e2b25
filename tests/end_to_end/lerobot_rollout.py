"""LeRobot's own loop for real robots, ``lerobot-rollout``, with a checkpoint of vlaflow and a robot without hardware."""

from __future__ import annotations

import logging
import sys
from itertools import islice
from pathlib import Path

import numpy as np
from lerobot.scripts import lerobot_rollout

from tests.end_to_end.deskarm import JOINTS, KIND, SIZE, DeskArm
from vlaflow.policies.base import Policy
from vlaflow.policies.seeds import chunk_generator
from vlaflow.spec import Observation

FPS, SECONDS, TASK = 10, 3, "push the puck"


class Errors(logging.Handler):
    """What LeRobot's threads complain about; real-time chunking tries ten times before it gives up."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.sentences: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the sentence."""
        self.sentences.append(record.getMessage())


def driven(checkpoint: Path, folder: Path, *given: str) -> np.ndarray:
    """The actions (T, D) that the robot was sent in ``SECONDS``."""
    words = [f"--policy.path={checkpoint}", "--policy.device=cpu", f"--robot.type={KIND}", f"--robot.calibration_dir={folder}"]
    words += [f"--fps={FPS}", f"--duration={SECONDS}", f"--task={TASK}", "--play_sounds=false"]
    before, sys.argv = sys.argv, ["lerobot-rollout", *words, "--return_to_initial_position=false", *given]
    errors = Errors()
    logging.getLogger("lerobot").addHandler(errors)
    DeskArm.sent.clear()
    try:
        lerobot_rollout.main()
    finally:
        sys.argv = before
        logging.getLogger("lerobot").removeHandler(errors)
    assert not errors.sentences, errors.sentences
    return np.array(DeskArm.sent, np.float32)


def expected(checkpoint: Path, count: int) -> np.ndarray:
    """The same actions from vlaflow alone: of every chunk the steps that are executed, one chunk after the other."""
    policy = Policy.from_pretrained(checkpoint)
    seen = Observation({"front": np.full((SIZE, SIZE, 3), 128, np.uint8)}, np.zeros(len(JOINTS), np.float32), TASK)
    chunks = (policy.act(seen, generator=chunk_generator(0, number)).actions for number in range(count))
    steps = (action for chunk in chunks for action in chunk[: policy.n_action_steps])
    return np.array(list(islice(steps, count)), np.float32)


def check(checkpoint: Path, folder: Path) -> None:
    """One call per step sends vlaflow's own actions; real-time chunking keeps the robot moving without an error."""
    actions = driven(checkpoint, folder)
    assert len(actions) > FPS * SECONDS // 2, f"{len(actions)} actions in {SECONDS} s at {FPS} per second"
    assert np.array_equal(actions, expected(checkpoint, len(actions))), "lerobot-rollout sends other actions than vlaflow"
    actions = driven(checkpoint, folder, "--inference.type=rtc", "--inference.queue_threshold=2")
    assert len(actions) > FPS * SECONDS // 3, f"{len(actions)} actions in {SECONDS} s at {FPS} per second"
    assert np.isfinite(actions).all()
