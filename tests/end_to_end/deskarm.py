"""A robot of LeRobot's kind without hardware: it stands still, sees grey, and remembers what it was sent.

``lerobot_rollout`` drives it with ``lerobot-rollout``, as ``--robot.type=vlaflow_deskarm``. LeRobot looks for the class of a
robot in a module of its name, so this file is named after ``DeskArm``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from lerobot.robots import Robot, RobotConfig

KIND, SIZE = "vlaflow_deskarm", 32
JOINTS, TARGETS = ("a.pos", "b.pos", "c.pos"), ("x.pos", "y.pos")


@RobotConfig.register_subclass(KIND)
@dataclass(kw_only=True)
class DeskArmConfig(RobotConfig):
    """Nothing to configure."""


class DeskArm(Robot):
    """See the module text.

    Attributes:
        sent: the actions of all robots of this process, each with the numbers of ``TARGETS``.
    """

    config_class, name = DeskArmConfig, KIND
    sent: ClassVar[list[tuple[float, ...]]] = []

    observation_features: ClassVar[dict[str, Any]] = {**dict.fromkeys(JOINTS, float), "front": (SIZE, SIZE, 3)}
    action_features: ClassVar[dict[str, Any]] = dict.fromkeys(TARGETS, float)
    is_connected, is_calibrated = False, True

    def connect(self, calibrate: bool = True) -> None:
        """Be there."""
        self.is_connected = True

    def calibrate(self) -> None:
        """Nothing to calibrate."""

    def configure(self) -> None:
        """Nothing to configure."""

    def get_observation(self) -> dict[str, Any]:
        """The same at all times."""
        return {**dict.fromkeys(JOINTS, 0.0), "front": np.full((SIZE, SIZE, 3), 128, np.uint8)}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """Remember it."""
        self.sent.append(tuple(float(action[name]) for name in TARGETS))
        return action

    def disconnect(self) -> None:
        """Be gone."""
        self.is_connected = False
