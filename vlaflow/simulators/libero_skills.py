"""Movements of LIBERO's scripted experts: each maps the current state to the pose that the hand should head for.

The laws have no clock. Where the hand goes follows from where everything is now, so noise on the executed action only changes
the state that they start from, and a policy without memory can learn them. Rising and falling are one function of the
horizontal distance to the goal (`glide`), and the gripper's own state tells closing from opening.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vlaflow.simulators.libero_geometry import rotation_vector, yaw_of
from vlaflow.simulators.libero_scene import LiberoScene

STEP = (0.05, 0.5)
"""Metres and radians by which an action of 1 moves the target of LIBERO's controller."""

GAIN = 1.2
"""How far the controller's target is set, relative to the distance to the aim; at 1 the hand arrives without overshoot."""

STRAIGHT = 0.70
"""Distance from shoulder to wrist, in metres, at which tilts below 0.6 rad are no longer corrected. The elbow is straight at
0.71; near that, the controller's forces for position and rotation can cancel out, and the hand stays short of its goal."""

OPEN, CLOSED = -1.0, 1.0


@dataclass(frozen=True)
class Aim:
    """What the hand should do next.

    Args:
        position: (3,) where the grip site should go.
        rotation: (3, 3) of the grip site.
        gripper: ``OPEN`` or ``CLOSED``.
    """

    position: np.ndarray
    rotation: np.ndarray
    gripper: float


class Skill(Protocol):
    """One part of a task."""

    def done(self, scene: LiberoScene) -> bool:
        """Whether nothing remains to be done."""
        ...

    def busy(self, scene: LiberoScene) -> bool:
        """Whether it must not be interrupted, because it holds something."""
        ...

    def aim(self, scene: LiberoScene) -> Aim:
        """What the hand should do next."""
        ...


def action(hand: np.ndarray, rotation: np.ndarray, aim: Aim, extension: float = 0.0) -> np.ndarray:
    """The action (7,) that moves the hand towards an aim, at most at full speed.

    From far it goes straight to a lower point; to a higher one it rises at full speed whatever the distance, out of the way.

    Args:
        hand: (3,) current position.
        rotation: (3, 3) current rotation.
        aim: where to go.
        extension: of the arm; see `STRAIGHT`.
    """
    move = GAIN * (aim.position - hand) / STEP[0]
    scale = max(1.0, float(np.abs(move[:2]).max()), -float(move[2]))
    move = np.append(move[:2] / scale, min(1.0, move[2]) if move[2] > 0 else move[2] / scale)
    turn = rotation_vector(aim.rotation @ rotation.T)
    tilt = float(np.linalg.norm(turn[:2]))
    turn[:2] *= np.clip(max((STRAIGHT - extension) / 0.05, (tilt - 0.6) / 0.3), 1e-3, 1.0)
    turn *= GAIN / STEP[1]
    turn /= max(1.0, float(np.abs(turn).max()))
    return np.concatenate([move, turn, [aim.gripper]]).astype(np.float32)


def turn_to(yaw: float, rotation: np.ndarray) -> float:
    """How far the hand still has to turn to this yaw and to point down, in radians; a tilt of 0.3 is tolerated."""
    tilt = float(np.arccos(np.clip(-rotation[2, 2], -1, 1)))
    angle = abs(float(np.angle(np.exp(1j * (yaw - yaw_of(rotation))))))
    return max(angle if tilt < 1 else 0.0, tilt - 0.2)


def glide(hand: np.ndarray, goal: np.ndarray, cruise: float, turn: float = 0.0, near: float = 0.012) -> np.ndarray:
    """The point to head for on the way over obstacles and down to a goal, (3,).

    The hand keeps above a funnel: at ``cruise`` height when far from the goal, and lower with the horizontal distance. While it
    is lower than that, it rises first.

    Args:
        hand: (3,) current position.
        goal: (3,).
        cruise: height that clears everything on the way.
        turn: angle still to turn, which counts as distance: the hand turns before it goes down.
        near: horizontal distance at which it may go all the way down.
    """
    offset = goal[:2] - hand[:2]
    distance = float(np.linalg.norm(offset)) + 0.08 * max(0.0, turn - 0.1)
    height = max(goal[2], min(cruise, goal[2] + 2.0 * max(0.0, distance - near)))
    freedom = np.clip(1 - (height - hand[2] - 0.01) / 0.03, 0.0, 1.0)
    return np.append(hand[:2] + freedom * offset, height)
