"""openpi's protocol, and the variant of RoboArena's clients.

The server sends its metadata first; then every request, a map in one binary frame, is answered by a map with "actions"
(chunk_size, D) in robot units, or by a text frame with one sentence.

Besides openpi's keys a request may contain "seed" (of this chunk's noise), "reset" (the noise sequence starts over; alone, the
reply is {"reset": true}), "action_prefix" and "inference_delay" (actions that the robot will have executed when the
reply arrives, with which the chunk begins), "budget_ms", "deadline_ms", "action_spec" (refused unless it is the policy's),
"follow_operator" (see ``dashboard``) and, from RoboArena's clients, "endpoint": "infer" or "reset". A reply also contains
"confidence" if there is a rater, "spread" if several draws were made, "layers", "nfe", "repaired" and the milliseconds by part.

RoboArena's clients expect a fixed set of fields in the first message and a bare array as reply, and execute all of it, so they
get only the actions that are executed per chunk. Their "session_id" is ignored, because a connection is a session.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Generator

from vlaflow.compute.base import ComputePolicy
from vlaflow.config import from_json
from vlaflow.errors import RequestError, SpecError, VlaflowError
from vlaflow.robot import wire
from vlaflow.serving.conversation import Conversation, WireProtocol
from vlaflow.serving.request_arrays import array_of
from vlaflow.serving.request_log import RequestEntry
from vlaflow.spec import ActionPrefix, ActionSpec, Chunk, Observation
from vlaflow.text import as_typed

if TYPE_CHECKING:
    from vlaflow.serving.server import PolicyServer

ARM_AND_GRIPPER = 8
"""Action dimension of RoboArena's two action spaces: seven joints and the gripper."""


@dataclass(frozen=True)
class _Asked:
    """A decoded request for a chunk; see the module docstring."""

    restarts: bool
    seed: float | None
    deadline_ms: float | None
    budget_ms: float | None
    action_prefix: ActionPrefix | None
    follows: bool
    observation: Observation


class OpenpiConversation(Conversation):
    """A connection in openpi's protocol; its only state is the number of chunks, which seeds the next one's noise."""

    def __init__(self, server: PolicyServer) -> None:
        super().__init__(server)
        self._chunks = 0

    def greeting(self) -> bytes:
        """The metadata."""
        return wire.pack(self.metadata())

    def metadata(self) -> dict[str, Any]:
        """Content of the first message."""
        return self.server.metadata

    def encoded(self, reply: dict[str, Any]) -> Any:
        """A reply with actions as the client expects it."""
        return reply

    async def answer(self, frame: str | bytes, entry: RequestEntry) -> str | bytes:
        """See ``Conversation``."""
        asked = await self.in_thread(lambda: self._read(frame, entry))
        if isinstance(asked, bytes | str):
            self._chunks, entry.outcome = 0, "reset"
            return asked
        chunks = 0 if asked.restarts else self._chunks
        observation = self.server.instruct(asked.observation, asked.follows)
        generator = Generator().manual_seed(int(asked.seed) if asked.seed is not None else chunks)
        compute = None if asked.budget_ms is None else self._within(asked.budget_ms)
        began = time.perf_counter()
        chunk = await self.infer(
            observation,
            generator,
            entry,
            compute=compute,
            action_prefix=asked.action_prefix,
            deadline_ms=asked.deadline_ms,
        )
        reply = _reply(chunk, 1e3 * (time.perf_counter() - began))
        if asked.follows:
            reply["instruction"] = observation.instruction
        self._chunks, entry.outcome = chunks + 1, "answered"
        reply["server_timing"]["total_ms"] = 1e3 * (time.perf_counter() - entry.began)
        return wire.pack(self.encoded(reply), entry.encoding)

    def _read(self, frame: str | bytes, entry: RequestEntry) -> _Asked | str | bytes:
        """Decode a request; one that only resets is answered at once."""
        if isinstance(frame, str):
            raise RequestError("Requests must be binary msgpack frames, got text.")
        request, entry.encoding = wire.unpack_as_sent(frame, self.server.most_bytes)
        if not isinstance(request, dict):
            raise RequestError(f"A request must be a map, got a {type(request).__name__}.")
        endpoint = request.pop("endpoint", None)
        if endpoint is not None and (not isinstance(endpoint, str) or endpoint not in ("infer", "reset")):
            raise RequestError(f"There is no endpoint {endpoint!r:.40}; there are 'infer' and 'reset'.")
        self._require_spec(request.pop("action_spec", None))
        restarts = _flag(request.pop("reset", False), "reset")
        if endpoint == "reset" or (restarts and not request):
            return "reset successful" if endpoint == "reset" else wire.pack({"reset": True}, entry.encoding)
        return _Asked(
            restarts=restarts,
            seed=_number(request.pop("seed", None), "seed"),
            deadline_ms=_number(request.pop("deadline_ms", None), "deadline_ms"),
            budget_ms=_number(request.pop("budget_ms", None), "budget_ms"),
            action_prefix=committed(request, self.server.policy.chunk_size),
            follows=_flag(request.pop("follow_operator", False), "follow_operator"),
            observation=self.server.observe(request),
        )

    def _within(self, budget_ms: float) -> ComputePolicy:
        budget = self.server.config.budget
        if budget is None:
            cure = f"measure one: vlaflow bench latency {as_typed(self.server.config.checkpoint or None)}"
            raise RequestError(f"This server has no latency profile for budget_ms; {cure}")
        try:
            return budget(budget_ms)
        except VlaflowError as error:
            raise RequestError(str(error)) from error

    def _require_spec(self, stated: Any) -> None:
        if stated is None:
            return
        if not isinstance(stated, Mapping):
            raise RequestError("'action_spec' must be a map, as in the server's metadata.")
        theirs = from_json(ActionSpec, _plain(stated), "the request's action_spec")
        self.server.policy.action_spec.require_match(theirs, "the server's policy", "the client")


class RoboArenaConversation(OpenpiConversation):
    """A connection in RoboArena's variant."""

    def metadata(self) -> dict[str, Any]:
        """See ``roboarena_config``."""
        return roboarena_config(super().metadata())

    def encoded(self, reply: dict[str, Any]) -> np.ndarray:
        """The actions to execute, (n_action_steps, D)."""
        actions: np.ndarray = reply["actions"][: self.server.n_action_steps]
        return actions


OPENPI = WireProtocol(OpenpiConversation)
ROBOARENA = WireProtocol(RoboArenaConversation)


def roboarena_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
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


def _reply(chunk: Chunk, infer_ms: float) -> dict[str, Any]:
    reply: dict[str, Any] = {
        "actions": chunk.actions,
        "server_timing": {"infer_ms": infer_ms},
        "policy_timing": {"infer_ms": chunk.milliseconds.get("total", 0.0), **chunk.milliseconds},
        "layers": chunk.layers,
        "nfe": chunk.nfe,
        "repaired": chunk.repaired,
    }
    if chunk.confidence is not None:
        reply["confidence"] = chunk.confidence.astype(np.float32)
    if chunk.spread is not None:
        reply["spread"] = chunk.spread.astype(np.float32)
    return reply


def committed(request: dict[str, Any], most: int) -> ActionPrefix | None:
    """Remove and decode the action prefix of a request: "action_prefix" (N, D), of which "inference_delay" are committed.

    Args:
        request: decoded.
        most: largest N, the policy's chunk size.

    Raises:
        RequestError: "inference_delay" without "action_prefix", or invalid values.
    """
    prefix, delay = request.pop("action_prefix", None), request.pop("inference_delay", None)
    if prefix is None:
        if delay is not None:
            raise RequestError("'inference_delay' says how many of the 'action_prefix' actions are committed; send both.")
        return None
    rows = len(prefix) if isinstance(prefix, list) or (isinstance(prefix, np.ndarray) and prefix.ndim) else 0
    if rows > most:
        raise RequestError(f"'action_prefix' has {rows} actions, but a chunk of this policy has {most}.")
    if isinstance(prefix, list):
        prefix = array_of(prefix)
    if not isinstance(prefix, np.ndarray) or prefix.dtype.kind not in "fiu":
        raise RequestError("'action_prefix' must be an array of actions, (N, D), in robot units.")
    if isinstance(delay, np.integer):
        delay = int(delay)
    if delay is not None and (not isinstance(delay, int) or isinstance(delay, bool)):
        raise RequestError("'inference_delay' must be an integer number of actions.")
    try:
        return ActionPrefix(prefix.astype(np.float32), len(prefix) if delay is None else delay)
    except (SpecError, TypeError) as error:
        raise RequestError(f"'action_prefix' with 'inference_delay': {error}") from error


def _number(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**63:
        raise RequestError(f"'{name}' must be a number ≥ 0 and below 2⁶³.")
    return value


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise RequestError(f"'{name}' must be true or false.")
    return bool(value)


def _plain(value: Any) -> Any:
    """Convert to plain maps with text keys, as from JSON."""
    try:
        return json.loads(json.dumps(value))  # with Python's infinities: a range may be infinite
    except (TypeError, ValueError) as error:
        raise RequestError("'action_spec' must consist of texts, numbers, lists and maps.") from error
