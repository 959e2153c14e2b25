"""Observation keys of requests: those of openpi's, RoboArena's and vla-eval's clients, and custom ones.

The image keys correspond to the policy's views, in order. So a policy trained on two views serves any robot that sends two
images, and another number of images is refused before the first request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from vlaflow import registry
from vlaflow.errors import ConfigError, RequestError, SpecError, nearest
from vlaflow.serving import openpi, vla_eval
from vlaflow.serving.conversation import MOST_SIDE, WireProtocol
from vlaflow.spec import Observation

MOST_STATE = 4096
_NAMED_KEYS = 50


@dataclass(frozen=True)
class ObservationKeys:
    """The keys of a request.

    Args:
        images: keys of the images, uint8 (H, W, 3), or (3, H, W) with ``channels_first``; "a/b" may be one key or nested maps.
        state: keys of the parts of the state, concatenated in this order; none for clients that send no state.
        prompt: key of the instruction.
        channels_first: whether images are (3, H, W).
        protocol: the protocol that these clients speak.
    """

    images: tuple[str, ...]
    state: tuple[str, ...]
    prompt: str = "prompt"
    channels_first: bool = False
    protocol: WireProtocol = openpi.OPENPI


METAWORLD = ObservationKeys(("observation/image",), ("observation/state",))
LIBERO = ObservationKeys(("observation/image", "observation/wrist_image"), ("observation/state",))
DROID = ObservationKeys(
    ("observation/exterior_image_1_left", "observation/wrist_image_left"),
    ("observation/joint_position", "observation/gripper_position"),
)
ALOHA = ObservationKeys(
    ("images/cam_high", "images/cam_low", "images/cam_left_wrist", "images/cam_right_wrist"),
    ("state",),
    channels_first=True,
)
ROBOARENA = ObservationKeys(
    ("observation/exterior_image_0_left", "observation/wrist_image_left"),
    ("observation/joint_position", "observation/gripper_position"),
    protocol=openpi.ROBOARENA,
)
VLA_EVAL_LIBERO = ObservationKeys(
    ("images/agentview", "images/wrist"), ("states",), "task_description", protocol=vla_eval.LIBERO
)
VLA_EVAL_CALVIN = ObservationKeys(
    ("images/rgb_static", "images/rgb_gripper"), ("states",), "task_description", protocol=vla_eval.TWO_VIEWS
)
VLA_EVAL_SIMPLER = ObservationKeys(("images/primary",), ("states",), "task_description", protocol=vla_eval.ONE_VIEW)
VLA_EVAL_VLABENCH = ObservationKeys(("images/primary",), (), "task_description", protocol=vla_eval.NO_STATE)


def choose(name: str, views: Sequence[str], images: Sequence[str] = (), state: Sequence[str] = ()) -> dict[str, Any]:
    """The observation keys for these views, as keyword arguments of ``read``.

    Args:
        name: name of installed observation keys (``registry``).
        views: views of the policy, in order.
        images, state: keys to use instead of the installed ones.

    Raises:
        ConfigError: unknown name, or the number of images differs from that of the views.
    """
    observation_keys = registry.load("layouts", name, ObservationKeys, f"There are no observation keys '{name}'")
    observation_keys = replace(
        observation_keys, images=tuple(images) or observation_keys.images, state=tuple(state) or observation_keys.state
    )
    if len(observation_keys.images) != len(views):
        raise ConfigError(
            f"The observation keys '{name}' name {len(observation_keys.images)} images "
            f"{list(observation_keys.images)}, but the policy has {len(views)} views {list(views)}. Name the "
            "keys of the images with --image."
        )
    return {"observation_keys": observation_keys, "views": tuple(views)}


def read(request: Mapping[str, Any], observation_keys: ObservationKeys, views: Sequence[str]) -> Observation:
    """Read the observation of a request.

    Raises:
        RequestError: a key is missing or has an invalid value.
    """
    images = {}
    for view, key in zip(views, observation_keys.images, strict=True):
        image = _find(request, key)
        if not isinstance(image, np.ndarray):
            raise RequestError(f"'{key}' must be an image, a uint8 array of shape (height, width, 3).")
        if image.size == 0 or max(image.shape, default=0) > MOST_SIDE:
            raise RequestError(f"'{key}' must be an image of 1 to {MOST_SIDE} pixels per side, got shape {list(image.shape)}.")
        images[view] = (
            np.ascontiguousarray(image.transpose(1, 2, 0)) if observation_keys.channels_first and image.ndim == 3 else image
        )
    parts = [_vector(_find(request, key), key) for key in observation_keys.state]
    prompt = _find(request, observation_keys.prompt)
    if not isinstance(prompt, str):
        raise RequestError(f"'{observation_keys.prompt}' must be the instruction in words.")
    if sum(map(len, parts)) > MOST_STATE:
        raise RequestError(f"The state ({', '.join(observation_keys.state)}) may have at most {MOST_STATE} numbers.")
    try:
        return Observation(images, np.concatenate(parts) if parts else np.zeros(0, np.float32), prompt)
    except SpecError as error:
        raise RequestError(str(error)) from error


def _vector(value: Any, key: str) -> np.ndarray:
    """Decode a part of the state; numbers too large for float32 become infinite, which an observation refuses."""
    try:
        found = np.atleast_1d(np.asarray(value))
    except ValueError:  # lists of unequal lengths
        found = np.empty((0, 0))
    if found.ndim != 1 or found.dtype.kind not in "biuf":
        raise RequestError(f"'{key}' must be a vector of numbers.")
    with np.errstate(over="ignore"):
        return found.astype(np.float32)


def _find(request: Mapping[str, Any], key: str) -> Any:
    if key in request:
        return request[key]
    found: Any = request
    for part in key.split("/"):
        if not isinstance(found, Mapping) or part not in found:
            present = [name for name in islice(request, _NAMED_KEYS) if isinstance(name, str) and len(name) < 80]
            raise RequestError(
                f"The request lacks '{key}'; {nearest(key, present)}" if present else f"The request lacks '{key}'."
            )
        found = found[part]
    return found
