"""What is said around the actions: openpi's protocol as it is, and the variant that RoboArena's clients speak.

Both are msgpack over a websocket, with the server speaking first. RoboArena's clients read the first message as a fixed set of
fields, want a bare array for an answer and execute all of it, so they get the actions that this policy executes per chunk
and no others. Requests differ in nothing that a layout would not say: an "endpoint", and a "session_id" that is not needed,
because a connection is a session.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ARM_AND_GRIPPER = 8
"""Numbers of an action in RoboArena's two action spaces: seven joints and the gripper."""


@dataclass(frozen=True)
class WireProtocol:
    """Two functions.

    Args:
        hello: the first message, of the server's metadata.
        answer: what is sent for a reply, of the reply and the actions to execute per chunk.
    """

    hello: Callable[[Mapping[str, Any]], dict[str, Any]]
    answer: Callable[[Mapping[str, Any], int], Any]


def _roboarena_hello(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of RoboArena's server config; an action space of its own has the robot's name."""
    images, spec = metadata["images"], metadata["action_spec"]
    sizes = set(images.values())
    side = sizes.pop() if len(sizes) == 1 else None
    modes = {dimension["mode"] for dimension in spec["dimensions"][:-1]}
    joints = {"absolute": "joint_position", "delta": "joint_velocity"}.get(modes.pop() if len(modes) == 1 else "")
    return {
        "image_resolution": [side, side] if side else None,
        "needs_wrist_camera": any("wrist" in key for key in images),
        "n_external_cameras": sum("exterior" in key for key in images),
        "needs_stereo_camera": any(key.endswith("_right") for key in images),
        "needs_session_id": False,
        "action_space": joints if joints and len(spec["dimensions"]) == ARM_AND_GRIPPER else spec["robot"],
    }


OPENPI = WireProtocol(hello=dict, answer=lambda reply, n_action_steps: dict(reply))
ROBOARENA = WireProtocol(hello=_roboarena_hello, answer=lambda reply, n_action_steps: reply["actions"][:n_action_steps])
