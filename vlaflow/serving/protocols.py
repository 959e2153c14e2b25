"""Wire protocols: openpi's, and the variant of RoboArena's clients.

Both are msgpack over a websocket, and the server sends the first message. RoboArena's clients expect a fixed set of fields in
the first message and a bare array as reply, and execute all of it, so they get only the actions that this policy executes per
chunk. Requests differ only in their observation keys, an "endpoint", and a "session_id" that is ignored, because a connection
is a session.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ARM_AND_GRIPPER = 8
"""Action dimension of RoboArena's two action spaces: seven joints and the gripper."""


@dataclass(frozen=True)
class WireProtocol:
    """The format of the server's messages.

    Args:
        hello: makes the first message from the server's metadata.
        answer: makes the message of a reply from the reply and the number of actions to execute per chunk.
    """

    hello: Callable[[Mapping[str, Any]], dict[str, Any]]
    answer: Callable[[Mapping[str, Any], int], Any]


def _roboarena_hello(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of RoboArena's server config; other action spaces are named after the robot."""
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
