"""Observation keys of requests: those of openpi's, RoboArena's and vla-eval's clients, and custom ones.

The image keys correspond to the policy's views, in order. So a policy trained on two views serves any robot that sends two
images, and another number of images is refused before the first request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import MappingProxyType
from typing import Any

import numpy as np

from vlaflow import registry
from vlaflow.errors import ConfigError, RequestError, SpecError, closest
from vlaflow.serving import openpi, vla_eval
from vlaflow.serving.conversation import WireProtocol
from vlaflow.serving.request_arrays import array_of, image_of
from vlaflow.spec import Observation

MOST_STATE = 4096
_NAMED_KEYS = 50


@dataclass(frozen=True)
class ObservationKeys:
    """The keys of a request.

    Args:
        images: keys of the images (see ``request_arrays``); "a/b" may be one key or nested maps. Where empty, "images/VIEW" of
            every view of the policy.
        state: keys of the parts of the state, concatenated in this order; none for clients that send no state.
        prompt: key of the instruction.
        channels_first: whether images whose shape leaves it open are (3, H, W).
        protocol: the protocol that these clients speak.
        default_prompt: the instruction of requests without one; None refuses them.
    """

    images: tuple[str, ...]
    state: tuple[str, ...]
    prompt: str = "prompt"
    channels_first: bool = False
    protocol: WireProtocol = openpi.OPENPI
    default_prompt: str | None = None


VIEWS = ObservationKeys((), ("state",))
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


def choose(
    name: str,
    views: Sequence[str],
    images: Sequence[str] = (),
    state: Sequence[str] = (),
    default_prompt: str | None = None,
    *,
    stateless: bool = False,
) -> dict[str, Any]:
    """The observation keys for these views, as keyword arguments of ``read``.

    Args:
        name: name of installed observation keys (``registry``).
        views: views of the policy, in order.
        images, state: keys to use instead of the installed ones.
        default_prompt: the instruction of requests without one, instead of refusing them.
        stateless: the policy reads no state, so requests need not have one.

    Raises:
        ConfigError: unknown name, an empty prompt, or the number of images differs from that of the views.
    """
    if default_prompt is not None and not default_prompt.strip():
        raise ConfigError("The default prompt is empty. Give the instruction in words, or leave --default-prompt out.")
    observation_keys = registry.load("layouts", name, ObservationKeys, f"There are no observation keys '{name}'")
    observation_keys = replace(
        observation_keys,
        images=tuple(images) or observation_keys.images or tuple(f"images/{view}" for view in views),
        state=tuple(state) or (() if stateless else observation_keys.state),
        default_prompt=default_prompt if default_prompt is not None else observation_keys.default_prompt,
    )
    if len(observation_keys.images) != len(views):
        raise ConfigError(
            f"The observation keys '{name}' name {len(observation_keys.images)} images "
            f"{list(observation_keys.images)}, but the policy has {len(views)} views {list(views)}. Name the "
            "keys of the images with --image, or those of all views with --observation-keys views (images/VIEW, and state)."
        )
    return {"observation_keys": observation_keys, "views": tuple(views)}


def read(
    request: Mapping[str, Any],
    observation_keys: ObservationKeys,
    views: Sequence[str],
    sides: Mapping[str, int | None] = MappingProxyType({}),
) -> Observation:
    """Read the observation of a request.

    Args:
        request: decoded.
        observation_keys, views: see ``choose``.
        sides: side in pixels at which the policy reads each view, which limits the images; None for any.

    Raises:
        RequestError: a key is missing or has an invalid value.
    """
    images = {
        view: image_of(_find(request, key, observation_keys), key, observation_keys.channels_first, sides.get(view))
        for view, key in zip(views, observation_keys.images, strict=True)
    }
    parts = [_vector(_find(request, key, observation_keys), key) for key in observation_keys.state]
    prompt = _prompt(request, observation_keys)
    if sum(map(len, parts)) > MOST_STATE:
        raise RequestError(f"The state ({', '.join(observation_keys.state)}) may have at most {MOST_STATE} numbers.")
    try:
        return Observation(images, np.concatenate(parts) if parts else np.zeros(0, np.float32), prompt)
    except SpecError as error:
        raise RequestError(str(error)) from error


def _vector(value: Any, key: str) -> np.ndarray:
    """Decode a part of the state; numbers too large for float32 become infinite, which an observation refuses."""
    found = np.atleast_1d(array_of(value))
    if found.dtype.kind not in "biuf":
        raise RequestError(f"'{key}' must be a vector of numbers.")
    if found.ndim != 1:
        cure = f" Send one state without a batch axis: {key.rpartition('/')[2]}[0]." if len(found) == 1 else ""
        raise RequestError(f"'{key}' must be a vector of numbers, got shape {list(found.shape)}.{cure}")
    with np.errstate(over="ignore"):
        return found.astype(np.float32)


def _prompt(request: Mapping[str, Any], observation_keys: ObservationKeys) -> str:
    key = observation_keys.prompt
    try:
        prompt = _find(request, key, observation_keys)
    except RequestError as error:
        if observation_keys.default_prompt is not None:
            return observation_keys.default_prompt
        raise RequestError(f"{error} Send the instruction, or serve with --default-prompt.") from error
    if not isinstance(prompt, str):
        cure = " Send one text, not a list." if isinstance(prompt, list) else ""
        raise RequestError(f"'{key}' must be the instruction in words.{cure}")
    return prompt


def _find(request: Mapping[str, Any], key: str, observation_keys: ObservationKeys) -> Any:
    if key in request:
        return request[key]
    found: Any = request
    for part in key.split("/"):
        if not isinstance(found, Mapping) or part not in found:
            raise RequestError(f"The request lacks '{key}'{_instead(request, key, observation_keys)}")
        found = found[part]
    return found


def _instead(request: Mapping[str, Any], key: str, observation_keys: ObservationKeys) -> str:
    """The key that was probably meant, or those that the request has, as the end of a sentence."""
    present = [name for name in islice(request, _NAMED_KEYS) if isinstance(name, str) and len(name) < 80]
    others = set(present).difference(observation_keys.images, observation_keys.state, (observation_keys.prompt,))
    last = key.rpartition("/")[2]  # openpi's own data sets have the keys without "observation/"
    if close := last if last in others else closest(key, others):
        return f"; did you mean '{close}'?"
    return f"; it has {' and '.join(map(repr, present))}." if present else "."
