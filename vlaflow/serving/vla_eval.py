"""vla-eval's protocol: benchmarks of AllenAI's evaluation harness play episodes against any checkpoint and compute policy.

Every message is a msgpack map of "type", "payload", "seq" and "timestamp". The client says "hello" and gets one in return, with
what its benchmark has to send. It announces every episode ("episode_start", "episode_end"), which has no answer. Each
"observation" is answered by one "action" for one step, {"actions": (D,)} in robot units, or by an "error", with the number of
the observation. So the server keeps the chunk: it executes ``n_action_steps`` of it before the policy sees the next
observation, and the observations in between are not even decoded. "episode_restart" in an observation (CALVIN: the next of the
chained instructions) discards the rest of a chunk.

The noise is that of ``vlaflow eval``: episode number i of a task has seed 1000 + i.

An array is a map {"__ndarray__": true, "data", "dtype", "shape"}, an image {"__image__": true, "format", "data", "shape"} with
a PNG, a JPEG or raw bytes.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np

from vlaflow import __version__
from vlaflow.errors import RequestError
from vlaflow.policies.seeds import FIRST_SEED, chunk_generator
from vlaflow.robot import wire
from vlaflow.serving.conversation import MOST_SIDE, Conversation, WireProtocol
from vlaflow.serving.request_log import RequestEntry, sentence
from vlaflow.spec import ActionSpec, Observation

if TYPE_CHECKING:
    from vlaflow.serving.server import PolicyServer

VERSION = 1
"""Version of the protocol."""
IDLE_S = 600.0
"""A simulator does not answer pings while it builds a scene."""
FORMATS = {"png": "PNG", "jpeg": "JPEG"}
_PROVENANCE = ("server", "system", "compute", "compute_settings", "checkpoint", "fingerprint", "n_action_steps")
"""The metadata that the harness stores with its results."""
_ROTATIONS = {"axis-angle": ("axis_angle", 3), "quaternion xyzw": ("quaternion_xyzw", 4)}


@dataclass(frozen=True)
class EncodedImage:
    """An image that has not been decoded yet.

    Args:
        data: the file.
        format: Pillow's name of its format.
        shape: what the client says its shape is.
    """

    data: bytes
    format: str
    shape: tuple[int, ...]

    def decode(self) -> np.ndarray:
        """The image, (H, W, 3) uint8.

        Raises:
            RequestError: it is damaged, or of another shape.
        """
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.data), formats=(self.format,)) as image:
                if (image.height, image.width, 3) != self.shape or image.mode != "RGB" or max(image.size) > MOST_SIDE:
                    raise RequestError(
                        f"An image is said to have shape {list(self.shape)} and is {image.mode} of {image.height} × "
                        f"{image.width} pixels; it must be RGB, of 1 to {MOST_SIDE} pixels per side."
                    )
                return np.asarray(image)
        except RequestError:
            raise
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise RequestError(f"An image is not a valid {self.format} ({type(error).__name__}).") from error


class VlaEvalConversation(Conversation):
    """A connection of vla-eval's client.

    Args:
        server: see ``Conversation``.
        observation_params: parameters that the benchmark takes over from the server, e.g. {"send_state": True}.
    """

    def __init__(self, server: PolicyServer, observation_params: Mapping[str, Any]) -> None:
        super().__init__(server)
        self._params = dict(observation_params)
        self._seq = 0
        self._begin(FIRST_SEED)
        self._episodes = 0

    async def answer(self, frame: str | bytes, entry: RequestEntry) -> bytes | None:
        """See ``Conversation``."""
        kind, payload, observation = await self.in_thread(lambda: self._read(frame))
        if kind == "observation":
            return self._packed("action", {"actions": await self._action(observation, entry)})
        entry.outcome = "reset"
        if kind == "hello":
            return self._packed("hello", self._hello(payload))
        if kind == "error":
            entry.note = sentence(payload.get("error"))
        if kind == "episode_start":
            task = payload.get("task")
            number = task.get("episode_idx") if isinstance(task, Mapping) else None
            if not isinstance(number, int) or not 0 <= number < 2**31:
                number = self._episodes
            self._begin(FIRST_SEED + number)
            self._episodes += 1
        return None

    def refusal(self, sentence: str) -> bytes:
        """An "error" with the number of the message that it answers."""
        return self._packed("error", {"error": sentence})

    def _begin(self, seed: int) -> None:
        self._seed, self._chunks = seed, 0
        self._rest: list[np.ndarray] = []

    async def _action(self, observation: Observation | None, entry: RequestEntry) -> np.ndarray:
        """The action for one step, (D,) float32; without an observation, the next of the chunk."""
        if observation is None:
            entry.outcome = "continued"
            return self._rest.pop(0)
        observation = self.server.instruct(observation, follows=False)
        chunk = await self.infer(observation, chunk_generator(self._seed, self._chunks), entry)
        self._chunks, entry.outcome = self._chunks + 1, "answered"
        first, *self._rest = chunk.actions[: self.server.n_action_steps]
        return np.asarray(first, np.float32)

    def _read(self, frame: str | bytes) -> tuple[str, dict[str, Any], Observation | None]:
        """Decode a message: its type, its payload, and the observation if the policy has to look at it."""
        kind, payload = self._message(frame)
        if kind != "observation":
            return kind, payload, None
        if payload.get("episode_restart") is True:
            self._rest = []
        if self._rest:
            return kind, payload, None
        size, most = sum(math.prod(image.shape) for image in _images(payload)), self.server.most_image_bytes
        if size > most:
            raise RequestError(
                f"The images of the message have {size} bytes, but at most {most} are accepted. Send smaller images."
            )
        return kind, payload, self.server.observe(_decoded(payload))

    def _hello(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        version = theirs.get("protocol_version", VERSION)
        if not isinstance(version, int) or version != VERSION:
            raise RequestError(
                f"This server speaks version {VERSION} of vla-eval's protocol, not {version!r:.20}; use vla-eval 0.8."
            )
        metadata = self.server.metadata
        views = [key.rpartition("/")[2] for key in metadata["images"]]
        return {
            "harness_version": f"vlaflow {__version__}",
            "protocol_version": VERSION,
            "model_server": f"vlaflow {metadata['system']}",
            "capabilities": {},
            "observation_params": self._params,
            "action_spec": action_components(self.server.policy.action_spec),
            "observation_spec": {
                **{view: _component("image", 0, "rgb_hwc_uint8") for view in views},
                "language": _component("language", 0, "language"),
            },
            "vlaflow": {key: metadata[key] for key in _PROVENANCE},
        }

    def _message(self, frame: str | bytes) -> tuple[str, dict[str, Any]]:
        self._seq = 0
        if isinstance(frame, str):
            raise RequestError("Messages must be binary msgpack frames, got text.")
        message = wire.unpack(frame, self.server.most_bytes, _decode)
        if not isinstance(message, dict):
            raise RequestError(f"A message must be a map, got a {type(message).__name__}.")
        seq = message.get("seq")
        self._seq = seq if isinstance(seq, int) else 0
        kind, payload = message.get("type"), message.get("payload")
        if not isinstance(kind, str) or kind not in ("hello", "episode_start", "observation", "episode_end", "error"):
            raise RequestError(f"There is no message of type {kind!r:.40}.")
        if not isinstance(payload, dict):
            raise RequestError(f"The payload of '{kind}' must be a map.")
        return kind, payload

    def _packed(self, kind: str, payload: dict[str, Any]) -> bytes:
        message = {"type": kind, "payload": payload, "seq": self._seq, "timestamp": time.time()}
        return bytes(msgpack.packb(message, default=_encode))


def action_components(spec: ActionSpec) -> dict[str, dict[str, Any]]:
    """The spec in vla-eval's words: "position", "rotation" and "gripper"; empty unless all three are known.

    The harness compares it with what its benchmark expects, and warns of differences.
    """
    position, last = spec.dimensions[:3], spec.dimensions[-1]
    form, numbers = _ROTATIONS.get(spec.rotation, ("", 0))
    modes = {dimension.mode for dimension in position}
    if [d.name for d in position] != ["x", "y", "z"] or len(modes) > 1 or not numbers or spec.dim != 4 + numbers:
        return {}
    signs = {"closes": "binary_close_positive", "opens": "binary_close_negative"}
    if last.name != "gripper" or last.low >= 0 or last.positive not in signs:
        return {}
    return {
        "position": _component("position", 3, f"{modes.pop()}_xyz"),
        "rotation": _component("rotation", numbers, form),
        "gripper": _component("gripper", 1, signs[last.positive]),
    }


def speaking(**observation_params: Any) -> WireProtocol:
    """The protocol, for benchmarks with these parameters."""
    return WireProtocol(partial(VlaEvalConversation, observation_params=observation_params), IDLE_S)


NO_STATE = speaking()
ONE_VIEW = speaking(send_state=True)
TWO_VIEWS = speaking(send_state=True, send_wrist_image=True)
LIBERO = speaking(send_state=True, send_wrist_image=True, quat_no_antipodal=True)
"""Rotations as in LIBERO's own data: the angle lies in [0, 2π]."""


def _component(name: str, dims: int, form: str) -> dict[str, Any]:
    return {"name": name, "dims": dims, "format": form}


def _decode(found: dict[Any, Any]) -> Any:
    """What a map of a message stands for; images are decoded later."""
    data, shape, form = found.get("data"), found.get("shape"), found.get("format", "raw")
    if "__image__" in found and isinstance(form, str) and form in FORMATS:
        if not isinstance(data, bytes) or not isinstance(shape, list) or not all(isinstance(n, int) and n > 0 for n in shape):
            raise RequestError("An image of the message lacks its data or its shape.")
        return EncodedImage(data, FORMATS[form], tuple(shape))
    if "__image__" in found or "__ndarray__" in found:
        return wire.array(data, shape, found.get("dtype"))
    return found


def _images(value: Any) -> Iterator[EncodedImage]:
    """All images of a message that are not decoded yet, except those in lists, which have no key."""
    if isinstance(value, EncodedImage):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _images(each)


def _decoded(value: Any) -> Any:
    """The value with all its images decoded."""
    if isinstance(value, EncodedImage):
        return value.decode()
    return {key: _decoded(each) for key, each in value.items()} if isinstance(value, dict) else value


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": list(value.shape)}
    raise TypeError(f"not a {type(value).__name__}")
